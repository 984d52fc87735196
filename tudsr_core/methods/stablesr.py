"""StableSR's recipe: the sampling of `zoom` with other numbers, on networks that see the low-resolution picture.

Its progressive aggregation sampling (Wang et al. 2024, section 3.3, eq. 6) is MultiDiffusion with Gaussian weights in
which every tile's network sees that tile of the low-resolution latent: what `Zoom` does with networks that are told
it (`TextNetworks.seeing`). So there is no second sampler here, and no rule about sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..pictures import ColorFix
from .sampling import SampleOptions
from .zoom import ZoomOptions

NEGATIVE = "3d, cartoon, anime, sketches, (worst quality:2), (low quality:2)"
"""What the published scripts say when guidance is on; the brackets are words to their tokenizer, not weights."""
POSITIVE = "(masterpiece:2), (best quality:2), (realistic:2), (very clear:2)"


def _sampling() -> SampleOptions:
    return SampleOptions(steps=200, guidance=1.0, window="centred", respacing="whole")


@dataclass(frozen=True)
class StableSROptions(ZoomOptions):
    """How to run: 200 ancestral steps without guidance from the noised picture; tiles of 512 px overlap by half.

    Its authors' numbers for the 768 model: tiles of 768 px, 20 steps, guidance 7; for SD-Turbo: 4 steps.
    """

    color_fix: ColorFix = "wavelet"
    sample: SampleOptions = field(default_factory=_sampling)
