"""Checks of Exact Tiled VAE Encode and Decode, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_vae_nodes.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

import copy

from inside import cancelled_at, main, noise, part, picture, small_vae, vae_nodes  # first: it makes ComfyUI importable

import comfy.model_management
import comfy.utils
import torch


def check_exact_tiled_vae_equals_comfyuis_own():
    # Four channels to a group, as in SD: a group of one has no variance at all on a constant picture.
    vae = small_vae(ch=128, ch_mult=[1, 1])
    tiling, exact = part("tudsr_core.vae.settings").VAETiling, part("nodes.host.exact_vae").ExactVAE(vae)
    halves = torch.zeros(2, 38, 54, 3)
    halves[:, :, 27:] = 1
    for image in (picture(2, 38, 54), torch.full((1, 38, 54, 3), 0.3), halves, noise(1, 38, 54, 3).sigmoid()):
        pixels, network = image.movedim(-1, 1), vae.first_stage_model
        latent = network.encode(vae.process_input(pixels).double())
        truth = vae.process_output(network.decode(latent))
        for tile in (16, 32, 34, 80):
            ours = exact.encode(pixels, lambda: None, tiling(tile, "host"))
            assert (ours - latent).abs().max() < 1e-12, (tile, float((ours - latent).abs().max()))
            out = exact.decode(latent, lambda: None, tiling(tile, "host"))
            assert (out - truth).abs().max() < 1e-12, tile
    assert exact.tiled.layers, "must not have fallen back to the whole picture"


def check_exact_vae_nodes_equal_stock_nodes():
    vae = small_vae(torch.float32)
    image = picture(2, 75, 110)
    latent, decoded = vae_nodes(vae, image)
    wanted = vae.encode(image)
    assert latent.shape == wanted.shape and (latent - wanted).abs().max() < 5e-5 * max(1, float(wanted.abs().max()))
    assert (decoded - vae.decode(latent)).abs().max() < 5e-5
    whole, windowed = (vae_nodes(vae, image, attention=kind)[0] for kind in ("exact", "windowed"))
    assert (whole - windowed).abs().max() > 1e-4


def check_exact_vae_sees_patched_and_cast_weights():
    """An adapter on the VAE encoder, weights cast per call, and weights left for loading per call."""
    vae = small_vae(torch.float32)
    plain, image = vae.encode(picture(1, 48, 64)), picture(1, 48, 64)
    patched = copy.copy(vae)
    patched.patcher = vae.patcher.clone()
    keys = [key for key in vae.first_stage_model.state_dict() if key.startswith("encoder") and key.endswith("weight")]
    patched.patcher.add_patches(
        {key: (torch.full_like(comfy.utils.get_attr(vae.first_stage_model, key), 0.02),) for key in keys}
    )
    ours = vae_nodes(patched, image)[0]
    wanted = patched.encode(image)
    assert (ours - wanted).abs().max() < 5e-5 * max(1, float(wanted.abs().max()))
    assert (ours - plain).abs().max() > 1e-2
    assert (vae_nodes(vae, image)[0] - plain).abs().max() < 5e-5 * max(1, float(plain.abs().max()))
    for module in vae.first_stage_model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    vae.first_stage_model.to(torch.bfloat16)
    assert (vae_nodes(vae, image)[0] - vae.encode(image)).abs().max() < 5e-5 * max(1, float(plain.abs().max()))


def check_exact_vae_asks_for_a_tiles_memory():
    vae, seen = small_vae(torch.float32), []
    vae_nodes(vae, picture(1, 64, 64))  # tries the steps on a small picture first, once
    load = comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, **more):
        seen.append(memory_required)
        return load(models, memory_required=memory_required, **more)

    comfy.model_management.load_models_gpu = spy
    try:
        for side in (64, 256):
            vae_nodes(vae, picture(1, side, side))
    finally:
        comfy.model_management.load_models_gpu = load
    assert len(set(seen)) == 1 and seen[0] > 64 * 64 * 32 * 4, seen


def check_an_unknown_vae_runs_whole_and_says_so():
    import logging

    for change in ("tanh", "forward"):
        vae, lines = small_vae(torch.float32), []
        network = vae.first_stage_model
        if change == "tanh":
            network.decoder.tanh_out = True
        else:  # the same modules in another order: only running them shows it
            network.encoder.forward = lambda x, forward=network.encoder.forward: forward(x.flip(-1))
        handler = logging.Handler()
        handler.emit = lambda record, lines=lines: lines.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        try:
            latent, decoded = vae_nodes(vae, picture(1, 48, 64))
        finally:
            logging.getLogger().removeHandler(handler)
        assert torch.equal(latent, vae.encode(picture(1, 48, 64)))
        assert change == "forward" or torch.equal(decoded, vae.decode(latent))
        assert any("whole picture" in line for line in lines), lines


def check_a_video_vae_is_refused():
    vae = small_vae(torch.float32)
    vae.latent_dim = 3
    try:
        vae_nodes(vae, picture(1, 48, 64))
    except ValueError as error:
        assert "video" in str(error)
    else:
        raise AssertionError("accepted")


def check_cancel_stops_the_vae_within_a_tile():
    vae = small_vae(torch.float32)
    cancelled_at(7, lambda: vae_nodes(vae, picture(1, 128, 128)))


if __name__ == "__main__":
    main(globals())
