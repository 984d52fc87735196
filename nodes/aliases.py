"""Other words under which people look for a node in ComfyUI's search, for those ComfyUIs that search by them.

Words in a node's name need not be repeated.
"""

from __future__ import annotations

ALIASES = {
    "TUDSRLoadEmbedded": "built-in model, shipped model, tiny upscaler, super-resolution model",
    "TUDSRLoadAdapter": "one-step lora, HYPIR, OSEDiff, PiSA-SR, InvSR, OMGSR, sr lora loader",
    "TUDSRUpscale": "super-resolution, enlarge, upscaler, x4, x8, one-step, sharpen, ultimate sd upscale",
    "TUDSRStageOne": "super-resolution, enlarge, upscale x4, one-step",
    "TUDSRStageTwo": "super-resolution, enlarge, upscale x2, one-step",
    "TUDSRUpscaleFolder": "batch upscale, directory, bulk, super-resolution",
    "TUDSRLoadFromFolder": "batch, directory, load images from folder, image iterator",
    "TUDSRSaveWithSourceName": "save image with original filename, keep exif, metadata, batch",
    "TUDSRLoadPicture": "load image, 16-bit, EXR, HDR, TIFF, float, high bit depth",
    "TUDSRSavePicture": "save image, 16-bit, EXR, HDR, TIFF, float, keep exif, color profile",
    "TUDSRPlan": "dry run, estimate, count tiles, memory",
    "TUDSROneStepSigmas": "scheduler, single step, timestep to sigma",
    "TUDSROneStepLatent": "scale latent, single step",
    "TUDSRMultiDiffusion": "tiled diffusion, mixture of diffusers, tiled sampler, tiled ksampler, demofusion",
    "TUDSRLoadStableSR": "super-resolution, structcond, webui_768v",
    "TUDSRApplyStableSR": "super-resolution, upscale, aggregation sampling, spade",
    "TUDSRStableSRSigmas": "scheduler, ddpm, spaced timesteps",
    "TUDSRVAEEncode": "tiled vae, seamless, low memory encode, large image",
    "TUDSRVAEDecode": "tiled vae, seamless, low memory decode, large image, out of memory",
    "TUDSRTilePlan": "tiles, grid, split image, tile calculator, overlap",
    "TUDSRTileImages": "split image, crop tiles, slice, cut into tiles",
    "TUDSRClipTagPrompter": "tagger, interrogate, clip interrogator, caption",
    "TUDSRLoadDape": "tagger, RAM, recognize anything, SeeSR, interrogate",
    "TUDSRLoadCaptioner": "BLIP, Florence-2, caption, describe, interrogate",
    "TUDSRExtractTilePrompts": "regional prompt, prompt per tile, tagger, interrogate, edit prompts",
    "TUDSRTilePromptsFromStrings": "regional prompt, prompt per tile, captions",
    "TUDSRTilePromptsToConditioning": "regional prompt, area conditioning, tile controlnet",
    "TUDSRColorFix": "color match, colour transfer, wavelet, adain, color correction",
    "TUDSRCompare": "image comparer, slider, before and after, difference, PSNR, SSIM",
    "TUDSRLoadCFW": "controllable feature wrapping, StableSR decoder, vqgan",
    "TUDSRCFWDecode": "controllable feature wrapping, StableSR, vae decode, fidelity",
    "TUDSRDegradeImage": "Real-ESRGAN, degradation, blur, noise, jpeg, low quality, downscale",
    "TUDSRLoadDownsampler": "degradation model, co-learning",
    "TUDSRDegradeLearned": "degradation, blur, noise, low quality, downscale",
}


def aliases_of(node_id: str) -> list[str]:
    """Return the other words for a node, if it has any."""
    return ALIASES[node_id].split(", ") if node_id in ALIASES else []
