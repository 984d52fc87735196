"""Structure that strangers wrote, read with limits: JSON, tables of plain values, texts.

Every reader of files and of texts that a workflow brings goes through here, so nothing untrusted is
deeper, longer or more numerous than these limits, and nothing of it is printed raw. Pickles come
here too, once `pickles.py` has let them load.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 2**24  # of a text file, or of a header or an index inside a weight file
MAX_DEPTH = 16
MAX_VALUES = 200_000
MAX_NAME = 400  # characters of a tensor's name; published ones stay below 150
MAX_PROMPT = 5_000  # characters of one prompt, of which CLIP reads some 300
MAX_TEXT = 2**22  # characters of all texts of a picture's tiles
MAX_LARGEST = 10**12  # of a number; sizes, timesteps and factors are all far below
SHOWN, LONGEST_LINE = 120, 5_000  # characters: of one value, and of a message, which may hold the longest path
HALF = re.compile("[\ud800-\udfff]")


class UntrustedError(ValueError):
    """Something from outside that cannot be used; the message is one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message, LONGEST_LINE))


def printable(text: object) -> str:
    """Return `text` with everything escaped that could move a cursor, colour a terminal or start a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown(text: object, longest: int = SHOWN) -> str:
    """Return a name or value from outside for people: printable, at most `longest` characters."""
    raw = text if isinstance(text, str) else _brief(text)
    cut = printable(raw[: longest + 1])
    return cut if len(cut) <= longest else f"{cut[: longest - 3]}..."


def some(names: Iterable[str]) -> str:
    """Return the first three names and how many more there are, for messages."""
    names = list(names)
    first = ", ".join(map(shown, names[:3]))
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _brief(value: object) -> str:
    """Return `repr` of small values, the kind of others: repr of an aliased or deep structure may never end."""
    if isinstance(value, int | float | bool | None):
        return repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "a number of many digits"
    return f"a {type(value).__name__}"


def read_text(path: Path, error: type[UntrustedError] = UntrustedError, limit: int = MAX_BYTES) -> str:
    """Return a UTF-8 file's text without its byte order mark; raises `error` naming it."""
    try:
        if not path.is_file():
            raise error(f"{path} does not exist or is no file; check the path")
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise error(f"{path} has more than {limit:,} bytes; it is not what it should be")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read as text: {problem}") from problem


def parse_json(text: str, where: str, error: type[UntrustedError] = UntrustedError) -> Any:
    """Return the value of a JSON text within the limits; raises `error` naming `where`."""
    if len(text) > MAX_BYTES:
        raise error(f"{where} has {len(text):,} characters; the limit is {MAX_BYTES:,}")
    try:
        value = json.loads(text)
    except RecursionError as problem:
        raise error(f"{where} is nested too deeply") from problem
    except ValueError as problem:
        raise error(f"{where} cannot be read: {problem}") from problem
    check_plain(value, where, error)
    return value


def check_plain(value: Any, where: str, error: type[UntrustedError] = UntrustedError) -> None:
    """Raise `error` unless `value` is made of plain values and within the limits of depth, count and size."""
    count = 0
    for item, depth in _walk(value):
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise error(f"{where} is nested too deeply or holds too many values")
        if not isinstance(item, str | int | float | bool | None | list | tuple | dict):
            raise error(f"{where} holds a {type(item).__name__}, which is no plain value")
        if isinstance(item, int | float) and not abs(item) <= MAX_LARGEST:
            raise error(f"{where} holds a number that is none or far too large")


def flat(value: Any, where: str, error: type[UntrustedError] = UntrustedError) -> list[Any]:
    """Return what is in lists inside lists, in order, without the Nones; raises `error` beyond the limits."""
    check_plain(value, where, error)
    waiting, found = [value], []
    while waiting:
        item = waiting.pop()
        if isinstance(item, list | tuple):
            waiting += reversed(item)
        elif item is not None:
            found.append(item)
    return found


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Yield every value inside `value` with its depth, without recursion; the caller stops what never ends."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        yield item, depth
        if isinstance(item, dict):
            waiting += [(inner, depth + 1) for pair in item.items() for inner in pair]
        elif isinstance(item, list | tuple):
            waiting += [(inner, depth + 1) for inner in item]


def check_text(text: Any, what: str, longest: int = MAX_PROMPT) -> str:
    """Return `text` if it is one of at most `longest` characters; raises UntrustedError naming `what`.

    Halves of characters, which JSON can bring, are refused: no tokenizer and no file takes them.
    """
    if not isinstance(text, str):
        raise UntrustedError(f"{what} must be a text, not {shown(text)}")
    if len(text) > longest:
        raise UntrustedError(f"{what} has {len(text):,} characters, the limit is {longest:,}; shorten it")
    if half := HALF.search(text):
        raise UntrustedError(f"{what} holds half a character ({shown(half[0])}); type it again")
    return text


class Fields:
    """A table from a file whose values are taken by name and kind.

    What is missing, of another kind or out of range raises `error` naming `where` and the field.
    """

    def __init__(self, values: Any, where: str, error: type[UntrustedError] = UntrustedError) -> None:
        if not isinstance(values, dict):
            raise error(f"{where} must be a table of names and values, not {shown(values)}")
        check_plain(values, where, error)
        self.values, self.where, self.error = values, where, error

    def number(
        self, name: str, default: float | None = None, least: float = -MAX_LARGEST, most: float = MAX_LARGEST
    ) -> float:
        """Return a finite number of `least` to `most`; a missing or null one is `default`, unless that is None."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(name, value, "a number")
        if not least <= value <= most:
            raise self._wrong(name, value, f"from {least:g} to {most:g}")
        return value

    def whole(self, name: str, default: int | None = None, least: int = 0, most: int = 2**31) -> int:
        """Return a whole number of `least` to `most`."""
        value = self.number(name, default, least, most)
        if value != int(value):
            raise self._wrong(name, value, "a whole number")
        return int(value)

    def text(self, name: str, default: str | None = None, longest: int = MAX_NAME) -> str:
        """Return a text of at most `longest` characters."""
        value = self._get(name, default)
        if not isinstance(value, str) or len(value) > longest:
            raise self._wrong(name, value, f"a text of at most {longest} characters")
        return value

    def texts(self, name: str) -> list[str]:
        """Return a list of texts."""
        value = self._get(name, None)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a list of texts")
        return list(value)

    def numbers(self, name: str) -> list[float]:
        """Return a list of finite numbers."""
        value = self._get(name, None)
        if not isinstance(value, list | tuple):
            raise self._wrong(name, value, "a list of numbers")
        row = Fields(dict(enumerate(value)), f"{self.where}, {name}", self.error)
        return [row.number(index) for index in row.values]

    def only(self, *names: str) -> None:
        """Raise `error` naming every field that is none of `names`: a setting that would be ignored."""
        if strange := sorted(shown(name) for name in self.values.keys() - set(names)):
            more = ", ..." if len(strange) > 5 else ""
            raise self.error(
                f"{self.where} says {', '.join(strange[:5])}{more}, which this version does not know; update this pack"
            )

    def table(self, name: str) -> Fields:
        """Return the table inside this one."""
        return Fields(self._get(name, None), f"{self.where}, {name}", self.error)

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(f"{self.where} lacks {name!r}")
        return value

    def _wrong(self, name: str, value: Any, wanted: str) -> UntrustedError:
        return self.error(f"{self.where}: {name!r} is {shown(value)}, it must be {wanted}")


MAX_SIZE, MAX_LIST, MAX_LAYERS = 2**17, 64, 500
SCALING = 1e-3, 1e3  # what a VAE's scaling_factor may be; published ones are 0.1 to 2


FRACTIONS = ("eps", "factor", "dropout", "range", "scale")  # of settings that are not whole numbers from 0 up


def network_config(fields: Fields) -> dict[str, Any]:
    """Return a network's configuration from a file as data, without the notes of libraries (names with `_` in front).

    Building a network takes time for every layer before any weight is looked at, so their number is
    limited: at most MAX_LAYERS by the product of all that counts them.
    """
    config = {name: value for name, value in fields.values.items() if not str(name).startswith("_")}
    layers = longest = 1
    for name, value in config.items():
        rows = [row for row in [value, *(value if isinstance(value, list) else [])] if isinstance(row, list)]
        longest = max([longest, *map(len, rows)])
        numbers = [x for x in [value, *(x for row in rows for x in row)] if isinstance(x, int | float)]
        counts = all(isinstance(x, int) and x >= 0 for x in numbers) or any(word in name for word in FRACTIONS)
        if isinstance(value, dict) or longest > MAX_LIST or not counts or any(abs(x) > MAX_SIZE for x in numbers):
            raise fields.error(f"{fields.where}: {shown(name)!r} is no size of a network")
        if "layers" in name:
            layers *= max([1, *numbers])
    if layers * longest > MAX_LAYERS:
        raise fields.error(f"{fields.where}: its layers are too many, no model of this kind has over {MAX_LAYERS}")
    return config
