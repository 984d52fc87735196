"""A Stable Diffusion 2.1 in miniature: the checkpoint, two adapters, and a pack that lets ComfyUI detect it."""

from __future__ import annotations

from pathlib import Path

import torch
from sd_layout import to_ldm

UNET = dict(
    sample_size=8,
    block_out_channels=(32, 64, 128, 128),
    layers_per_block=2,
    attention_head_dim=(2, 4, 8, 8),  # number of heads: 16 channels each
    cross_attention_dim=32,
    use_linear_projection=True,
)
TARGETS = ["conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out", "to_k", "to_q", "to_v", "to_out.0"]

PACK = """
import numpy as np, os
import torch
import comfy.supported_models, comfy.supported_models_base, folder_paths
from comfy import sd1_clip
from comfy.text_encoders import sd2_clip

TEXT = dict(architectures=["CLIPTextModel"], hidden_act="gelu", hidden_size=32, intermediate_size=64,
            num_attention_heads=2, num_hidden_layers=3, max_position_embeddings=77, projection_dim=32,
            layer_norm_eps=1e-5, vocab_size=49408, eos_token_id=49407, model_type="clip_text_model")

class Text(sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}, **kwargs):
        super().__init__(device=device, layer="hidden", layer_idx=-2, textmodel_json_config=dict(TEXT), dtype=dtype,
                         special_tokens={"start": 49406, "end": 49407, "pad": 0}, model_options=model_options)

class Tokenizer(sd1_clip.SDTokenizer):
    def __init__(self, tokenizer_path=None, embedding_directory=None, tokenizer_data={}):
        super().__init__(tokenizer_path, pad_with_end=False, embedding_directory=embedding_directory,
                         embedding_size=32, embedding_key="clip_h", tokenizer_data=tokenizer_data)

class Tokens(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data,
                         clip_name="h", tokenizer=Tokenizer)

class Clip(sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}, **kwargs):
        super().__init__(device=device, dtype=dtype, model_options=model_options, clip_name="h", clip_model=Text)

class SmallSD20(comfy.supported_models.SD20):
    unet_config = dict(comfy.supported_models.SD20.unet_config, context_dim=32, model_channels=32)
    unet_extra_config = dict(comfy.supported_models.SD20.unet_extra_config, num_head_channels=16)
    def clip_target(self, state_dict={}):
        return comfy.supported_models_base.ClipTarget(Tokens, Clip)

comfy.supported_models.models.append(SmallSD20)

import json, tempfile
import comfy.clip_vision, comfy.utils
load_vision = comfy.clip_vision.load

def load_small_vision(path):
    tensors = comfy.utils.load_torch_file(path)
    if tensors["vision_model.embeddings.class_embedding"].shape[0] != 64:
        return load_vision(path)
    config = os.path.join(tempfile.mkdtemp(), "config.json")
    with open(config, "w", encoding="utf-8") as file:
        json.dump(dict(VISION), file)
    vision = comfy.clip_vision.ClipVisionModel(config)
    vision.load_sd(tensors)
    return vision

VISION = dict(model_type="clip_vision_model", hidden_act="gelu", hidden_size=64, intermediate_size=64, image_size=28,
              patch_size=14, num_attention_heads=2, num_channels=3, num_hidden_layers=2, projection_dim=32,
              layer_norm_eps=1e-5)
comfy.clip_vision.load = load_small_vision

make_vae = comfy.sd.VAE.__init__

def make_small_vae(self, sd=None, device=None, config=None, **more):
    weight = (sd or {}).get("encoder.conv_in.weight")
    small = config is None and weight is not None and len(weight) == 32
    config = dict(params=dict(ddconfig=dict(SMALL_KL), embed_dim=4)) if small else config
    make_vae(self, sd=sd, device=device, config=config, **more)
    if small:
        self.downscale_ratio = self.upscale_ratio = 8

SMALL_KL = dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 2, 2],
                num_res_blocks=1, attn_resolutions=[], dropout=0.0)
comfy.sd.VAE.__init__ = make_small_vae

class TestConditioning:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "tests"
    def make(self):
        return ([[torch.linspace(-1, 1, 77 * 32).view(1, 77, 32), {}]],)

class TestSaveTensor:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"images": ("IMAGE",), "name": ("STRING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "tests", True
    def save(self, images, name):
        np.save(os.path.join(folder_paths.get_output_directory(), name), images.float().cpu().numpy())
        return {"ui": {"text": [name]}}

class TestSaveConditioning:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "tests", True
    def save(self, conditioning, name):
        np.save(os.path.join(folder_paths.get_output_directory(), name), conditioning[0][0].float().cpu().numpy())
        return {"ui": {"text": [name]}}

class FoldVAE:
    # Folds pixels into four latents, exact both ways where pictures are smooth: a VAE that costs nothing.
    latent_channels = 4
    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([small, small[:, :1]], 1)
    def decode(self, z):
        return z[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1)

class TestFoldVAE:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "make", "tests"
    def make(self):
        return (FoldVAE(),)

NODE_CLASS_MAPPINGS = {"TestConditioning": TestConditioning, "TestSaveTensor": TestSaveTensor}
NODE_CLASS_MAPPINGS["TestFoldVAE"] = TestFoldVAE
NODE_CLASS_MAPPINGS["TestSaveConditioning"] = TestSaveConditioning
"""


def condition() -> torch.Tensor:
    """What the pack's TestConditioning gives."""
    return torch.linspace(-1, 1, 77 * 32).view(1, 77, 32)


def networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the stand-in's `(unet, vae)` as diffusers modules; the VAE is a TAESD."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel

    torch.manual_seed(0)
    unet, vae = UNet2DConditionModel(**UNET), AutoencoderTiny()
    return unet.eval(), vae.eval()


def write(models: Path) -> None:
    """Write the checkpoint, two peft adapters, a PiSA-SR and a HYPIR file under ComfyUI's `models` folder."""
    import published
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    unet, vae = networks()
    tensors = to_ldm(unet, torch.nn.Module())
    for key, value in vae.state_dict().items():
        side, _, number, rest = key.split(".", 3)
        # ComfyUI's decoder starts with a clamp layer, diffusers' does that in forward.
        tensors[f"first_stage_model.taesd_{side}.{int(number) + (side == 'decoder')}.{rest}"] = value
    tensors |= {"first_stage_model.vae_scale": torch.tensor(0.18215), "first_stage_model.vae_shift": torch.tensor(0.0)}
    tensors |= text_weights()
    (models / "checkpoints").mkdir(parents=True, exist_ok=True)
    name = models / "checkpoints" / "v2-1_512-ema-pruned.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, name)
    write_companions(models, tensors)
    for number, folder in enumerate(("tudsr-stage-one", "tudsr-stage-two")):
        torch.manual_seed(number)
        adapted = get_peft_model(unet, LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(models / "tudsr" / folder / "unet_lora_adapter")
        unet = adapted.unload()
    published.pisa(models / "tudsr" / "pisa_sr.pkl")
    published.hypir(models / "tudsr" / "HYPIR_sd2.pth")
    write_for_stablesr(models, tensors)


def write_for_stablesr(models: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the base models of StableSR's templates, SD2.1-base's with an autoencoder that CFW fits, and its files."""
    from diffusers import AutoencoderKL
    from plain_stablesr import random_tensors
    from safetensors.torch import save_file

    from tudsr_core.models import FeatureWrapping

    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
    )
    kl = {key: value for key, value in tensors.items() if not key.startswith("first_stage_model.")}
    kl |= to_ldm(torch.nn.Module(), vae)
    telltale = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    v = kl | {telltale: torch.linspace(-1, 1, tensors[telltale].numel())}
    for name, content in (("stablesr-base", kl), ("v2-1_768-ema-pruned", v), ("sd_turbo", kl)):
        save_file({key: x.contiguous() for key, x in content.items()}, models / "checkpoints" / f"{name}.safetensors")
    for name in ("stablesr_000117", "webui_768v_139"):
        torch.save({"state_dict": random_tensors("stand-in")}, models / "tudsr" / f"{name}.ckpt")
    torch.manual_seed(4)
    cfw = FeatureWrapping((64, 64), 8).state_dict()
    torch.save({f"decoder.{key}": value for key, value in cfw.items()}, models / "tudsr" / "vqgan_cfw_00011.ckpt")


def write_companions(models: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a ControlNet made of the UNet's own encoder, and a two-layer CLIP picture tower."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(7)
    made = {}
    for key, value in tensors.items():
        inner = key.removeprefix("model.diffusion_model.")
        if inner.startswith(("input_blocks.", "middle_block.", "time_embed.")):
            made[f"control_model.{inner}"] = value.contiguous()
    widths = (3, 16, 16, 32, 32, 96, 96, 256, UNET["block_out_channels"][0])
    convolutions = {
        f"input_hint_block.{2 * i}": (out, size, 3, 3)
        for i, (size, out) in enumerate(zip(widths, widths[1:], strict=False))
    }
    outputs = (32, 32, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128)
    convolutions |= {f"zero_convs.{i}.0": (width, width, 1, 1) for i, width in enumerate(outputs)}
    convolutions["middle_block_out.0"] = (128, 128, 1, 1)
    for name, shape in convolutions.items():
        made[f"control_model.{name}.weight"] = torch.randn(shape, generator=generator) * 0.05
        made[f"control_model.{name}.bias"] = torch.zeros(shape[0])
    write_at(models / "controlnet" / "sd21-tile.safetensors", save_file, made)

    width, inner, layers = 64, 64, 2
    shapes = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (5, width),
        "visual_projection.weight": (32, width),
    }
    for layer in range(layers):
        block = f"vision_model.encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {block + f"self_attn.{part}.weight": (width, width), block + f"self_attn.{part}.bias": (width,)}
        shapes |= {block + "mlp.fc1.weight": (inner, width), block + "mlp.fc1.bias": (inner,)}
        shapes |= {block + "mlp.fc2.weight": (width, inner), block + "mlp.fc2.bias": (width,)}
    vision = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    norms = [f"vision_model.encoder.layers.{i}.layer_norm{j}" for i in range(layers) for j in (1, 2)]
    for name in (*norms, "vision_model.pre_layrnorm", "vision_model.post_layernorm"):
        vision |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    write_at(models / "clip_vision" / "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", save_file, vision)


def write_at(path: Path, save, tensors: dict[str, torch.Tensor]) -> None:
    """Save tensors in a folder that may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(tensors, path)


def text_weights() -> dict[str, torch.Tensor]:
    """Return random open_clip-style weights for the three-layer text tower."""
    torch.manual_seed(5)
    width, prefix = 32, "cond_stage_model.model."
    shapes = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "ln_final.weight": None,
        "ln_final.bias": (width,),
        "text_projection": (width, width),
    }
    for layer in range(3):
        block = f"transformer.resblocks.{layer}."
        shapes |= {
            block + "attn.in_proj_weight": (3 * width, width),
            block + "attn.in_proj_bias": (3 * width,),
            block + "attn.out_proj.weight": (width, width),
            block + "attn.out_proj.bias": (width,),
            block + "ln_1.weight": None,
            block + "ln_1.bias": (width,),
            block + "ln_2.weight": None,
            block + "ln_2.bias": (width,),
            block + "mlp.c_fc.weight": (2 * width, width),
            block + "mlp.c_fc.bias": (2 * width,),
            block + "mlp.c_proj.weight": (width, 2 * width),
            block + "mlp.c_proj.bias": (width,),
        }
    return {
        prefix + key: torch.ones(width) if shape is None else torch.randn(shape) * 0.1 for key, shape in shapes.items()
    }


def slow_text_tower(weights: dict, ids: list[int], layers: int = 2, heads: int = 2) -> torch.Tensor:
    """OpenCLIP's text transformer up to `layers`, then its final norm, one line per operation: `tokens width`."""
    w = {key.removeprefix("cond_stage_model.model."): value for key, value in weights.items()}
    norm = torch.nn.functional.layer_norm
    x = w["token_embedding.weight"][ids] + w["positional_embedding"]
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for layer in range(layers):
        b = f"transformer.resblocks.{layer}."
        h = norm(x, (32,), w[b + "ln_1.weight"], w[b + "ln_1.bias"])
        q, k, v = (h @ w[b + "attn.in_proj_weight"].T + w[b + "attn.in_proj_bias"]).chunk(3, -1)
        split = [one.view(len(ids), heads, -1).transpose(0, 1) for one in (q, k, v)]
        attention = (split[0] @ split[1].transpose(1, 2) / (32 / heads) ** 0.5 + mask).softmax(-1) @ split[2]
        h = attention.transpose(0, 1).reshape(len(ids), 32)
        x = x + h @ w[b + "attn.out_proj.weight"].T + w[b + "attn.out_proj.bias"]
        h = norm(x, (32,), w[b + "ln_2.weight"], w[b + "ln_2.bias"])
        h = torch.nn.functional.gelu(h @ w[b + "mlp.c_fc.weight"].T + w[b + "mlp.c_fc.bias"])
        x = x + h @ w[b + "mlp.c_proj.weight"].T + w[b + "mlp.c_proj.bias"]
    return norm(x, (32,), w["ln_final.weight"], w["ln_final.bias"])
