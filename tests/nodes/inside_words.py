"""What the scripts about tile prompts share: texts that are numbers, their CLIP, and MultiDiffusion written out."""

import hashlib
import math

import inside  # first: it makes ComfyUI importable
from inside import NODES, HintControl, part

import comfy.k_diffusion.sampling
import comfy.model_base
import comfy.sample
import comfy.samplers
import torch

prompts_module = part("tudsr_core.prompts.tile_prompts")
tiles_module = part("tudsr_core.tiling.plan")
# As on a GPU: which row of a batch gets which text is what is checked here.
part("nodes.multidiffusion").batches_tiles = lambda x: True
CASES = (((1, 4, 37, 50), 1.0), ((2, 4, 41, 29), 5.5), ((1, 4, 16, 61), 5.5))
STYLE = {"prefix": "photo", "suffix": "8k", "negative": "blur"}


def word_eps(x, t, context, pointwise=False):
    """eps that depends on the place inside the tile and on the text, and does not amplify rounding."""
    rows = torch.linspace(0.2, 1, x.shape[-2]).view(1, 1, -1, 1)
    columns = torch.linspace(1, 0.4, x.shape[-1])
    return torch.tanh(x) * rows + 0.3 * context.mean((1, 2)).view(-1, 1, 1, 1) * columns + t / 5000


def stub_model():
    model = inside.stub_model()
    model.model.diffusion_model.eps = word_eps
    return model


class WordClip:
    """A CLIP stand-in whose embedding is a number made of the text; long texts take two windows."""

    def __init__(self):
        self.calls = []

    def tokenize(self, words):
        tokens = words.replace(",", " ,").split()
        return {"l": [tokens[i : i + 75] for i in range(0, max(1, len(tokens)), 75)]}

    def encode_from_tokens_scheduled(self, tokens, **_):
        windows = tokens["l"]
        self.calls.append(windows)
        value = word_value(" ".join(word for window in windows for word in window).replace(" ,", ","))
        return [[torch.full((1, 77 * len(windows), 8), value), {"pooled_output": torch.full((1, 3), value)}]]


def word_value(words):
    return int(hashlib.sha256(words.encode()).hexdigest()[:6], 16) / 0xFFFFFF - 0.5


def tile_prompts(plan, texts=None, **style):
    texts = texts or [f"thing {i}" for i in range(len(plan))]
    shared = prompts_module.Style(**({"prefix": "", "suffix": "8k", "negative": "blur"} | style))
    return prompts_module.TilePrompts(plan, tuple(map(prompts_module.TilePrompt, texts)), shared)


def regions(prompts, clip=None, **more):
    widgets = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    return NODES["TUDSRTilePromptsToConditioning"].execute(clip or WordClip(), prompts, **(widgets | more)).args


def tiled(model, prompts, batch=1, window="uniform", jitter=False, clip=None):
    node = NODES["TUDSRMultiDiffusion"]
    return node.execute(model, 512, 128, batch, window, jitter, prompts, clip or WordClip()).args[0]


def run(model, start, cfg, positive, negative, sigmas, sampler="ddpm", seed=3):
    """Sample and return what the model's own space holds; `start` is noise on an empty latent."""
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            model,
            start,
            cfg,
            comfy.samplers.sampler_object(sampler),
            sigmas,
            positive,
            negative,
            torch.zeros_like(start),
            disable_pbar=True,
            seed=seed,
        )
    return out * 0.18215


def schedule():
    return comfy.model_base.model_sampling(type("C", (), {"sampling_settings": {}})(), comfy.model_base.ModelType.EPS)


def reference(start, plan, positive, negative, cfg, sigmas, hints=None, seed=3):
    """MultiDiffusion with a prompt per tile and ancestral DDPM steps, written out from the papers.

    Noise predictions of both halves are averaged over the tiles, then guidance (eq. 5 of
    MultiDiffusion), then DDPM's posterior (Ho et al. 2020, eq. 6 and 7) on alpha-bar.
    """
    sampling, fresh = schedule(), comfy.k_diffusion.sampling.default_noise_sampler(start, seed=seed)
    abars = [1 / (1 + float(sigma) ** 2) for sigma in sigmas]
    z = start * float(sigmas[0]) * math.sqrt(abars[0])
    for sigma, abar, before in zip(sigmas, abars, abars[1:], strict=False):
        t = sampling.timestep(sigma.view(1)).float()[0]
        sums, count = [torch.zeros_like(z), torch.zeros_like(z)], torch.zeros_like(z)
        for i, top in enumerate(plan.tops):
            for j, left in enumerate(plan.lefts):
                index = i * len(plan.lefts) + j
                box = (..., slice(top, top + plan.tile_height), slice(left, left + plan.tile_width))
                for total, words in zip(sums, (positive[index], negative[index]), strict=True):
                    context = torch.full((1, 1, 1), word_value(words))
                    total[box] += word_eps(z[box], t, context) + (0 if hints is None else hints[index])
                count[box] += 1
        with_text, without = (total / count for total in sums)
        eps = without + cfg * (with_text - without)
        alpha = abar / before
        z = (z - (1 - alpha) / math.sqrt(1 - abar) * eps) / math.sqrt(alpha)
        if before < 1:
            z = z + math.sqrt((1 - alpha) * (1 - before) / (1 - abar)) * fresh(None, None)
    return z


def ddpm_sigmas(steps):
    return comfy.samplers.calculate_sigmas(schedule(), "ddim_uniform", steps)


def whole(prompts):
    """The composed texts of all tiles and the negative for each."""
    count = len(prompts.plan)
    return [prompts.positive(i) for i in range(count)], [prompts.style.negative] * count


class RecordingControl(HintControl):
    """Remembers which hint went with which latent; `copy` shares the list, as networks are shared."""

    def copy(self):
        made = RecordingControl(self.seen)
        self.copy_to(made)
        return made


def extract(image, plan, edits="", **more):
    values = STYLE | {"context": 0.0, "edits": edits} | more
    return NODES["TUDSRExtractTilePrompts"].execute(image, plan, **values)
