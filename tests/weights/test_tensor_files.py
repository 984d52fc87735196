import json
import os
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile

import pytest
import torch
from fuzz.archives import Evil, good, header, index, rezip
from safetensors.torch import save_file

from tudsr_core.weights.tensor_files import CheckpointError, read_file, stream, write_file


def test_pickles_of_tensors_are_read(tmp_path):
    file = read_file(good(tmp_path / "good.pkl"))
    assert torch.equal(file.tensors["w"], torch.arange(6.0)) and file.tensors["half"].dtype == torch.float16
    torch.save({"rank": 4, "names": ["a"], "state_dict_unet": {"a": torch.ones(1)}}, tmp_path / "nested.pkl")
    file = read_file(tmp_path / "nested.pkl")
    assert list(file.tensors) == ["state_dict_unet.a"] and file.values == {"rank": 4, "names": ["a"]}


def test_code_in_pickles_is_never_run(tmp_path):
    mark = tmp_path / "was-run"
    torch.save({"state_dict": {"w": torch.ones(2)}, "more": Evil(mark)}, tmp_path / "new.pkl")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps({"state_dict": Evil(mark)}))
    torch.save({"state_dict": Evil(mark)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("new.pkl", "old.ckpt", "legacy.pt"):
        with pytest.raises(CheckpointError, match="cannot be read safely"):
            read_file(tmp_path / name)
    assert not mark.exists()
    with pytest.raises(CheckpointError, match="save only its tensors, best as .safetensors"):
        read_file(tmp_path / "new.pkl")


@pytest.fixture
def lightning(monkeypatch):
    """Stand-ins for Lightning's classes, which files name; gone when a file is read."""
    made = {}
    for module, name in (("model_checkpoint", "ModelCheckpoint"), ("early_stopping", "EarlyStopping")):
        where = f"pytorch_lightning.callbacks.{module}"
        made[name] = type(name, (), {"__module__": where})
        for path in ("pytorch_lightning", "pytorch_lightning.callbacks", where):
            monkeypatch.setitem(sys.modules, path, sys.modules.get(path) or types.ModuleType(path))
        setattr(sys.modules[where], name, made[name])
    return made


def checkpoint(callbacks):
    return {"epoch": 3, "callbacks": callbacks, "optimizer_states": [], "state_dict": {"w": torch.arange(3.0)}}


def test_lightnings_checkpoints_are_read(tmp_path, lightning):
    """Its class is a key there; nothing of Lightning is imported, and torch trusts no more than before."""
    before = set(torch.serialization.get_safe_globals())
    remembered = {"monitor": "val/rec_loss", "best_model_score": torch.ones(1)}
    torch.save(checkpoint({lightning["ModelCheckpoint"]: remembered}), tmp_path / "cfw.ckpt")
    for path in [path for path in sys.modules if path.startswith("pytorch_lightning")]:
        del sys.modules[path]
    file = read_file(tmp_path / "cfw.ckpt")
    assert torch.equal(file.tensors["w"], torch.arange(3.0)) and file.values == {}
    assert not [path for path in sys.modules if path.startswith("pytorch_lightning")]
    assert set(torch.serialization.get_safe_globals()) == before


CLASS = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x80\x02" + CLASS + b")R.", "torch.save never calls"),
        (b"\x80\x02" + CLASS + b")\x81.", "NEWOBJ, which torch.save never does"),
        (b"\x80\x02" + CLASS + b"}b.", "cannot be read safely"),
        (b"\x80\x02}" + CLASS + b"\x85K\x01s.", "neither a text nor a small number"),
        (b"\x80\x02}" + CLASS.replace(b"ModelC", b"OtherC") + b"K\x01s.", "OtherCheckpoint"),
        (b"\x80\x02" + CLASS + b".", "holds a type"),
    ],
)
def test_lightnings_class_is_nothing_but_a_key(data, says, tmp_path):
    index(tmp_path / "bad.ckpt", data)
    with pytest.raises(CheckpointError, match=says):
        read_file(tmp_path / "bad.ckpt")


def test_other_classes_of_lightning_are_refused(tmp_path, lightning):
    torch.save(checkpoint({lightning["EarlyStopping"]: {}}), tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="pytorch_lightning.callbacks.early_stopping.EarlyStopping"):
        read_file(tmp_path / "other.ckpt")


def expanded(path):
    torch.save({"w": torch.zeros(1).expand(2**38)}, path)


def bomb(path):
    rezip(good(path.with_suffix(".tmp")), path, lambda name, data: data, zipfile.ZIP_DEFLATED)


def many_entries(path):
    rezip(good(path.with_suffix(".tmp")), path, extra=[(f"data/{i}", b"") for i in range(20_001)])


def two_indexes(path):
    rezip(good(path.with_suffix(".tmp")), path, extra=[("other/data.pkl", b"")])


def overlapping(path):
    """Two directory entries for the same large bytes: more unpacked than the file holds."""
    good(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("data/big", b"x" * 100_000)
        archive.filelist += [archive.getinfo("data/big")] * 5
        archive._didModify = True


def saved(value):
    return lambda path: torch.save({"w": value}, path)


def aliased(path):
    """Ten thousand names for the same 400 kB."""
    large = torch.ones(100_000)
    torch.save({f"w{i}": large for i in range(10_000)}, path)


def colliding(path):
    """Numbers whose hashes are all alike: a table of them takes minutes to fill."""
    keys = b"".join(pickle.dumps((2**61 - 1) << i, 2)[2:-1] + b"K\x01" for i in range(1000))
    index(path, b"\x80\x02}(" + keys + b"u.")


NESTED_KEY = b"\x80\x02}K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s."


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (saved(torch.ones(2, device="meta")), "_rebuild_meta_tensor_no_storage"),
        (saved(torch.nested.nested_tensor([torch.ones(2)])), "_rebuild_nested_tensor"),
        (saved(torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)), "more than tensors and plain values"),
        (saved(torch.ones(3).to_sparse()), "more than tensors and plain values"),
        (saved(torch.ones(3, dtype=torch.complex64)), "torch.ComplexFloatStorage"),
        (saved(bytearray(9)), "builtin"),
        (saved({1, 2}), "more than tensors|EMPTY_SET"),
        (aliased, "its tensors claim more values than the file holds"),
        (colliding, "neither a text nor a small number"),
        (lambda p: index(p, NESTED_KEY), "neither a text nor a small number"),
        (lambda p: index(p, b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R."), "builtins.bytearray"),
        (lambda p: index(p, b"\x80\x02ctorch\nFloatStorage\nJ\x00\x00\x00\x7f\x85R."), "torch.save never calls"),
        (lambda p: index(p, b"\x80\x02" + b"]" * 3_000_000 + b"."), "far longer than that of a model"),
        (lambda p: index(p, b"\x80\x02}h\x07"), "its index is damaged"),
        (lambda p: p.write_bytes(good(p).read_bytes()[:-200]), "only a part of one"),
        (lambda p: p.write_bytes(b""), "it is empty"),
        (lambda p: p.write_text("<!DOCTYPE html><html>sign in", encoding="utf-8"), "it is a web page"),
        (
            lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0", encoding="utf-8"),
            "Git LFS pointer",
        ),
        (lambda p: p.write_bytes(random.Random(0).randbytes(5000)), "no archive of torch.save"),
        (lambda p: torch.save([1, 2], p), "holds a list"),
        (expanded, "claims more values than the file holds"),
        (bomb, "entries are compressed"),
        (many_entries, "it has 20,0"),
        (two_indexes, "index is not that of a model"),
        (overlapping, "more bytes than the file has"),
    ],
)
def test_hostile_and_damaged_pickles(tmp_path, make, says):
    make(tmp_path / "bad.pkl")
    with pytest.raises(CheckpointError, match=says) as caught:
        read_file(tmp_path / "bad.pkl")
    assert "bad.pkl" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: header(p, {"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}), "not a whole"),
        (
            lambda p: header(p, {"w": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}}, b"0000"),
            "not a whole",
        ),
        (lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}"), "not a whole"),
        (lambda p: (save_file({"w": torch.ones(99)}, p), p.write_bytes(p.read_bytes()[:-8])), "not a whole"),
        (lambda p: p.write_text("<html>", encoding="utf-8"), "it is a web page"),
        (
            lambda p: header(p, {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**5)}),
            "100,000 tensors",
        ),
        (lambda p: header(p, {"__metadata__": {"x": "y" * 2**25}}), "a header of 33,"),
        (lambda p: header(p, {"__metadata__": json.loads("[" * 900 + "]" * 900)}), "not a whole"),
        (
            lambda p: header(p, {"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
            "w is stored as torch.complex64",
        ),
        (
            lambda p: header(p, {"w": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}, bytes(1)),
            "w is stored as|w cannot be read|not a whole",
        ),
        (
            lambda p: header(p, {"w" * 5000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
            "w... is too long",
        ),
        (
            lambda p: header(p, {"\x1b[2J": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
            r": \\x1b\[2J is stored",
        ),
    ],
)
def test_hostile_and_damaged_safetensors(tmp_path, make, says):
    make(tmp_path / "bad.safetensors")
    for read in (read_file, lambda path: list(stream(path))):
        with pytest.raises(CheckpointError, match=says):
            read(tmp_path / "bad.safetensors")


PROBE = """
import resource, sys
from pathlib import Path
import torch
from tudsr_core.weights.tensor_files import CheckpointError, read_file
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        read_file(Path(name))
    except CheckpointError:
        continue
    raise SystemExit(f"{name} was accepted")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_refusing_hostile_files_takes_little_memory(tmp_path):
    expanded(tmp_path / "a.pkl")
    many_entries(tmp_path / "b.pkl")
    header(tmp_path / "c.safetensors", {"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}})
    raw = good(tmp_path / "zeros.pkl")
    rezip(
        raw, tmp_path / "d.pkl", lambda name, data: bytes(2**28) if name.endswith("/0") else data, zipfile.ZIP_DEFLATED
    )
    files = [str(tmp_path / name) for name in ("a.pkl", "b.pkl", "c.safetensors", "d.pkl")]
    done = subprocess.run([sys.executable, "-c", PROBE, *files], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) < 100_000, "kB"


def test_streaming_gives_every_tensor_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tudsr_core.weights.tensor_files.STREAM_BYTES", 100)
    tensors = {f"{part}.{i}": torch.full((20,), float(i)) for part in "ab" for i in range(7)}
    write_file(tmp_path / "x.safetensors", tensors, {})
    torch.save(tensors, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        whole = dict(stream(tmp_path / name))
        assert whole.keys() == tensors.keys() and all(torch.equal(whole[key], tensors[key]) for key in tensors)
        assert set(dict(stream(tmp_path / name, ("a.",)))) == {f"a.{i}" for i in range(7)}


FULL = """
import resource, sys
from pathlib import Path
import torch
from tudsr_core.weights.tensor_files import CheckpointError, write_file
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_file(Path(sys.argv[1]), {"a": torch.zeros(10_000)}, {})
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "x.safetensors"
    write_file(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()
    command = [sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert "x.safetensors was not written" in done.stdout and "free some space" in done.stdout, done.stderr
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_file(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()
    with pytest.raises(Exception, match="metadata|str"):
        write_file(path, {"a": torch.zeros(2)}, {"bad": 3})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def test_weights_that_share_memory_are_written_each_for_itself(tmp_path):
    shared = torch.arange(6.0)
    write_file(tmp_path / "a.safetensors", {"one": shared, "two": shared, "part": shared[2:4]}, {})
    tensors = read_file(tmp_path / "a.safetensors").tensors
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "one": shared.tolist(),
        "two": shared.tolist(),
        "part": [2.0, 3.0],
    }
