"""Text: from a UTF-8 file to tokens and back."""

import gzip
import json
import lzma

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from data_helpers import replace, write_tokens

from hpclr.cli.data import data
from hpclr.data import open_dataset, prepare
from hpclr.errors import UsageError

SPLITS = ("train", "valid", "test")
TEXT = "Grüße, Welt!\r\n\t„Ein“ 𝄞 und 日本語…\n\0" * 7


def prepared(tmp_path, content, **options):
    (tmp_path / "source.txt").write_bytes(content)
    prepare("text", tmp_path / "source.txt", tmp_path / "out.h5", force=True, **options)
    return open_dataset(tmp_path / "out.h5")


def refusal(tmp_path, content, **options):
    with pytest.raises(UsageError) as caught:
        prepared(tmp_path, content, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source.txt"]
    return str(caught.value)


def read_back(dataset):
    return {
        split: "".join(dataset.classes[token] for token in dataset.read_all(split, "tokens")) for split in dataset.sizes
    }


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 22])  # smaller than a character, too
@pytest.mark.parametrize(("suffix", "pack"), [("txt", bytes), ("gz", gzip.compress), ("xz", lzma.compress)])
def test_a_text_comes_back(tmp_path, monkeypatch, suffix, pack, block):
    monkeypatch.setattr("hpclr.data.readers.text.BLOCK_BYTES", block)
    (tmp_path / f"a.{suffix}").write_bytes(pack(TEXT.encode()))
    sizes = prepare("text", tmp_path / f"a.{suffix}", tmp_path / "a.h5")
    count = len(TEXT)
    with open_dataset(tmp_path / "a.h5") as dataset:
        assert (dataset.task, dataset.sample_shape, dataset.dtype) == ("language", (), np.uint16)
        assert dataset.classes == sorted(set(TEXT))
        assert read_back(dataset) == {
            "train": TEXT[: count * 8 // 10],
            "valid": TEXT[count * 8 // 10 : count * 9 // 10],
            "test": TEXT[count * 9 // 10 :],
        }
        assert sizes == dataset.sizes
        assert dataset.mean.size == dataset.std.size == 0
        assert dataset.trusted
        dataset.verify()


def test_the_same_text_gives_the_same_file(tmp_path):
    files = []
    for _ in range(2):
        prepared(tmp_path, TEXT.encode()).close()
        files.append((tmp_path / "out.h5").read_bytes())
    assert files[0] == files[1]


def test_several_blocks_are_written_in_order(tmp_path):
    text = "".join(np.random.default_rng(0).choice(list("abcdé \n"), 700_000))  # more than a chunk
    with prepared(tmp_path, text.encode()) as dataset, h5py.File(tmp_path / "out.h5") as file:
        assert "".join(read_back(dataset).values()) == text
        assert file["train/tokens"].chunks == (1 << 19,)
        assert file["train/tokens"].fletcher32
        assert "mean" not in file


def test_a_byte_order_mark_is_no_character(tmp_path):
    with prepared(tmp_path, b"\xef\xbb\xbf" + TEXT.encode()) as dataset:
        assert "".join(read_back(dataset).values()) == TEXT


@pytest.mark.parametrize("block", [1, 5, 1 << 22])
@pytest.mark.parametrize("front", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("bad", "offset", "found"),
    [(b"caf\xe9 au lait", 3, "0xe9"), ("é".encode() + b"\xff", 2, "0xff"), ("日本".encode()[:-1], 3, "0xe6")],
)
def test_what_is_not_utf8_is_named_by_its_byte(tmp_path, monkeypatch, bad, offset, found, front, block):
    monkeypatch.setattr("hpclr.data.readers.text.BLOCK_BYTES", block)
    content = front + TEXT.encode() + bad
    place = len(content) - len(bad) + offset
    assert f"source.txt: byte {place} (from 0) is not UTF-8: found {found}" in refusal(tmp_path, content)


def test_as_many_characters_as_16_bits_hold(tmp_path):
    points = [point for point in range(0x20, 0x20000) if not 0xD800 <= point < 0xE000]
    most = "".join(map(chr, points[: 1 << 16]))
    with prepared(tmp_path, most.encode()) as dataset:
        assert "".join(read_back(dataset).values()) == most
    (tmp_path / "out.h5").unlink()
    assert "found 65,537 different characters, expected at most 65,536" in refusal(
        tmp_path, (most + chr(points[1 << 16])).encode()
    )


@pytest.mark.parametrize("content", [b"", b"123456789", "é".encode() * 9])
def test_too_few_characters(tmp_path, content):
    assert "expected at least 10 characters" in refusal(tmp_path, content)


def test_options_are_those_of_time_series(tmp_path):
    with prepared(tmp_path, TEXT.encode(), limit=20) as dataset:
        border = len(TEXT) * 8 // 10
        places = (border - 20, border, border + 20)
        assert list(read_back(dataset).values()) == [TEXT[place : place + 20] for place in places]
    (tmp_path / "out.h5").unlink()
    assert "the source has a validation split" in refusal(tmp_path, TEXT.encode(), valid_fraction=0.2)
    assert "--image-size 8 is for imagefolder" in refusal(tmp_path, TEXT.encode(), image_size=8)


def test_sources_that_cannot_be_read(tmp_path):
    for name, content in (("a.gz", b"no gzip"), ("b.xz", lzma.compress(TEXT.encode())[:-9])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="the source cannot be read"):
            prepare("text", tmp_path / name, tmp_path / "out.h5")
    with pytest.raises(UsageError, match="cannot be read"):
        prepare("text", tmp_path / "none.txt", tmp_path / "out.h5")


# --- files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: replace(file, "train/tokens", np.zeros(9, np.int64)), "is int64, expected uint16"),
        (lambda file: replace(file, "test/tokens", np.zeros((4, 2), np.uint16)), "has 2 dimensions, expected 1"),
        (lambda file: replace(file, "test/tokens", np.zeros(0, np.uint16)), "/test/tokens is empty"),
        (lambda file: file.pop("test"), "/test is missing"),
        (lambda file: file.pop("vocabulary"), "/vocabulary is missing"),
        (lambda file: replace(file, "vocabulary", np.frombuffer(b"[1]", np.uint8)), "not the JSON text of a list"),
        (lambda file: replace(file, "valid/tokens", np.full(8, 9, np.uint16)), "valid split, sample 0 .* token is 9"),
        (lambda file: file.attrs.update(task="translation"), "'forecasting' or 'language', found"),
    ],
)
def test_files_that_are_no_text(tmp_path, change, message):
    write_tokens(tmp_path / "t.h5", {"train": 30, "valid": 8, "test": 5}, tokens=9)
    open_dataset(tmp_path / "t.h5").close()
    with h5py.File(tmp_path / "t.h5", "a") as file:
        change(file)
    with pytest.raises(UsageError, match=f"t.h5: .*{message}"):
        open_dataset(tmp_path / "t.h5")


def test_a_damaged_file_is_found_out(tmp_path):
    prepared(tmp_path, TEXT.encode()).close()
    with h5py.File(tmp_path / "out.h5") as file:
        place = file["train/tokens"].id.get_chunk_info(0).byte_offset
    content = bytearray((tmp_path / "out.h5").read_bytes())
    content[place + 11] ^= 1
    (tmp_path / "out.h5").write_bytes(content)
    with open_dataset(tmp_path / "out.h5") as dataset, pytest.raises(UsageError, match=r"train/tokens.*damaged"):
        dataset.read_all("train", "tokens")


def test_texts_count_as_one_where_their_vocabularies_agree(tmp_path):
    sizes = {"train": 30, "test": 5}
    contents = [write_tokens(tmp_path / f"{n}.h5", sizes, tokens=40, seed=n) for n in (0, 1)]
    write_tokens(tmp_path / "other.h5", sizes, tokens=41)
    with open_dataset([tmp_path / "0.h5", tmp_path / "1.h5"]) as dataset:
        expected = np.concatenate([content["train"] for content in contents])
        assert np.array_equal(dataset.read_all("train", "tokens"), expected)
        assert dataset.mean.shape == (0,)
    with pytest.raises(UsageError) as caught:
        open_dataset([tmp_path / "0.h5", tmp_path / "other.h5"])
    assert "vocabulary is 41 names, from number 40 (from 0) on ['t40'], that of" in str(caught.value)


def test_a_text_is_shown(tmp_path):
    prepared(tmp_path, b"ab \n" * 30).close()
    shown = CliRunner().invoke(data, ["inspect", str(tmp_path / "out.h5")]).output
    assert "task       language" in shown
    assert "tokens     train 96, valid 12, test 12; uint16" in shown
    assert r"vocabulary '\n', ' ', 'a', 'b'" in shown
    assert "mean" not in shown


def test_there_are_no_statistics_of_text(tmp_path):
    prepared(tmp_path, TEXT.encode()).close()
    result = CliRunner().invoke(data, ["stats", str(tmp_path / "out.h5")])
    assert isinstance(result.exception, UsageError)
    assert "its task is language; tokens have neither mean nor principal components" in str(result.exception)


def test_the_vocabulary_is_readable_with_h5py_alone(tmp_path):
    prepared(tmp_path, TEXT.encode()).close()
    with h5py.File(tmp_path / "out.h5") as file:
        assert json.loads(file["vocabulary"][...].tobytes()) == sorted(set(TEXT))
