"""What was done in an output folder: one line of JSON for every run that began and every picture that ended.

A picture's line is written when its file is complete under a temporary name, before it takes its own: a process
that is killed in between leaves a line whose digest is not that of any file there, and the picture is done again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..pictures import PictureError
from ..untrusted import Fields, UntrustedError, parse_json, shown
from .folder_lock import hold
from .jobs import Job
from .settings import Settings, differences, sha256_of

log = logging.getLogger(__name__)

MANIFEST = "tudsr-run.jsonl"
MAX_LINE = 2**18
MAX_PATH = 2**13
MAX_SECONDS = 10**10

Facts = tuple[int, float]
"""A file's bytes, and the time of its last change in seconds."""


class State(Enum):
    """What an output folder has of a job: nothing, its result, an older result, or a file that no run wrote."""

    new = "new"
    done = "done"
    outdated = "outdated"
    foreign = "foreign"


@dataclass(frozen=True)
class Record:
    """How one picture ended; `output` is relative to the folder, with `/`. Either `sha256` or `error` is empty."""

    source: str
    bytes: int
    mtime: float
    output: str
    output_bytes: int = 0
    output_mtime: float = 0.0
    sha256: str = ""
    seconds: float = 0.0
    error: str = ""

    @property
    def facts(self) -> Facts:
        """Of the source, when it was read."""
        return self.bytes, self.mtime


@dataclass
class History:
    """What a manifest says: the last run's settings, how its pictures ended, and all that was ever written.

    `begun`: outputs that a run began and did not finish, beside which it may have written other files; once finished
    those are the user's to change. `unreadable` counts lines that say nothing, such as one that a power cut left half.
    """

    settings: Settings | None = None
    ended: dict[str, Record] = field(default_factory=dict)
    written: dict[str, list[Record]] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    unreadable: int = 0

    def begin(self, settings: Settings) -> None:
        """A run began."""
        self.settings, self.ended = settings, {}

    def add(self, record: Record) -> None:
        """A picture ended."""
        self.ended[record.output] = record
        if not record.error:
            self.written.setdefault(record.output, []).append(record)
            self.begun.discard(record.output)


def facts(path: Path) -> Facts:
    """Return what tells that a file has changed; raises OSError."""
    status = path.stat()
    return status.st_size, round(status.st_mtime_ns / 1e9, 6)


def facts_or_none(path: Path) -> Facts:
    """Return a file's facts, of nothing where there is none: reading it says what is wrong."""
    try:
        return facts(path)
    except OSError:
        return 0, 0.0


def results_in(folder: Path) -> list[Record]:
    """Return the last result of every output that a folder's manifest knows; none without one."""
    path = folder / MANIFEST
    return [records[-1] for records in read_history(path).written.values()] if path.is_file() else []


def read_history(path: Path) -> History:
    """Read a manifest; lines that are none are counted and passed over."""
    history = History()
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            try:
                _read_line(line.decode("utf-8"), history)
            except (UntrustedError, UnicodeDecodeError):
                history.unreadable += bool(line.strip())
    return history


def _read_line(line: str, history: History) -> None:
    values = Fields(parse_json(line, "the line"), "the line")
    if "run" in values.values:
        return history.begin(dict(values.table("run").values))
    if "begins" in values.values:
        return history.begun.add(_name_inside(values, "begins"))
    name = _name_inside(values, "output")
    history.add(
        Record(
            source=values.text("source", longest=MAX_PATH),
            bytes=values.whole("bytes", most=10**12),
            mtime=values.number("mtime", most=MAX_SECONDS, least=-MAX_SECONDS),
            output=name,
            output_bytes=values.whole("output_bytes", 0, most=10**12),
            output_mtime=values.number("output_mtime", 0, most=MAX_SECONDS, least=-MAX_SECONDS),
            sha256=values.text("sha256", ""),
            seconds=values.number("seconds", 0),
            error=values.text("error", "", longest=MAX_LINE),
        )
    )


def _name_inside(values: Fields, key: str) -> str:
    name = values.text(key, longest=MAX_PATH)
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or Path(name).drive:
        raise UntrustedError(f"{name} lies outside the folder")
    return name


class Manifest:
    """The record of one output folder, held by this process; made by `open_manifest`."""

    def __init__(self, folder: Path, file: BinaryIO, history: History) -> None:
        self.folder, self.history = folder, history
        self._file = file

    def begin(self, settings: Settings) -> None:
        """Note that a run began in which nothing is done yet; raises OSError."""
        self._append({"run": settings})
        self.history.begin(settings)

    def state(self, job: Job) -> State:
        """Return what there is of a job; reads the output only where size and time are not those noted."""
        name = self.name(job)
        if not os.path.exists(job.output):  # also for a name that cannot be: writing says so
            return State.new
        record = self.history.ended.get(name)
        if record and not record.error and _is_file_of(record, job.output):
            try:
                unchanged = facts(job.source) == record.facts
            except OSError:
                unchanged = False
            return State.done if unchanged and all(path.exists() for path in job.also) else State.outdated
        ours = any(_is_file_of(old, job.output) for old in self.history.written.get(name, ()))
        return State.outdated if ours else State.foreign

    def begin_job(self, job: Job) -> None:
        """Note that a run writes the files beside a job's output from now on; raises OSError."""
        if job.also and not self.has_begun(job):
            self._append({"begins": self.name(job)})
            self.history.begun.add(self.name(job))

    def has_begun(self, job: Job) -> bool:
        """Return whether files beside a job's output are what an unfinished run left: none were there before it."""
        return self.name(job) in self.history.begun

    def record(self, job: Job) -> Record | None:
        """Return how a job ended in this run, or in the run that it goes on with."""
        return self.history.ended.get(self.name(job))

    def add_written(self, job: Job, source: Facts, complete: Path, seconds: float, sha256: str | None = None) -> None:
        """Note a result that is complete in the file `complete` and is about to be renamed; raises OSError.

        `sha256` is its digest, where whoever wrote it has said it.
        """
        size, mtime = facts(complete)
        digest, name = sha256 or sha256_of(complete), str(job.source.absolute())
        self._add(Record(name, *source, self.name(job), size, mtime, digest, round(seconds, 3)))

    def add_failed(self, job: Job, error: BaseException) -> None:
        """Note why there is no result, to be tried again by the next run; raises OSError."""
        source = str(job.source.absolute()), *facts_or_none(job.source)
        self._add(Record(*source, self.name(job), error=shown(str(error), 2000)))

    def name(self, job: Job) -> str:
        """Return what lines call a job's output: its path in the folder, with `/`."""
        return job.output.relative_to(self.folder).as_posix()

    def _add(self, record: Record) -> None:
        self._append({name: value for name, value in asdict(record).items() if value != ""})
        self.history.add(record)

    def _append(self, values: dict[str, object]) -> None:
        # One write at the end of the file, on the disk before the picture is renamed. What of a line fitted on a
        # full disk is taken back.
        line = json.dumps(values).encode("ascii") + b"\n"
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), before)
            raise


def _is_file_of(record: Record, output: Path) -> bool:
    """Whether a file is the one that was noted: by size and time or, where it was copied since, by its digest."""
    try:
        size, mtime = facts(output)
        same_time = size == record.output_bytes and mtime == record.output_mtime
        return same_time or (size == record.output_bytes and sha256_of(output) == record.sha256)
    except OSError:  # it cannot be read, so nobody can say
        return False


@contextmanager
def open_manifest(folder: Path, settings: Settings, force: bool = False) -> Iterator[Manifest]:
    """Hold the manifest of an output folder, alone, for a run with `settings`.

    A run with the same settings goes on with the last one; `force` begins a new one, in which everything is
    to be done. Raises PictureError where another process is at it, and where the last run had other settings.
    """
    path = folder / MANIFEST
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise PictureError(f"{path} is no file of a run; move it away, or choose another folder")
    with path.open("ab", buffering=0) as file:
        hold(file, folder)
        history = read_history(path)
        if history.unreadable:
            log.warning("%s: unreadable lines are passed over (%d)", path, history.unreadable)
        manifest = Manifest(folder, file, history)
        _end_line(path, file)
        if history.settings is None or force:
            manifest.begin(settings)
        elif changed := differences(history.settings, settings):
            raise PictureError(
                f"the pictures in {folder} were made with other settings ({changed}); choose another folder for the "
                "results, or make them all again (tudsr: --force, ComfyUI: replace)"
            )
        yield manifest


def _end_line(path: Path, file: BinaryIO) -> None:
    """End a last line that a power cut left half, so that the next one stands alone."""
    with path.open("rb") as reader:
        if reader.seek(0, os.SEEK_END):
            reader.seek(-1, os.SEEK_END)
            if reader.read(1) != b"\n":
                file.write(b"\n")
