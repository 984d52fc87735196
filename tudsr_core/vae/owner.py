"""An autoencoder as its owner calls it, with something else in the place of its encoder or decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from .graph import Side

POINTWISE = {"encoder": "quant_conv", "decoder": "post_quant_conv"}


class Core(nn.Module):
    """Stands where an owner calls its encoder or decoder, and counts the calls."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.calls = run, 0

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Return what stands here makes of x."""
        self.calls += 1
        return self.run(x)


def with_core(vae: nn.Module, side: Side, core: nn.Module) -> nn.Module:
    """Return `vae` with `core` in place of one side and its pointwise convolution; `vae` itself is not touched."""
    owner = copy.copy(vae)
    owner._modules = vae._modules | {side: core}
    if owner._modules.get(POINTWISE[side]) is not None:
        owner._modules[POINTWISE[side]] = nn.Identity()
    return owner
