"""What writer and reader of a checkpoint file must agree on (`docs/checkpoint-format.md`)."""

FORMAT = "hpclr-checkpoint"
VERSION = 2

STORED_AS: dict[str, str] = {
    **dict.fromkeys(("bool", "uint8"), "uint8"),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), "uint8"),
    **dict.fromkeys(("bfloat16", "uint16"), "uint16"),
    **{name: name for name in ("int8", "int16", "int32", "int64", "uint32", "uint64")},
    **{name: name for name in ("float16", "float32", "float64", "complex64", "complex128")},
}
"""torch dtype → the numpy dtype of the same width in which its bits are stored."""
