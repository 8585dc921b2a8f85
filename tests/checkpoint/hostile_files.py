"""A corpus of files made to harm whoever reads them as checkpoints: each a function that writes one to a path."""

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from json import dumps as json_text
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {}
"""Name → what writes the file, and a pattern of the reason for which it is to be refused."""

ONES = np.ones(4, np.float32)


def new_file(path, version=2, **options):
    """A checkpoint of step 7 without entries."""
    file = h5py.File(path, "w", libver=("v110", "v110"), track_order=True, **options)
    file.attrs.update(format=np.bytes_("hpclr-checkpoint"), version=np.int64(version), step=np.int64(7))
    return file


def describe(dataset, data=b"", kind="tensor", dtype="float32"):
    """Gives a dataset the attributes that it should have."""
    dataset.attrs.update(kind=np.bytes_(kind), dtype=np.bytes_(dtype), crc32=np.uint32(zlib.crc32(bytes(data))))
    return dataset


def tensor(group, name, data=ONES, dtype=None, **options):
    """An entry of version 2, or anything else with options of h5py."""
    made = group.create_dataset(name, data=data, **options)
    return describe(made, np.ascontiguousarray(data).tobytes(), dtype=dtype or data.dtype.name)


def json(group, name, text):
    data = np.frombuffer(text, np.uint8)
    return describe(group.create_dataset(name, data=data), text, kind="json")


def chunked(group, name, data=ONES, **options):
    """An entry of version 1."""
    made = group.create_dataset(name, data=data, **({"chunks": True, "fletcher32": True} | options))
    return describe(made, dtype=data.dtype.name)


def spoilt(reason, version=2, **file_options):
    """Registers a function that adds something to a checkpoint that HDF5 itself has nothing against."""

    def register(spoil):
        def write(path):
            with new_file(path, version, **file_options) as file:
                (chunked if version == 1 else tensor)(file, "good")
                spoil(file)

        HOSTILE[spoil.__name__] = write, reason
        return spoil

    return register


def raw(reason):
    """Registers a function that writes to a path by itself."""

    def register(write):
        HOSTILE[write.__name__] = write, reason
        return write

    return register


# Links


@spoilt("data inside the file, found a soft or external link")
def external_link(file):
    file["w"] = h5py.ExternalLink("/etc/passwd", "/")


@spoilt("data inside the file, found a soft or external link")
def soft_link(file):
    file["w"] = h5py.SoftLink("/good")


@spoilt("data inside the file, found a soft or external link")
def soft_link_loop(file):
    file["a"] = h5py.SoftLink("/b")
    file["b"] = h5py.SoftLink("/a")


@spoilt("an object with one name, found one with 2")
def two_hard_links(file):
    file["w"] = file["good"]


@spoilt("an object with one name, found one with 2")
def group_in_itself(file):
    group = file.create_group("w")
    group["w"] = group


@spoilt("an object with one name, found one with 2")
def root_in_itself(file):
    file["w"] = file["/"]


@spoilt("at most 32 deep")
def deep_groups(file):
    file.create_group("/".join("g" * 40))


@spoilt("names of at most 4096 bytes")
def long_name(file):
    tensor(file, "n" * 5000)


@spoilt("names as the format writes keys")
def name_in_other_quotes(file):
    tensor(file, "w%41")


@spoilt("names as the format writes keys")
def name_not_unicode(file):
    tensor(file, b"\xff\xfe")


# Types


@spoilt("the type uint8, found class 9")
def vlen_of_pickles(file):
    made = file.create_dataset("w", (1,), h5py.vlen_dtype(np.uint8))
    made[0] = np.frombuffer(pickle.dumps(print), np.uint8)
    describe(made, dtype="uint8")


@spoilt("the type float32, found class 7")
def references(file):
    describe(file.create_dataset("w", data=[file.ref], dtype=h5py.ref_dtype))


@spoilt("the type uint8, found class 5")
def opaque(file):
    describe(file.create_dataset("w", data=np.array([b"1234"], "V4")), dtype="uint8")


@spoilt("the type float32, found class 6")
def compound(file):
    describe(file.create_dataset("w", data=np.zeros(3, [("a", "<f4"), ("b", "<f8")])))


@spoilt("the type float32, found class 10")
def array_type(file):
    describe(file.create_dataset("w", shape=(2,), dtype="(3,)f4"))


@spoilt("the type float32, found a shared type")
def committed_type(file):
    file["t"] = np.dtype("<f4")
    describe(file.create_dataset("a", data=ONES, dtype=file["t"]))
    del file["t"]


@spoilt("a group or a dataset, found a named type")
def named_type(file):
    file["w"] = np.dtype("<f4")


@spoilt("the type float32, found class 1 of 8 bytes")
def wrong_type(file):
    tensor(file, "w", np.ones(2), dtype="float32")


@spoilt("the type float32, found class 1 of 4 bytes")
def big_endian(file):
    tensor(file, "w", np.ones(2, ">f4"))


# Storage


@spoilt("contiguous storage in the file without filters, found chunked storage, filters .1")
def compression_bomb(file):
    tensor(file, "w", np.zeros(64 << 20, np.uint8), compression="gzip", compression_opts=1)


@spoilt("chunks with a fletcher32 checksum and no other filter, found chunked storage, filters .1", version=1)
def compression_bomb_of_version_1(file):
    chunked(file, "w", np.zeros(64 << 20, np.uint8), compression="gzip", compression_opts=1)


@spoilt("contiguous storage in the file without filters, found chunked")
def chunks(file):
    tensor(file, "w", chunks=True)


@spoilt("without filters, found compact storage")
def compact_storage(file):
    plan = h5p.create(h5p.DATASET_CREATE)
    plan.set_layout(h5d.COMPACT)
    h5d.create(file.id, b"w", h5t.IEEE_F32LE, h5s.create_simple((4,)), dcpl=plan)
    describe(file["w"], bytes(16))


@spoilt("without filters, found contiguous storage, filters .., 1 other files")
def external_storage(file):
    describe(file.create_dataset("w", shape=(4,), dtype="u1", external=[("/etc/passwd", 0, 4)]), dtype="uint8")


@spoilt("without filters, found virtual storage")
def virtual_storage(file):
    layout = h5py.VirtualLayout(shape=(4,), dtype="<f4")
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "w", shape=(4,))
    describe(file.create_virtual_dataset("w", layout))


@spoilt("all of it in the file, found 4503599627370496 from None on")
def huge_shape(file):
    describe(file.create_dataset("w", shape=(1 << 50,), dtype="<f4"))


@spoilt("data no larger than what the file stores for it", version=1)
def huge_shape_of_version_1(file):
    describe(file.create_dataset("w", shape=(1 << 50,), dtype="<f4", chunks=(1 << 20,), fletcher32=True))


@spoilt("data no larger than what the file stores for it", version=1)
def missing_chunks(file):
    made = describe(file.create_dataset("w", (64, 1024), "<f4", chunks=(1, 1024), fletcher32=True))
    made[:40] = 1
    chunked(file, "x", np.ones(1 << 17, np.float32))


@spoilt("chunks of at most 8388608 bytes, found 16777216", version=1)
def huge_chunks(file):
    chunked(file, "w", np.ones(4 << 20, np.float32), chunks=(4 << 20,))


@spoilt("a dataset with axes, found one without")
def no_dataspace(file):
    describe(file.create_dataset("w", data=h5py.Empty("<f4")))


@spoilt("a dataset with axes, found one without")
def scalar_dataspace(file):
    tensor(file, "w", np.float32(1))


# Indexes of sharded tensors


def sharded(file, name, *rows, shape=(4, 2), parts=((1, 100), (2, 100))):
    """A tensor of float32 whose rows are in parts: of each piece part, first row, rows and byte; and the parts."""
    if "%parts" not in file:
        listed = [{"sha256": f"{number}" * 64, "bytes": size} for number, size in parts]
        json(file, "%parts", json_text(listed).encode())
    table = np.array([[*row, 0] for row in rows], np.int64)
    made = tensor(file, name, table)
    made.attrs.update(kind=np.bytes_("sharded"), dtype=np.bytes_("float32"), shape=np.array(shape))
    return made


@spoilt("kind to be 'tensor' or 'json', found 'sharded'")
def sharded_in_version_2(file):
    sharded(file, "w", (0, 0, 4, 0))
    del file["%parts"]


@spoilt("a list of parts '%parts' in the file, found none", version=3)
def no_parts(file):
    pass


@spoilt("a list of parts '%parts' in the file, found none", version=3)
def parts_by_link(file):
    file["%parts"] = h5py.ExternalLink("/etc/passwd", "/")


@spoilt("a list of at most 65536 parts in JSON, found group", version=3)
def parts_in_a_group(file):
    file.create_group("%parts")


@spoilt("without filters, found virtual storage", version=3)
def virtual_parts(file):
    layout = h5py.VirtualLayout(shape=(4,), dtype="u1")
    layout[:] = h5py.VirtualSource("/etc/passwd", "w", shape=(4,))
    describe(file.create_virtual_dataset("%parts", layout), kind="json")


@spoilt("a list of at most 65536 parts in JSON, found json of 9000000 bytes", version=3)
def endless_list_of_parts(file):
    json(file, "%parts", b" " * 9_000_000)


@spoilt("found 0 parts", version=3)
def empty_list_of_parts(file):
    json(file, "%parts", b"[]")


@spoilt("the digests and sizes of parts, found .*bytes", version=3)
def part_without_size(file):
    json(file, "%parts", json_text([{"sha256": "1" * 64}]).encode())


@spoilt("the digests and sizes of parts, found .*`int` <= ", version=3)
def part_of_any_size(file):
    json(file, "%parts", json_text([{"sha256": "1" * 64, "bytes": 1 << 60}]).encode())


@spoilt("the digests and sizes of parts, found .*matching regex", version=3)
def part_elsewhere_by_its_digest(file):
    json(file, "%parts", json_text([{"sha256": "../" * 20 + "etc/", "bytes": 9}]).encode())


@spoilt("the digests and sizes of parts, found .*unknown field `name`", version=3)
def part_elsewhere_by_a_name(file):
    json(file, "%parts", json_text([{"sha256": "1" * 64, "bytes": 9, "name": "/etc/passwd"}]).encode())


@spoilt("a table of 5 columns, found the shape", version=3)
def table_of_other_columns(file):
    made = sharded(file, "w", (0, 0, 4, 0, 0))
    assert made.shape == (1, 6)


@spoilt("the shape of a tensor that has rows", version=3)
def sharded_scalar(file):
    sharded(file, "w", (0, 0, 1, 0), shape=())


@spoilt("the shape of a tensor that has rows", version=3)
def sharded_with_negative_shape(file):
    sharded(file, "w", (0, 0, 4, 0), shape=(4, -2))


@spoilt("a tensor no larger than the 200 bytes of all parts", version=3)
def sharded_beyond_all_parts(file):
    sharded(file, "w", (0, 0, 1 << 50, 0), shape=(1 << 50,))


@spoilt("parts of numbers below 2, found 0 to 2", version=3)
def part_that_is_not_listed(file):
    sharded(file, "w", (0, 0, 2, 0), (2, 2, 2, 0))


@spoilt("parts of numbers below 2, found -1 to -1", version=3)
def part_of_negative_number(file):
    sharded(file, "w", (-1, 0, 4, 0))


@spoilt("rows among the 4 of the tensor", version=3)
def negative_row(file):
    sharded(file, "w", (0, -2, 2, 0), (1, 0, 4, 0))


@spoilt("rows among the 4 of the tensor", version=3)
def rows_beyond_the_tensor(file):
    sharded(file, "w", (0, 0, (1 << 63) - 1, 0))


@spoilt("rows among the 4 of the tensor", version=3)
def piece_without_rows(file):
    sharded(file, "w", (0, 0, 4, 0), (1, 4, 0, 0))


@spoilt("the rows 0 to 4, each once and in order, found gaps", version=3)
def rows_that_overlap(file):
    sharded(file, "w", (0, 0, 3, 0), (1, 2, 2, 0))


@spoilt("the rows 0 to 4, each once and in order, found gaps", version=3)
def rows_with_a_gap(file):
    sharded(file, "w", (0, 0, 1, 0), (1, 2, 2, 0))


@spoilt("the rows 0 to 4, each once and in order, found gaps", version=3)
def last_row_missing(file):
    sharded(file, "w", (0, 0, 3, 0))


@spoilt("rows that lie in their part", version=3)
def rows_beyond_their_part(file):
    sharded(file, "w", (0, 0, 2, 0), (1, 2, 2, 99))


@spoilt("rows that lie in their part", version=3)
def rows_before_their_part(file):
    sharded(file, "w", (0, 0, 4, -1))


@spoilt("no more data than its part has bytes, found 28 too many", version=3)
def many_tensors_in_one_place(file):
    for number in range(4):
        sharded(file, f"w{number}", (0, 0, 4, 0))


@spoilt("/w: expected data with the checksum crc32", version=3)
def table_that_was_changed(file):
    sharded(file, "w", (0, 0, 4, 0)).attrs["crc32"] = np.uint32(1)


@raw("expected a checkpoint, found a part of one")
def part_of_a_checkpoint(path):
    with new_file(path) as file:
        file.attrs["format"] = np.bytes_("hpclr-checkpoint-part")


# Attributes


@spoilt("dtype to be one of .* found 'float31'")
def unknown_dtype(file):
    tensor(file, "w", dtype="float31")


@spoilt("kind to be 'tensor' or 'json', found 'pickle'")
def unknown_kind(file):
    tensor(file, "w").attrs["kind"] = np.bytes_("pickle")


@spoilt("an attribute kind, found none")
def no_kind(file):
    del tensor(file, "w").attrs["kind"]


@spoilt("kind to be a number or a text")
def vlen_attribute(file):
    tensor(file, "w").attrs["kind"] = "tensor"


@spoilt("shape to be a number or a text of at most 1024 bytes, found 40000 bytes")
def huge_attribute(file):
    tensor(file, "w").attrs["shape"] = np.zeros(5000, np.int64)


@spoilt("at most 64 attributes, found 1003")
def many_root_attributes(file):
    for number in range(1000):
        file.attrs[f"a{number}"] = number


@spoilt(r"found \[3, 4\] stored as \(1,\)")
def lying_shape(file):
    tensor(file, "w", ONES[:1]).attrs["shape"] = np.array([3, 4])


@spoilt(r"found \[0, -4\] stored as")
def negative_shape(file):
    tensor(file, "w", ONES[:1]).attrs["shape"] = np.array([0, -4])


@spoilt("an attribute crc32, found none")
def no_checksum(file):
    del tensor(file, "w").attrs["crc32"]


@spoilt("version 1 to 3, found version 4")
def newer_version(file):
    file.attrs["version"] = np.int64(4)


# Content


@spoilt("/w: expected data with the checksum crc32 0x.*, found 0x")
def wrong_checksum(file):
    tensor(file, "w").attrs["crc32"] = np.uint32(1)


@spoilt("bool values 0 and 1, found 2")
def bool_of_two(file):
    tensor(file, "w", np.array([0, 2], np.uint8), dtype="bool")


@spoilt("expected JSON, found .*NaN is not standard JSON")
def nan_in_json(file):
    json(file, "w", b'{"a": NaN}')


@spoilt("expected JSON")
def deep_json(file):
    json(file, "w", b"[" * 100_000)


@spoilt("expected JSON, found .*a key occurs twice")
def key_twice_in_json(file):
    json(file, "w", b'{"a":1,"a":2}')


@spoilt("expected JSON")
def pickle_for_json(file):
    json(file, "w", pickle.dumps(print))


@raw("JSON on one axis, of at most 268,435,456 bytes")
def huge_json(path):
    with new_file(path) as file:
        plan = h5p.create(h5p.DATASET_CREATE)
        plan.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5d.FILL_TIME_NEVER)  # a hole in the file
        h5d.create(file.id, b"w", h5t.STD_U8LE, h5s.create_simple((300 << 20,)), dcpl=plan)
        describe(file["w"], kind="json")


# The file itself


@raw("starts with")
def user_block(path):
    with new_file(path, userblock_size=512) as file:
        tensor(file, "w")


@raw("a superblock of HDF5's 1.10 form")
def old_superblock(path):
    with h5py.File(path, "w", libver="earliest") as file:
        tensor(file, "w")


@raw("a superblock of HDF5's 1.10 form, closed")
def left_open(path):
    with new_file(path) as file:
        tensor(file, "w")
    content = bytearray(path.read_bytes())
    content[11] = 1
    path.write_bytes(rechecked(content, 0, 44))


@raw("a file of .* bytes, as it says itself, found")
def extra_tail(path):
    with new_file(path) as file:
        tensor(file, "w")
    path.write_bytes(path.read_bytes() + b"tail")


@raw("a file of .* bytes, as it says itself, found")
def cut_off(path):
    with new_file(path) as file:
        tensor(file, "w")
    os.truncate(path, path.stat().st_size - 1)


@raw("starts with .* found b''")
def empty_file(path):
    path.touch()


@raw("superblock of 48 bytes, found 8")
def signature_alone(path):
    path.write_bytes(b"\x89HDF\r\n\x1a\n")


@raw("it can run code")
def pickle_file(path):
    path.write_bytes(pickle.dumps(print))


@raw("it can run code")
def zip_file(path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(print))
    path.write_bytes(content.getvalue())


@raw("expected a checkpoint, found no file there")
def fifo(path):
    os.mkfifo(path)


@raw("expected a checkpoint, found no file there")
def device(path):
    path.symlink_to("/dev/zero")


@raw("expected a checkpoint, found no file there")
def directory(path):
    path.mkdir()


@raw("expected a checkpoint, found nothing there")
def link_to_nothing(path):
    path.symlink_to("nowhere.h5")


# Metadata that lies, with checksums that are right


@raw("a place of its own from byte .* inside /")
def two_datasets_in_one_place(path):
    with new_file(path) as file:
        places = [tensor(file, name, np.zeros(64, np.float32)).id.get_offset() for name in "ab"]
    forge(path, places[1], places[0] + 128)


@raw("a place of its own from byte .* inside /a")
def dataset_over_metadata(path):
    with new_file(path) as file:
        place = tensor(file, "a", np.zeros(64, np.float32)).id.get_offset()
        group = h5py.h5o.get_info(file.create_group("g").id).addr
    forge(path, place, group - 8)
    found = zlib.crc32(path.read_bytes()[group - 8 : group + 248])
    forge(path, zlib.crc32(bytes(256)), found, "<I")


@raw("at least one byte of data, all of it in the file|HDF5 cannot read the file")
def dataset_beyond_the_end(path):
    with new_file(path) as file:
        place = tensor(file, "a", np.zeros(64, np.float32)).id.get_offset()
    forge(path, place, 1 << 40)


@raw("an object with one name, found one with 2")
def cycle_of_objects_that_deny_it(path):
    with new_file(path) as file:
        group = file.create_group("g")
        inner = group.create_group("h")
        forged = [h5py.h5o.get_info(item.id).addr for item in (inner, group)]
    forge(path, *forged)


def forge(path, old, new, form="<Q"):
    """Puts another number in place of one, in whatever object header it stands, and makes its checksum right."""
    before, after = struct.pack(form, old), struct.pack(form, new)
    content = bytearray(path.read_bytes())
    start = -1
    while (start := content.find(b"OHDR", start + 1)) >= 0:
        stop = end_of_header(content, start)
        place = content.find(before, start, stop)
        if place >= 0:
            content[place : place + len(after)] = after
            path.write_bytes(rechecked(content, start, stop))
            return
    raise AssertionError("nothing was forged")


def end_of_header(content, start):
    """Where the checksum of an object header (version 2) stands."""
    flags = content[start + 5]
    width = 1 << (flags & 3)
    at = start + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    return at + width + int.from_bytes(content[at : at + width], "little")


def rechecked(content, start, stop):
    """The same bytes with the right checksum at `stop` for those from `start`."""
    content[stop : stop + 4] = struct.pack("<I", lookup3(bytes(content[start:stop])))
    return content


def lookup3(data):
    """Bob Jenkins' hash, which HDF5 uses for its metadata (public domain; hashlittle of lookup3.c)."""

    def rotated(x, k):
        return (x << k | x >> 32 - k) & mask

    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(data)) & mask
    rest = data
    while len(rest) > 12:
        x, y, z = struct.unpack("<III", rest[:12])
        a, b, c, rest = (a + x) & mask, (b + y) & mask, (c + z) & mask, rest[12:]
        for k, n, m in ((4, 6, 8), (16, 19, 4)):
            a = ((a - c) & mask) ^ rotated(c, k)
            c = (c + b) & mask
            b = ((b - a) & mask) ^ rotated(a, n)
            a = (a + c) & mask
            c = ((c - b) & mask) ^ rotated(b, m)
            b = (b + a) & mask
    if not rest:
        return c
    x, y, z = struct.unpack("<III", rest.ljust(12, b"\0"))
    a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
    for k, n, m in ((14, 11, 25), (16, 4, 14)):
        c = ((c ^ b) - rotated(b, k)) & mask
        a = ((a ^ c) - rotated(c, n)) & mask
        b = ((b ^ a) - rotated(a, m)) & mask
    return ((c ^ b) - rotated(b, 24)) & mask
