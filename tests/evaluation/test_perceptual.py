"""Perceptual metrics: which pictures each is given, and the table that comes of it.

pyiqa itself needs torchvision, whose Linux wheels on the package index do not load beside a CPU build of torch, and
it fetches weights; the stand-in has the part of its interface that is used.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import identity_model
from PIL import Image

from tudsr_core.evaluation.measurement import Result, evaluate_model, tile_borders
from tudsr_core.evaluation.perceptual import Perceptual, perceptual_rows
from tudsr_core.missing_packages import needs


class Metric:
    def __init__(self, name):
        self.name, self.metric_mode, self.lower_better = name, "NR" if name == "musiq" else "FR", name != "musiq"

    def __call__(self, *given):
        if self.name == "fid":
            folders = [sorted(path.name for path in folder.iterdir()) for folder in map(self.path, given)]
            assert folders[0] == folders[1]
            with Image.open(self.path(given[0]) / folders[0][0]) as image:
                return len(folders[0]) + image.width / 100
        return torch.stack([one.mean() for one in given]).sum()

    @staticmethod
    def path(folder):
        from pathlib import Path

        return Path(folder)


@pytest.fixture
def stand_in(monkeypatch):
    names = ["fid", "musiq", "lpips"]
    module = SimpleNamespace(list_models=lambda: names, create_metric=lambda name, device: Metric(name))
    monkeypatch.setitem(sys.modules, "pyiqa", module)


def test_each_metric_gets_what_it_compares_and_the_table_has_means(stand_in):
    measured = Perceptual("fid, musiq,lpips")
    for number, value in enumerate((0.2, 0.4)):
        made, sharp = torch.full((1, 3, 8, 10), value), torch.full((1, 3, 8, 10), 0.5)
        measured.add(Result("clean x4", "ours", f"p{number}", made, made, sharp))
    heads, rows = perceptual_rows(measured)
    assert heads == ["case", "method", "FID down", "MUSIQ up", "LPIPS down"]
    assert rows == [["clean x4", "ours", "2.1000", "0.3000", "0.8000"]]


def test_names_that_pyiqa_does_not_know_are_refused(stand_in):
    with pytest.raises(ValueError, match="pyiqa has no metric clipiqa, niqe"):
        Perceptual("lpips,niqe,clipiqa")


def test_without_pyiqa_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(ImportError) as caught:
        Perceptual("lpips")
    assert needs(ModuleNotFoundError("no", name="pyiqa")) == "needs pyiqa; run: pip install pyiqa"
    assert caught.value.name == "pyiqa"


def test_seams_are_measured_where_tiles_begin_and_end(noise):
    model = identity_model()
    assert tile_borders(model, (40, 40), 4) == ([], [])  # one tile
    rows, columns = tile_borders(model, (100, 200), 8)
    assert rows and columns and all(edge % 8 == 0 for edge in rows + columns)
    assert 0 < min(rows) and max(rows) < 800 and max(columns) < 1600
    seen = []
    scores = evaluate_model(model, {"a": noise(3, 48, 64)}, cases=("clean",), watch=seen.append)
    assert {key[0] for key in scores} == {"clean x4", "clean x8"} and len(seen) == 11
    assert all(score["a"][2] is None for score in scores.values())
    assert seen[0].small.shape == (1, 3, 12, 16) and seen[0].made.shape == seen[0].sharp.shape == (1, 3, 48, 64)
