"""A one-step student from a multi-step teacher: the chain that makes its targets, and SinSR's three losses.

Wang et al. 2024, sec. 3, written from the mathematics alone. A network is seen as `predict(x, index)`: what it says x0
is for an input that is scaled already; its condition y is its own business.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion import ResidualShift

Predict = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def run_chain(predict: Predict, y: Tensor, noise: Tensor, shift: ResidualShift) -> Tensor:
    """Return what the deterministic steps make of `y`, `B C h w`, and the `noise` they begin with."""
    x = shift.start(y, noise)
    for index in reversed(range(len(shift.eta))):
        x = shift.step_back(x, predict(x * shift.input_scale(index), index), y, index)
    return x


def chain_loss(predict: Predict, x0: Tensor, y: Tensor, noise: Tensor, index: int, shift: ResidualShift) -> Tensor:
    """Return ResShift's loss of a teacher: the mean squared error of x0 predicted at one `index`, unweighted."""
    x = shift.diffuse(x0, y, noise, index)
    return F.mse_loss(predict(x * shift.input_scale(index), index), x0)


def distillation_terms(
    student: Predict, taught: Tensor, x0: Tensor, start: Tensor, scale: float, last: int
) -> dict[str, Tensor]:
    """Return the student's losses, unweighted: `distill`, `inverse` and `consistency`.

    `taught` is what the teacher has made of `start`, x0 the truth. The inverse is asked for at index 0, but with
    the `scale` of the `last`, as published. In `consistency` no gradient passes through the inverse.
    """
    with torch.no_grad():
        back = student(x0 * scale, 0)
    return {
        "distill": F.mse_loss(student(start * scale, last), taught),
        "inverse": F.mse_loss(student(taught * scale, 0), start),
        "consistency": F.mse_loss(student(back * scale, last), x0),
    }
