import pytest
import torch
from sd_layout import to_ldm

from tudsr_core.image import resize
from tudsr_core.local import load_sd21, pick_device
from tudsr_core.pipeline import UpscaleOptions, upscale
from tudsr_core.plan import Target
from tudsr_core.vae_tiling import run_tiled


def photo(height, width):
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    return torch.stack([(x * y).sin(), (x + y).cos(), (x - y).sin()])[None] * 0.4 + 0.5


@pytest.mark.parametrize("scale", [4, 8])
def test_same_bytes_for_any_tile_batch_and_run_to_run(embedded, scale):
    image = photo(40, 52)
    results = [upscale(image, embedded, Target(scale=scale), UpscaleOptions(128, 32, batch)) for batch in (1, 2, 5, 1)]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_tiled_is_close_to_untiled(embedded):
    image = photo(64, 80)
    whole, tiled = (
        upscale(image, embedded, Target(scale=8), UpscaleOptions(tile, overlap))
        for tile, overlap in ((1024, 128), (128, 32))
    )
    assert (whole - tiled).abs().mean() < 1e-3
    assert (whole - tiled).abs().max() < 0.03


def test_the_embedded_vae_tiles_exactly(embedded):
    backbone = embedded.first.networks.backbone
    encode, decode = backbone.reaches
    image = photo(96, 136)
    with torch.inference_mode():
        mean = backbone.moments(image * 2 - 1)[0]
        tiled = run_tiled(lambda x: backbone.moments(x * 2 - 1)[0], image, encode, 32, lambda: None)
        assert (tiled - mean).abs().max() < 1e-5
        pixels = backbone.vae.decode(mean).sample
        assert (
            run_tiled(lambda z: backbone.vae.decode(z).sample, mean, decode, 8, lambda: None) - pixels
        ).abs().max() < 1e-5


def test_stage_one_again_after_stage_two_is_bit_identical(embedded):
    image = photo(16, 20)
    before = upscale(image, embedded, Target(scale=4))
    upscale(image, embedded, Target(scale=8))
    assert torch.equal(upscale(image, embedded, Target(scale=4)), before)


def test_stage_two_is_another_network_than_stage_one(embedded):
    networks = embedded.second.networks
    z = networks.encode(photo(32, 32), None, lambda: None)
    empty = networks.condition("")
    adapted, plain = (
        stage.networks.denoise(z, 50, empty, z.shape, lambda predict: predict(z, []))
        for stage in (embedded.second, embedded.first)
    )
    assert (adapted - plain).abs().max() > 1e-3


def test_half_precision_stays_close(embedded):
    from tudsr_core.local import load_embedded

    image = photo(24, 24)
    exact = upscale(image, embedded, Target(scale=4))
    rough = upscale(image, load_embedded("cpu", "bf16"), Target(scale=4))
    assert -10 * torch.log10((exact - rough).square().mean()) > 35


def test_devices_that_are_absent_are_named():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not available"):
            pick_device("cuda")
    assert pick_device("cpu").type == "cpu"


SMALL_UNET = dict(
    sample_size=8,
    block_out_channels=(32, 64, 64, 64),
    layers_per_block=2,
    attention_head_dim=(2, 4, 4, 4),
    cross_attention_dim=32,
    use_linear_projection=True,
    norm_num_groups=8,
)
SMALL_VAE = dict(
    block_out_channels=(16, 32, 32, 32),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    norm_num_groups=8,
    latent_channels=4,
    scaling_factor=0.18215,
)
SMALL_TEXT = dict(
    vocab_size=49408,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=32,
)


@pytest.fixture(scope="module")
def small_sd(tmp_path_factory):
    """A Stable Diffusion folder in miniature, with a tokenizer and two adapters, all random."""
    import json

    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("sd")
    unet = UNet2DConditionModel(**SMALL_UNET)
    unet.save_pretrained(root / "base" / "unet")
    AutoencoderKL(**SMALL_VAE).save_pretrained(root / "base" / "vae")
    CLIPTextModel(CLIPTextConfig(**SMALL_TEXT)).save_pretrained(root / "base" / "text_encoder")
    DDPMScheduler().save_pretrained(root / "base" / "scheduler")
    tokenizer = root / "base" / "tokenizer"
    tokenizer.mkdir()
    words = {"!": 0, "a</w>": 1, "b</w>": 2, "a": 3, "b": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}
    (tokenizer / "vocab.json").write_text(json.dumps(words))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("one", "two"):
        targets = ["conv1", "conv2", "to_q", "to_v", "to_out.0", "conv_in"]
        adapted = get_peft_model(unet, LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(root / name / "unet_lora_adapter")
        unet = adapted.unload()
    return root


def test_sd21_folder_with_two_adapters_equals_the_formula_by_hand(small_sd):
    """Both stages, untiled, against diffusers and peft called directly."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from peft import PeftModel

    model = load_sd21(small_sd / "base", small_sd / "one", small_sd / "two", device="cpu")
    image = photo(16, 24)
    ours = upscale(image, model, Target(scale=8), UpscaleOptions(color_fix="none"))
    vae = AutoencoderKL.from_pretrained(small_sd / "base" / "vae")
    text = model.first.networks.condition("")
    picture = image
    with torch.no_grad():
        for name, t, abar, size in (("one", 200, 0.753692, (64, 96)), ("two", 50, 0.951577, (128, 192))):
            unet = UNet2DConditionModel.from_pretrained(small_sd / "base" / "unet")
            unet = PeftModel.from_pretrained(unet, small_sd / name / "unet_lora_adapter")
            z = vae.encode(resize(picture, size).clamp(0, 1) * 2 - 1).latent_dist.mode() * 0.18215
            eps = unet(z, t, encoder_hidden_states=text).sample
            z = (z - (1 - abar) ** 0.5 * eps) / abar**0.5
            picture = (vae.decode(z / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    assert (ours - picture).abs().max() < 1e-4


def test_sd21_posterior_sample_depends_on_the_seed_only(small_sd):
    model = load_sd21(small_sd / "base", small_sd / "one", device="cpu")
    image = photo(16, 16)

    def run(seed, sample=True):
        return upscale(image, model, Target(scale=2), UpscaleOptions(sample_posterior=sample, seed=seed))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(1, False), run(2, False))


def test_posterior_sample_is_mode_plus_deviation_times_noise(small_sd):
    networks = load_sd21(small_sd / "base", small_sd / "one", device="cpu").first.networks
    image = photo(32, 40)
    mode, drawn = (networks.encode(image, seed, lambda: None) for seed in (None, 7))
    distribution = networks.backbone.vae.encode(image * 2 - 1).latent_dist
    noise = torch.randn(distribution.mean.shape, generator=torch.Generator().manual_seed(7))
    assert (mode - distribution.mode() * 0.18215).abs().max() < 1e-6
    assert (drawn - (distribution.mean + distribution.std * noise) * 0.18215).abs().max() < 1e-6


def test_sd21_refuses_what_does_not_fit(small_sd, tmp_path):
    from tudsr_core.checkpoints import CheckpointError, read_adapter, write_adapter

    with pytest.raises(CheckpointError, match="does not exist"):
        load_sd21(tmp_path / "none", small_sd / "one")
    with pytest.raises(CheckpointError, match="vae/ is missing|unet/ is missing"):
        load_sd21(tmp_path, small_sd / "one")
    adapter = read_adapter(small_sd / "two")
    from dataclasses import replace

    write_adapter(tmp_path / "two.safetensors", replace(adapter, stage=2))
    with pytest.raises(CheckpointError, match="stage-2 adapter and was given as stage 1"):
        load_sd21(small_sd / "base", tmp_path / "two.safetensors", device="cpu")


def test_sd21_single_file_equals_the_folder(small_sd, tmp_path):
    """The same weights under the original checkpoint's names give the same networks."""
    from safetensors.torch import save_file

    from tudsr_core.sd21 import Architecture, read_base

    vae, unet, embed = read_base(small_sd / "base")
    tensors = to_ldm(unet, vae)
    save_file(tensors, tmp_path / "single.safetensors")
    made_vae, made_unet, _ = read_base(
        tmp_path / "single.safetensors", architecture=Architecture(SMALL_UNET, SMALL_VAE, SMALL_TEXT)
    )
    for made, wanted in ((made_vae, vae), (made_unet, unet)):
        for key, value in wanted.state_dict().items():
            assert torch.equal(made.state_dict()[key], value), key
