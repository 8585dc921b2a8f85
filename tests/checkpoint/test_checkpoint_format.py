"""What goes into a file comes out of it to the bit, and what is not of the format is refused."""

import io
import json
import math
import pickle
import re
from pathlib import Path

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from hpclr.checkpoint import Json, NewerVersionError, read_attrs, read_tree, write_tree
from hpclr.checkpoint.format import STORED_AS
from hpclr.checkpoint.tree import decode_json, encode_json
from hpclr.checkpoint.writer import size_on_disk
from hpclr.errors import UsageError

DTYPES = [getattr(torch, name) for name in STORED_AS]
DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoint-format.md"


def random_tensor(dtype, shape, seed=0):
    """Any bit pattern of the dtype, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bits(found) == bits(expected)
    else:
        assert repr(found) == repr(expected)  # nan is nan, 1 is not True, -0.0 is not 0.0


def bits(tensor):
    plain = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def written(path, tree, **attrs):
    path.unlink(missing_ok=True)
    write_tree(path, tree, {"step": 7, **attrs})
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (5,), (3, 4), (2, 1, 3, 2)], ids=str)
def test_tensors_come_back_to_the_bit(tmp_path, dtype, shape):
    tree = {"t": random_tensor(dtype, shape)}
    assert_same(read_tree(written(tmp_path / "f.h5", tree)), tree)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(10)[::3],
        torch.tensor([1.0]).expand(4, 3),
        torch.nn.Parameter(torch.ones(2, 2)),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
    ],
    ids=["transposed", "strided", "expanded", "parameter", "conjugate", "negative"],
)
def test_views_are_stored_by_value(tmp_path, tensor):
    assert_same(read_tree(written(tmp_path / "f.h5", {"t": tensor})), {"t": tensor.detach()})


@pytest.mark.parametrize("shape", [(3_000_001,), (1, 3, 1_000_001), (1_000_003, 3), (7, 5, 60_000)], ids=str)
def test_tensors_of_several_chunks(tmp_path, shape):
    tree = {"t": torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)}
    path = written(tmp_path / "f.h5", tree)
    with h5py.File(path) as file:
        assert math.prod(file["t"].chunks) * 4 <= 4 << 20
    assert_same(read_tree(path), tree)
    assert 1 <= size_on_disk(tree) / path.stat().st_size < 1.01


def test_the_order_of_keys_is_kept(tmp_path):
    tree = {name: Json(name) for name in [f"layers.{i}.weight" for i in range(40)] + ["a", "Z", "0"]}
    assert list(read_tree(written(tmp_path / "f.h5", tree))) == list(tree)


def test_the_same_tree_gives_the_same_bytes(tmp_path):
    tree = {"model": {"w": torch.ones(3)}, "run": Json([1, "é"])}
    first, second = (written(tmp_path / name, tree).read_bytes() for name in ("a.h5", "b.h5"))
    assert first == second


KEYS = st.one_of(
    st.sampled_from(["", ".", "..", "/", "a/b", "%", "%25", "%2F", "\0", "L.0.u", "ключ", "kind", "x" * 300]),
    st.text(st.characters(codec="utf-8"), max_size=8),
)
FLOATS = st.floats(width=64)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
LEAVES = st.builds(random_tensor, st.sampled_from(DTYPES), SHAPES, st.integers(0, 99)) | st.builds(Json, PLAIN)
TREES = st.dictionaries(
    KEYS, st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=5), max_size=4
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
def test_any_tree_comes_back(tmp_path, tree):
    path = written(tmp_path / "f.h5", tree)
    assert_same(read_tree(path), tree)
    assert path.stat().st_size <= size_on_disk(tree)


@settings(max_examples=200, deadline=None)
@given(value=PLAIN)
def test_any_json_value_comes_back_and_is_standard_json(value):
    data = encode_json(value, "here")
    json.loads(data, parse_constant=pytest.fail)
    assert repr(decode_json(data)) == repr(value)


def test_integers_of_any_size_are_exact(tmp_path):
    tree = {"n": Json([2**63, -(2**64) - 1, 10**300 + 1])}
    assert_same(read_tree(written(tmp_path / "f.h5", tree)), tree)


def test_attributes_and_partial_reading(tmp_path):
    path = written(tmp_path / "f.h5", {"model": {"w": torch.ones(2)}, "run": Json(1)}, metric=0.5)
    assert read_attrs(path) == {"format": "hpclr-checkpoint", "version": 1, "step": 7, "metric": 0.5}
    assert_same(read_tree(path, only="model"), {"model": {"w": torch.ones(2)}})
    assert_same(read_tree(path, only="run"), {"run": Json(1)})
    with pytest.raises(UsageError, match="'optimizer'"):
        read_tree(path, only="optimizer")


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": {"b": 3}}, TypeError, "/a/b.*found int.*Json"),
        ({"a": {3: Json(1)}}, TypeError, "/a.*keys of type str.*3"),
        ({"a": Json((1, 2))}, TypeError, "/a.*tuple"),
        ({"a": Json({1: 2})}, TypeError, "/a.*keys of type str"),
        ({"a": Json({"$float": "nan"})}, ValueError, "/a.*reserved"),
        ({"a": Json("\ud800")}, ValueError, "/a.*cannot"),
        ({"\ud800": Json(1)}, ValueError, "Unicode"),
        ({"k" * 5000: Json(1)}, ValueError, "4096.*5000"),
        ({"a": torch.ones(2).to_sparse()}, TypeError, "/a.*sparse"),
        ({"a": torch.ones(2, device="meta")}, TypeError, "/a.*meta"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, tree, error, message):
    with pytest.raises(error, match=message):
        write_tree(tmp_path / "f.h5", tree, {"step": 0})
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_dtype_without_a_place_in_the_format_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"/a: .*float32.*found complex32"):
        write_tree(tmp_path / "f.h5", {"a": torch.ones(2, dtype=torch.complex32)}, {"step": 0})


def test_nesting_without_end_is_refused(tmp_path):
    tree, deep = {}, []
    for _ in range(2000):
        tree, deep = {"g": tree}, [deep]
    with pytest.raises(ValueError, match="32 deep"):
        write_tree(tmp_path / "f.h5", tree, {"step": 0})
    with pytest.raises(ValueError, match="32 deep"):
        write_tree(tmp_path / "f.h5", {"v": Json(deep)}, {"step": 0})


@pytest.mark.parametrize("attrs", [{}, {"step": -1}, {"step": 1.5}, {"step": 1, "format": 2}])
def test_wrong_root_attributes_are_refused(tmp_path, attrs):
    with pytest.raises(ValueError, match="step"):
        write_tree(tmp_path / "f.h5", {}, attrs)


# Files that are not of the format


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def not_a_checkpoint():
    torch_file = io.BytesIO()
    torch.save({"w": torch.ones(2)}, torch_file)
    return {
        "empty": b"",
        "text": b"step: 3\n",
        "pickle": pickle.dumps(Bomb()),
        "torch": torch_file.getvalue(),
        "signature alone": b"\x89HDF\r\n\x1a\n",
        "signature and noise": b"\x89HDF\r\n\x1a\n" + bytes(range(256)) * 40,
    }


@pytest.mark.parametrize("content", not_a_checkpoint().values(), ids=not_a_checkpoint().keys())
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "f.h5"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(str(path))):
        read_tree(path)


@pytest.mark.parametrize("name", ["missing.h5", "."])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(UsageError, match="expected a checkpoint"):
        read_tree(tmp_path / name)


def dataset(group, name, data, kind="tensor", dtype="float32", **options):
    options = {"chunks": True, "fletcher32": True} | options
    made = group.create_dataset(name, data=data, **options)
    made.attrs["kind"] = np.bytes_(kind)
    made.attrs["dtype"] = np.bytes_(dtype)
    return made


HOSTILE = []


def hostile(spoil):
    """A way to spoil a checkpoint that HDF5 itself has nothing against."""
    HOSTILE.append(spoil)
    return spoil


@hostile
def external_link(file):
    file["w"] = h5py.ExternalLink("/etc/passwd", "/")


@hostile
def soft_link(file):
    dataset(file, "v", np.ones(2, np.float32))
    file["w"] = h5py.SoftLink("/v")


@hostile
def hard_link_twice(file):
    file["w"] = dataset(file, "v", np.ones(2, np.float32))


@hostile
def group_in_itself(file):
    group = file.create_group("w")
    group["w"] = group


@hostile
def pickled_objects(file):
    pickled = np.frombuffer(pickle.dumps(Bomb()), np.uint8)
    made = file.create_dataset("w", (1,), h5py.vlen_dtype(np.uint8))
    made[0] = pickled
    made.attrs.update(kind=np.bytes_("tensor"), dtype=np.bytes_("uint8"))


@hostile
def references(file):
    file.create_dataset("w", data=[file.ref], dtype=h5py.ref_dtype, chunks=True, fletcher32=True)
    file["w"].attrs.update(kind=np.bytes_("tensor"), dtype=np.bytes_("float32"))


@hostile
def huge_shape(file):
    made = file.create_dataset("w", shape=(1 << 50,), dtype="<f4", chunks=(1 << 20,), fletcher32=True)
    made.attrs.update(kind=np.bytes_("tensor"), dtype=np.bytes_("float32"))


@hostile
def missing_rows(file):
    made = file.create_dataset("w", (64, 1024), "<f4", chunks=(1, 1024), fletcher32=True)
    made[:40] = 1
    made.attrs.update(kind=np.bytes_("tensor"), dtype=np.bytes_("float32"))
    dataset(file, "x", np.ones(1 << 17, np.float32))


@hostile
def compressed(file):
    dataset(file, "w", np.zeros(1 << 20, np.float32), compression="gzip")


@hostile
def without_checksum(file):
    dataset(file, "w", np.ones(2, np.float32), fletcher32=False)


@hostile
def contiguous(file):
    dataset(file, "w", np.ones(2, np.float32), chunks=None, fletcher32=False)


@hostile
def external_storage(file):
    made = file.create_dataset("w", shape=(4,), dtype="u1", external=[("/etc/passwd", 0, 4)])
    made.attrs.update(kind=np.bytes_("tensor"), dtype=np.bytes_("uint8"))


@hostile
def virtual_dataset(file):
    layout = h5py.VirtualLayout(shape=(4,), dtype="<f4")
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "w", shape=(4,))
    made = file.create_virtual_dataset("w", layout)
    made.attrs.update(kind=np.bytes_("tensor"), dtype=np.bytes_("float32"))


@hostile
def named_type(file):
    file["w"] = np.dtype("<f4")


@hostile
def wrong_type(file):
    dataset(file, "w", np.ones(2, np.float64))


@hostile
def big_endian(file):
    dataset(file, "w", np.ones(2, ">f4"))


@hostile
def unknown_dtype(file):
    dataset(file, "w", np.ones(2, np.float32), dtype="float31")


@hostile
def unknown_kind(file):
    dataset(file, "w", np.ones(2, np.float32), kind="pickle")


@hostile
def no_kind(file):
    del dataset(file, "w", np.ones(2, np.float32)).attrs["kind"]


@hostile
def vlen_kind(file):
    dataset(file, "w", np.ones(2, np.float32)).attrs["kind"] = "tensor"


@hostile
def huge_attribute(file):
    dataset(file, "w", np.ones(2, np.float32)).attrs["shape"] = np.zeros(5000, np.int64)


@hostile
def lying_shape(file):
    dataset(file, "w", np.ones(1, np.float32)).attrs["shape"] = np.array([3, 4])


@hostile
def negative_shape(file):
    dataset(file, "w", np.ones(1, np.float32)).attrs["shape"] = np.array([0, -4])


@hostile
def bool_of_two(file):
    dataset(file, "w", np.array([0, 2], np.uint8), dtype="bool")


@hostile
def bad_json(file):
    dataset(file, "w", np.frombuffer(b'{"a": NaN}', np.uint8), kind="json")


@hostile
def deep_json(file):
    dataset(file, "w", np.frombuffer(b"[" * 100_000, np.uint8), kind="json")


@hostile
def double_key(file):
    dataset(file, "w", np.frombuffer(b'{"a":1,"a":2}', np.uint8), kind="json")


@hostile
def bad_name(file):
    dataset(file, "w%41", np.ones(2, np.float32))


@hostile
def deep_groups(file):
    file.create_group("/".join("g" * 40))


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__)
def test_what_is_not_of_the_layout_is_refused(tmp_path, spoil):
    path = written(tmp_path / "f.h5", {"ok": torch.ones(3)})
    assert_same(read_tree(path), {"ok": torch.ones(3)})
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        spoil(file)
    with pytest.raises(UsageError, match=f"{re.escape(str(path))}.*(expected .* found|HDF5 cannot read)"):
        read_tree(path)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("format", np.bytes_("other"), "'hpclr-checkpoint', found 'other'"),
        ("format", None, "an attribute format, found none"),
        ("version", None, "an attribute version, found none"),
        ("version", np.int64(0), "version of at least 1, found 0"),
        ("step", None, "an attribute step, found none"),
        ("step", np.float64(1.5), "an integer attribute step, found 1.5"),
    ],
)
def test_root_attributes_are_checked(tmp_path, attribute, value, message):
    path = written(tmp_path / "f.h5", {})
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        del file.attrs[attribute]
        if value is not None:
            file.attrs[attribute] = value
    with pytest.raises(UsageError, match=message):
        read_tree(path)


def test_a_newer_version_is_named(tmp_path):
    path = written(tmp_path / "f.h5", {})
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        file.attrs["version"] = np.int64(2)
    with pytest.raises(NewerVersionError, match="version 1 to 1, found version 2"):
        read_tree(path)


# The document


def test_the_code_in_the_document_reads_a_checkpoint(tmp_path):
    u, sigma, vh = torch.randn(6, 2), torch.randn(2, 2), torch.randn(2, 5)
    name = "blocks.0.linear."
    tree = {
        "model": {name + "u": u, name + "sigma": sigma, name + "vh": vh, "a/b%": torch.tensor(1.5).bfloat16()},
        "empty": {"t": torch.empty(0, 3), "": torch.tensor([True, False]), ".": torch.tensor([2j])},
        "run": Json({"name": "digits", "lr": 1e-3}),
    }
    names = {"path": written(tmp_path / "f.h5", tree)}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL):
        exec(block, names)
    found = names["checkpoint"]
    assert np.array_equal(names["weight"], (u.numpy() @ sigma.numpy()) @ vh.numpy())
    assert found["model"]["a/b%"] == np.float32(1.5)
    assert found["empty"]["t"].shape == (0, 3)
    assert found["empty"][""].tolist() == [True, False]
    assert found["empty"]["."].tolist() == [2j]
    assert found["run"] == {"name": "digits", "lr": 1e-3}
