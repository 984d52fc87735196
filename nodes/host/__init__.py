"""The translation between ComfyUI's objects and the core's: MODEL, VAE, CLIP, CONDITIONING, patches, memory, files.

Owns: everything that depends on how ComfyUI is made inside, so that a new ComfyUI is met here and nowhere else.

networks       a MODEL, VAE and CONDITIONING as the core's `Networks`, and progress
stages         what an adapter says of itself, carried on the MODEL; MODEL, VAE and CONDITIONING as the core's stages
adapters       the core's weight changes as ComfyUI's patches
embedded       the shipped model as MODEL and VAE
exact_vae      ComfyUI's VAE through the core's exact tiling
conditions     ComfyUI's conditions cut to one tile
tile_texts     tile prompts through a CLIP, and a text per tile inside a sampler
model_files    where files lie, as ComfyUI's folders say
messages       what a node says for people to read
search         other words under which ComfyUI finds a node
settings       what people have set in ComfyUI's settings
result_cache   the last result of each picture

Must not know: node classes, their inputs and their names. No formulas of a method and no tile
geometry of its own: those are the core's.
"""
