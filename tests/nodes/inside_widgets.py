"""Checks of widgets and of what nodes say, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_widgets.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

import dataclasses
import gc
import math
import tempfile
from pathlib import Path

import inside as base  # first: it makes ComfyUI importable
from inside import NODES, embedded, part, picture, refused, stub_model, upscale

import comfy.model_base
import folder_paths
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_api.latest import io


def said(output):
    """Return the text that the node shows, empty if none."""
    shown = output.ui or {}
    shown = shown if isinstance(shown, dict) else shown.as_dict()
    return "\n".join(shown.get("text", ()))


class CountedCalls:
    """Counts how often any network is run."""

    def __enter__(self):
        self.calls, self.apply = 0, comfy.model_base.BaseModel.apply_model

        def apply(model, *args, **kwargs):
            self.calls += 1
            return self.apply(model, *args, **kwargs)

        comfy.model_base.BaseModel.apply_model = apply
        return self

    def __exit__(self, *_):
        comfy.model_base.BaseModel.apply_model = self.apply


def inputs_of(node):
    info = node.GET_NODE_INFO_V1()
    info = info if isinstance(info, dict) else vars(info)
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def check_every_float_takes_two_decimals():
    """The browser rounds what is typed to as many decimals as the step has, or to `round`."""
    for name, node in NODES.items():
        for widget, (kind, options, *_) in inputs_of(node).items():
            if kind == "FLOAT":
                decimals = -math.floor(math.log10(options.get("step", 0.5)))
                assert decimals >= 2, f"{name}.{widget}: 3.14 becomes {round(3.14, decimals)}"
                assert not options.get("round") or options["round"] <= 0.01, f"{name}.{widget}"


def check_no_seed_changes_by_itself():
    for name, node in NODES.items():
        for widget in ("seed", "noise_seed"):
            if widget in (inputs := inputs_of(node)):
                assert inputs[widget][1].get("control_after_generate") is False, f"{name}.{widget}"


def check_every_output_has_a_tooltip():
    for name, node in NODES.items():
        for output in node.GET_SCHEMA().outputs:
            assert output.tooltip, f"{name}.{output.display_name}"


def check_nodes_have_other_words_where_comfyui_searches_by_them():
    """Both with this ComfyUI's schema, and with one that has the field, as those since January 2026 do."""
    words = part("nodes.aliases").aliases_of

    @dataclasses.dataclass
    class Newer(io.Schema):
        search_aliases: list = dataclasses.field(default_factory=list)

    class Node(io.ComfyNode):
        schema = io.Schema

        @classmethod
        def define_schema(cls):
            return cls.schema(node_id="TUDSRCompare", display_name="Compare", category="x")

    part("nodes.host.search").found_by(Node, words)
    assert getattr(Node.define_schema(), "search_aliases", words("TUDSRCompare")) == words("TUDSRCompare")
    Node.schema = Newer
    assert Node.define_schema().search_aliases == words("TUDSRCompare")
    for name, node in NODES.items():
        if "search_aliases" in io.Schema.__dataclass_fields__:
            assert node.GET_SCHEMA().search_aliases == words(name)


def check_only_what_is_not_proven_is_experimental():
    flagged = {name for name, node in NODES.items() if node.GET_SCHEMA().is_experimental}
    assert flagged == {"TUDSRLoadDownsampler", "TUDSRDegradeLearned"}


def check_previews_are_made_unless_someone_has_turned_them_off():
    """`comfy.settings.json` as the browser stores it, broken, missing, and on a server with several users."""
    settings, model = part("nodes.host.settings"), embedded()[0]
    before, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    user = folder_paths.get_user_directory()
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_user_directory(folder)
        file = Path(folder) / "default" / "comfy.settings.json"
        try:
            bar = part("nodes.host.networks").ProgressBar
            assert bar(model).previewer is not None
            file.parent.mkdir()
            for text, shown in (
                ('{"TUDSR.Upscaling.Previews": false}', False),
                ('{"TUDSR.Upscaling.Previews": true}', True),
                ('{"Comfy.Locale": "zh"}', True),
                ("no json", True),
                ("[]", True),
            ):
                file.write_text(text, encoding="utf-8")
                assert (bar(model).previewer is not None) is shown, text
            file.write_text('{"TUDSR.Upscaling.Previews": false}', encoding="utf-8")
            args.multi_user = True
            assert settings.setting(settings.PREVIEWS, True) is True
        finally:
            folder_paths.set_user_directory(user)
            args.preview_method, args.multi_user = before, False


def check_a_seed_that_draws_nothing_computes_nothing():
    image, models = picture(1, 20, 24), embedded()
    with CountedCalls() as counted:
        first = upscale(4.0, image, models)
        once = counted.calls
        assert once > 0
        again = upscale(4.0, image, models, seed=7)
        assert counted.calls == once and again.args[0] is first.args[0]
        drawn = upscale(4.0, image, models, seed=7, sample_posterior=True)
        assert counted.calls == 2 * once
        upscale(4.0, image, models, seed=8, sample_posterior=True)
        assert counted.calls == 3 * once
        other = upscale(4.0, image.clone(), models)
        assert counted.calls == 4 * once and torch.equal(other.args[0], first.args[0])
        upscale(4.0, image, embedded(), seed=1)
        assert counted.calls == 5 * once
    assert drawn.args[0].shape == first.args[0].shape


def check_masks_sizes_and_timesteps_are_part_of_what_is_kept():
    image, models, masks = picture(1, 16, 16), embedded(), torch.zeros(2, 1, 16, 16)
    stage = {"factor": 2.0, "timestep": 0} | base.OPTIONS
    with CountedCalls() as counted:
        calls = 0
        for changes in ({}, {"mask": masks[0]}, {"mask": masks[1]}, {"long_edge": 48}, {"tile": 64}):
            upscale(2.0, image, models, **changes)
            assert counted.calls > calls, changes
            calls = counted.calls
        for timestep in (0, 100, 120):
            NODES["TUDSRStageOne"].execute(image, models[0], *models[2:], **(stage | {"timestep": timestep}))
            assert counted.calls > calls, timestep
            calls = counted.calls


def check_nothing_is_kept_beyond_its_picture():
    kept = part("nodes.upscale")._results._by_image
    gc.collect()
    before, image = len(kept), picture(1, 16, 16)
    upscale(2.0, image)
    assert len(kept) == before + 1
    del image
    gc.collect()
    assert len(kept) == before


def check_the_overlap_follows_a_small_tile_and_says_so():
    image, models = picture(1, 40, 40), embedded()
    word = "overlap 128 is not smaller than the tile (128); 64 is used"
    made = upscale(4.0, image, models, tile=128, overlap=128)
    assert word in said(made)
    assert torch.equal(made.args[0], upscale(4.0, image, models, tile=128, overlap=64).args[0])
    assert not said(upscale(4.0, image, models, tile=128, overlap=64))
    plan = NODES["TUDSRPlan"].execute(image, models[0], models[2], 4.0, 0, 0, 128, 128, 1)
    assert word in said(plan) and word not in plan.args[1]
    assert said(plan).startswith("40 x 40 to 160 x 160")
    tiles = NODES["TUDSRTilePlan"].execute(1.0, 640, 640, 128, 128, "even", 1)
    assert word in said(tiles) and tiles.args[0].overlap == 8
    assert word in said(NODES["TUDSRMultiDiffusion"].execute(stub_model(), 128, 128, 1, "uniform", False))


def check_only_the_warnings_of_the_run_are_shown():
    log = part("nodes.host.stages").log
    log.warning("of nobody")
    made = upscale(2.0, picture(1, 16, 16), tile=128, overlap=256)
    assert said(made).splitlines() == ["Note: overlap 256 is not smaller than the tile (128); 64 is used"]


def check_the_longer_edge_is_a_target():
    image, models = picture(1, 20, 30), embedded()
    assert upscale(4.0, image, models, long_edge=75).args[0].shape == (1, 50, 75, 3)
    assert upscale(4.0, image.transpose(1, 2), models, long_edge=75).args[0].shape == (1, 75, 50, 3)
    plan = NODES["TUDSRPlan"].execute(image, models[0], models[2], 4.0, 0, 0, 0, 128, 1, long_edge=75)
    assert plan.args[1].startswith("30 x 20 to 75 x 50")
    call = dict(stage_two=models[1], long_edge=75) | base.OPTIONS
    refused(
        lambda: NODES["TUDSRUpscale"].execute(image, models[0], *models[2:], 4.0, 75, 0, **call),
        "exactly one of scale, width / height, or long edge",
    )
    refused(lambda: upscale(4.0, image, models, long_edge=29), "smaller than the picture")


def check_the_dial_changes_the_picture_and_says_how():
    image, models = picture(1, 16, 16), embedded()
    plain = upscale(8.0, image, models)
    assert said(upscale(8.0, image, models, inventive=0.5)) == said(plain) == ""
    pictures = {place: upscale(8.0, image, models, inventive=place) for place in (0.0, 0.5, 0.8)}
    assert torch.equal(pictures[0.5].args[0], plain.args[0])
    assert not torch.equal(pictures[0.0].args[0], pictures[0.8].args[0])
    how = "inventive 0.8 (x1.3 of its sharpening, which invents nothing)"
    assert said(pictures[0.8]).splitlines() == [f"stage one: {how}", f"stage two: {how}"]
    plan = NODES["TUDSRPlan"].execute(image, models[0], models[2], 4.0, 0, 0, 0, 128, 1, inventive=0.8)
    assert how in plan.args[1]
    local, pipeline, target = (
        part(f"tudsr_core.{name}") for name in ("backends.local", "methods.two_stage", "methods.plan")
    )
    options = pipeline.UpscaleOptions(128, 32, color_fix="none")
    model = local.load_embedded("cpu", inventive=0.8)
    wanted = pipeline.upscale(image.movedim(-1, 1), model, target.Target(scale=8), options).movedim(1, -1)
    assert (pictures[0.8].args[0] - wanted).abs().max() < 1 / 255
    refused(lambda: upscale(8.0, image, models, inventive=1.5), "must be from 0 (faithful) to 1 (inventive)")


def check_conditionings_are_part_of_what_is_kept():
    image, (first, second, vae, words) = picture(1, 16, 16), embedded()
    stage = {"factor": 2.0, "timestep": 0} | base.OPTIONS
    with CountedCalls() as counted:
        for name, model in (("TUDSRStageOne", first), ("TUDSRStageTwo", second)):
            for given in (words, list(words)):
                calls = counted.calls
                NODES[name].execute(image, model, vae, given, **stage)
                assert counted.calls > calls, name


if __name__ == "__main__":
    base.main(globals())
