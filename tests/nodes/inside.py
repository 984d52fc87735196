"""What the `inside_*.py` scripts share: ComfyUI made importable, the pack loaded as ComfyUI does, and stand-ins.

Each script takes COMFYUI_PATH and FILES. FILES is a folder that `test_comfyui_inside.py` has filled: adapters of every
published format, and what peft makes of them. Plain functions and asserts, because pytest is not installed beside
ComfyUI.
"""

import asyncio
import importlib.util
import json
import math
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

PACK = Path(__file__).parents[2]
sys.path.insert(0, sys.argv[1])
sys.path.append(str(PACK / "tests"))

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.controlnet
import comfy.latent_formats
import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import comfy.supported_models_base
import sd_stand_in
import torch
from safetensors.torch import load_file

PUBLISHED = Path(sys.argv[2])


def load_pack(name="custom_nodes/a-folder-with.dots"):
    """Load the pack the way ComfyUI does, under a path-like module name."""
    name = name.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    nodes = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    return name, nodes


NAME, NODES = load_pack()


def part(path):
    return importlib.import_module(f"{NAME}.{path}")


SIGMAS = torch.tensor([3.0, 1.2, 0.4, 0.0])

OPTIONS = dict(tile=128, overlap=32, tile_batch=1, window="gaussian", color_fix="none", sample_posterior=False, seed=0)


class StubUNet(torch.nn.Module):
    """eps that depends on the place inside the tile (unless pointwise), on the text and on control."""

    def __init__(self, pointwise=False, device=None, operations=None):
        super().__init__()
        self.pointwise, self.dtype, self.calls, self.fail_at = pointwise, torch.float32, [], None
        self.eps = stub_eps
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, timesteps, context=None, control=None, **_):
        self.calls.append(tuple(x.shape))
        if len(self.calls) == self.fail_at:
            raise comfy.model_management.OOM_EXCEPTION("simulated")
        extra = control["middle"][0] if control else 0
        return self.eps(x, timesteps[0], context, self.pointwise) * self.scale + extra


def stub_eps(x, t, context, pointwise):
    ramp = 1 if pointwise else torch.linspace(0.2, 1, x.shape[-2]).view(1, 1, -1, 1)
    return torch.sin(x * 0.7) * ramp + context.mean((1, 2)).view(-1, *[1] * (x.ndim - 1)) * torch.cos(x) + t / 5000


def stub_model(pointwise=False, latents=comfy.latent_formats.SD15):
    class Config(comfy.supported_models_base.BASE):
        unet_extra_config = {}
        latent_format = latents

        def inpaint_model(self):
            return False

    base = comfy.model_base.BaseModel(
        Config({"pointwise": pointwise}), comfy.model_base.ModelType.EPS, unet_model=StubUNet
    )
    return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def text(value, **more):
    return [[torch.full((1, 4, 8), float(value)), dict(more)]]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class HintControl(comfy.controlnet.ControlBase):
    """Adds its hint, shrunk to latents, to eps, and remembers what it was given."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options=None):
        assert tuple(self.cond_hint_original.shape[-2:]) == tuple(side * 8 for side in x_noisy.shape[-2:])
        self.seen.append(self.cond_hint_original.clone())
        small = self.cond_hint_original[:, :1, ::8, ::8] * self.strength
        return {"input": [], "middle": [small.expand_as(x_noisy)], "output": []}


class FoldVAE:
    """A VAE stand-in that folds pixels into four channels; exact both ways."""

    latent_channels, vae_dtype, device = 4, torch.float32, torch.device("cpu")
    first_stage_model = torch.nn.Sequential(torch.nn.GroupNorm(1, 1))

    class patcher:
        model_size = staticmethod(lambda: 0)
        get_attachment = staticmethod(lambda key: None)

    def spacial_compression_encode(self):
        return 8

    def memory_used_decode(self, shape, dtype):
        return 0

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([small, small[:, :1]], 1)

    def decode(self, z):
        return z[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1)


def picture(batch, height, width, channels=3):
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    planes = [(x * y / (i + 1)).sin() * 0.4 + 0.5 for i in range(channels)]
    return torch.stack([torch.stack(planes, -1).roll(i, 0) for i in range(batch)])


def embedded():
    return NODES["TUDSRLoadEmbedded"].execute().args


def upscale(scale, image, models=None, **changes):
    first, second, vae, conditioning = models or embedded()
    with torch.inference_mode():
        return NODES["TUDSRUpscale"].execute(
            image, first, vae, conditioning, scale, 0, 0, stage_two=second, **(OPTIONS | changes)
        )


def sample(model, start, cfg=1.0, positive=None, negative=None, sigmas=SIGMAS):
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            model,
            start,
            cfg,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            positive or text(0.3),
            negative or text(-0.2),
            torch.zeros_like(start),
            disable_pbar=True,
        )
    return out * 0.18215


def multidiffusion(model, tile=128, overlap=48, batch=1, window="uniform", jitter=False):
    return NODES["TUDSRMultiDiffusion"].execute(model, tile, overlap, batch, window, jitter).args[0]


def slow_reference(start, tile, overlap, cfg, hint=None):
    """Euler steps on the plain average over tiles, written out; no code of the pack."""
    height, width = start.shape[-2:]

    def offsets(length):
        if length <= tile:
            return [0]
        count = math.ceil((length - tile) / (tile - overlap)) + 1
        return [i * (length - tile) // (count - 1) for i in range(count)]

    schedule = comfy.model_base.model_sampling(
        type("C", (), {"sampling_settings": {}})(), comfy.model_base.ModelType.EPS
    )
    x = start * SIGMAS[0]
    for sigma, after in zip(SIGMAS, SIGMAS[1:], strict=False):
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        t = schedule.timestep(sigma.view(1)).float()[0]
        for top in offsets(height):
            for left in offsets(width):
                box = (..., slice(top, top + tile), slice(left, left + tile))
                inner = x[box] / (sigma**2 + 1) ** 0.5
                extra = 0 if hint is None else hint[box]
                outs = [
                    x[box] - sigma * (stub_eps(inner, t, torch.full((1, 4, 8), value), False) + extra)
                    for value in (0.3, -0.2)
                ]
                total[box] += outs[1] + cfg * (outs[0] - outs[1])
                count[box] += 1
        x = x + (x - total / count) / sigma * (after - sigma)
    return x


def small_vae(dtype=torch.float64, **config):
    """A real ComfyUI VAE of SD's topology with few channels, weights random, none at its default."""
    torch.manual_seed(3)
    shape = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
    shape |= {"ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0} | config
    network = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=shape, embed_dim=4)
    state = {key: value for key, value in network.state_dict().items() if value.ndim}
    weights = {key: torch.randn(value.shape) / max(9.0, value[0].numel()) ** 0.5 for key, value in state.items()}
    weights |= {key: value + 1 for key, value in weights.items() if "norm" in key and key.endswith("weight")}
    vae = comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": shape, "embed_dim": 4}}, dtype=torch.float32)
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(shape["ch_mult"]) - 1)
    vae.first_stage_model.to(dtype)
    vae.vae_dtype = dtype
    return vae


def vae_nodes(vae, image, tile=64, planes="host", attention="exact"):
    latent = NODES["TUDSRVAEEncode"].execute(image, vae, tile, planes, attention).args[0]["samples"]
    return latent, NODES["TUDSRVAEDecode"].execute({"samples": latent}, vae, tile, planes, attention).args[0]


def published_model():
    """The networks of `published.networks()`, loaded by ComfyUI from the original checkpoints' layout."""
    scope = {}
    exec(sd_stand_in.PACK, scope)  # registers the small SD2 with ComfyUI, as the test pack does
    tensors = load_file(PUBLISHED / "base.safetensors")
    unet = {key: value for key, value in tensors.items() if key.startswith("model.diffusion_model.")}
    model = comfy.sd.load_diffusion_model_state_dict(unet)
    converted = {key.removeprefix("first_stage_model."): v for key, v in tensors.items() if key.startswith("first_")}
    shape = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
    shape |= {"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    vae = comfy.sd.VAE(sd=converted, config={"params": {"ddconfig": shape, "embed_dim": 4}}, dtype=torch.float32)
    vae.downscale_ratio = vae.upscale_ratio = 2
    return model, vae


def load_published(name, model=None, vae=None, stage="one", **options):
    """Run Load TUDSR Adapter on a written file; returns (MODEL, VAE, CONDITIONING)."""
    import folder_paths

    folder_paths.add_model_folder_path("tudsr", str(PUBLISHED))
    path = next(path.name for path in PUBLISHED.iterdir() if path.stem == name)
    base_model, base_vae = published_model()
    node = NODES["TUDSRLoadAdapter"]
    return node.execute(model or base_model, path, stage, 1.0, vae or base_vae, **options).args


def refused(call, *words):
    """Assert that `call` raises ValueError in one line that says `words`."""
    try:
        call()
    except ValueError as error:
        assert all(word in str(error) for word in words) and "\n" not in str(error), error
    else:
        raise AssertionError("accepted")


@contextmanager
def memory_asked_for():
    """Yield the list to which the shapes are added that ComfyUI estimates memory for meanwhile."""
    seen, original = [], comfy.sampler_helpers.estimate_memory

    def spy(model, noise_shape, conds):
        seen.append(tuple(noise_shape))
        return original(model, noise_shape, conds)

    comfy.sampler_helpers.estimate_memory = spy
    try:
        yield seen
    finally:
        comfy.sampler_helpers.estimate_memory = original


def cancelled_at(count, run):
    """Cancel `run` when ComfyUI looks for it the `count`-th time; AssertionError if it looks again, or goes on."""
    seen, original = [], comfy.model_management.throw_exception_if_processing_interrupted

    def stop():
        seen.append(1)
        if len(seen) == count:
            raise comfy.model_management.InterruptProcessingException()

    comfy.model_management.throw_exception_if_processing_interrupted = stop
    try:
        run()
    except comfy.model_management.InterruptProcessingException:
        assert len(seen) == count
    else:
        raise AssertionError("was not cancelled")
    finally:
        comfy.model_management.throw_exception_if_processing_interrupted = original


def main(checks):
    results = {}
    with torch.inference_mode():
        for name, check in list(checks.items()):
            if name.startswith("check_"):
                try:
                    check()
                    results[name] = None
                except Exception:
                    results[name] = traceback.format_exc()
    sys.stdout.write("\n" + json.dumps(results))
