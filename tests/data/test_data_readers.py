import gzip
import lzma
import pickle
import struct
import warnings

import numpy as np
import pytest
from data_helpers import pictures

from hpclr.data import open_dataset, prepare
from hpclr.data.readers import READERS
from hpclr.errors import UsageError

SPLITS = ("train", "valid", "test")


def prepared(tmp_path, reader, source, **options):
    out = tmp_path / "out.h5"
    prepare(reader, source, out, valid_fraction=options.pop("valid_fraction", 0), **options)
    with open_dataset(out) as dataset:
        field = "series" if dataset.task == "forecasting" else "x"
        content = {split: dataset.read_all(split, field) for split in dataset.sizes}
        labels = {} if field == "series" else {split: dataset.read_all(split, "y") for split in dataset.sizes}
    return dataset, content, labels


def refusal(tmp_path, reader, source, **options):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError) as caught:
        prepare(reader, source, tmp_path / "out.h5", **options)
    assert sorted(tmp_path.iterdir()) == before  # nothing written, nothing left behind
    return str(caught.value)


def put(path, content):
    path.write_bytes(content)
    return path


# --- digits


def test_digits_keep_the_same_test_split_whatever_the_seed(tmp_path):
    first, x, y = prepared(tmp_path, "digits", None, seed=0, valid_fraction=0.1)
    assert first.sizes == {"train": 1294, "valid": 144, "test": 359}
    _, other_x, _ = prepared(tmp_path, "digits", None, seed=1, valid_fraction=0.1, force=True)
    assert np.array_equal(x["test"], other_x["test"])
    assert not np.array_equal(x["valid"], other_x["valid"])
    assert y["test"][:12].tolist() == [
        5,
        0,
        5,
        1,
        5,
        8,
        1,
        3,
        2,
        6,
        7,
        4,
    ]  # in every version, or results no longer compare


def test_digits_are_all_there_once_with_their_labels(tmp_path):
    from sklearn.datasets import load_digits

    _, x, y = prepared(tmp_path, "digits", None, valid_fraction=0.2)
    pairs = {(image.tobytes(), label) for split in SPLITS for image, label in zip(x[split], y[split], strict=True)}
    images, labels = load_digits(return_X_y=True)
    assert sum(len(x[split]) for split in SPLITS) == len(images)
    assert pairs == {(i.astype(np.uint8).tobytes(), label) for i, label in zip(images, labels, strict=True)}


# --- idx


def idx_folder(tmp_path, pack=gzip.compress, suffix=".gz", separator="-"):
    folder = tmp_path / "idx"
    folder.mkdir()
    sets = {"train": pictures(30, (5, 4), 1), "t10k": pictures(12, (5, 4), 2)}
    for name, (x, y) in sets.items():
        head = b"\0\0\x08"
        put(
            folder / f"{name}-images{separator}idx3-ubyte{suffix}",
            pack(head + b"\3" + struct.pack(">3I", *x.shape) + x.tobytes()),
        )
        labels = y.astype(np.uint8).tobytes()
        put(
            folder / f"{name}-labels{separator}idx1-ubyte{suffix}",
            pack(head + b"\1" + struct.pack(">I", len(y)) + labels),
        )
    return folder, sets


@pytest.mark.parametrize("form", [{}, {"pack": bytes, "suffix": "", "separator": "."}])
def test_idx(tmp_path, form, monkeypatch):
    monkeypatch.setattr("hpclr.data.readers.idx.BLOCK_BYTES", 7 * 20)  # several blocks
    folder, sets = idx_folder(tmp_path, **form)
    dataset, x, y = prepared(tmp_path, "idx", folder)
    assert dataset.classes == ["0", "1", "2"]
    assert np.array_equal(x["train"], sets["train"][0][:, None])
    assert np.array_equal(y["test"], sets["t10k"][1])


def test_idx_says_which_file_is_missing(tmp_path):
    folder, _ = idx_folder(tmp_path)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels-idx1-ubyte" in refusal(tmp_path, "idx", folder)
    assert "expected a folder" in refusal(tmp_path, "idx", tmp_path / "none")


def test_idx_with_wrong_contents(tmp_path):
    folder, _ = idx_folder(tmp_path, bytes, "")
    images = folder / "train-images-idx3-ubyte"
    content = images.read_bytes()
    put(images, content[:-1])
    assert "train-images-idx3-ubyte: the file ends early: expected another 600 bytes, found 599" in refusal(
        tmp_path, "idx", folder
    )
    put(images, content[:4] + struct.pack(">I", 29) + content[8:])
    message = refusal(tmp_path, "idx", folder)
    assert "29 samples" in message
    assert "30 labels" in message
    put(images, b"\x89PNG")
    assert "found 89504e47" in refusal(tmp_path, "idx", folder)


def test_a_damaged_gzip_names_the_source(tmp_path):
    folder, _ = idx_folder(tmp_path)
    images = folder / "train-images-idx3-ubyte.gz"
    put(images, images.read_bytes()[:-20])
    message = refusal(tmp_path, "idx", folder)
    assert str(folder) in message
    assert "cannot be read" in message


# --- CIFAR-10


def cifar_sets():
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {name: (rng.integers(0, 256, (6, 3072), dtype=np.uint8), rng.integers(0, 10, 6)) for name in names}


def write_binary(folder, sets):
    for name, (x, y) in sets.items():
        put(folder / f"{name}.bin", np.hstack([y[:, None].astype(np.uint8), x]).tobytes())


def write_pickled(folder, sets, protocol=2):
    for name, (x, y) in sets.items():
        content = {b"batch_label": b"one of five", b"labels": y.tolist(), b"data": x, b"filenames": [b"a.png"] * 6}
        put(folder / name, pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("write", [write_binary, write_pickled])
@pytest.mark.parametrize("above", [True, False])
def test_cifar10_in_both_versions(tmp_path, write, above):
    folder = tmp_path / "source" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sets = cifar_sets()
    write(folder, sets)
    dataset, x, y = prepared(tmp_path, "cifar10", folder.parent if above else folder)
    assert dataset.sizes == {"train": 30, "test": 6}
    assert dataset.classes[3] == "cat"
    assert np.array_equal(x["train"][6:12], sets["data_batch_2"][0].reshape(-1, 3, 32, 32))
    assert np.array_equal(y["test"], sets["test_batch"][1])


def test_a_pickle_as_python_2_wrote_it_is_read(tmp_path):
    # the published files: protocol 2, names of an old numpy, byte strings as raw bytes
    folder = tmp_path / "py"
    folder.mkdir()
    sets = cifar_sets()
    for name, (x, y) in sets.items():
        raw = x.tobytes()
        array = (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x06M\x00\x0c\x86"
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            b"T" + struct.pack("<I", len(raw)) + raw + b"tb"
        )
        labels = b"](" + b"".join(b"K" + bytes([label]) for label in y) + b"e"
        put(folder / name, b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u.")
    _, x, y = prepared(tmp_path, "cifar10", folder)
    assert np.array_equal(x["test"].reshape(6, -1), sets["test_batch"][0])
    assert np.array_equal(y["test"], sets["test_batch"][1])


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.getattr", "numpy.load", "shutil.rmtree"])
def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path, name):
    folder = tmp_path / "py"
    folder.mkdir()
    write_pickled(folder, cifar_sets())
    module, _, function = name.rpartition(".")
    target = tmp_path / "was-here"
    code = f"c{module}\n{function}\n(V{f'touch {target}'}\ntR.".encode()
    put(folder / "data_batch_3", code)
    message = refusal(tmp_path, "cifar10", folder)
    assert name in message
    assert "data_batch_3" in message
    assert not target.exists()


def test_a_pickled_array_of_objects_is_refused(tmp_path):
    folder = tmp_path / "py"
    folder.mkdir()
    sets = cifar_sets()
    write_pickled(folder, sets | {"data_batch_1": (sets["test_batch"][0].astype(object), sets["test_batch"][1])})
    message = refusal(tmp_path, "cifar10", folder)
    assert "data_batch_1" in message
    assert "array of numbers, found type 'object'" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", pickle.dumps({}), pickle.dumps([1, 2]), pickle.dumps({b"data": 1, b"labels": [1]})],
)
def test_other_pickles_are_refused(tmp_path, content):
    folder = tmp_path / "py"
    folder.mkdir()
    write_pickled(folder, cifar_sets())
    put(folder / "data_batch_1", content)
    assert "data_batch_1" in refusal(tmp_path, "cifar10", folder)


def test_cifar10_binary_faults(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    sets = cifar_sets()
    sets["data_batch_4"][1][2] = 10
    write_binary(folder, sets)
    message = refusal(tmp_path, "cifar10", folder)
    assert "data_batch_4.bin: sample 2 (from 0): the label is 10, expected 0 to 9" in message
    batch = folder / "data_batch_5.bin"
    put(batch, batch.read_bytes()[:-3])
    assert "3073 bytes, found 18435" in refusal(tmp_path, "cifar10", folder)
    for name in ("test_batch.bin", "data_batch_2.bin"):
        (folder / name).unlink()
    assert "data_batch_2.bin" in refusal(tmp_path, "cifar10", folder)
    assert "found neither" in refusal(tmp_path, "cifar10", tmp_path)


# --- npz


def npz(tmp_path, save=np.savez, **arrays):
    (tx, ty), (vx, vy) = pictures(20, (6, 6, 3), 1), pictures(9, (6, 6, 3), 2)
    content = {"x_train": tx, "y_train": ty, "x_test": vx, "y_test": vy} | arrays
    save(tmp_path / "data.npz", **{name: value for name, value in content.items() if value is not None})
    return tmp_path / "data.npz", content


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_channels_last(tmp_path, save, monkeypatch):
    monkeypatch.setattr("hpclr.data.readers.npz.BLOCK_BYTES", 300)
    path, content = npz(tmp_path, save)
    _, x, y = prepared(tmp_path, "npz", path)
    assert np.array_equal(x["train"], content["x_train"].transpose(0, 3, 1, 2))
    assert np.array_equal(y["test"], content["y_test"])


@pytest.mark.parametrize(
    ("shape", "stored"), [((7,), (7,)), ((6, 5), (1, 6, 5)), ((3, 6, 5), (3, 6, 5)), ((6, 5, 1), (1, 6, 5))]
)
@pytest.mark.parametrize("dtype", ["float64", "int16", "uint8"])
def test_npz_shapes_and_types(tmp_path, shape, stored, dtype):
    rng = np.random.default_rng(0)
    x = np.asfortranarray(rng.integers(0, 100, (20, *shape)).astype(dtype))
    path, _ = npz(tmp_path, x_train=x, x_test=x[:9])
    dataset, content, _ = prepared(tmp_path, "npz", path)
    assert dataset.sample_shape == stored
    assert dataset.dtype == ("uint8" if dtype == "uint8" else "float32")
    assert np.array_equal(content["train"].ravel(), x.ravel())


def test_npz_with_a_validation_split_and_other_names(tmp_path):
    x, y = pictures(20, (4, 4))
    sets = {"train": 10, "val": 4, "test": 6}
    arrays = {f"{split}_images": x[:n] for split, n in sets.items()}
    arrays |= {f"{split}_labels": y[:n, None] for split, n in sets.items()}
    np.savez(tmp_path / "medical.npz", **arrays)
    dataset, _, _ = prepared(tmp_path, "npz", tmp_path / "medical.npz", valid_fraction=None)
    assert dataset.sizes == {"train": 10, "valid": 4, "test": 6}
    message = refusal(tmp_path, "npz", tmp_path / "medical.npz", valid_fraction=0.1, force=True)
    assert "has a validation split of 4" in message


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_test": None}, "expected an array x_test"),
        ({"y_train": np.array([1, None] * 10)}, "whole-number labels"),
        ({"y_train": np.zeros(20)}, "whole-number labels"),
        ({"x_train": np.array([{}] * 20)}, "never loaded"),
        ({"y_train": np.zeros(19, dtype=int)}, "holds 20 samples but"),
        ({"y_train": np.arange(20) - 1}, "array x_train: sample 0 (from 0): the label is -1"),
        ({"x_test": np.zeros((9, 6, 7, 3), dtype=np.uint8)}, "expected samples (6, 6, 3) uint8"),
        ({"y_train": np.array([2**40] + [0] * 19)}, "the largest label is 1099511627776, expected one below 1000000"),
        ({"x_train": np.zeros((20, 0)), "x_test": np.zeros((9, 0))}, "found samples of shape (0,)"),
    ],
)
def test_npz_faults(tmp_path, arrays, message):
    path, _ = npz(tmp_path, **arrays)
    assert message in refusal(tmp_path, "npz", path)


def test_npz_not_finite_is_named_by_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("hpclr.data.readers.npz.BLOCK_BYTES", 200)
    x = np.ones((20, 6), dtype=np.float32)
    x[13, 2] = np.nan
    path, _ = npz(tmp_path, x_train=x, x_test=x[:9])
    assert "array x_train: sample 13 (from 0): x holds a value that is NaN" in refusal(tmp_path, "npz", path)


def test_npz_that_is_none(tmp_path):
    assert "cannot be read" in refusal(tmp_path, "npz", put(tmp_path / "a.npz", b"no archive"))


# --- time series


def series_text(rows, header="date,load,wind", delimiter=","):
    lines = [header] if header else []
    lines += [f"2024-01-01 {i:02d}:00,{a},{b}" for i, (a, b) in enumerate(rows)]
    return "\n".join(lines).replace(",", delimiter) + "\n"


@pytest.mark.parametrize(("name", "pack"), [("s.csv", bytes), ("s.csv.gz", gzip.compress), ("s.csv.xz", lzma.compress)])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_series(tmp_path, name, pack, delimiter, monkeypatch):
    monkeypatch.setattr("hpclr.data.readers.series.BLOCK_BYTES", 8 * 30)  # several blocks
    rows = np.random.default_rng(0).normal(5, 3, (200, 2)).astype(np.float32)
    path = put(tmp_path / name, pack(series_text(rows, delimiter=delimiter).encode()))
    dataset, content, _ = prepared(tmp_path, "csv", path, valid_fraction=None)
    assert (dataset.task, dataset.classes) == ("forecasting", ["load", "wind"])
    assert dataset.sizes == {"train": 140, "valid": 20, "test": 40}
    assert np.array_equal(np.concatenate([content[split] for split in SPLITS]), rows)
    assert dataset.mean == pytest.approx(rows[:140].mean(axis=0, dtype=float))
    assert dataset.std == pytest.approx(rows[:140].std(axis=0, dtype=float))


def test_series_without_header_and_date(tmp_path):
    path = put(tmp_path / "s.csv", "\n\n".join(f"{i},{2 * i}" for i in range(20)).encode())
    dataset, content, _ = prepared(tmp_path, "csv", path, valid_fraction=None)
    assert dataset.classes == ["0", "1"]
    assert content["train"][3].tolist() == [3, 6]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("?", 1), "column 'load' of data row 60 (from 0): expected a number, found '?'"),
        ((1, ""), "column 'wind' of data row 60 (from 0): expected a number, found ''"),
        ((1, "nan"), "sample 60 (from 0): series holds a value that is NaN"),
    ],
)
def test_series_faults_name_row_and_column(tmp_path, row, message):
    rows = [(1.0, 2.0)] * 60 + [row] + [(1.0, 2.0)] * 20
    path = put(tmp_path / "s.csv", series_text(rows).encode())
    assert message in refusal(tmp_path, "csv", path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,5;0", "column 'a' of data row 0 (from 0): expected a number, found '0,5'. Write decimals with a point"),
        ("1.234,5;0", "column 'a' of data row 0 (from 0): expected a number, found '1.234,5'. Write decimals"),
        ("?;0", "column 'a' of data row 0 (from 0): expected a number, found '?'. Fill in"),
        (";0", "column 'a' of data row 0 (from 0): expected a number, found ''. Fill in"),
    ],
)
def test_a_column_that_is_no_date_is_not_left_out(tmp_path, row, message):
    path = put(tmp_path / "s.csv", f"a;b\n{row}\n1;2\n".encode() + b"3;4\n" * 20)
    assert message in refusal(tmp_path, "csv", path)


def test_decimal_commas_without_a_header_are_named(tmp_path):
    path = put(tmp_path / "s.csv", b"0,5;0,7\n" * 20)
    assert "column '0' of data row 0 (from 0): expected a number, found '0,5'" in refusal(tmp_path, "csv", path)


@pytest.mark.parametrize(("row", "count"), [("7", 1), ("7,8,9", 3), ("2024,7,8,9", 4)])
@pytest.mark.parametrize("date", ["", '"Jan 1, 2024",'])
def test_rows_of_another_length_are_refused(tmp_path, row, count, date):
    good = f"{date}1,2\n"
    path = put(tmp_path / "s.csv", (good * 30 + f"{date}{row}\n" + good * 30).encode())
    more = 1 if date else 0
    message = f"data row 30 (from 0) has {count + more} columns, expected {2 + more}"
    assert message in refusal(tmp_path, "csv", path)


@pytest.mark.parametrize("first", ["date", "", "0"])
def test_numbers_above_dated_rows_are_names(tmp_path, first):
    rows = "".join(f"2024-01-{i:02d},5.5,{i}.5\n" for i in range(1, 31))
    dataset, content, _ = prepared(tmp_path, "csv", put(tmp_path / "s.csv", f"{first},10,20\n{rows}".encode()))
    assert dataset.classes == ["10", "20"]
    assert content["train"][0].tolist() == [5.5, 1.5]


@pytest.mark.parametrize("columns", [1, 3])
def test_a_first_line_that_may_be_names_or_numbers_is_refused(tmp_path, columns):
    numbers = ",".join(map(str, range(columns)))
    rows = f"{numbers}\n" + f"{','.join(['5.5'] * columns)}\n" * 30
    message = refusal(tmp_path, "csv", put(tmp_path / "s.csv", rows.encode()))
    assert f"the first line '{numbers}' may be names of columns or data" in message
    header = ",".join("abc"[:columns])
    _, content, _ = prepared(tmp_path, "csv", put(tmp_path / "s.csv", f"{header}\n{rows}".encode()))
    assert content["train"][0].tolist() == list(range(columns))


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(lambda i: 1577836810 + i, id="seconds, constant in float32"),
        pytest.param(lambda i: 1577836810 + 600 * i, id="every ten minutes"),
        pytest.param(lambda i: 1577836810000 + 600000 * i, id="milliseconds"),
        pytest.param(lambda i: 2458849.5 + i / 1440, id="Julian days"),
        pytest.param(lambda i: 500 + 1e-6 * (i % 3), id="small changes"),
    ],
)
def test_columns_that_float32_cannot_hold_are_warned_of_once(tmp_path, value, monkeypatch):
    monkeypatch.setattr("hpclr.data.readers.series.BLOCK_BYTES", 8 * 30)  # several blocks
    text = "load,ts\n" + "".join(f"{i % 7},{value(i)!r}\n" for i in range(200))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as python does unless told otherwise
        prepared(tmp_path, "csv", put(tmp_path / "s.csv", text.encode()))
    assert [str(warning.message).count("column 'ts'") for warning in caught] == [1]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(lambda i: 16000000 + i % 2, id="whole numbers that it can hold"),
        pytest.param(lambda i: 101325 + 0.1 * (i % 5), id="pressure"),
        pytest.param(lambda i: 0.1, id="constant"),
        pytest.param(lambda i: 1e9 + 0.3 if i == 90 else 1e9 + 0.2 if i > 100 else 0.5, id="one far away"),
    ],
)
def test_columns_that_float32_holds_are_taken_without_a_word(tmp_path, value):
    text = "".join(f"5.5,{value(i)!r}\n" for i in range(200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(tmp_path, "csv", put(tmp_path / "s.csv", text.encode()))


@pytest.mark.parametrize("text", ["", "a,b\n", "a,b\nx,y\n" * 20, "1,2\n" * 5])
def test_files_without_a_series_are_refused(tmp_path, text):
    refusal(tmp_path, "csv", put(tmp_path / "s.csv", text.encode()))


# --- pictures


def tree(tmp_path, splits=("train", "val", "test"), size=(10, 8), suffix=".png"):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(("ant", "bee")):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 100, (*size, 3), dtype=np.uint8) + 100 * label
                image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}{suffix}")
    return tmp_path / "tree"


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_imagefolder(tmp_path, suffix):
    dataset, x, y = prepared(tmp_path, "imagefolder", tree(tmp_path, suffix=suffix), valid_fraction=None)
    assert dataset.classes == ["ant", "bee"]
    assert dataset.sizes == {"train": 8, "valid": 8, "test": 8}
    assert dataset.sample_shape == (3, 10, 8)
    for split in SPLITS:
        assert np.array_equal(x[split].mean(axis=(1, 2, 3)) > 100, y[split] == 1)


def test_imagefolder_resizes_the_short_side_and_takes_the_middle(tmp_path):
    image = pytest.importorskip("PIL.Image")
    root = tree(tmp_path, ("train", "test"), size=(20, 40))
    halves = np.zeros((20, 40, 3), dtype=np.uint8)
    halves[:, 10:30] = 200
    for path in root.rglob("*.png"):
        image.fromarray(halves).save(path)
    dataset, x, _ = prepared(tmp_path, "imagefolder", root, image_size=10)
    assert dataset.sample_shape == (3, 10, 10)
    assert (x["train"][:, :, :, 1:-1] > 190).all()


def test_imagefolder_with_train_and_val_tests_on_val(tmp_path):
    dataset, _, _ = prepared(tmp_path, "imagefolder", tree(tmp_path, ("train", "val")), valid_fraction=0.25)
    assert dataset.sizes == {"train": 6, "valid": 2, "test": 8}


def test_imagefolder_faults(tmp_path):
    root = tree(tmp_path)
    odd = root / "test" / "bee" / "3.png"
    content = odd.read_bytes()
    put(odd, content[:60])
    assert str(odd) in refusal(tmp_path, "imagefolder", root)
    put(odd, b"GIF89a")
    assert str(odd) in refusal(tmp_path, "imagefolder", root)
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (9, 10)).save(odd)
    assert "expected 10x8 pixels" in refusal(tmp_path, "imagefolder", root)
    (root / "test" / "bee").rename(root / "test" / "wasp")
    assert "no class 'wasp'" in refusal(tmp_path, "imagefolder", root)
    assert "train" in refusal(tmp_path, "imagefolder", root / "train")


def test_imagefolder_refuses_grey_of_16_bits(tmp_path):
    image = pytest.importorskip("PIL.Image")
    root = tree(tmp_path)
    odd = root / "val" / "ant" / "2.png"
    image.fromarray(np.full((10, 8), 30_000, dtype=np.uint16)).save(odd)
    message = refusal(tmp_path, "imagefolder", root)
    assert f"{odd}: expected a picture with 8 bits a channel" in message
    assert "mode I" in message


def test_imagefolder_names_what_it_leaves_out_and_skips_what_is_hidden(tmp_path):
    root = tree(tmp_path, ("train", "test"))
    (root / "train" / ".cache" / "deep").mkdir(parents=True)
    for name in (".cache/deep/0.png", "ant/._0.png", ".DS_Store"):
        put(root / "train" / name, b"no picture")
    for name in ("list.txt", "bee/a.webp", "bee/b.gif", "bee/c.gif"):
        put(root / "train" / name, b"no picture")
    with pytest.warns(UserWarning, match="4 other files are left out: list.txt, bee/a.webp, bee/b.gif, …") as warned:
        dataset, _, _ = prepared(tmp_path, "imagefolder", root)
    assert len(warned) == 1
    assert dataset.classes == ["ant", "bee"]
    assert dataset.sizes == {"train": 8, "test": 8}


@pytest.mark.parametrize("split", ["train", "test"])
def test_imagefolder_refuses_a_class_without_pictures(tmp_path, split):
    root = tree(tmp_path)
    for path in (root / split / "bee").iterdir():
        path.rename(path.with_suffix(".tif"))
    assert f"{root / split / 'bee'}: expected pictures" in refusal(tmp_path, "imagefolder", root)


# --- all


@pytest.mark.parametrize("reader", [name for name in READERS if READERS[name].source])
def test_a_missing_source_is_named(tmp_path, reader):
    assert "none-here" in refusal(tmp_path, reader, tmp_path / "none-here")
    assert "needs a SOURCE" in refusal(tmp_path, reader, None)


def test_options_a_reader_does_not_have_are_refused(tmp_path):
    assert "--image-size 5" in refusal(tmp_path, "digits", None, image_size=5)
    assert "takes no SOURCE" in refusal(tmp_path, "digits", tmp_path)
    assert "no reader 'hdf4'; expected one of digits" in refusal(tmp_path, "hdf4", tmp_path)
