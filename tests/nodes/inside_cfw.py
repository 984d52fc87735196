"""Checks of Load CFW and CFW Decode inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_cfw.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

import os
import tempfile
from pathlib import Path

from inside import NODES, cancelled_at, main, noise, part, picture, refused, small_vae  # first: it imports ComfyUI

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from safetensors.torch import save_file

FOLDER = Path(tempfile.mkdtemp())
folder_paths.add_model_folder_path("tudsr", str(FOLDER))
SIZES = ((44, 60), (41, 58))  # a multiple of the VAE's 4 pixels per latent, and not


def wrapping(seed=0):
    """CFW of the small VAE's widths, every weight random."""
    network = part("tudsr_core.models").FeatureWrapping((64, 64), growth=8).eval().requires_grad_(False)
    torch.manual_seed(seed)
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape) / max(9.0, parameter[0].numel()) ** 0.5)
    return network


def load(network, name="vqgan_cfw.ckpt"):
    """Write CFW as it is published, and load it with the node."""
    state = {f"decoder.{key}": value for key, value in network.state_dict().items()}
    state["encoder.conv_in.weight"] = torch.ones(2)
    torch.save({"state_dict": state}, FOLDER / name)
    return NODES["TUDSRLoadCFW"].execute(name).args[0]


def decode(z, vae, image, cfw=None, w=0.5, color_fix="none", tile=64, planes="host"):
    return NODES["TUDSRCFWDecode"].execute({"samples": z}, vae, image, w, color_fix, tile, planes, cfw)


def latents(image):
    """Latents of the picture's size padded to a multiple of 4."""
    return noise(len(image), 4, *(-(-side // 4) for side in image.shape[1:3]))


def untiled(vae, network, z, image, weight):
    """What ComfyUI's own modules give, with hooks where CFW takes features and adds to them; cut to the picture."""
    encoder, decoder, features, hooks = vae.first_stage_model.encoder, vae.first_stage_model.decoder, {}, []
    for number in (1, 2):
        layer = getattr(network, f"fusion_layer_{number}")
        taken, changed = encoder.down[number].block[-1], decoder.up[number].block[-1]
        hooks.append(taken.register_forward_hook(lambda *call, n=number: features.update({n: call[2]})))
        fuse = lambda *call, n=number, f=layer: call[2] + weight * f(features[n], call[2])  # noqa: E731
        hooks.append(changed.register_forward_hook(fuse))
    pixels = image.movedim(-1, 1)
    grown = torch.nn.functional.pad(pixels, (0, -pixels.shape[-1] % 4, 0, -pixels.shape[-2] % 4), mode="reflect")
    try:
        vae.first_stage_model.encoder(vae.process_input(grown).to(vae.vae_dtype))
        made = vae.process_output(vae.first_stage_model.decode(z.to(vae.vae_dtype))).movedim(1, -1)
    finally:
        for hook in hooks:
            hook.remove()
    return made[:, : image.shape[1], : image.shape[2]]


def check_it_equals_comfyuis_own_modules_with_cfw():
    vae, network = small_vae(torch.float32), wrapping()
    cfw = load(network)
    for size in SIZES:
        image = picture(2, *size)
        z = latents(image)
        plain = vae.decode(z)[:, : size[0], : size[1]]
        for weight in (0.5, 1.0):
            truth = untiled(vae, network, z, image, weight)
            assert (truth - plain).abs().mean() > 0.01 * weight, "a fusion that does nothing proves nothing"
            for tile in (32, 64):
                made = decode(z, vae, image, cfw, weight, tile=tile).args[0]
                assert made.shape == image.shape
                assert (made - truth).abs().max() < 5e-5, (size, weight, tile, float((made - truth).abs().max()))


def check_one_picture_serves_all_latents():
    vae, network = small_vae(torch.float32), wrapping()
    cfw, image = load(network), picture(1, 41, 58)
    z, calls = noise(3, 4, 11, 15), []
    part("nodes.host.exact_vae").ExactVAE(vae).encode(torch.zeros(1, 3, 44, 60), lambda: None)  # tries its layers, once
    hook = vae.first_stage_model.encoder.conv_in.register_forward_hook(lambda *call: calls.append(1))
    made = decode(z, vae, image, cfw, tile=512).args[0]
    hook.remove()
    assert len(calls) == 1, "encoded once"
    truth = torch.cat([untiled(vae, network, one, image, 0.5) for one in z.split(1)])
    assert (made - truth).abs().max() < 5e-5


def check_a_weight_of_zero_is_exact_tiled_vae_decode():
    """To the last bit, without encoding and without CFW's weights in memory."""
    vae, image = small_vae(torch.float32), picture(1, 44, 60)
    cfw, z = load(wrapping()), latents(image)
    plain = NODES["TUDSRVAEDecode"].execute({"samples": z}, vae, 64, "host", "exact").args[0]
    seen, calls, original = [], [], comfy.model_management.load_models_gpu
    hook = vae.first_stage_model.encoder.register_forward_pre_hook(lambda *call: calls.append(1))
    hook_in = vae.first_stage_model.encoder.conv_in.register_forward_pre_hook(lambda *call: calls.append(1))
    comfy.model_management.load_models_gpu = lambda models, **more: seen.append(len(models)) or original(models, **more)
    try:
        made = decode(z, vae, image, cfw, 0.0).args[0]
    finally:
        comfy.model_management.load_models_gpu = original
        hook.remove()
        hook_in.remove()
    assert torch.equal(made, plain) and not calls and set(seen) == {1}, (calls, seen)


def check_without_cfw_it_decodes_plainly_and_says_so():
    vae, image = small_vae(torch.float32), picture(1, 44, 60)
    z = latents(image)
    output = decode(z, vae, image)
    assert torch.equal(output.args[0], decode(z, vae, image, w=0.0).args[0])
    assert "no CFW is connected" in output.ui["text"][0] and "Load CFW" in output.ui["text"][0], output.ui
    assert decode(z, vae, image, w=0.0).ui is None


def check_colours_follow_the_picture():
    vae, image = small_vae(torch.float32), picture(2, 41, 58)
    cfw, z = load(wrapping()), latents(image)
    bare = decode(z, vae, image, cfw).args[0].movedim(-1, 1)
    for method in ("wavelet", "adain"):
        wanted = part("tudsr_core.pictures").match_color(bare, image.movedim(-1, 1), method).movedim(1, -1)
        made = decode(z, vae, image, cfw, color_fix=method).args[0]
        assert (made - wanted).abs().max() < 1e-6 and (made - bare.movedim(1, -1)).abs().max() > 0.01
    one = decode(z, vae, image[:1], cfw, color_fix="wavelet").args[0]
    assert one.shape == image.shape


def check_comfyui_loads_both_models_with_a_tiles_memory():
    vae, cfw = small_vae(torch.float32), load(wrapping())
    seen, original = [], comfy.model_management.load_models_gpu
    decode(noise(1, 4, 16, 16), vae, picture(1, 64, 64), cfw)  # tries the layers on a small picture first, once

    def spy(models, memory_required=0, **more):
        seen.append((sorted(model.model_size() for model in models), memory_required))
        return original(models, memory_required=memory_required, **more)

    comfy.model_management.load_models_gpu = spy
    try:
        for side in (64, 256):
            decode(noise(1, 4, side // 4, side // 4), vae, picture(1, side, side), cfw, tile=512)
    finally:
        comfy.model_management.load_models_gpu = original
    own = sum(parameter.nbytes for parameter in cfw.network.parameters())
    assert all(own in sizes and vae.patcher.model_size() in sizes for sizes, _ in seen), seen
    most = {memory for _, memory in seen}
    exact = part("nodes.host.exact_vae").ExactVAE(vae, cfw, 0.5)
    tiling = part("tudsr_core.vae").VAETiling(512)
    assert most == {2 * exact.tiled.tile_bytes(tiling), 2 * exact.tiled.tile_bytes(tiling, exact.fuse)}, most
    plain = part("nodes.host.exact_vae").ExactVAE(vae)
    assert exact.bytes_per_pixel()[2] > plain.bytes_per_pixel()[2]


def check_cfw_is_computed_in_the_vaes_dtype_and_stays_as_it_was():
    network = wrapping()
    cfw, image = load(network), picture(1, 44, 60)
    z, wanted = latents(image), untiled(small_vae(torch.float32), network, latents(image), image, 0.5)
    for dtype, most in ((torch.bfloat16, 0.05), (torch.float64, 5e-6), (torch.float32, 5e-5)):
        vae = small_vae(dtype)
        made = decode(z, vae, image, cfw).args[0]
        assert {parameter.dtype for parameter in cfw.patcher_for(vae).model.parameters()} == {dtype}
        assert (made - wanted).abs().mean() < most, (dtype, float((made - wanted).abs().mean()))
    for key, value in cfw.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


def check_the_bar_ends_at_its_total_and_cancel_stops():
    vae, cfw, image = small_vae(torch.float32), load(wrapping()), picture(2, 64, 64)
    bars, original = [], comfy.utils.ProgressBar

    class Bar:
        def __init__(self, total):
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, count):
            self.done += count

    comfy.utils.ProgressBar = Bar
    try:
        for pictures, w in ((image, 0.5), (image[:1], 0.5), (image, 0.0)):
            decode(latents(image), vae, pictures, cfw, w)
    finally:
        comfy.utils.ProgressBar = original
    assert all(bar.done == bar.total > 20 for bar in bars) and len(bars) == 3
    assert bars[0].total > bars[1].total > bars[2].total
    for count in (3, bars[0].total - 3):
        cancelled_at(count, lambda: decode(latents(image), vae, image, cfw))


def check_what_does_not_fit_is_refused():
    vae, cfw, image = small_vae(torch.float32), load(wrapping()), picture(2, 44, 60)
    z = latents(image)
    for given in (picture(2, 40, 60), picture(2, 44, 61), picture(2, 88, 120)):
        size = f"{given.shape[2]} x {given.shape[1]}"
        refused(lambda given=given: decode(z, vae, given, cfw), "of a picture of 60 x 44", size, "connect")
    refused(lambda: decode(noise(3, 4, 11, 15), vae, image, cfw), "3 latents but 2 pictures")
    refused(lambda: decode(z[:1], vae, image, cfw), "1 latents but 2 pictures")
    refused(lambda: decode(noise(1, 16, 11, 15), vae, image, cfw), "decodes pictures of 4 channels")
    refused(lambda: decode(z, vae, image[..., :1], cfw), "picture")
    refused(lambda: decode(z, vae, image, cfw, color_fix="new"), "is 'new'; use")
    refused(lambda: decode(z, vae, image, cfw, planes="gpu"), "planes ")
    narrow = small_vae(torch.float32, ch_mult=[1, 1, 1])
    refused(lambda: decode(z, narrow, image, cfw), "does not fit")
    unknown = small_vae(torch.float32)
    unknown.first_stage_model.decoder.tanh_out = True
    refused(lambda: decode(z, unknown, image, cfw), "cannot be fused with")


def check_files_are_offered_found_and_refused():
    offered, node = part("nodes.host.model_files").list_weights, NODES["TUDSRLoadCFW"]
    load(wrapping(), "offered.pt")
    (FOLDER / "faces").mkdir()
    own = {key: value.contiguous() for key, value in wrapping().state_dict().items()}
    save_file(own, FOLDER / "faces" / "face_cfw.safetensors")
    assert {"offered.pt", "faces/face_cfw.safetensors"} <= set(offered()), offered()
    assert node.validate_inputs("offered.pt") is True
    loaded = node.execute("faces/face_cfw.safetensors").args[0].network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in own.items())
    message = node.validate_inputs("vqgan_cfw_00011.ckpt")
    assert "huggingface.co/Iceclear/StableSR" in message and str(FOLDER) in message and message.isprintable()
    torch.save({"structcond_stage_model.time_embed.0.bias": torch.ones(2)}, FOLDER / "module.ckpt")
    refused(lambda: node.execute("module.ckpt"), "StableSR's own module", "huggingface.co/Iceclear/StableSR")
    before = node.fingerprint_inputs("offered.pt")
    os.utime(FOLDER / "offered.pt", ns=(1, 1))
    assert node.fingerprint_inputs("offered.pt") != before


if __name__ == "__main__":
    main(globals())
