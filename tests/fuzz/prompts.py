"""Texts that a workflow or a file brings: edits, prompts, captioners' lists, tag lists, read as nodes and CLI do."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tudsr_core.methods.prompt_sources import read_prompts
from tudsr_core.models.dape import LIST_FILE, THRESHOLD_FILE, read_lists
from tudsr_core.prompts.edits import MAX_LINES, SIGNS, read_edits, write_header
from tudsr_core.prompts.prompters import StaticPrompter, check_tags, prompts_from_strings, read_tags
from tudsr_core.prompts.tile_prompts import Style, TilePrompt, TilePrompts, content_key
from tudsr_core.tiling.plan import TilePlan, plan_tiles
from tudsr_core.untrusted import UntrustedError
from tudsr_core.weights.tensor_files import CheckpointError

from .case import Case


class Refused(Exception):
    """A text was refused by this pack; a ValueError of Python's own (int, encode, json) is not that."""


CLEAR = (Refused,)
PLAN = plan_tiles(160, 256, 64, 16)
PLANS = (PLAN, plan_tiles(16, 16, 64, 16), plan_tiles(2000, 1000, 64, 32), plan_tiles(1, 900, 8, 0))
WORDS = (
    "a tree",
    "red brick wall",
    "8k",
    "",
    " ",
    "é漢字",
    "\u202e",
    "\x1b[31m",
    "\0",
    "\ud800",
    "x" * 300,
    "a,,b",
    "🌲",
)
ENDS = ("\n", "\r\n", "\r", "\u2028", "\x0b", "\n\n")
NUMBERS = ("0", "1", "2", "15", "16", "-1", "007", "999999999", "9" * 40, "٣", "1.5", "1e3", "")
LATIN = "abcdefghij ,"


def cases(rng: random.Random, folder: Path, count: int) -> Iterator[Case]:
    """Yield `count` cases: handmade ones, at most half of them, then random texts for every reader."""
    fixed = handmade(folder)
    rng.shuffle(fixed)
    for number in range(count):
        if number < min(len(fixed), count // 2):
            name, run = fixed[number]
        else:
            make = rng.choice(MAKERS)
            name, run = make.__name__, make(rng, folder / f"{number}")
        yield Case(f"{number} {name}", partial(judged, run))


def judged(run: Callable[[], object]) -> None:
    """Call `run`; raises Refused for errors that the pack itself wrote."""
    try:
        run()
    except ValueError as error:
        if type(error) not in (ValueError, UntrustedError, CheckpointError) or raised_by_python(error):
            raise AssertionError("an error of Python's own") from error
        raise Refused(str(error)) from error


def raised_by_python(error: BaseException) -> bool:
    """Return whether the innermost line is a call of a built-in function, and no `raise` of ours."""
    place = error.__traceback__
    while place.tb_next:
        place = place.tb_next
    lines = Path(place.tb_frame.f_code.co_filename).read_text("utf-8").splitlines()
    return not lines[place.tb_lineno - 1].lstrip().startswith(("raise ", "super().__init__"))


def use_edits(text: Any, plan: TilePlan = PLAN, picture: str | None = None) -> None:
    """Read edits, fit and apply them as the editor's node does, and write what fits."""
    plain = TilePrompts(plan, (TilePrompt("dog, moss"),) * len(plan))
    fitted = read_edits(text).fit(plan, picture)
    prompts = fitted.apply(plain)
    content_key(*(prompts.positive(index) for index in (0, len(plan) - 1)))
    written = fitted.write()
    assert read_edits(written).write() == written, "what is written is not what is read"


def use_strings(values: Any, count: int = len(PLAN), style: Style | None = None) -> None:
    """Take a captioner's texts and compose every tile's prompt."""
    found = prompts_from_strings(values, count)
    assert len(found) == count
    style = style or Style()
    content_key(StaticPrompter(found[0].text).fingerprint(), *(style.compose(prompt.text) for prompt in found[:3]))


def use_tags(path: Path, data: bytes) -> None:
    """Read a tag list, and hash it as the prompter does."""
    path.write_bytes(data)
    content_key(*read_tags(path))


def use_more_tags(text: str) -> None:
    """Take the words of the node's own field."""
    content_key(*check_tags([word.strip() for word in text.split(",") if word.strip()], "more_tags"))


def use_prompt_file(path: Path, data: bytes) -> None:
    """Read a file of prompts as `tudsr zoom --prompts` does."""
    path.write_bytes(data)
    for positive, negative in read_prompts(path, "blur"):
        content_key(positive, negative)


def use_lists(folder: Path, tags: bytes, thresholds: bytes) -> None:
    """Read RAM's two lists."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LIST_FILE).write_bytes(tags)
    (folder / THRESHOLD_FILE).write_bytes(thresholds)
    content_key(*read_lists(folder, 3)[0])


def any_text(rng: random.Random, longest: int = 40) -> str:
    """Return words, letters or code points of any kind, joined."""
    match rng.randrange(4):
        case 0:
            parts = [rng.choice(WORDS) for _ in range(rng.randint(0, 6))]
        case 1:
            parts = [chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(rng.randint(0, 30))]
        case 2:
            parts = ["".join(rng.choices(LATIN, k=rng.randint(0, longest)))]
        case _:
            parts = ["".join(rng.choices(LATIN, k=40)) * rng.choice((1, 10, 200))]
    return rng.choice((", ", "", "\n")).join(parts)


def edit_line(rng: random.Random) -> str:
    """Return one line of edits, mostly right."""
    if rng.random() < 0.8:
        line = f"{rng.randint(1, 15)}{rng.choice(': + : -'.split())}"
        return line if line.endswith("-") else f"{line} a {' '.join(any_text(rng).splitlines())}"
    sign = rng.choice((*SIGNS, *SIGNS, "：", "=", ""))
    blank = rng.choice(("", " ", "\t", "\u3000", "\u2003"))
    return f"{rng.choice(NUMBERS)}{blank}{sign}{blank}{any_text(rng)}"


def header_line(rng: random.Random) -> str:
    """Return a first line of some grid, whole or with one number changed."""
    line = write_header(rng.choice(PLANS), rng.choice((None, "00ff" * 4, "0" * 16)))
    if rng.random() < 0.6:
        at = rng.randrange(len(line))
        line = line[:at] + rng.choice(("", "9", "0 ", "-", "x", "\0", "9" * 30)) + line[at + rng.randrange(3) :]
    return line


def edits(rng: random.Random, path: Path) -> Callable[[], None]:
    """Edits of many lines."""
    lines = [header_line(rng)] * rng.choice((0, 1, 1, 2)) + [edit_line(rng) for _ in range(rng.randint(0, 12))]
    text = rng.choice(("", "\ufeff")) + rng.choice(ENDS).join(lines)
    return partial(use_edits, text, rng.choice(PLANS), rng.choice((None, "00ff" * 4)))


def strings(rng: random.Random, path: Path) -> Callable[[], None]:
    """Lists in lists of texts and of what is none."""

    def value(depth: int) -> Any:
        if depth and rng.random() < 0.5:
            return [value(depth - 1) for _ in range(rng.choice((0, 1, 2, 15)))]
        return rng.choice((any_text(rng), None, 3, 0.5, b"x", {"a": "b"}, "\n".join("abc" * 5)))

    return partial(use_strings, rng.choice((value(3), [any_text(rng) for _ in range(15)])))


def styles(rng: random.Random, path: Path) -> Callable[[], None]:
    """Prefix, suffix and negative of any kind around a prompt."""
    texts = [any_text(rng) for _ in range(3)]
    return lambda: use_strings("a dog, a cat", 1, Style(*texts))


def tags(rng: random.Random, path: Path) -> Callable[[], None]:
    """A tag list of any bytes."""
    lines = [any_text(rng) for _ in range(rng.randint(0, 20))]
    data = rng.choice(ENDS).join(lines).encode("utf-8", rng.choice(("replace", "surrogatepass")))
    return partial(use_tags, path.with_suffix(".txt"), damaged(rng, data))


def more_tags(rng: random.Random, path: Path) -> Callable[[], None]:
    """Words typed into the node."""
    return partial(use_more_tags, any_text(rng, 4000))


def prompt_files(rng: random.Random, path: Path) -> Callable[[], None]:
    """A prompt file, JSON or lines."""
    entries = [rng.choice((any_text(rng), [any_text(rng), "x"], [1, 2], None)) for _ in range(rng.randint(0, 9))]
    data = json.dumps(entries, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return partial(use_prompt_file, path.with_suffix(rng.choice((".json", ".JSON", ".txt"))), damaged(rng, data))


def lists(rng: random.Random, path: Path) -> Callable[[], None]:
    """RAM's two lists, of three entries."""
    numbers = rng.choices(("0.5", "1e3", "nan", "-inf", "1_0", "٣", "", "x", "9" * 400), k=rng.choice((3, 3, 3, 2)))
    names = rng.choices(WORDS, k=3)
    parts = ("\n".join(rows).encode("utf-8", "surrogatepass") for rows in (names, numbers))
    return partial(use_lists, path, *(damaged(rng, part) if rng.random() < 0.2 else part for part in parts))


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes as they are, or with a few changed, cut or put in."""
    data = bytearray(data)
    for _ in range(rng.choice((0, 0, 1, 5))):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randrange(3)] = rng.choice((b"", b"\xff", b"\0", b"]", b"[", b'"', rng.randbytes(4)))
    return bytes(data)


MAKERS = (edits, edits, edits, strings, styles, tags, more_tags, prompt_files, lists)


def handmade(folder: Path) -> list[tuple[str, Callable[[], object]]]:
    """Return the cases that somebody thought of: what once hung, grew or ended in a traceback, and its relatives."""
    many, loop, laughs = " ".join(map(str, range(2001))), [], ["ha"]
    loop.append(loop)
    for _ in range(20):
        laughs = [laughs] * 10
    fine = " ".join(map(str, range(0, 400_000)))
    texts = {
        "a header of 2001 x 2001 tiles": f"# grid 2064x2064, tile 64x64, rows {many}, columns {many}\n4004001: b",
        "a header of 400,000 rows": f"# grid 400063x64, tile 64x64, rows {fine}, columns 0\n400000: b\n1: a",
        "many edits of a fine grid": f"# grid 400063x64, tile 64x64, rows {fine}, columns 0\n"
        + "\n".join(f"{n}: b" for n in range(1, MAX_LINES)),
        "a header of no size": "# grid 0x0, tile 0x0, rows 0, columns 0\n1: a",
        "a header of huge sizes": "# grid 999999999x999999999, tile 999999999x999999999, rows 0, columns 0\n1: a",
        "a header that repeats": write_header(PLAN, None) + "\n" + "# grid " * 500_000,
        "two headers": write_header(PLAN, None) + "\n" + write_header(PLANS[2], None) + "\n15: a",
        "one long line": "1: " + "x" * 2**22,
        "four million blanks": " " * 2**22,
        "blanks before a sign": "1" + " " * 2**21 + "x",
        "a million lines": "1-\n" * 2**20,
        "adding to one tile for ever": "\n".join(f"1+ word {n}" for n in range(MAX_LINES)),
        "a byte order mark": "\ufeff1: a",
        "half a character": "1: \ud800",
        "no text": None,
        "a number": 3,
        "a list": ["1: a"],
    }
    cases = [(f"edits: {name}", partial(use_edits, text)) for name, text in texts.items()]
    cases += [
        ("strings: a list of itself", partial(use_strings, loop)),
        ("strings: a billion laughs", partial(use_strings, laughs)),
        ("strings: ten million characters", partial(use_strings, "x" * 10**7)),
        ("strings: a million lines", partial(use_strings, "x\n" * 10**6)),
        ("strings: a million texts", partial(use_strings, ["x"] * 10**6)),
        ("strings: half a character", partial(use_strings, ["\ud800"] * 15)),
        ("strings: a long sentence", partial(use_strings, "word " * 900, 1)),
        ("strings: many commas", partial(use_strings, "," * 4_999, 1)),
        ("style: a long suffix", lambda: use_strings("a", 1, Style("", "8k, " * 1_200, ""))),
        ("style: half a character", lambda: use_strings("a", 1, Style("\udfff"))),
        ("style: no text", lambda: use_strings("a", 1, Style(None))),
        ("tags: empty", partial(use_tags, folder / "empty.txt", b"")),
        ("tags: remarks", partial(use_tags, folder / "remarks.txt", b"# a\n#b\n")),
        ("tags: a million", partial(use_tags, folder / "million.txt", b"".join(b"%d\n" % n for n in range(10**6)))),
        ("tags: sixty megabytes", partial(use_tags, folder / "large.txt", b"x" * 60_000_000)),
        ("tags: another encoding", partial(use_tags, folder / "utf16.txt", "a tree".encode("utf-16"))),
        ("tags: a folder", lambda: read_tags(folder)),
        ("tags: nothing there", lambda: read_tags(folder / "\x1b[31m")),
        ("more tags: long", partial(use_more_tags, "x" * 10**6)),
        ("more tags: many", partial(use_more_tags, ",".join(map(str, range(10**6))))),
        ("more tags: half a character", partial(use_more_tags, "\ud800")),
        ("prompt file: deep", partial(use_prompt_file, folder / "deep.json", b"[" * 10**6)),
        ("prompt file: many", partial(use_prompt_file, folder / "many.json", b"[" + b'"",' * 10**6 + b'""]')),
        ("prompt file: digits", partial(use_prompt_file, folder / "digits.json", b"9" * 10**6)),
        ("prompt file: a name", partial(use_prompt_file, folder / "name.json", b'"owner/name"')),
        ("prompt file: half a character", partial(use_prompt_file, folder / "half.json", b'["\\ud800"]')),
        ("lists: long lines", partial(use_lists, folder / "long", b"x" * 10**7 + b"\na\nb", b"0.5\n" * 3)),
        ("lists: digits", partial(use_lists, folder / "digits", b"a\nb\nc", b"9" * 10**6 + b"\n1\n2")),
    ]
    return cases
