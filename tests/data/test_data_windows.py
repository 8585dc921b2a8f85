"""Windows of time series and text, against loops that cut them one by one."""

import pickle

import h5py
import numpy as np
import pytest
import torch
from data_helpers import write_by_hand, write_series, write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from hpclr.data import Augment, BatchStream, Loader, Order, WindowLoader, choose_order, count_windows, open_dataset
from hpclr.data.windows import Windows
from hpclr.errors import UsageError

SPLITS = ("train", "valid", "test")
FILES = [
    {"train": 60, "valid": 20, "test": 31},
    {"train": 25, "test": 14},  # its test split follows on train
    {"train": 9, "valid": 3, "test": 12},  # shorter than a window, and than a context
]


@pytest.fixture
def series(request, tmp_path):
    """An open dataset of one to three files, and what each holds."""
    paths = [tmp_path / f"{number}.h5" for number in range(getattr(request, "param", 3))]
    contents = [write_series(path, FILES[number], seed=number) for number, path in enumerate(paths)]
    with open_dataset(paths) as dataset:
        yield dataset, contents


@pytest.fixture
def text(tmp_path):
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    contents = [
        write_tokens(path, {"train": size, "valid": 33, "test": 21}, seed=size)
        for path, size in zip(paths, (200, 90), strict=True)
    ]
    with open_dataset(paths) as dataset:
        yield dataset, contents


def forecasts(contents, split, context, horizon, stride=1):
    """The windows of series (N, context + horizon, C), not normalised: `border1 = start − context`, file by file."""
    found = []
    for content in contents:
        if split in content:
            rows = np.concatenate([content[name] for name in SPLITS if name in content])
            start = sum(len(content[name]) for name in SPLITS[: SPLITS.index(split)] if name in content)
            end, first = start + len(content[split]), max(0, start - context)
            while first + context + horizon <= end:
                found.append(rows[first : first + context + horizon])
                first += stride
    return np.array(found)


def sentences(contents, split, context, stride):
    found = []
    for content in contents:
        first = 0
        while first + context + 1 <= len(content[split]):
            found.append(content[split][first : first + context + 1])
            first += stride
    return np.array(found)


def loader(dataset, split="train", batch_size=4, seed=0, *, shuffle=False, **options):
    return WindowLoader(dataset, split, batch_size, seed, shuffle=shuffle, **options)


def epoch_of(batches, epoch=0):
    made = [batches.batch(epoch, index) for index in range(len(batches))]
    return tuple(torch.cat([getattr(batch, name) for batch in made]) for name in ("x", "y", "indices"))


def same(first, second):
    return first.weight == second.weight and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("x", "y", "indices")
    )


@pytest.mark.parametrize("series", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("split", SPLITS)
def test_windows_of_series(series, split, in_memory):
    dataset, contents = series
    batches = loader(dataset, split, context=8, horizon=3, in_memory=in_memory, dtype=torch.float64)
    expected = (forecasts(contents, split, 8, 3) - dataset.mean) / dataset.std
    x, y, indices = epoch_of(batches)
    assert np.array_equal(x, expected[:, :8])
    assert np.array_equal(y, expected[:, 8:])
    assert indices.tolist() == list(range(len(expected)))
    assert batches.size == len(expected) == count_windows(dataset, split, context=8, horizon=3)


def test_every_row_after_the_first_border_is_predicted(tmp_path):
    content = write_series(tmp_path / "s.h5", {"train": 50, "valid": 20, "test": 30})
    with open_dataset(tmp_path / "s.h5") as dataset:
        for split in ("valid", "test"):
            _, y, _ = epoch_of(loader(dataset, split, context=16, horizon=5))
            assert len(y) == len(content[split]) - 5 + 1
            rows = torch.cat([y[0], y[1:, -1]]).numpy() * dataset.std + dataset.mean
            assert rows == pytest.approx(content[split], rel=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=3),
    context=st.integers(1, 12),
    horizon=st.integers(1, 6),
    stride=st.integers(1, 9),
    split=st.sampled_from(SPLITS),
)
def test_any_sizes(tmp_path_factory, sizes, context, horizon, stride, split):
    folder = tmp_path_factory.mktemp("series")
    paths = [folder / f"{number}.h5" for number in range(len(sizes))]
    contents = [
        write_series(path, dict(zip(SPLITS, size, strict=True)), 1, seed)
        for seed, (path, size) in enumerate(zip(paths, sizes, strict=True))
    ]
    expected = forecasts(contents, split, context, horizon, stride if split == "train" else 1)
    options = {"context": context, "horizon": horizon, "stride": stride}
    with open_dataset(paths) as dataset:
        if not len(expected):
            with pytest.raises(UsageError, match=f"a window takes {context} .* = {context + horizon} rows"):
                loader(dataset, split, **options)
            return
        x, y, _ = epoch_of(loader(dataset, split, 1, dtype=torch.float64, **options))
        windows = torch.cat([x, y], dim=1).numpy() * dataset.std + dataset.mean
        assert windows == pytest.approx(expected, rel=1e-9)
        shuffled = loader(dataset, split, 1, shuffle=True, **options)
        for epoch in range(3):
            _, y, indices = epoch_of(shuffled, epoch)
            assert sorted(indices.tolist()) == list(range(shuffled.size))
            assert len(torch.unique(y.flatten(1), dim=0)) == shuffled.size  # all different


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("split", SPLITS)
def test_windows_of_text(text, split, in_memory):
    dataset, contents = text
    x, y, _ = epoch_of(loader(dataset, split, 2, context=10, stride=7, in_memory=in_memory))
    expected = sentences(contents, split, 10, 7 if split == "train" else 10)
    assert x.dtype == y.dtype == torch.int64
    assert np.array_equal(x, expected[:, :-1])
    assert np.array_equal(y, expected[:, 1:])
    if split == "test":
        assert len(x) == 4  # of 21 tokens, 20 have a next one


def test_training_text_takes_every_token_once(text):
    dataset, contents = text
    _, y, _ = epoch_of(loader(dataset, context=10))
    assert np.array_equal(y.flatten(), np.concatenate([contents[0]["train"][1:191], contents[1]["train"][1:81]]))


@pytest.mark.parametrize(("context", "horizon"), [(6, 2), (6, None)])
def test_boundaries_differ_from_epoch_to_epoch(series, text, context, horizon):
    dataset, contents = series if horizon else text
    options = {"context": context, "horizon": horizon, "dtype": torch.float64}
    places = {x.numpy().tobytes(): place for place, x in enumerate(epoch_of(loader(dataset, stride=1, **options))[0])}
    most = len(contents[0]["train"]) - context - (horizon or 1)

    def starts(seed):
        """Where the first window begins in each of 90 epochs."""
        batches = loader(dataset, seed=seed, stride=5, shuffle=True, **options)
        for epoch in range(90):
            x, _, indices = epoch_of(batches, epoch)
            assert len(x) == batches.size
            found = np.array([places[window.numpy().tobytes()] for window in x[indices.argsort()]])
            in_first_file = found[found <= most]
            assert set(np.diff(in_first_file)) == {5}
            yield int(in_first_file[0])

    first, again, other = list(starts(0)), list(starts(0)), list(starts(1))
    places = most + 1
    assert set(first) == set(range(places - (places // 5 - 1) * 5))  # the last of them ends with the last row
    assert first == again
    assert first != other


@pytest.mark.parametrize(("rows", "stride"), [(420, 7), (53, 5), (48, 5), (50, 60), (200, 48)])
def test_every_row_is_trained_on_at_some_time(rows, stride):
    windows = Windows([rows], 32 + 16, stride, shifted=True)
    numbers = np.arange(*windows.sizes)
    starts = {first for epoch in range(500) for first in windows.first_rows(numbers, 0, epoch).tolist()}
    assert starts == set(range(rows - 47))


def test_held_out_windows_begin_where_they_always_do(text):
    dataset, _ = text
    plain, shuffled = (
        epoch_of(loader(dataset, "valid", 2, context=10, shuffle=shuffle), 3) for shuffle in (False, True)
    )
    assert torch.equal(plain[0], shuffled[0][shuffled[2].argsort()])


def test_a_mean_far_from_zero_costs_no_digits(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.attrs.update(format="hpclr-data", version=1, task="forecasting")
        rows = (1e6 + np.arange(40)[:, None] % 7).astype(np.float32)
        file["train/series"], file["test/series"] = rows, rows
        file["mean"], file["std"] = np.array([1e6 + 2.95]), np.array([2.0])
        file["columns"] = np.frombuffer(b'["pressure"]', dtype=np.uint8)
    with open_dataset(tmp_path / "s.h5") as dataset:
        exact = (rows.astype(float) - dataset.mean) / 2
        for dtype, digits in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
            x = loader(dataset, context=4, horizon=2, dtype=dtype).batch(0, 0).x
            assert x.dtype == dtype
            assert x[0].double().numpy() == pytest.approx(exact[:4], rel=digits)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 3, 11])
@pytest.mark.parametrize("kind", ["series", "text"])
def test_parts_together_are_the_batch(series, text, kind, processes, in_memory):
    dataset, options = (series[0], {"context": 7, "horizon": 2}) if kind == "series" else (text[0], {"context": 7})
    whole = loader(dataset, batch_size=10, shuffle=True, **options)
    parts = [
        loader(dataset, batch_size=10, shuffle=True, part=(rank, processes), in_memory=in_memory, **options)
        for rank in range(processes)
    ]
    for index in (0, len(whole) - 1):
        expected, made = whole.batch(2, index), [part.batch(2, index) for part in parts]
        assert sum(batch.weight for batch in made) == pytest.approx(1)
        for name in ("x", "y", "indices"):
            assert torch.equal(
                torch.cat([getattr(batch, name) for batch in made if batch.weight]), getattr(expected, name)
            )
        assert all(torch.equal(batch.x, expected.x[:1]) for batch in made if not batch.weight)


def test_any_batch_comes_without_those_before_it(series):
    options = {"context": 7, "horizon": 2, "stride": 3, "shuffle": True}
    first = loader(series[0], **options)
    expected = [first.batch(epoch, index) for epoch in range(2) for index in range(len(first))]
    for step in reversed(range(len(expected))):
        place = divmod(step, len(first))
        assert same(loader(series[0], in_memory=False, **options).batch(*place), expected[step])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("series", {"context": 7, "horizon": 2, "in_memory": True, "dtype": torch.bfloat16}),
        ("text", {"context": 7, "stride": 3, "in_memory": True}),
        ("text", {"context": 7, "in_memory": False, "part": (1, 3)}),
    ],
)
def test_workers_make_the_same_batches(series, text, kind, options):
    dataset = series[0] if kind == "series" else text[0]
    expected, batches = (loader(dataset, shuffle=True, **options) for _ in range(2))
    last = 2 * len(batches)
    with BatchStream(batches, 2, last, workers=2, prefetch=3) as stream:
        for step, batch in zip(range(2, last), stream, strict=True):
            assert same(batch, expected.batch(*divmod(step, len(expected))))
            assert batch.x.dtype == expected.x_form.dtype


def test_a_loader_sent_to_another_process_opens_the_file_there(series):
    batches = loader(series[0], context=7, horizon=2, in_memory=False)
    sent = pickle.dumps(batches)
    assert len(sent) < 10_000
    assert same(pickle.loads(sent).batch(0, 2), batches.batch(0, 2))


SERIES, TEXT = {"context": 8, "horizon": 3}, {"context": 8}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "series",
            SERIES | {"augment": Augment(flip=True)},
            "flip, crop and mixup are for pictures, its task is forec",
        ),
        ("text", TEXT | {"mixup": 0.2}, "flip, crop and mixup are for pictures, its task is language"),
        ("text", TEXT | {"shuffle": Order("chunks", 4, 4)}, "an order of chunks is for labelled samples"),
        ("text", SERIES, "each next token is predicted; found horizon 3"),
        ("series", TEXT, "say in horizon how many rows"),
        ("series", SERIES | {"context": 0}, "context: expected 1 or more, found 0"),
        ("series", SERIES | {"stride": -1}, "stride: expected 1 or more, found -1"),
        ("series", SERIES | {"split": "dev"}, "no split 'dev', found train, valid, test"),
        ("series", SERIES | {"batch_size": 1000}, r"batch_size is 1000, the train split has \d+ samples"),
        ("series", {"context": 70, "horizon": 3}, r"70 \(context\) \+ 3 \(horizon\) = 73 rows, the train split has 60"),
        (
            "series",
            {"context": 8, "horizon": 32, "split": "test"},
            "= 40 rows, the test split has 39",
        ),
        (
            "text",
            {"context": 200},
            r"200 \(context\) \+ 1 \(the next token\) = 201 rows, the train split has 200",
        ),
    ],
)
def test_what_does_not_fit_is_refused(series, text, kind, options, message):
    with pytest.raises(UsageError, match=message):
        loader((series if kind == "series" else text)[0], **options)


def test_each_loader_names_the_other(tmp_path, series):
    with pytest.raises(UsageError, match="expected classification"):
        Loader(series[0], "train", 4, 0, shuffle=True)
    with (
        open_dataset(write_by_hand(tmp_path / "p.h5")) as pictures,
        pytest.raises(UsageError, match="labelled samples"),
    ):
        loader(pictures, context=3)


def test_large_series_are_shuffled_by_windows(tmp_path):
    write_series(tmp_path / "s.h5", {"train": 30, "test": 20}, 1)
    with h5py.File(tmp_path / "s.h5", "a") as file:  # 1 GiB that takes no space, as it was never written
        del file["train/series"]
        file.create_dataset("train/series", (1 << 28, 1), "float32", chunks=(1 << 18, 1))
        file.attrs.update(checked=True, digest="0" * 64)
    with open_dataset(tmp_path / "s.h5") as dataset:
        order = choose_order(dataset, "auto", 64)
        assert order == Order("samples")
        batches = loader(dataset, batch_size=3, shuffle=order, context=5, horizon=2)
        assert batches.kept is None
        assert batches.batch(0, 9).x.shape == (3, 5, 1)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_file_that_wrongly_says_it_was_checked_is_found_out(tmp_path, in_memory):
    write_series(tmp_path / "s.h5", FILES[0])
    write_tokens(tmp_path / "t.h5", FILES[0], tokens=20)
    message = r"train split, sample 50 \(from 0\): "
    for name, field, bad in (("s.h5", "train/series", np.nan), ("t.h5", "train/tokens", 20)):
        with h5py.File(tmp_path / name, "a") as file:
            file.attrs.update(checked=True, digest="0" * 64)
            file[field][50] = bad
    with open_dataset(tmp_path / "s.h5") as dataset, pytest.raises(UsageError, match=f"s.h5: {message}series holds"):
        epoch_of(loader(dataset, "valid", context=11, horizon=3, in_memory=in_memory))
    with open_dataset(tmp_path / "t.h5") as dataset, pytest.raises(UsageError, match=f"t.h5: {message}the token is 20"):
        epoch_of(loader(dataset, context=11, in_memory=in_memory))
