import math

import pytest
import yaml

from hpclr.config import yaml12
from hpclr.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.e3", 1000.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("+.INF", math.inf),
        ("1.", 1.0),
        ("0o17", 15),
        ("0x1F", 31),
        ("010", 10),
        ("-12", -12),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("tRue", "tRue"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("0b11", "0b11"),
        ("2020-01-01", "2020-01-01"),
        ("=", "="),
        ("'1e-3'", "1e-3"),
        ("!!str 12", "12"),
        ("!!float 12", 12.0),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = yaml12.read(f"key: {text}", "x").value["key"]
    assert (type(found), found) == (type(value), value)
    again = yaml12.read(yaml12.write({"key": value}), "x").value["key"]
    assert (type(again), again) == (type(value), value)


@pytest.mark.parametrize("text", ["yes", "1_000", "12:30:45", "2020-01-01", "1e-3", "0o17", "null", "", "<<", "010"])
def test_written_text_is_text_for_readers_of_yaml_1_1_too(text):
    assert yaml.safe_load(yaml12.write({"key": text})) == {"key": text}


def test_written_numbers_are_numbers_for_readers_of_yaml_1_1_too():
    numbers = [1e-3, 1e-7, 1e17, 1e300, 0.1, -3, 10**18]
    assert yaml.safe_load(yaml12.write({"key": numbers})) == {"key": numbers}


def test_nan_is_read_and_written():
    assert math.isnan(yaml12.read(yaml12.write([math.nan]), "x").value[0])


def test_every_key_has_its_place_and_what_has_none_that_of_the_section_around_it():
    document = yaml12.read("a:\n  b: 1\n  c:\n    d: [1, 2]\n", "run.yaml")
    assert document.place(("a", "b")) == "run.yaml line 2"
    assert document.place(("a", "c", "d")) == "run.yaml line 4"
    assert document.place(("a", "c", "absent")) == "run.yaml line 3"
    assert document.place(("absent",)) == "run.yaml"


def test_anchors_and_aliases_work():
    assert yaml12.read("a: &x {b: [1]}\nc: *x\n", "x").value == {"a": {"b": [1]}, "c": {"b": [1]}}


def test_nothing_is_written_as_an_alias():
    shared = ["a"]
    assert yaml12.write({"x": shared, "y": shared}) == "x: [a]\ny: [a]\n"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "run.yaml line 5: the key b.c is given twice (first on line 3)"),
        ("a:\n\tb: 1\n", "run.yaml line 2 column 1: a tab; YAML is indented with spaces"),
        ("a: b: c", "run.yaml line 1 column 5: cannot be read as YAML"),
        ("a: [1, 2", "run.yaml line 1 column 9: cannot be read as YAML"),
        ("a: *b", "undefined alias 'b'"),
        ("a: 1\n---\nb: 2", "run.yaml line 2 column 1: cannot be read as YAML: expected a single document"),
        ("1: 2", "run.yaml line 1 column 1: a key must be text, found '1'; put it in quotes"),
        ("? [a]\n: 1", "a key must be text, found a list or a mapping"),
        ("a: !!python/object/apply:os.system [ls]", "the tag '!!python/object/apply:os.system' cannot be used"),
        ("a: !!python/name:os.system x", "the tag '!!python/name:os.system' cannot be used"),
        ("a: !!binary aGk=", "the tag '!!binary' cannot be used"),
        ("a: !local x", "the tag '!local' cannot be used"),
        ("a: !!int 1_0", "'1_0' cannot be read as int"),
        ("a: \x07", "run.yaml line 1 column 4: the character U+0007 cannot stand in YAML"),
        ('a: "\\0"', "holds a character that no text can hold"),
        ('a: "\\ud800"', "holds a character that no text can hold"),
        ('a: "\\U99999999"', "run.yaml cannot be read as YAML"),
        ("a: " + "9" * 5000, "a number of 5000 digits is too large"),
        ("a: 0x" + "f" * 5000, "a number of 5002 digits is too large"),
        ("[" * 5000, "nested more than 32 deep"),
        ("- " * 5000, "nested more than 32 deep"),
        ("&a [*a]", "at most 10000 values"),
        (BOMB, "at most 10000 values"),
        ("#" * 300_000, "run.yaml is too long for a run file: 300000 characters, at most 262144"),
    ],
)
def test_what_no_run_file_may_hold_is_refused_with_its_place(text, message):
    with pytest.raises(UsageError) as caught:
        yaml12.read(text, "run.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("run.yaml")
