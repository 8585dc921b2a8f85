"""What goes into a file comes out of it to the bit, and what is not of the format is refused."""

import hashlib
import io
import json
import math
import pickle
import random
import re
import threading
import zlib
from pathlib import Path

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from hpclr.checkpoint import Json, NewerVersionError, read_attrs, read_tree, write_tree
from hpclr.checkpoint.digest import _Hasher, check_digest, write_hashed
from hpclr.checkpoint.format import STORED_AS
from hpclr.checkpoint.skeleton import Skeleton
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
def test_tensors_of_several_blocks(tmp_path, shape):
    tree = {"t": torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)}
    path = written(tmp_path / "f.h5", tree)
    assert_same(read_tree(path), tree)
    assert 1 <= size_on_disk(tree) / path.stat().st_size < 1.01


def many_kinds():
    large = {f"large.{i}": torch.full((1000 + i, 7), float(i)) for i in range(5)}
    huge = {f"huge.{i}": torch.arange(300_000 * (i + 1)) for i in range(4)}
    return {"model": large | {f"s.{i}": torch.tensor(i) for i in range(30)}, "huge": huge, "run": Json(list(range(9)))}


def test_every_dataset_is_where_it_says_with_its_checksum(tmp_path):
    path = written(tmp_path / "f.h5", many_kinds())
    content, datasets = path.read_bytes(), []
    with h5py.File(path) as file:
        file.visititems(lambda _, node: datasets.append(node) if isinstance(node, h5py.Dataset) else None)
        for node in datasets:
            offset, size = node.id.get_offset(), node.id.get_storage_size()
            stored = content[offset : offset + size]
            assert stored == node[...].tobytes()
            assert (node.attrs["crc32"].dtype, node.attrs["crc32"]) == (np.uint32, zlib.crc32(stored))
            assert size < 4096 or offset % 64 == 0
            assert node.chunks is None
    assert len(datasets) == 40


def test_the_digest_is_that_of_the_file(tmp_path):
    digest = write_tree(tmp_path / "f.h5", many_kinds(), {"step": 1})
    assert digest == hashlib.sha256((tmp_path / "f.h5").read_bytes()).hexdigest()


def test_offsets_beyond_4_gib_need_no_memory():
    skeleton = Skeleton()
    skeleton.seek(5 << 30)
    skeleton.write(b"abc")
    assert skeleton.between((5 << 30) - 2, (5 << 30) + 5) == b"\0\0abc\0\0"
    assert skeleton.size == (5 << 30) + 3


WRITES = st.lists(st.tuples(st.integers(0, 20_000), st.binary(max_size=9000)), max_size=6)


@settings(max_examples=50, deadline=None)
@given(writes=WRITES, seed=st.integers(0, 99))
def test_a_skeleton_is_a_file(writes, seed):
    skeleton, plain = Skeleton(), bytearray(40_000)
    for offset, data in writes:
        skeleton.seek(offset)
        assert skeleton.write(data) == len(data)
        plain[offset : offset + len(data)] = data
    start, stop = sorted(random.Random(seed).sample(range(40_000), 2))
    assert skeleton.between(start, stop) == plain[start:stop]
    skeleton.seek(start)
    assert skeleton.read(stop - start) == plain[start:stop]


@pytest.mark.parametrize("sizes", [[], [0], [5], [0, 3 << 20, 7, 5 << 20, 0, 9 << 20], [1 << 20] * 3, [700_000] * 13])
def test_pieces_of_any_length_are_written_in_order(tmp_path, sizes):
    pieces = [random.Random(n).randbytes(size) for n, size in enumerate(sizes)]
    digest = write_hashed(tmp_path / "f", iter(pieces))
    assert (tmp_path / "f").read_bytes() == b"".join(pieces)
    assert digest == hashlib.sha256(b"".join(pieces)).hexdigest()


@pytest.mark.parametrize("many", [1, 300])
def test_a_source_that_fails_ends_the_write_and_its_thread(tmp_path, many):
    def pieces():
        for _ in range(many):
            yield bytes(1 << 20)
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        write_hashed(tmp_path / "f", pieces())
    assert threading.active_count() == before


def test_hashing_that_fails_is_raised_and_holds_nothing_up():
    holes = memoryview(bytes(4))[::2]  # not contiguous
    with _Hasher() as hasher:
        for _ in range(300):
            hasher.follow(holes)
    with pytest.raises(BufferError):
        hasher.hexdigest()


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
).filter(lambda key: key != "$float")  # reserved in JSON, and hypothesis finds it in the source
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
    assert read_attrs(path) == {"format": "hpclr-checkpoint", "version": 2, "step": 7, "metric": 0.5}
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
    made = group.create_dataset(name, data=data, **options)
    made.attrs["kind"] = np.bytes_(kind)
    made.attrs["dtype"] = np.bytes_(dtype)
    made.attrs["crc32"] = np.uint32(zlib.crc32(data.tobytes()))
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
    file.create_dataset("w", data=[file.ref], dtype=h5py.ref_dtype)
    file["w"].attrs.update(kind=np.bytes_("tensor"), dtype=np.bytes_("float32"))


@hostile
def huge_shape(file):
    made = file.create_dataset("w", shape=(1 << 50,), dtype="<f4")
    made.attrs.update(kind=np.bytes_("tensor"), dtype=np.bytes_("float32"))


@hostile
def never_stored(file):
    made = file.create_dataset("w", (64, 1024), "<f4")
    made.attrs.update(kind=np.bytes_("tensor"), dtype=np.bytes_("float32"), crc32=np.uint32(zlib.crc32(bytes(1 << 18))))
    dataset(file, "x", np.ones(1 << 17, np.float32))


@hostile
def compressed(file):
    dataset(file, "w", np.zeros(1 << 20, np.float32), compression="gzip")


@hostile
def chunked(file):
    dataset(file, "w", np.ones(2, np.float32), chunks=True, fletcher32=True)


@hostile
def without_checksum(file):
    del dataset(file, "w", np.ones(2, np.float32)).attrs["crc32"]


@hostile
def wrong_checksum(file):
    dataset(file, "w", np.ones(2, np.float32)).attrs["crc32"] = np.uint32(1)


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
        file.attrs["version"] = np.int64(4)
    with pytest.raises(NewerVersionError, match="version 1 to 3, found version 4"):
        read_tree(path)


# Older files


def test_a_file_of_version_1_is_read():
    path = Path(__file__).with_name("version-1.h5")
    check_digest(path)
    floats = torch.tensor([1.5, math.inf, -math.inf], dtype=torch.float64)
    model = {
        "float32": torch.arange(12, dtype=torch.float32).reshape(3, 4) / 8,
        "float64": floats,
        "bfloat16": torch.arange(6).bfloat16().reshape(2, 3),
        "float16": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "float8_e4m3fn": torch.tensor([1.0, -0.5]).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False, True]),
        "int64": torch.tensor([-(2**62), 7]),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "complex64": torch.tensor([1 + 2j]),
        "a/b%": torch.tensor(2.5),
    }
    run = {"name": "digits", "lr": 1e-3, "seed": 2**70, "worst": math.inf, "none": None}
    scalar = torch.tensor(3, dtype=torch.int32)
    expected = {"model": model, "scalar": scalar, "empty": torch.empty(0, 3), "run": Json(run)}
    assert_same(read_tree(path), expected)
    assert read_attrs(path) == {"format": "hpclr-checkpoint", "version": 1, "step": 7, "metric": 0.5}


# The document


def test_the_code_in_the_document_reads_a_checkpoint(tmp_path):
    u, sigma, vh = torch.randn(6, 2), torch.randn(2, 2), torch.randn(2, 5)
    name = "blocks.0.linear."
    factors = [name + "u", name + "sigma", name + "vh"]
    tree = {
        "model": {name + "u": u, name + "sigma": sigma, name + "vh": vh, "a/b%": torch.tensor(1.5).bfloat16()},
        "empty": {"t": torch.empty(0, 3), "": torch.tensor([True, False]), ".": torch.tensor([2j])},
        "run": Json({"name": "digits", "lr": 1e-3}),
        "layers": Json({name[:-1]: {"factors": factors, "shape": [5, 3, 2], "transposed": True}}),
    }
    names = {"path": written(tmp_path / "f.h5", tree)}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL):
        exec(block, names)
    found = names["checkpoint"]
    assert np.array_equal(names["weight"], (u.numpy() @ sigma.numpy() @ vh.numpy()).T.reshape(5, 3, 2))
    assert found["model"]["a/b%"] == np.float32(1.5)
    assert found["empty"]["t"].shape == (0, 3)
    assert found["empty"][""].tolist() == [True, False]
    assert found["empty"]["."].tolist() == [2j]
    assert found["run"] == {"name": "digits", "lr": 1e-3}


def test_the_code_in_the_document_finds_a_flipped_bit(tmp_path):
    path = written(tmp_path / "f.h5", {"model": {"w": torch.ones(2000)}})
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(2000).numpy().tobytes()) + 99] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="/model/w"):
        exec(re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)[0], {"path": path})
