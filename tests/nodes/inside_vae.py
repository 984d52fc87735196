"""Checks of the exact tiled VAE inside ComfyUI's interpreter; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_vae.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

import inspect
import logging

import inside as base  # first: it makes ComfyUI importable
from inside import part, picture, small_vae, vae_nodes

import comfy.ldm.models.autoencoder
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.taesd.taesd
import torch

PACKS_LATENTS = "batch_norm_latent" in inspect.getsource(comfy.ldm.models.autoencoder)


def warnings_of(call):
    """Return what `call` returns, and the lines it logged."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        return call(), lines
    finally:
        logging.getLogger().removeHandler(handler)


def close(ours, wanted):
    assert ours.shape == wanted.shape, (ours.shape, wanted.shape)
    bound = 5e-5 * max(1, float(wanted.abs().max()))
    assert (ours - wanted).abs().max() < bound, float((ours - wanted).abs().max())


def nodes_equal_the_owner(vae, streamed=True):
    """Assert that both nodes give what ComfyUI's VAE gives, in tiles or (not `streamed`) whole, saying so."""
    image = picture(2, 67, 102)
    (latent, decoded), lines = warnings_of(lambda: vae_nodes(vae, image))
    close(latent, vae.encode(image))
    close(decoded, vae.decode(latent))
    assert any("whole picture" in line for line in lines) != streamed, lines
    return latent


def flux2_vae(dtype=torch.float32):
    """ComfyUI's own autoencoder of Flux.2 with few channels: latents normalised and packed two by two."""
    vae = small_vae(dtype, batch_norm_latent=True)
    bn = vae.first_stage_model.bn
    bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    bn.running_var.copy_(torch.linspace(0.3, 2, 16))
    vae.downscale_ratio = vae.upscale_ratio = 8
    vae.latent_channels = 16
    return vae


def check_packed_and_normalised_latents_are_the_owners():
    if not PACKS_LATENTS:
        return
    vae = flux2_vae()
    latent = nodes_equal_the_owner(vae)
    assert latent.shape == (2, 16, 8, 12)
    exact, image = part("nodes.host.exact_vae").ExactVAE(vae), picture(1, 64, 96).movedim(-1, 1)
    ticks = []
    exact.encode(image, lambda: ticks.append(1))
    exact.decode(latent[:1], lambda: ticks.append(1))
    assert len(ticks) == sum(exact.tiled.count(side, (64, 96)) for side in ("encoder", "decoder"))
    drawn, again = (exact.encode(image, lambda: None, seed=3) for _ in range(2))
    assert torch.equal(drawn, again) and drawn.shape == (1, 16, 8, 12)
    # A draw is made before packing: undone, it is off from the mode by noise times the deviation.
    network = vae.first_stage_model
    moments = network.quant_conv(network.encoder(vae.process_input(image)))
    mean = part("tudsr_core.vae.tiled").posterior_latent(moments, 4, 3)
    network.regularization.forward = lambda z: (mean, None)
    close(drawn, network.encode(vae.process_input(image)))


def check_packed_latents_in_half_precision():
    if PACKS_LATENTS:
        vae, image = flux2_vae(torch.bfloat16), picture(1, 64, 96)
        wanted = flux2_vae().encode(image)
        ours, plain = vae_nodes(vae, image)[0], vae.encode(image)
        assert (ours - wanted).abs().mean() < 1.2 * (plain - wanted).abs().mean()


class Scaling(comfy.ldm.models.autoencoder.AutoencoderKL):
    """An owner that scales and shifts its latents itself, and ends in a curve of its own."""

    def encode(self, x):
        return (super().encode(x) - 0.3) * 1.7

    def decode(self, z, **kwargs):
        return torch.tanh(super().decode(z / 1.7 + 0.3, **kwargs))


class Bending(comfy.ldm.models.autoencoder.AutoencoderKL):
    """An owner that does between encoder and quant_conv what no step knows."""

    def encode(self, x):
        return self.regularization(self.quant_conv(self.encoder(x).sin()))[0]

    def decode(self, z, **kwargs):
        return self.decoder(self.post_quant_conv(z).sin(), **kwargs)


class Blind(comfy.ldm.models.autoencoder.AutoencoderKL):
    """An owner that asks more of its decoder than to be called."""

    def decode(self, z, **kwargs):
        return self.decoder(self.post_quant_conv(z), **kwargs) * float(self.decoder.conv_out.weight.std())


def check_what_an_owner_does_around_its_networks_stays():
    for owner, streamed in ((Scaling, True), (Bending, False)):
        vae = small_vae(torch.float32)
        vae.first_stage_model.__class__ = owner
        nodes_equal_the_owner(vae, streamed)
    vae = small_vae(torch.float32)
    vae.first_stage_model.__class__ = Blind
    (latent, decoded), lines = warnings_of(lambda: base.vae_nodes(vae, picture(1, 64, 96)))
    close(decoded, vae.decode(latent))
    assert any("decoder's layers" in line and "conv_out" in line for line in lines), lines


def check_a_vae_object_with_its_own_encode_and_decode_is_the_owner():
    """As packs make them: ComfyUI's VAE, but what its methods give is not what its network gives."""

    class Brighter(comfy.sd.VAE):
        def encode(self, pixels):
            return super().encode(pixels) * 2

        def decode(self, samples, **kwargs):
            return super().decode(samples / 2, **kwargs) ** 2

    vae = small_vae(torch.float32)
    vae.__class__ = Brighter
    nodes_equal_the_owner(vae, streamed=False)


def check_a_network_without_pointwise_convolutions():
    """SD3's and Flux's: encoder, decoder and regularizer alone."""
    vae, shape = small_vae(torch.float32), dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3)
    shape |= dict(ch=32, ch_mult=[1, 2, 2], num_res_blocks=1, attn_resolutions=[], dropout=0.0)
    models = "comfy.ldm.modules.diffusionmodules.model"
    network = comfy.ldm.models.autoencoder.AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{models}.Encoder", "params": shape},
        decoder_config={"target": f"{models}.Decoder", "params": shape},
    )
    network.load_state_dict(vae.first_stage_model.state_dict(), strict=False)
    vae.first_stage_model = network.eval()
    vae.patcher = comfy.model_patcher.ModelPatcher(network, vae.device, vae.device)
    nodes_equal_the_owner(vae)


def check_small_and_pixel_autoencoders_are_the_owners():
    state = comfy.taesd.taesd.TAESD().state_dict()
    for value in state.values():
        if value.ndim:
            value.copy_(base.noise(*value.shape) / max(9, value[0].numel()) ** 0.5)
    vae = comfy.sd.VAE(sd=state, dtype=torch.float32)
    image = picture(1, 128, 200)
    latent, decoded = vae_nodes(vae, image)
    close(latent, vae.encode(image))
    close(decoded, vae.decode(latent))
    if hasattr(comfy, "pixel_space_convert"):
        pixels = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
        latent, decoded = vae_nodes(pixels, image)
        close(latent, pixels.encode(image))
        close(decoded, pixels.decode(latent))


def check_other_kinds_are_refused_by_name():
    for change, says in (
        (dict(latent_dim=3), "video"),
        (dict(latent_dim=1), "sound"),
        (dict(extra_1d_channel=16), "sound"),  # ACE's latents have two sides, and are sound all the same
        (dict(output_channels=2), "pictures"),
        (dict(first_stage_model=None), "empty"),
    ):
        vae = small_vae(torch.float32)
        vars(vae).update(change)
        try:
            vae_nodes(vae, picture(1, 48, 64))
        except ValueError as error:
            assert says in str(error) and "\n" not in str(error), error
        else:
            raise AssertionError(f"{change} was accepted")


def failing_at(number, load):
    """Return ComfyUI's loading of models, out of memory at that call."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise comfy.model_management.OOM_EXCEPTION("simulated")
        return load(*args, **kwargs)

    return failing


def check_out_of_memory_is_never_raw_nor_tiled_by_comfyui():
    """Wherever it happens: the owner's own picture, or one clear error."""
    unknown, load, image = small_vae(torch.float32), comfy.model_management.load_models_gpu, picture(1, 64, 96)
    unknown.first_stage_model.decoder.tanh_out = True
    for vae in (small_vae(torch.float32), unknown, base.embedded()[2]):
        wanted = vae_nodes(vae, image)
        for number in range(1, 8):
            comfy.model_management.load_models_gpu = failing_at(number, load)
            try:
                made = vae_nodes(vae, image)
                assert all((a - b).abs().max() < 1e-5 for a, b in zip(made, wanted, strict=True))
            except MemoryError as error:
                assert "out of memory in the autoencoder" in str(error) and "\n" not in str(error)
            finally:
                comfy.model_management.load_models_gpu = load
        assert all(torch.equal(a, b) for a, b in zip(vae_nodes(vae, image), wanted, strict=True))


if __name__ == "__main__":
    base.main(globals())
