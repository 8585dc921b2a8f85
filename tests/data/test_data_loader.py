import random

import h5py
import numpy as np
import pytest
import torch
from data_helpers import write_by_hand

from hpclr.data import Augment, Loader, open_dataset
from hpclr.errors import UsageError


@pytest.fixture
def dataset(tmp_path):
    with open_dataset(write_by_hand(tmp_path / "data.h5")) as dataset:
        yield dataset


def loader(dataset, split="train", batch_size=8, seed=0, shuffle=True, **options):
    return Loader(dataset, split, batch_size, seed, shuffle=shuffle, **options)


def same(first, second):
    mixed = [batch.y_mixed for batch in (first, second)]
    return (
        torch.equal(first.x, second.x)
        and torch.equal(first.y, second.y)
        and torch.equal(first.indices, second.indices)
        and first.lam == second.lam
        and (mixed == [None, None] or torch.equal(*mixed))
    )


def test_samples_are_normalised_and_keep_their_labels(dataset):
    batch = loader(dataset).batch(0, 2)
    rows = batch.indices.numpy()
    stored = dataset.read_all("train", "x")[rows].astype(float)
    shape = (3, 1, 1)
    expected = (stored - dataset.mean.reshape(shape)) / dataset.std.reshape(shape)
    assert batch.x.dtype == torch.float32
    assert np.allclose(batch.x.numpy(), expected, atol=1e-6)
    assert np.array_equal(batch.y.numpy(), dataset.read_all("train", "y")[rows])
    assert batch.y_mixed is None


def test_the_whole_split_has_mean_zero_and_deviation_one(dataset):
    x = loader(dataset, batch_size=50, dtype=torch.float64).batch(0, 0).x
    assert x.dtype == torch.float64
    assert x.mean(dim=(0, 2, 3)).numpy() == pytest.approx(0, abs=1e-12)
    assert x.std(dim=(0, 2, 3), correction=0).numpy() == pytest.approx(1)


def test_an_epoch_shows_each_sample_once_in_an_order_of_its_own(dataset):
    batches = loader(dataset)
    assert len(batches) == 7
    epochs = [torch.cat([batches.batch(epoch, i).indices for i in range(7)]) for epoch in (0, 1)]
    assert [len(batches.batch(0, i).y) for i in (0, 6)] == [8, 2]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(50))
    assert not torch.equal(*epochs)
    plain = loader(dataset, shuffle=False)
    assert plain.batch(3, 1).indices.tolist() == list(range(8, 16))


OPTIONS = {"augment": Augment(flip=True, crop=2), "mixup": 0.4}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_batch_depends_on_its_arguments_alone(dataset, in_memory):
    first = loader(dataset, in_memory=True, **OPTIONS)
    second = loader(dataset, in_memory=in_memory, **OPTIONS)
    expected = {(epoch, index): first.batch(epoch, index) for epoch in (0, 1) for index in range(7)}
    torch.manual_seed(99)
    places = list(expected)
    random.Random(0).shuffle(places)
    for place in places:
        assert same(second.batch(*place), expected[place])
    other = loader(dataset, seed=1, **OPTIONS)
    assert not any(same(other.batch(*place), expected[place]) for place in places)


def test_changing_a_batch_does_not_change_the_data(dataset):
    batches = loader(dataset, shuffle=False, dtype=torch.float32)
    before = batches.batch(0, 0).x.clone()
    batches.batch(0, 0).x.zero_()
    assert torch.equal(batches.batch(0, 0).x, before)


def test_floats_in_memory_survive_being_normalised(tmp_path):
    with open_dataset(write_by_hand(tmp_path / "f.h5", dtype="float32")) as dataset:
        batches = loader(dataset)
        assert torch.equal(batches.batch(0, 0).x, batches.batch(0, 0).x)
        assert same(batches.batch(0, 1), loader(dataset, in_memory=False).batch(0, 1))


def test_no_global_random_state_is_touched(dataset):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    loader(dataset, **OPTIONS).batch(0, 0)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


def test_augmentation_of_a_sample_does_not_depend_on_its_batch():
    x = torch.randn(40, 3, 6, 5)
    augment = Augment(flip=True, crop=2)
    whole = augment(x, np.arange(40), 0, 3)
    some = np.array([31, 4, 17])
    assert torch.equal(augment(x[some], some, 0, 3), whole[some])
    assert not torch.equal(augment(x, np.arange(40), 0, 4), whole)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [0, 1, 3])
def test_every_augmented_picture_is_a_crop_perhaps_mirrored(flip, crop):
    x = torch.rand(300, 2, 4, 5) + 1
    out = Augment(flip, crop)(x, np.arange(300), 0, 0)
    padded = torch.nn.functional.pad(x, [crop] * 4)
    seen = torch.zeros(2 if flip else 1, 2 * crop + 1, 2 * crop + 1)
    for sample in range(300):
        found = [
            (mirror, top, left)
            for mirror in range(2 if flip else 1)
            for top in range(2 * crop + 1)
            for left in range(2 * crop + 1)
            if torch.equal(mirrored(padded[sample, :, top : top + 4, left : left + 5], mirror), out[sample])
        ]
        assert found
        seen[found[0]] += 1
    expected = 300 / seen.numel()
    assert ((seen - expected) ** 2 / expected).sum() < seen.numel() - 1 + 4.5 * np.sqrt(2 * seen.numel())


def mirrored(x, mirror):
    return x.flip(-1) if mirror else x


def test_mixup_mixes_within_the_batch(dataset):
    plain, mixed = (loader(dataset, mixup=alpha, dtype=torch.float64) for alpha in (0.0, 0.7))
    weights = set()
    for index in range(len(plain)):
        a, b = plain.batch(0, index), mixed.batch(0, index)
        rest = (b.x - b.lam * a.x) / (1 - b.lam)
        partners = torch.cdist(rest.flatten(1), a.x.flatten(1)).argmin(dim=1)
        assert torch.allclose(rest, a.x[partners], atol=1e-6)
        assert sorted(partners.tolist()) == list(range(len(a.y)))
        assert torch.equal(b.y, a.y)
        assert torch.equal(b.y_mixed, a.y[partners])
        weights.add(b.lam)
    assert len(weights) == len(plain)


def test_mixup_weights_follow_their_distribution(dataset):
    batches = loader(dataset, batch_size=1, mixup=2.0)
    weights = [batches.batch(epoch, index).lam for epoch in range(8) for index in range(50)]
    assert np.mean(weights) == pytest.approx(0.5, abs=4 * 0.2236 / 20)  # Beta(2, 2) has deviation 0.2236
    assert np.std(weights) == pytest.approx(0.2236, abs=0.03)


def test_a_batch_moves_and_comes_in_pieces(dataset):
    batch = loader(dataset, **OPTIONS).batch(0, 0)
    pieces = list(batch.split(3))
    assert [len(piece.y) for piece in pieces] == [3, 3, 2]
    for name in ("x", "y", "indices", "y_mixed"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
    assert {piece.lam for piece in pieces} == {batch.lam}
    assert batch.to("meta").y_mixed.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 51}, "batch_size is 51, the train split has 50 samples"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"split": "dev"}, "no split 'dev', found train, valid, test"),
        ({"mixup": -1.0}, "found -1.0"),
    ],
)
def test_options_that_do_not_fit_are_refused(dataset, options, message):
    with pytest.raises(UsageError, match=message):
        loader(dataset, **options)


def test_there_is_no_batch_beyond_the_epoch(dataset):
    for index in (-1, 7):
        with pytest.raises(IndexError, match="0 to 6"):
            loader(dataset).batch(0, index)


def test_flat_samples(tmp_path):
    path = write_by_hand(tmp_path / "flat.h5", shape=(5,), dtype="float32")
    with open_dataset(path) as dataset:
        batch = loader(dataset, batch_size=50).batch(0, 0)
        assert batch.x.shape == (50, 5)
        assert batch.x.mean(dim=0).numpy() == pytest.approx(0, abs=1e-5)
        with pytest.raises(UsageError, match="flip and crop are for pictures"):
            loader(dataset, augment=Augment(flip=True))


def test_a_file_that_wrongly_says_it_was_checked_is_found_out(tmp_path):
    path = write_by_hand(tmp_path / "copied.h5", dtype="float32")
    with h5py.File(path, "a") as file:
        file.attrs.update(checked=True, digest="0" * 64)
        file["train/x"][31, 0, 1, 2] = np.nan
        file["valid/y"][4] = 3
    with open_dataset(path) as dataset:
        with pytest.raises(UsageError, match=r"copied.h5: train split, sample 31 \(from 0\): x holds a value"):
            loader(dataset)
        with pytest.raises(UsageError, match=r"valid split, sample 4 \(from 0\): the label is 3, expected 0 to 2"):
            loader(dataset, "valid")
        loader(dataset, "test")


def test_reading_from_disk_finds_damage(tmp_path):
    path = tmp_path / "d.h5"
    with h5py.File(write_by_hand(tmp_path / "plain.h5")) as source, h5py.File(path, "w", libver="v110") as file:
        file.attrs.update(source.attrs)
        file.attrs.update(checked=True, digest="0" * 64)
        for name in ("train/x", "train/y", "test/x", "test/y", "mean", "std", "classes"):
            file.create_dataset(name, data=source[name][...], chunks=True, fletcher32=True)
        place = file["train/x"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with open_dataset(path) as dataset, pytest.raises(UsageError, match="damaged"):
        loader(dataset, batch_size=50, in_memory=False).batch(0, 0)
