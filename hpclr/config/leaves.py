"""A run file as its settings one by one."""

from typing import Any


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Path → value of every setting.

    Args:
        value: of plain dictionaries, lists and values, as `msgspec.to_builtins` makes them; lists are values.
        path: of `value` itself.
    """
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {end: leaf for key, item in value.items() for end, leaf in leaves(item, (*path, str(key))).items()}
