"""Torch's `.bin` files: tensors are read without torch, and nothing in them is run."""

import collections
import io
import pickle
import shutil
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from peftjax.interop.pickles import read_pickle
from safetensors.numpy import load_file


class Storage:
    """What torch's pickles refer to: a kind of numbers, and the entry that holds them."""

    def __init__(self, kind, key, numbers):
        self.reference, self.numbers = ("storage", kind, key, "cpu", numbers.size), numbers


def fake(module, name, **attributes):
    """A class or function of torch's, of which pickle writes nothing but the name."""
    made = type(name, (), {"__module__": module, "__qualname__": name, **attributes})
    sys.modules.setdefault(module, types.ModuleType(module))
    setattr(sys.modules[module], name, made)
    return made


@pytest.fixture
def torch_names(monkeypatch):
    """Stand-ins for the names that torch's pickles hold."""
    for module in ("torch", "torch._utils"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    return (
        fake("torch._utils", "_rebuild_tensor_v2"),
        fake("torch", "FloatStorage"),
        fake("torch._utils", "_rebuild_parameter"),
    )


class Pickler(pickle.Pickler):
    """Writes tensors as torch does: a call of a rebuilding function on a reference to their numbers."""

    def __init__(self, file, names):
        super().__init__(file, protocol=2)
        (self.tensor, self.kind, self.parameter), self.storages = names, []

    def persistent_id(self, x):
        return x.reference if isinstance(x, Storage) else None

    def reducer_override(self, x):
        if not isinstance(x, np.ndarray):
            return NotImplemented
        base = np.ascontiguousarray(x).ravel()
        self.storages.append(Storage(self.kind, str(len(self.storages)), base))
        stride = tuple(n // x.itemsize for n in np.ascontiguousarray(x).strides)
        return self.tensor, (self.storages[-1], 0, x.shape, stride, False, collections.OrderedDict())


def written(path, value, names, change=lambda entries: None):
    """A file as `torch.save` writes it."""
    out = io.BytesIO()
    pickler = Pickler(out, names)
    pickler.dump(value)
    entries = {"archive/data.pkl": out.getvalue(), "archive/version": b"3\n", "archive/byteorder": b"little"}
    entries |= {f"archive/data/{s.reference[2]}": s.numbers.tobytes() for s in pickler.storages}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


TENSORS = collections.OrderedDict(a=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.ones(4, np.float32))


def test_reads_tensors(tmp_path, torch_names):
    found = read_pickle(written(tmp_path / "x.bin", TENSORS, torch_names))
    assert list(found) == ["a", "b"]
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor)


def streamed(path, value, names, change=lambda parts: None):
    """A file as `torch.save` wrote it before 1.6: five pickles, then the storages."""
    out = io.BytesIO()
    pickler = Streamer(out, names)
    pickler.dump(value)
    keys = [s.reference[2] for s in pickler.storages]
    dumped = lambda x: pickle.dumps(x, 2)
    parts = {"magic": dumped(0x1950A86A20F9469CFC6C), "protocol": dumped(1001)}
    parts |= {"system": dumped({"little_endian": True}), "program": out.getvalue(), "keys": dumped(keys)}
    for s in pickler.storages:
        parts[s.reference[2]] = s.numbers.size.to_bytes(8, "little") + s.numbers.tobytes()
    change(parts)
    path.write_bytes(b"".join(parts.values()))
    return path


class Streamer(Pickler):
    """Its references to storages say, too, whether they are views of others."""

    def persistent_id(self, x):
        return (*x.reference, None) if isinstance(x, Storage) else None


def test_reads_tensors_of_before_torch_1_6(tmp_path, torch_names):
    found = read_pickle(streamed(tmp_path / "x.pth", TENSORS, torch_names))
    assert list(found) == ["a", "b"]
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor)


def part(name, change):
    return lambda parts: parts.__setitem__(name, change(parts[name]))


@pytest.mark.parametrize(
    "change,message",
    [
        (part("magic", lambda x: pickle.dumps(7, 2)), "nor does it begin as those before torch 1.6"),
        (part("system", lambda x: pickle.dumps({"little_endian": False}, 2)), "little-endian"),
        (part("program", lambda x: b"\x80\x02c__builtin__\neval\n."), "__builtin__.eval"),
        (part("keys", lambda x: pickle.dumps(["0", "0"], 2)), "the storage 0 is cut off, there twice"),
        (part("keys", lambda x: pickle.dumps(["0", "7"], 2)), "the storage 7 is cut off, there twice, or of no tensor"),
        (part("1", lambda x: x[:-1]), "the storage 1 is cut off"),
        (part("1", lambda x: x + b"x"), "goes on behind its last storage"),
        (part("0", lambda x: (5).to_bytes(8, "little") + x[8:]), "damaged"),
        (lambda parts: parts.pop("keys"), "damaged"),
    ],
)
def test_damaged_of_before_torch_1_6(change, message, tmp_path, torch_names):
    with pytest.raises(ValueError, match=message):
        read_pickle(streamed(tmp_path / "x.pth", TENSORS, torch_names, change))


class Evil:
    """Asks, when it is unpickled, for a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "value,message",
    [
        (Evil(exec, "raise SystemExit"), "exec"),
        (Evil(__import__, "os"), "__import__"),
        ({"a": Evil(print, "ran")}, "print"),
        (Evil(getattr, "a", "upper"), "getattr"),
        ({"a": types.SimpleNamespace(x=1)}, "SimpleNamespace"),
        ({"a": 3}, "no flat dictionary of tensors"),
        ([1, 2], "no flat dictionary of tensors"),
        ({"a": {"b": TENSORS["a"]}}, "no flat dictionary of tensors"),
        ({3: TENSORS["a"]}, "no strings"),
    ],
)
def test_runs_nothing(value, message, tmp_path, torch_names, capsys):
    with pytest.raises(ValueError, match=message):
        read_pickle(written(tmp_path / "x.bin", value, torch_names))
    assert capsys.readouterr().out == ""


def entry(name, change):
    return lambda entries: entries.__setitem__(f"archive/{name}", change(entries[f"archive/{name}"]))


@pytest.mark.parametrize(
    "change,message",
    [
        (entry("data/0", lambda x: x[:-4]), "holds 5 numbers, expected 6"),
        (lambda entries: entries.pop("archive/data/1"), "data/1"),
        (lambda entries: entries.pop("archive/data.pkl"), "0 entries called data.pkl"),
        (lambda entries: entries.__setitem__("other/data.pkl", b""), "2 entries called data.pkl"),
        (entry("byteorder", lambda x: b"big"), "little-endian"),
        *((entry("data.pkl", lambda x, k=k: x[: len(x) * k // 8]), "damaged") for k in range(8)),
        (entry("data.pkl", lambda x: b"\x80\x02" + b"N" * 1_000_001 + b"."), "more than 1000000 instructions"),
        (entry("data.pkl", lambda x: b"\x80\x02c__builtin__\neval\n."), "__builtin__.eval"),
        (entry("data.pkl", lambda x: b"\x80\x02]q\x00(h\x00h\x00e."), "damaged"),
    ],
)
def test_damaged(change, message, tmp_path, torch_names):
    with pytest.raises(ValueError, match=message):
        read_pickle(written(tmp_path / "x.bin", TENSORS, torch_names, change))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"not a zip", pickle.dumps({})])
def test_no_zip_file(data, tmp_path):
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ValueError, match="no zip file|damaged"):
        read_pickle(tmp_path / "x.bin")


def test_missing(tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        read_pickle(tmp_path / "x.bin")


@pytest.fixture
def readers():
    """Each reader on its model, a folder of its own, and the names of its files. Before `torch_names`: it asks for torch."""
    golden = pytest.importorskip("golden_models")
    import peftjax as pj
    import test_adapter
    from peftjax.interop import adapterhub, hf_peft

    _, params, roles, _, _ = golden.model("bert")
    fn, hub_params, args = test_adapter.loaded("bert")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        hub_roles = pj.roles(fn, hub_params, *args)
    ours = lambda folder, **options: pj.extract(hf_peft.load(folder, params, roles, **options))
    hub = lambda folder, **options: pj.extract(adapterhub.load(folder, hub_params, hub_roles, **options))
    return (
        (ours, golden.GOLDEN / "bert" / "ia3", "adapter_model.safetensors", "adapter_model.bin"),
        (hub, test_adapter.GOLDEN / "bert" / "seq_bn", "adapter.safetensors", "pytorch_adapter.bin"),
    )


@pytest.mark.third_party
def test_adapters_in_pickles_are_read_where_asked_for(readers, torch_names, tmp_path):
    """The same values as from safetensors; without being asked, a refusal that says how to ask."""
    for load, folder, name, pickled in readers:
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        written(copy / pickled, collections.OrderedDict(load_file(copy / name)), torch_names)
        (copy / name).unlink()
        with pytest.raises(ValueError, match="`pickles=True` reads it"):
            load(copy)
        got, want = load(copy, pickles=True), load(folder)
        assert set(got) == set(want) and got
        for key, x in want.items():
            np.testing.assert_array_equal(got[key], x)
