"""One x2 stage inside ComfyUI's own interpreter; `engine.py` starts this file.

    COMFYUI_PYTHON bench/comfyui_nodes.py METHOD COMFYUI_PATH WEIGHTS INPUT OUT

Methods: `whole` (VAE Encode, SamplerCustom, VAE Decode), `tiled` (VAE Encode Tiled, SamplerCustom, VAE
Decode Tiled, 512 px, overlap 64) and `ours` (TUDSR Stage One), over the same weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from comfyui_pack import load_pack, use_comfyui

METHOD, COMFYUI, WEIGHTS, INPUT, OUT = sys.argv[1:]
use_comfyui(COMFYUI)

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from harness import measure

import nodes

TIMESTEP = 200


def stock(method: str, image: torch.Tensor, model, vae, text: list) -> torch.Tensor:
    """Return `B H W C` of one Euler step from `TIMESTEP` on the picture enlarged by 2."""
    resize = sys.modules["pack.tudsr_core.pictures.tensors"].resize
    pixels = resize(image.movedim(-1, 1), tuple(2 * side for side in image.shape[1:3])).clamp(0, 1).movedim(1, -1)
    tiles = dict(tile_size=512, overlap=64) if method == "tiled" else {}
    encoder = nodes.VAEEncodeTiled() if tiles else nodes.VAEEncode()
    sigma = model.get_model_object("model_sampling").sigma(torch.tensor([TIMESTEP]))
    z = encoder.encode(vae, pixels, **tiles)[0]["samples"] * (1 + sigma**2).sqrt()
    sigmas = torch.cat([sigma, torch.zeros(1)])
    euler = comfy.samplers.sampler_object("euler")
    restored = comfy.sample.sample_custom(model, torch.zeros_like(z), 1.0, euler, sigmas, text, text, z)
    decoder = nodes.VAEDecodeTiled() if tiles else nodes.VAEDecode()
    return decoder.decode(vae, samples={"samples": restored}, **tiles)[0]


@torch.inference_mode()
def main() -> None:
    folder = Path(WEIGHTS)
    model = comfy.sd.load_diffusion_model(str(folder / "unet.safetensors"))
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folder / "vae.safetensors")))
    text = [[comfy.utils.load_torch_file(str(folder / "text.safetensors"))["text"], {}]]
    image = comfy.utils.load_torch_file(INPUT)["image"].movedim(1, -1)

    def run(picture: torch.Tensor) -> torch.Tensor:
        if METHOD != "ours":
            return stock(METHOD, picture, model, vae, text)
        widgets = dict(tile=0, overlap=128, tile_batch=0, window="gaussian", color_fix="none")
        widgets |= dict(sample_posterior=False, seed=0)
        return stage.execute(picture, model, vae, text, 2.0, TIMESTEP, **widgets).args[0]

    stage = load_pack()["TUDSRStageOne"]
    run(image[:, :32, :32])
    result, figures = measure(lambda: run(image))
    torch.save(result.movedim(-1, 1).float().cpu(), OUT)
    sys.stdout.write("\n" + json.dumps(figures) + "\n")


main()
