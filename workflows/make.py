"""Make the templates of this folder from their API forms: `python workflows/make.py [NAME ...]`.

Needs ComfyUI and Chromium. Each `api/NAME.json` is opened in a real browser, laid out in columns, given
its note and model links, saved as `NAME.json`, run where its models are at hand, and photographed
as `NAME.jpg`. `blueprint` makes the subgraph in `subgraphs/`, which newer ComfyUIs offer as a node; it needs one.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import uuid
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / "nodes"), str(HERE.parent / "tests"), str(HERE.parent)]

import numpy as np
import sd_stand_in
from browser import fit, load_graph, open_page, run_graph, shoot
from comfyui import Server, find
from PIL import Image

from tudsr_core.weights.known_files import known_file

BLUEPRINT = HERE.parent / "subgraphs" / "Upscale x8 (TUDSR).json"
BLUEPRINT_SAYS = (
    "Enlarges pictures x8 in two one-step diffusion stages with the small model that comes with the TUDSR pack: "
    "nothing to download. Open it to set another factor or to put other models in."
)
HUGGINGFACE = "https://huggingface.co"
ELSEWHERE = {
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": (
        f"{HUGGINGFACE}/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
        "clip_vision",
        "sha256:6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030",
    ),
    "seedvr2_3b_int8_convrot.safetensors": (
        f"{HUGGINGFACE}/Comfy-Org/SeedVR2/resolve/main/diffusion_models/seedvr2_3b_int8_convrot.safetensors",
        "diffusion_models",
        "sha256:c3dec8bcc5916843a8a858572970597462e1f2dc598d6dfd818f6cd40f53a157",
    ),
    "seedvr2_ema_vae_fp16.safetensors": (
        f"{HUGGINGFACE}/Comfy-Org/SeedVR2/resolve/main/vae/seedvr2_ema_vae_fp16.safetensors",
        "vae",
        "sha256:20678548f420d98d26f11442d3528f8b8c94e57ee046ef93dbb7633da8612ca1",
    ),
}
"""Address, folder and digest of files that templates load and `tudsr download` does not know: other packs use them."""
TITLE = 40  # of a node, above its place
CORNER, SEEN = (90, 100), (1240, 680)  # pixels of a small window that neither side bar nor menu covers
LOADERS = ("CheckpointLoaderSimple", "CLIPVisionLoader", "UNETLoader", "VAELoader")
LOADERS += ("TUDSRLoadAdapter", "TUDSRLoadStableSR", "TUDSRLoadCFW")
NOTES = {
    "01-embedded-x8": """## Upscale x8 with the embedded model
Pick a picture and press **Run**. Nothing is downloaded.

The shipped model is small: a faithful sharpener that shows how the pack works.
For invented detail use SD2.1 with TUDSR adapters (template 02).

- **scale**: any factor, or set **width** / **height**
- **tile**: 0 picks the side; set 256 if memory runs out
- **color_fix**: keep *wavelet* for photos
- **inventive**: here how strongly it sharpens; 0.5 as trained
- *Compare Pictures*: drag the divider, zoom with the wheel""",
    "02-sd21-two-stage": """## Two stages on SD2.1-base
1. Put **v2-1_512-ema-pruned.safetensors** into `models/checkpoints`.
2. Put the stage adapters into `models/tudsr` and choose them.
3. Leave the prompt empty: the adapters were trained so.

Both stages share one UNet and one VAE; only the adapter changes, in both (OMGSR's files
change the VAE's encoder too). So the checkpoint's VAE is all the upscaler needs.""",
    "03-stage-one-then-stage-two": """## The two stages, one node each
Look at what each stage does, or put something between them.
The plan at the bottom shows the tiles before anything runs.

Colour fix is off inside and done once at the end.""",
    "04-multidiffusion-ksampler": """## MultiDiffusion with any sampler
An ordinary image-to-image graph; **MultiDiffusion (Tiled)** makes every step work in
overlapping tiles, so any size fits.

- **denoise** 0.2 keeps, 0.5 invents
- **overlap**: raise it if you see a grid""",
    "08-exact-tiled-vae": """## Any size, all in tiles, no seams
**MultiDiffusion (Tiled)** samples in tiles; **Exact Tiled VAE Encode / Decode** need the memory of
one tile and give the picture that the whole VAE would give: no seams, no drift of colour.

- **tile** here changes memory and speed, never the picture
- **attention**: leave *exact* up to about 4096 x 4096""",
    "05-stock-sampler": """## A TUDSR stage with stock nodes
One-Step Sigmas and One-Step Latent let **SamplerCustom** do what *TUDSR Stage One* does:
euler, one step, no added noise, cfg 1.

Useful when you want your own sampler or wrappers in the path.""",
    "06-published-adapters": """## OMGSR, OSEDiff, PiSA-SR or InvSR
1. Put the base into `models/checkpoints`: **v2-1_512-ema-pruned.safetensors**
   (**sd_turbo.safetensors** for InvSR).
2. Put the authors' file into `models/tudsr` and choose it: here PiSA-SR's `pisa_sr.pkl`.

The adapter's *conditioning* output is the prompt it was trained with.

- **fidelity**, **detail**: PiSA-SR's dials
- **steps**: 1 to 5 with InvSR
- **method**: choose *omgsr* for OMGSR's folder""",
    "09-tile-prompts": """## A prompt per tile
Every tile is sampled with words for what **it** shows, so guidance does not paint the main
object into the background.

1. **Tile Plan** says how many calls a run costs: select it and press its play button first.
2. **Extract Tile Prompts**: point at a tile to read it, click to change it.
3. **denoise** 0.3 keeps, 0.6 invents.

Needs SD2.1-base in `models/checkpoints` and CLIP-ViT-H-14 in `models/clip_vision`.""",
    "10-stablesr": """## StableSR with CFW
The network sees the low-resolution picture at every step, so it keeps to it while it invents.

1. `models/checkpoints`: **v2-1_512-ema-pruned.safetensors**
2. `models/tudsr`: **stablesr_000117.ckpt** and **vqgan_cfw_00011.ckpt**
   (StableSR's page on Hugging Face; non-commercial licence)

- **steps**: 200 are the authors', 50 are four times faster
- **w**: 0 is what the model drew, 1 keeps closest to the picture
- *Apply StableSR* says how many tiles a picture takes""",
    "11-stablesr-768v": """## StableSR on SD2.1 (768)
The model for larger tiles: fewer calls, wider context. The authors' numbers: tiles of 768, 20 steps,
CFG 7 with a negative prompt, no CFW (it was not trained for this model).

1. `models/checkpoints`: **v2-1_768-ema-pruned.safetensors**
2. `models/tudsr`: **webui_768v_139.ckpt**

The licence is non-commercial.""",
    "12-stablesr-turbo": """## StableSR in 4 steps
SD-Turbo with the 512 file: four steps, CFG 1. More steps make it blurrier.

1. `models/checkpoints`: **sd_turbo.safetensors**
2. `models/tudsr`: **stablesr_000117.ckpt**, **vqgan_cfw_00011.ckpt**

Both licences are non-commercial.""",
    "13-stablesr-tile-prompts-4k": """## StableSR at 4K, a prompt per tile
Every tile sees its part of the low-resolution picture **and** its own words.

- **long_edge** 3840 sets the size; *Apply StableSR* says how many tiles and calls that are
- **Extract Tile Prompts**: point at a tile to read its words, click to change them
- *MultiDiffusion (Tiled)* takes the place of the tiles that *Apply StableSR* has set
- decoding needs the memory of one tile, CFW too

Needs SD2.1-base, CLIP-ViT-H-14 and StableSR's two files (template 10).""",
    "14-degrade-and-upscale": """## Down and up again
A good picture is made small and poor, upscaled, and put beside the original. Nothing is downloaded.

- **downsampler**: *shipped*, or one trained on your own bad pictures (`tudsr train downsampler`)
- **strength** 0 is the plain downscale; **seed** draws other noise
- connect a bad picture to **style** to take its kind of damage
- *Degrade Picture (Classical)* takes the same place, with published ranges

The photo here is small, so the factor is 2; 4 is what networks were trained for.""",
    "15-hypir": """## Restore and enlarge with HYPIR
One step that cleans up and invents detail. For x8 the same adapter works twice: x4, then x2.
Or give **stage_two** a TUDSR stage-two adapter: HYPIR restores, TUDSR enlarges.

1. `models/checkpoints`: **v2-1_512-ema-pruned.safetensors**
2. `models/tudsr`: **HYPIR_sd2.pth** (its licence is non-commercial)

- the prompt steers what is invented: say what the picture shows, or leave it empty
- **strength** of the adapter: lower is closer to the input""",
    "16-seedvr2-beside-ours": """## SeedVR2 beside ours
ComfyUI's own SeedVR2 (3B, one step) and the embedded model enlarge the same picture x4, and
**Compare Pictures** puts one over the other: drag the divider, zoom with the wheel.

1. ComfyUI 0.29 or newer, which has the SeedVR2 nodes
2. `models/diffusion_models`: **seedvr2_3b_int8_convrot.safetensors**, 3.5 GB
3. `models/vae`: **seedvr2_ema_vae_fp16.safetensors**, 0.5 GB; both Apache-2.0

SeedVR2's numbers are those of ComfyUI's template, colours are matched by *wavelet* on both sides. For invented
detail on ours too, put the loaders of template 06 or 15 in the place of the embedded model.""",
    "07-zoomed-in-diffused-out": """## Zoomed In, Diffused Out
SD2.x, a **tile ControlNet**, a prompt per tile, CFG 5.5, 50 DDPM steps (t = 981 ... 1) from the
noised low-resolution latent, on the **stock KSampler**: the conditions hold one area per tile.

- to 2K: 49 tiles, 2,450 calls; 4K: 225, 11,250; 8K: 961, 48,050
- without a ControlNet: remove it and lower **denoise** to 0.4
- large pictures: let *MultiDiffusion (Tiled)* take the tile prompts (template 09); its memory is fixed

Choose any ControlNet for your checkpoint that takes the picture itself as hint.""",
}
MOST_COLUMNS = 8
ONLY_THE_GRAPH = """body * { visibility: hidden !important }
    #graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important }"""
NOT_RUN = (
    "02-sd21-two-stage",
    "04-multidiffusion-ksampler",
    "06-published-adapters",
    "07-zoomed-in-diffused-out",
    "08-exact-tiled-vae",
    "09-tile-prompts",
    "10-stablesr",
    "11-stablesr-768v",
    "12-stablesr-turbo",
    "13-stablesr-tile-prompts-4k",
    "15-hypir",
    "16-seedvr2-beside-ours",
)


def lay_out(workflow: dict, api: dict) -> None:
    """Put nodes into columns by their distance from the inputs; of more than MOST_COLUMNS the later half below."""
    depth: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in depth:
            sources = [value[0] for value in api[node]["inputs"].values() if isinstance(value, list)]
            depth[node] = 1 + max(map(level, sources), default=-1)
        return depth[node]

    columns: dict[int, list[dict]] = {}
    for node in sorted(workflow["nodes"], key=lambda node: int(node["id"])):
        columns.setdefault(level(str(node["id"])), []).append(node)
    x = left = 380.0
    top = lowest = 0.0
    for index in sorted(columns):
        if len(columns) > MOST_COLUMNS and index == (len(columns) + 1) // 2:
            x, top = left, lowest
        y, widest = top, 0.0
        for node in columns[index]:
            picture = node["type"] in ("LoadImage", "SaveImage", "PreviewImage")
            node["size"] = [300, 340] if picture else [max(270, node["size"][0]), node["size"][1]]
            node["pos"] = [x, y]
            grows = node["type"].startswith("TUDSR") and "image" in str(node.get("inputs"))
            y += node["size"][1] + (300 if grows else 70)  # upscalers grow by their live preview
            widest = max(widest, node["size"][0])
        lowest = max(lowest, y)
        x += widest + 60


def set_first_view(workflow: dict) -> None:
    """Have the whole graph seen when it is opened, right of ComfyUI's side bar and below its menu."""
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes) - TITLE
    width, height = max(x + w for x, _, w, _ in boxes) - left, max(y + h for _, y, _, h in boxes) - top
    scale = min(SEEN[0] / width, SEEN[1] / height, 1.0)
    offset = [round(corner / scale - start) for corner, start in zip(CORNER, (left, top), strict=True)]
    workflow["extra"]["ds"] = {"scale": round(scale, 3), "offset": offset}


def add_note(workflow: dict, text: str) -> None:
    """Put a Markdown note left of the graph, as the first thing one reads."""
    number = workflow["last_node_id"] = max(node["id"] for node in workflow["nodes"]) + 1
    note = {"id": number, "type": "MarkdownNote", "pos": [0, 0], "size": [330, 330], "flags": {}, "order": 0}
    note |= {"mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text], "color": "#432"}
    workflow["nodes"].insert(0, note | {"bgcolor": "#653"})


def model_link(node: dict) -> dict | None:
    """Return where ComfyUI offers to download a loader's model from, if that needs no browser."""
    if node["type"] not in LOADERS:
        return None
    name = node["widgets_values"][0]
    known = known_file(name)
    url, folder, digest = (known.url, known.folder, known.digest) if known else ELSEWHERE.get(name, (None,) * 3)
    if url is None:
        return None
    kind, _, value = (digest or "").partition(":")
    said = {"hash": value, "hash_type": "SHA256"} if kind == "sha256" else {}
    return {"name": name, "url": url, **said, "directory": folder}


def make(page, name: str) -> None:
    """Make one template and its picture."""
    api = json.loads((HERE / "api" / f"{name}.json").read_text("utf-8"))
    text = page.evaluate(
        "async ([api, name]) => { await app.loadApiJson(JSON.parse(api), name);"
        " return JSON.stringify(app.graph.serialize()) }",
        [json.dumps(api), name],
    )
    workflow = json.loads(text)
    lay_out(workflow, api)
    for node in workflow["nodes"]:
        if link := model_link(node):
            node.setdefault("properties", {})["models"] = [link]
    add_note(workflow, NOTES[name])
    set_first_view(workflow)
    for node in workflow["nodes"]:
        values = node.get("widgets_values") or []
        node["widgets_values"] = ["fixed" if value == "randomize" else value for value in values]
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-tudsr/{name}"))
    (HERE / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")
    load_graph(page, workflow)
    if name not in NOT_RUN:
        run_graph(page)
    photograph(page, HERE / f"{name}.jpg")


def make_blueprint(page) -> None:
    """Make the embedded model and the upscaler of the first template one node, with what a person sets on it."""
    text = page.evaluate(
        """async ([api, name]) => {
            await app.loadApiJson(JSON.parse(api), name);
            const ours = app.graph._nodes.filter(n => n.type.startsWith('TUDSR'));
            const { subgraph, node } = app.graph.convertToSubgraph(new Set(ours));
            const upscaler = subgraph.nodes.find(n => n.type == 'TUDSRUpscale');
            for (const name of ['tile', 'color_fix']) {
                const slot = upscaler.inputs.find(i => i.name == name);
                subgraph.addInput(name, slot.type).connect(slot, upscaler);
            }
            subgraph.addOutput('mask', 'MASK').connect(upscaler.outputs.find(o => o.name == 'mask'), upscaler);
            node.title = subgraph.name = name;
            node.pos = [0, 0];
            node.properties.proxyWidgets = node.properties.proxyWidgets?.filter(([id]) => id == '-1');
            const { nodes, subgraphs } = app.canvas._serializeItems([node]);
            return JSON.stringify({ nodes, definitions: { subgraphs } });
        }""",
        [(HERE / "api" / "01-embedded-x8.json").read_text("utf-8"), BLUEPRINT.stem],
    )
    for index, drawn in enumerate(dict.fromkeys(re.findall(r"\b[\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12}\b", text))):
        text = text.replace(drawn, str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-tudsr/blueprint/{index}")))
    content = json.loads(text)
    for link in content["nodes"][0]["inputs"] + content["nodes"][0]["outputs"]:
        link |= {"link": None} if "link" in link else {"links": None}
    (inside,) = content["definitions"]["subgraphs"]
    left, top = (min(node["pos"][axis] for node in inside["nodes"]) for axis in (0, 1))
    right = max(node["pos"][0] + node["size"][0] for node in inside["nodes"])
    inside["inputNode"]["bounding"][:2] = [left - 220, top]
    inside["outputNode"]["bounding"][:2] = [right + 100, top]
    head = {"revision": 0, "last_node_id": content["nodes"][0]["id"], "last_link_id": 0}
    tail = {"links": [], "version": 0.4, "extra": {"BlueprintDescription": BLUEPRINT_SAYS}}
    BLUEPRINT.parent.mkdir(exist_ok=True)
    # ComfyUI reads it in whatever encoding the machine has: ASCII is the same in all.
    BLUEPRINT.write_text(json.dumps(head | content | tail, indent=1) + "\n", encoding="utf-8")


def photograph(page, path: Path) -> None:
    """Save the graph without the page's bars, small enough for a template card."""
    page.add_style_tag(content=ONLY_THE_GRAPH)
    box = fit(page)
    large = path.with_suffix(".png")
    shoot(page, large)
    with Image.open(large) as image:
        view = image.convert("RGB").crop([round(value) for value in box])
        view.resize((1000, round(1000 * view.height / view.width)), Image.Resampling.LANCZOS).save(path, quality=80)
    large.unlink()


def main() -> None:
    comfyui = find()
    if comfyui is None:
        raise SystemExit("set COMFYUI_PATH and COMFYUI_PYTHON to a ComfyUI")
    base = Path(tempfile.mkdtemp())
    sd_stand_in.write(base / "models")
    for name, (_, folder, _) in ELSEWHERE.items():
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
        (base / "models" / folder / name).touch()  # to be chosen; it is not loaded
    server = Server(comfyui, base, packs={"tests_pack": sd_stand_in.PACK})
    example = HERE.parent / "tudsr_core" / "assets" / "example.png"
    server.put_image("example.png", np.array(Image.open(example).convert("RGB")))
    try:
        for name in sys.argv[1:] or sorted(path.stem for path in (HERE / "api").glob("*.json")):
            with open_page(server.url, 2400, 1400) as page:
                make_blueprint(page) if name == "blueprint" else make(page, name)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
