"""Reading what strangers wrote: every limit has something that passes below it and is named above it."""

from __future__ import annotations

import json

import pytest

from tudsr_core.untrusted import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_VALUES,
    Fields,
    UntrustedError,
    check_plain,
    check_text,
    parse_json,
    printable,
    read_text,
    shown,
)


def nested(depth):
    return "[" * depth + "]" * depth


def test_json_within_the_limits_is_read():
    assert parse_json('{"a": [1, "b", null, 0.5]}', "x") == {"a": [1, "b", None, 0.5]}
    assert parse_json(nested(MAX_DEPTH), "x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (nested(MAX_DEPTH + 2), "nested too deeply"),
        (nested(100_000), "nested too deeply"),
        (json.dumps([0] * (MAX_VALUES + 1)), "too many values"),
        (" " * (MAX_BYTES + 1), "16,777,217 characters"),
        ("{", "cannot be read"),
        ("1" * 10_000, "cannot be read|far too large"),
        ("[NaN]", "a number that is none"),
        ("1e400", "a number that is none"),
    ],
)
def test_json_beyond_a_limit_is_named(text, says):
    with pytest.raises(UntrustedError, match=f"x.json.*({says})"):
        parse_json(text, "x.json")


def test_values_that_contain_themselves_or_multiply_end():
    loop: list = []
    loop.append(loop)
    laughs: list = ["ha"]
    for _ in range(MAX_DEPTH - 1):
        laughs = [laughs] * 10
    for value in (loop, laughs, {"a": {1, 2}}):
        with pytest.raises(UntrustedError, match="nested too deeply|too many values|no plain value"):
            check_plain(value, "x.pkl")


def test_fields_are_taken_by_kind_and_range():
    fields = Fields({"n": 3, "x": 0.5, "t": "a", "l": ["a"], "v": [1, 2.5], "inner": {"n": 1}, "none": None}, "x")
    assert (fields.whole("n"), fields.number("x"), fields.text("t"), fields.texts("l")) == (3, 0.5, "a", ["a"])
    assert (fields.numbers("v"), fields.table("inner").whole("n"), fields.whole("none", 7)) == ([1, 2.5], 1, 7)
    for take, says in (
        (lambda: fields.whole("absent"), "x lacks 'absent'"),
        (lambda: fields.whole("x"), "'x' is 0.5, it must be a whole number"),
        (lambda: fields.whole("t"), "'t' is a, it must be a number"),
        (lambda: fields.number("n", least=4), "'n' is 3, it must be from 4"),
        (lambda: fields.text("n"), "'n' is 3, it must be a text"),
        (lambda: fields.texts("v"), "'v' is a list, it must be a list of texts"),
        (lambda: fields.numbers("l"), "x, l: 0 is a, it must be a number"),
        (lambda: fields.table("l"), "x, l must be a table"),
        (lambda: Fields([], "x"), "x must be a table of names and values, not a list"),
    ):
        with pytest.raises(UntrustedError, match=says):
            take()


def test_what_is_printed_moves_no_cursor_and_stays_short():
    assert printable("a\x1b[31m\n\u202eé漢") == "a\\x1b[31m\\n\\u202eé漢"
    assert shown("k" * 10**6) == "k" * 117 + "..."
    assert str(UntrustedError("a\nb\x07")) == "a\\nb\\x07"
    assert shown([[1]] * 10**6) == "a list" and shown(10**5000) == "a number of many digits"


def test_a_message_has_a_longest():
    assert len(str(UntrustedError("\x1b" * 10**6))) == 5_000
    assert str(UntrustedError("a" * 4_500)) == "a" * 4_500


def test_texts_and_files_have_a_longest(tmp_path):
    assert check_text("x" * 10, "the prompt", 10)
    with pytest.raises(UntrustedError, match="the prompt has 11 characters, the limit is 10"):
        check_text("x" * 11, "the prompt", 10)
    with pytest.raises(UntrustedError, match=r"the prompt holds half a character \(\\ud800\); type it again"):
        check_text("a\ud800", "the prompt")
    with pytest.raises(UntrustedError, match="the prompt must be a text, not 3"):
        check_text(3, "the prompt")
    file = tmp_path / "x.txt"
    file.write_bytes("\ufeffcafé".encode())
    assert read_text(file) == "café"
    for content, says in ((b"x" * 20, "more than 10 bytes"), (b"\xff", "cannot be read as text")):
        file.write_bytes(content)
        with pytest.raises(UntrustedError, match=says):
            read_text(file, limit=10)
    with pytest.raises(UntrustedError, match="is no file"):
        read_text(tmp_path)
