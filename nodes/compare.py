"""Two pictures over one another on the node, and how close they are to a third."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..tudsr_core.evaluation import figures_of, seams_of
from ..tudsr_core.tiling import TilePlan
from .images import rgb
from .inputs import CATEGORY, TilePlanType


class Compare(io.ComfyNode):
    """Two IMAGEs to a view on the node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRCompare",
            display_name="Compare Pictures",
            category=CATEGORY,
            description="Shows two pictures over one another: drag the divider, zoom both with the wheel, or show "
            "their difference amplified. With a reference, or if both are of one size, it says PSNR and SSIM too; with "
            "a plan, whether tiles show.",
            inputs=[
                io.Image.Input("before", tooltip="Shown left of the divider, as large as the other one."),
                io.Image.Input("after", tooltip="Shown right of the divider; its size counts."),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="The sharp original, if you have it: PSNR and SSIM of both are measured against it.",
                ),
                TilePlanType.Input(
                    "plan",
                    optional=True,
                    tooltip="The tiles that after was made in, from TUDSR Plan or Tile Plan: how much stronger edges "
                    "at their borders are than elsewhere, in each picture. What before has there is no seam.",
                ),
            ],
            outputs=[io.Image.Output(display_name="after", tooltip="The second picture, as it came.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, before, after, reference=None, plan=None) -> io.NodeOutput:
        pictures = {"before": before, "after": after}
        count = max(map(len, pictures.values()))
        for name, batch in [*pictures.items(), ("reference", reference)]:
            if batch is not None and len(batch) not in (1, count):
                raise ValueError(f"{count} pictures but {len(batch)} in {name!r}; give one, or one for each")
        colors = {name: rgb(batch).cpu() for name, batch in pictures.items()}
        truth = None if reference is None else rgb(reference).cpu()
        shown = {name: _saved(name, batch) for name, batch in pictures.items()}
        text = _measured(colors, truth, plan, count)
        return io.NodeOutput(after, ui=shown | ({"text": [text]} if text else {}))


def _saved(name: str, batch: Tensor) -> list[ui.SavedResult]:
    return ui.ImageSaveHelper.save_images(batch, f"tudsr-compare-{name}", io.FolderType.temp, None, compress_level=1)


def _measured(pictures: dict[str, Tensor], reference: Tensor | None, plan: TilePlan | None, count: int) -> str:
    """Return a line for every figure; with several pictures the lines are numbered."""
    lines = []
    for index in range(count):
        one = {name: batch[min(index, len(batch) - 1)][None] for name, batch in pictures.items()}
        truth = None if reference is None else reference[min(index, len(reference) - 1)][None]
        start = f"{index + 1}: " if count > 1 else ""
        found = (*figures_of(one, truth), *(seams_of(one, truth, plan) if plan else ()))
        lines += [start + figure.describe() for figure in found]
    return "\n".join(lines)
