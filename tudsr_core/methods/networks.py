"""What the upscalers need of a model, whoever computes it.

ComfyUI's models, diffusers' models and a ten-line fake in a test all answer this one protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..tiling import NetworkFacts, Tile

Preview = Callable[[], Tensor]
"""Returns the scaled latents `B C h w` as far as they are restored."""

Tick = Callable[[int, int, "Preview | None"], None]
"""`tick(done, total, preview)`: called once per tile; may raise to cancel. `preview` costs only when called."""

NoisePredictor = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""`predictor(pixels, t)`: mean and deviation `B C h w` of the start noise for `B 3 2h 2w` in 0..1 (InvSR)."""

Predict = Callable[[Tensor, Sequence[Tile]], Tensor]
"""`predict(parts, tiles)`: eps for the latents of `tiles`, stacked along the batch, same shape."""


@dataclass(frozen=True)
class Encoded:
    """A picture as the autoencoder sees it: scaled latents `B C h w`, float32, and its activations on the way.

    `features` holds what a decoder fuses with its own activations (StableSR's CFW), by the name that
    both sides of the autoencoder know; empty for autoencoders that fuse nothing.
    """

    z: Tensor
    features: Mapping[str, Any] = field(default_factory=dict)


class Networks(Protocol):
    """What the upscalers need of a model; one object per stage, sharing weights as it likes."""

    facts: NetworkFacts
    device: torch.device
    """Where the networks compute; pictures and latents lie in host memory."""

    def vae_calls(self, size: tuple[int, int]) -> int:
        """Return how often `on_tile` will be called by one encode plus one decode of `size` pixels."""

    def encode(self, pixels: Tensor, seed: int | None, on_tile: Callable[[], None]) -> Encoded:
        """Encode `B 3 H W` in 0..1; `seed` draws from the posterior, None takes its mode."""

    def denoise(
        self, z: Tensor, t: int, condition: Any, part: tuple[int, ...], body: Callable[[Predict], Tensor]
    ) -> Tensor:
        """Make the UNet ready for timestep t, return `body(predict)`.

        `z` is the whole latent `B C h w`; `part` is the largest shape that `predict` will be given,
        for memory estimates. `condition` serves all tiles, or is a list with one for each, by `Tile.index`.
        """

    def decode(self, encoded: Encoded, on_tile: Callable[[], None]) -> Tensor:
        """Return pixels `B 3 H W`, nominally 0..1, unclamped, of latents and the features to fuse with them."""

    def condition(self, text: str) -> Any:
        """Return whatever `predict` takes as its text condition."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether `error` means that a smaller tile could succeed."""


class TextNetworks(Networks, Protocol):
    """Networks that encode many texts at once, for a condition per tile."""

    def conditions(self, texts: Sequence[str]) -> list[Any]:
        """Return one condition per text; equal texts cost one encoding."""

    def seeing(self, z: Tensor) -> TextNetworks:
        """Return the networks for the picture of latents `z` (`1 C h w`): where the UNet is told, this is what of."""
