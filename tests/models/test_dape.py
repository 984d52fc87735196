import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tudsr_core.cli.app import app
from tudsr_core.models import dape
from tudsr_core.models.dape import DapeTagger, load_tagger, read_lists, read_published, write_tagger
from tudsr_core.models.ram import RamConfig, RamTagger, prepare
from tudsr_core.models.swin import SwinConfig
from tudsr_core.weights.tensor_files import CheckpointError

LABELS = 40
SMALL = RamConfig(
    SwinConfig(image_px=64, width=8, depths=(2, 2, 2), heads=(1, 2, 4), window=4),
    labels=LABELS,
    token_width=16,
    width=24,
    heads=4,
)
RAM_HEAD = {ours: theirs for theirs, ours in dape.HEAD_PARTS.items()}


def ram_name(key):
    """The published name of one of our tensors."""
    if not key.startswith("head."):
        return key
    _, layer, part, kind = key.split(".")
    return f"tagging_head.encoder.layer.{layer}.{RAM_HEAD[part]}.{kind}"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published files in miniature and random: weights, updates, both lists."""
    folder = tmp_path_factory.mktemp("ram")
    torch.manual_seed(0)
    network = RamTagger(SMALL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        network.label_embed.mul_(5)
        network.fc.weight.mul_(5)
        network.fc.bias.sub_(network(prepare(pictures(1), 64)).median())
    weights = {ram_name(key): value for key, value in network.state_dict().items()}
    spare = {
        "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(2, dtype=torch.long),
        "visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(2),
        "tag_encoder.encoder.layer.5.output.dense.weight": torch.zeros(2),
        "text_decoder.cls.bias": torch.zeros(2),
        "temp": torch.zeros(()),
    }
    torch.save({"model": weights | spare, "optimizer": {"step": 3}, "epoch": 1}, folder / dape.RAM_FILE)
    updates = {}
    for key, value in network.state_dict().items():
        if key.endswith("attn.qkv.weight"):
            width = value.shape[1]
            updates[key.replace("weight", "lora_A")] = torch.randn(16, width) * 0.3
            updates[key.replace("weight", "lora_B")] = torch.randn(2 * width, 8) * 0.3
        elif key.startswith("head.") and key.endswith(("query.weight", "key.weight")):
            updates[ram_name(key).replace("weight", "lora_A")] = torch.randn(8, value.shape[1]) * 0.3
            updates[ram_name(key).replace("weight", "lora_B")] = torch.randn(value.shape[0], 8) * 0.3
    updates["tag_encoder.encoder.layer.0.crossattention.self.query.lora_A"] = torch.ones(8, 24)
    torch.save(updates, folder / dape.DAPE_FILE)
    (folder / dape.LIST_FILE).write_text("\n".join(f"thing {index}" for index in range(LABELS)), encoding="utf-8")
    (folder / dape.THRESHOLD_FILE).write_text(
        "".join(f"{0.3 + 0.01 * index:.2f}\n" for index in range(LABELS)), encoding="utf-8"
    )
    return folder


def read(folder, with_dape=True, ram=None):
    return read_published(ram or folder / dape.RAM_FILE, folder / dape.DAPE_FILE if with_dape else None, folder, SMALL)


def pictures(count=3, size=(70, 110)):
    generator = torch.Generator().manual_seed(4)
    return torch.rand(count, 3, *size, generator=generator)


# An independent, slow tagger: one token, one head, one label at a time, straight from the papers.


def slow_layer_norm(x, weight, bias, eps):
    mean = x.mean()
    return (x - mean) / (((x - mean) ** 2).mean() + eps) ** 0.5 * weight + bias


def slow_attention(q, k, v, biases):
    scores = torch.stack([(q * key).sum() / math.sqrt(len(q)) for key in k]) + biases
    return (torch.softmax(scores, 0)[:, None] * v).sum(0)


def slow_block(x, w, name, heads, window, shift):
    """A Swin block on a dict {(row, column): token} of a square picture; each token picks its own neighbours."""
    side, width = max(y for y, _ in x) + 1, len(x[0, 0])
    if side <= window:
        window, shift = side, 0
    normed = {at: slow_layer_norm(t, w[name + "norm1.weight"], w[name + "norm1.bias"], 1e-5) for at, t in x.items()}
    qkv = {at: w[name + "attn.qkv.weight"] @ t + w[name + "attn.qkv.bias"] for at, t in normed.items()}
    table = w[name + "attn.relative_position_bias_table"]
    # In the shifted picture, position p shows what was at p + shift; windows partition the shifted one.
    group = {(y, x_): (((y - shift) % side) // window, ((x_ - shift) % side) // window) for y, x_ in x}
    # Tokens that wrapped around are in the same window, but in another region.
    wrapped = {(y, x_): (y < shift, x_ < shift) for y, x_ in x}
    out, size = {}, width // heads
    for at in x:
        others = [other for other in x if group[other] == group[at]]
        mixed = []
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            biases = []
            for other in others:
                dy = (at[0] - shift) % side - (other[0] - shift) % side + window - 1
                dx = (at[1] - shift) % side - (other[1] - shift) % side + window - 1
                apart = 0.0 if wrapped[other] == wrapped[at] else -100.0
                biases.append(table[dy * (2 * window - 1) + dx, head] + apart)
            keys = torch.stack([qkv[other][width:][: 2 * width][rows] for other in others])
            values = torch.stack([qkv[other][2 * width :][rows] for other in others])
            mixed.append(slow_attention(qkv[at][:width][rows], keys, values, torch.stack(biases)))
        token = x[at] + w[name + "attn.proj.weight"] @ torch.cat(mixed) + w[name + "attn.proj.bias"]
        hidden = slow_layer_norm(token, w[name + "norm2.weight"], w[name + "norm2.bias"], 1e-5)
        hidden = w[name + "mlp.fc1.weight"] @ hidden + w[name + "mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        out[at] = token + w[name + "mlp.fc2.weight"] @ hidden + w[name + "mlp.fc2.bias"]
    return out


def slow_swin(picture, w, config):
    patch, x = config.patch_px, {}
    for row in range(config.image_px // patch):
        for column in range(config.image_px // patch):
            part = picture[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            token = (w["patch_embed.proj.weight"] * part).sum((1, 2, 3)) + w["patch_embed.proj.bias"]
            x[row, column] = slow_layer_norm(token, w["patch_embed.norm.weight"], w["patch_embed.norm.bias"], 1e-5)
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}."
            x = slow_block(x, w, name, config.heads[stage], config.window, config.window // 2 * (block % 2))
        if stage < len(config.depths) - 1:
            name, merged = f"layers.{stage}.downsample.", {}
            for row, column in {(y // 2, c // 2) for y, c in x}:
                four = [x[2 * row + dy, 2 * column + dx] for dx in (0, 1) for dy in (0, 1)]
                four = slow_layer_norm(torch.cat(four), w[name + "norm.weight"], w[name + "norm.bias"], 1e-5)
                merged[row, column] = w[name + "reduction.weight"] @ four
            x = merged
    return [slow_layer_norm(x[at], w["norm.weight"], w["norm.bias"], 1e-5) for at in sorted(x)]


def slow_logits(picture, weights, config):
    w = {key: value.double() for key, value in weights.items()}
    inner = {k.removeprefix("visual_encoder."): v for k, v in w.items() if k.startswith("visual_encoder.")}
    features = slow_swin(picture.double(), inner, config.swin)
    features = [torch.stack(features).mean(0), *features]
    tokens = [w["image_proj.weight"] @ token + w["image_proj.bias"] for token in features]
    logits = []
    for label in w["label_embed"]:
        x = (w["wordvec_proj.weight"] @ label + w["wordvec_proj.bias"]).clamp(min=0)
        for layer in range(config.layers):
            name = f"tagging_head.encoder.layer.{layer}."
            side = name + "crossattention.self."
            q = w[side + "query.weight"] @ x + w[side + "query.bias"]
            keys = torch.stack([w[side + "key.weight"] @ t + w[side + "key.bias"] for t in tokens])
            values = torch.stack([w[side + "value.weight"] @ t + w[side + "value.bias"] for t in tokens])
            size = len(q) // config.heads
            heads = [slice(i * size, (i + 1) * size) for i in range(config.heads)]
            mixed = torch.cat([slow_attention(q[h], keys[:, h], values[:, h], torch.zeros(len(keys))) for h in heads])
            side = name + "crossattention.output."
            x = x + w[side + "dense.weight"] @ mixed + w[side + "dense.bias"]
            x = slow_layer_norm(x, w[side + "LayerNorm.weight"], w[side + "LayerNorm.bias"], 1e-12)
            hidden = w[name + "intermediate.dense.weight"] @ x + w[name + "intermediate.dense.bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            x = x + w[name + "output.dense.weight"] @ hidden + w[name + "output.dense.bias"]
            x = slow_layer_norm(x, w[name + "output.LayerNorm.weight"], w[name + "output.LayerNorm.bias"], 1e-12)
        logits.append((w["fc.weight"] @ x + w["fc.bias"])[0])
    return torch.stack(logits)


def merged_by_hand(folder):
    """The published weights with every update added as the formula says, k untouched."""
    weights = {k: v.clone() for k, v in torch.load(folder / dape.RAM_FILE)["model"].items()}
    updates = torch.load(folder / dape.DAPE_FILE)
    for key in [key for key in updates if key.endswith("lora_A") and not key.startswith("tag_encoder")]:
        down, up, weight = updates[key], updates[key.replace("_A", "_B")], weights[key.replace("lora_A", "weight")]
        if "qkv" in key:
            width = weight.shape[1]
            weight[:width] += up[:width] @ down[:8] / 8
            weight[2 * width :] += up[width:] @ down[8:] / 8
        else:
            weight += up @ down / 8
    return weights


def test_tags_equal_a_slow_implementation(published):
    tagger, weights = read(published), merged_by_hand(published)
    image = pictures(1)
    prepared = prepare(image, 64)
    with torch.inference_mode():
        ours = tagger.network(prepared)[0]
    slow = slow_logits(prepared[0], weights, SMALL)
    assert (ours - slow).abs().max() < 1e-4
    limits = [float(line) for line in (published / dape.THRESHOLD_FILE).read_text("utf-8").split()]
    names = (published / dape.LIST_FILE).read_text("utf-8").split("\n")
    kept = [n for n, p, limit in zip(names, torch.sigmoid(slow).tolist(), limits, strict=True) if p > limit]
    assert 3 < len(kept) < LABELS - 3
    assert tagger.tags(image) == [", ".join(kept)]


def test_updates_change_q_and_v_and_never_k(published):
    plain, adapted = (read(published, with_dape).network.state_dict() for with_dape in (False, True))
    for key, before in plain.items():
        change = adapted[key] - before
        if key.endswith("attn.qkv.weight"):
            q, k, v = change.chunk(3)
            assert q.abs().max() > 1e-2 and v.abs().max() > 1e-2
            assert not k.any()
        elif key.startswith("head.") and key.endswith(("query.weight", "key.weight")):
            assert change.abs().max() > 1e-2
        else:
            assert not change.any(), key


def test_every_tag_has_its_own_threshold_and_the_lists_order(published):
    tagger = read(published)
    probability = tagger.probabilities(pictures(1))[0]
    wanted = [5, 11, 30]
    # The kept tags' probabilities fall while their numbers rise, so that order by score would show.
    order = probability.argsort(descending=True).tolist()
    names = ["-"] * LABELS
    limits = [float(p) + 1e-4 for p in probability]
    for name, index in zip("cba", wanted, strict=True):
        names[index], limits[index] = name, float(probability[index]) - 1e-4
    assert [index for index in order if index in wanted] != wanted
    chosen = DapeTagger(tagger.network, tuple(names), tuple(limits), "test")
    assert chosen.tags(pictures(1)) == ["c, b, a"]
    never = DapeTagger(tagger.network, tuple(names), (1.0,) * LABELS, "test")
    assert never.tags(pictures(1)) == [""]


def test_tags_do_not_depend_on_the_batch(published):
    tagger, images = read(published), pictures(3)
    together = tagger.probabilities(images)
    assert torch.equal(together, torch.cat([tagger.probabilities(image[None]) for image in images]))
    assert tagger.tags(images[:0]) == []
    with pytest.raises(ValueError, match="B 3 H W"):
        tagger.tags(images[0])


def test_prepare_is_the_published_transform():
    x = torch.linspace(0, 1, 12).view(1, 3, 2, 2)
    made = prepare(x, 4)[0, 0]
    # Bilinear, half-pixel centres: 3/4 and 1/4 of the two neighbours inside, the border repeated outside.
    row = [x[0, 0, 0, 0] * (1 - f) + x[0, 0, 0, 1] * f for f in (0, 0.25, 0.75, 1)]
    assert torch.allclose(made[0] * 0.229 + 0.485, torch.stack(row), atol=1e-6)
    stripes = torch.arange(64).remainder(2).float().expand(1, 3, 64, 64)
    shrunk = prepare(stripes, 20)[0, 0] * 0.229 + 0.485
    assert (shrunk[:, 2:-2] - 0.5).abs().max() < 0.05


def test_converted_file_tags_alike(published, tmp_path):
    tagger = read(published)
    write_tagger(tmp_path / "dape.safetensors", tagger)
    again = load_tagger(tmp_path / "dape.safetensors")
    assert (again.labels, again.thresholds, again.network.config) == (tagger.labels, tagger.thresholds, SMALL)
    found = tagger.network.state_dict()
    for key, value in again.network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, found[key].half().float()), key
    assert (again.probabilities(pictures()) - tagger.probabilities(pictures())).abs().max() < 0.01
    assert all(value.dtype == torch.float16 for value in load_file(tmp_path / "dape.safetensors").values())
    write_tagger(tmp_path / "again.safetensors", again)
    assert load_tagger(tmp_path / "again.safetensors").fingerprint() == again.fingerprint() != tagger.fingerprint()


def test_other_names_of_the_decoder_are_understood(published, tmp_path):
    """Older files call it vision_multi; it may also be stored only as tag_encoder's lowest layers."""
    weights = torch.load(published / dape.RAM_FILE)["model"]
    for name in ("vision_multi.", "tag_encoder."):
        renamed = {key.replace("tagging_head.", name): value for key, value in weights.items()}
        torch.save({"model": renamed}, tmp_path / "ram.pth")
        other = read(published, ram=tmp_path / "ram.pth")
        assert other.fingerprint() == read(published).fingerprint()


def hostile(published, tmp_path, change):
    stored = torch.load(published / dape.RAM_FILE)
    torch.save(change(stored["model"]) or stored, tmp_path / "bad.pth")
    return tmp_path / "bad.pth"


def drop(key):
    return lambda weights: weights.pop(key) is None or None


def put(key, value):
    return lambda weights: weights.__setitem__(key, value)


BAD_WEIGHTS = {
    "missing": (drop("visual_encoder.layers.1.blocks.0.mlp.fc1.weight"), "missing visual_encoder.layers.1.blocks.0"),
    "no head": (drop("tagging_head.encoder.layer.1.output.dense.bias"), "missing head.1.fc2.bias"),
    "shape": (put("label_embed", torch.zeros(LABELS * 51, 16)), r"wrong shape label_embed \(\(2040, 16\), not \(40"),
    "unknown": (put("visual_encoder.layers.3.norm.weight", torch.zeros(1)), "unknown visual_encoder.layers.3"),
    "unknown head": (put("tagging_head.pooler.weight", torch.zeros(1)), "unknown tagging_head.pooler"),
    "no tensor": (put("fc.bias", "text"), "no table of tensors"),
    "nan": (put("fc.bias", torch.tensor([math.nan])), "fc.bias contains NaN or infinite"),
    "list": (lambda weights: {"model": [1, 2]}, "no table of tensors"),
    "another list": (lambda weights: [1, 2], "not a dict of tensors"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_one_clear_error(name, published, tmp_path):
    change, says = BAD_WEIGHTS[name]
    path = hostile(published, tmp_path, change)
    with pytest.raises(CheckpointError, match=says) as caught:
        read(published, ram=path)
    assert str(path) in str(caught.value)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_unpickled(published, tmp_path):
    torch.save({"model": {"fc.bias": Trap(tmp_path / "sprung")}}, tmp_path / "trap.pth")
    (tmp_path / "cut.pth").write_bytes((published / dape.RAM_FILE).read_bytes()[:5000])
    (tmp_path / "noise.pth").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("trap", "cut", "noise", "empty"):
        with pytest.raises(CheckpointError, match="cannot be read safely"):
            read(published, ram=tmp_path / f"{name}.pth")
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(CheckpointError, match="does not exist"):
        read(published, ram=tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("visual_encoder.layers.0.blocks.0.attn.qkv.lora_A"), "missing visual_encoder.layers.0.blocks.0.attn.qkv"),
        (put("visual_encoder.layers.9.attn.qkv.lora_A", torch.zeros(1)), "unknown visual_encoder.layers.9"),
        (put("tagging_head.encoder.layer.0.crossattention.self.key.lora_B", torch.zeros(24, 4)), "wrong shape head.0"),
        (put("visual_encoder.layers.0.blocks.0.attn.qkv.lora_A", torch.full((16, 8), math.inf)), "NaN or infinite"),
    ],
)
def test_updates_that_do_not_fit_are_one_clear_error(change, says, published, tmp_path):
    updates = torch.load(published / dape.DAPE_FILE)
    change(updates)
    torch.save(updates, tmp_path / "DAPE.pth")
    with pytest.raises(CheckpointError, match=says) as caught:
        read_published(published / dape.RAM_FILE, tmp_path / "DAPE.pth", published, SMALL)
    assert str(tmp_path / "DAPE.pth") in str(caught.value)


def test_lists_that_do_not_fit_are_one_clear_error(published, tmp_path, caplog):
    with pytest.raises(CheckpointError, match="get it from .*recognize-anything"):
        read_lists(tmp_path, LABELS)
    for name in (dape.LIST_FILE, dape.THRESHOLD_FILE):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    assert read_lists(tmp_path, LABELS)[0][7] == "thing 7"
    assert "differs from the published list" in caplog.text
    with pytest.raises(CheckpointError, match="has 40 lines, but the weights know 4585"):
        read_lists(tmp_path, 4585)
    for content, says in (("0.5\n" * 39 + "high\n", "numbers"), ("0.5\n" * 39 + "nan\n", "finite")):
        (tmp_path / dape.THRESHOLD_FILE).write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=says):
            read_lists(tmp_path, LABELS)
    (tmp_path / dape.LIST_FILE).write_bytes(b"\xff\xfe\n" * 40)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_lists(tmp_path, LABELS)


def test_converted_files_that_do_not_fit_are_one_clear_error(published, tmp_path):
    path = tmp_path / "dape.safetensors"
    write_tagger(path, read(published))
    weights = {key: value.clone() for key, value in load_file(path).items()}  # not of the file that is replaced
    with pytest.raises(CheckpointError, match="give the folder"):
        load_tagger(published / dape.RAM_FILE)
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="not a tagger of this pack"):
        load_tagger(path)
    for facts in ("{", "[]", json.dumps({"swin": {"depth": 3}, "head": {}, "tags": [], "thresholds": []})):
        save_file(weights, path, {"format": dape.TAGGER_FORMAT, "tagger": facts})
        with pytest.raises(CheckpointError, match="the metadata of .*(cannot be read|must be a table|lacks 'depths')"):
            load_tagger(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_tagger(path)


def test_a_folder_of_published_files_is_enough(published, monkeypatch):
    monkeypatch.setattr(dape, "RamConfig", lambda: SMALL)
    assert load_tagger(published).name == "DAPE"
    assert load_tagger(published).fingerprint() == read(published).fingerprint()


def test_the_commands_convert_and_inspect(published, tmp_path, monkeypatch):
    monkeypatch.setattr(dape, "RamConfig", lambda *sizes, **more: RamConfig(*sizes, **more) if more else SMALL)
    path = tmp_path / "made" / "dape.safetensors"
    done = CliRunner().invoke(app, ["convert", str(published), "-o", str(path)])
    assert done.exit_code == 0, done.output
    assert "DAPE, 40 tags, fp16" in done.output
    assert load_tagger(path).labels[39] == "thing 39"
    done = CliRunner().invoke(app, ["inspect", str(path)])
    assert "tagger of 40 tags" in done.output
    assert CliRunner().invoke(app, ["convert", str(published), "-o", str(path)]).exit_code == 1


def test_the_full_size_is_the_published_one():
    """Tensor names and sizes of the real files, counted in the published modules."""
    with torch.device("meta"):
        weights = RamTagger(RamConfig()).state_dict()
    assert sum(value.numel() for key, value in weights.items() if key.startswith("visual_encoder.")) == 195_198_516
    assert weights["visual_encoder.layers.2.blocks.17.attn.relative_position_bias_table"].shape == (529, 24)
    assert weights["label_embed"].shape == (4585, 512)
    assert sum(key.startswith("head.") for key in weights) == 32
    assert sum(value.numel() for value in weights.values()) < 213e6
