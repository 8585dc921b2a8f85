"""What writer and reader of a checkpoint file must agree on (`docs/checkpoint-format.md`)."""

FORMAT = "hpclr-checkpoint"
PART_FORMAT = "hpclr-checkpoint-part"

VERSION = 2
"""Of a file that holds all of its tensors."""

SHARDED_VERSION = 3
"""Of a file that is the index of others, which hold the rows of sharded tensors; else the same."""

PARTS = "%parts"
"""The list of those files: a name at the top that no key is written as."""

TABLE_COLUMNS = 5
"""Of a sharded tensor's table: part, first row, rows, byte of the part, crc32."""

STORED_AS: dict[str, str] = {
    **dict.fromkeys(("bool", "uint8"), "uint8"),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), "uint8"),
    **dict.fromkeys(("bfloat16", "uint16"), "uint16"),
    **{name: name for name in ("int8", "int16", "int32", "int64", "uint32", "uint64")},
    **{name: name for name in ("float16", "float32", "float64", "complex64", "complex128")},
}
"""torch dtype → the numpy dtype of the same width in which its bits are stored."""
