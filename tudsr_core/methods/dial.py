"""The dial from faithful (0) to inventive (1) that all upscalers share, and what it turns in each of them.

At NEUTRAL nothing is touched: the method as trained, or as its own dials are set, to the bit. A method with a dial of
its own for this (`Method.dial`) gets that one turned. The others were trained at one timestep and one strength, away
from which nobody knows what their networks say; what is scaled there is the step's result: z_L + s (z_H - z_L), the
change of the latent, as PiSA-SR's two weights do when both are s.
"""

from __future__ import annotations

from dataclasses import dataclass

from .published import Method

NEUTRAL = 0.5


@dataclass(frozen=True)
class Dials:
    """What is in effect in one stage: strength s, number of evaluations, PiSA-SR's l_pix and l_sem, and it in words."""

    strength: float = 1.0
    count: int = 1
    fidelity: float = 1.0
    detail: float = 1.0
    words: str = ""


def turned(inventive: float, about: Method | None, count: int = 1, fidelity: float = 1.0, detail: float = 1.0) -> Dials:
    """Return the dials of a method (None: of no published one) whose own are set to `count`, `fidelity` and `detail`.

    Raises ValueError for `inventive` outside 0..1, and for one of the method's own dials that it would turn and that
    is set already.
    """
    check_inventive(inventive)
    own = Dials(1.0, count, fidelity, detail)
    if inventive == NEUTRAL:
        return own
    said = f"inventive {inventive:g}"
    if about and about.dial == "detail":
        _refuse_both(about, "fidelity and detail", (fidelity, detail) != (1, 1))
        detail = min(2 * inventive, 0.5 + inventive)  # 0: pixel-level part alone; 1: as far as its authors went
        return Dials(detail=detail, words=f"{said} (detail {detail:g})")
    if about and about.dial == "steps" and inventive > NEUTRAL:
        _refuse_both(about, "steps", count != 1)
        count = about.counts[round((inventive - NEUTRAL) * 2 * (len(about.counts) - 1))]
        return Dials(count=count, words=f"{said} ({count} step{'s' if count > 1 else ''})")
    strength = 0.5 + inventive
    what = "what it changes" if about else "its sharpening, which invents nothing"
    return Dials(strength, count, fidelity, detail, f"{said} (x{strength:g} of {what})")


def check_inventive(inventive: float) -> None:
    """Raise ValueError unless `inventive` is a place of the dial."""
    if not 0 <= inventive <= 1:
        raise ValueError(f"inventive {inventive:g} must be from 0 (faithful) to 1 (inventive); 0.5 changes nothing")


def _refuse_both(about: Method, names: str, is_set: bool) -> None:
    if is_set:
        raise ValueError(
            f"{names} of {about.title} and the dial 'inventive' set the same thing; leave inventive at {NEUTRAL:g}, or "
            f"{names} at 1"
        )


def fusion_weight(inventive: float) -> float:
    """Return CFW's w (StableSR) for a place of the dial: 1 is as close to the picture as it was trained to keep."""
    check_inventive(inventive)
    return 1 - inventive


def branch_weights(fidelity: float, detail: float) -> list[tuple[float, bool]]:
    """Return `(w_j, whether branch j has the detail updates)` with eps = sum of w_j B_j (PiSA-SR, adjustable).

    eps = l_pix eps_pix + l_sem (eps_full - eps_pix), so the full branch has weight l_sem and the pixel-level one
    l_pix - l_sem; branches without weight are left out.
    """
    weights = [(detail, True), (fidelity - detail, False)]
    return [(weight, full) for weight, full in weights if weight] or [(0.0, False)]
