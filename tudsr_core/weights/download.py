"""Fetching one file over HTTP: resumed when cut, checked by its digest, renamed when whole.

Only ever called because somebody asked for that file. Two processes never write to one part: whoever
holds the lock on `<name>.part.etag` owns both.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from .. import __version__
from ..untrusted import UntrustedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

CHUNK = 2**20
TIMEOUT_SECONDS = 60
AGENT = f"comfyui-tudsr/{__version__}"
LARGEST = 2**34  # bytes; the largest known file has 5 GB
STRONG_TAG = re.compile(rb'"[\x21\x23-\x7e]{1,200}"')

DownloadProgress = Callable[[int, int | None], None]


class DownloadError(UntrustedError):
    """A file that could not be fetched; the message names it, says why and what to do."""


def download_file(
    url: str, path: Path, digest: str | None = None, tick: DownloadProgress | None = None, largest: int = LARGEST
) -> str:
    """Fetch `url` to `path`, return its digest, `sha256:<hex>` unless another kind was asked for.

    What arrives is kept in `<name>.part`, from which a later call goes on; it is renamed only when it
    is complete and its digest is `digest` (or the one that Hugging Face's server states). Answers of
    more than `largest` bytes are refused. `tick(done, total)` counts bytes, total None if unknown; it
    may raise to cancel. Raises DownloadError, and FileExistsError if `path` exists.
    """
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.etag")
    try:
        _check_address(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(tag, part) as owned:
            if path.exists():
                raise FileExistsError(f"{path} exists; delete it to download it again")
            digest = digest or _stated_digest(url)
            _fetch(url, part, owned, tick or (lambda done, total: None), largest)
            return _accept(path, part, digest)
    except FileExistsError:
        raise
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url} was refused ({error.code} {error.reason}); get the file in a browser") from error
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(f"{url} was cut off ({reason}); run the same command to go on from there") from error
    except OSError as error:
        raise DownloadError(
            f"{path} was not written: {error.strerror or error}; free some space, then run again"
        ) from error


def _accept(path: Path, part: Path, digest: str | None) -> str:
    """Give a whole part its name if its digest is the wanted one, else delete it."""
    kind = digest.partition(":")[0] if digest else "sha256"
    found = f"{kind}:{_hash(part, kind)}"
    if digest and found != digest:
        part.unlink()
        raise DownloadError(
            f"{path.name} has the digest {found}, expected was {digest}; it was deleted: the download is damaged or "
            "the file was replaced by another one. Try again, or get it from its authors' page"
        )
    os.replace(part, path)
    return found


@contextmanager
def _claimed(tag: Path, part: Path) -> Iterator[BinaryIO]:
    """Yield the open file beside a part that holds its ETag, locked; it stays only as long as there is a part."""
    with _open_plain(tag) as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            if not tag.exists() or not os.path.samestat(os.fstat(file.fileno()), tag.stat()):
                raise BlockingIOError
        except OSError as error:
            raise DownloadError(f"{part} is being fetched by another process; wait for it, then run again") from error
        try:
            yield file
        finally:
            if not part.exists():
                if not fcntl:
                    file.close()
                tag.unlink(missing_ok=True)


def _open_plain(path: Path) -> BinaryIO:
    """Open or create a file for reading and writing; raises DownloadError for links, pipes and folders."""
    plain = path.is_file() and not path.is_symlink()
    if plain or not os.path.lexists(path):
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with suppress(FileExistsError):
            return os.fdopen(os.open(path, flags if plain else flags | os.O_EXCL, 0o644), "r+b")
    raise DownloadError(f"{path} is a link, a folder or just being made by another process; delete it, then run again")


def _check_address(url: str) -> None:
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url} is no web address; only http and https are fetched")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args, **kwargs) -> None:
        return None


class _WebRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, url):
        _check_address(url)
        return super().redirect_request(request, file, code, message, headers, url)


def _stated_digest(url: str) -> str | None:
    """Return the SHA-256 that Hugging Face states in the headers of its redirect, or None."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": AGENT})
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_SECONDS) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:
        headers = error.headers
    found = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag", ""))
    return f"sha256:{found[1]}" if found else None


def _fetch(url: str, part: Path, tag: BinaryIO, tick: DownloadProgress, largest: int) -> None:
    """Fetch what is missing of `part`; `tag` holds the ETag of what is there."""
    etag = tag.read()
    have = 0
    if os.path.lexists(part):
        with _open_plain(part) as file:
            have = file.seek(0, os.SEEK_END) if STRONG_TAG.fullmatch(etag) else 0
    with _ask(url, have, etag) as answer:
        have = have if answer.status == 206 else 0
        total = _total(url, answer.headers, have, largest)
        if total and shutil.disk_usage(part.parent).free < total - have:
            raise OSError(f"there is no room for {(total - have) / 2**30:.1f} GiB in {part.parent}")
        _remember(tag, answer.headers.get("ETag", ""))
        with _open_plain(part) as file:
            file.truncate(have)
            file.seek(have)
            have = _receive(answer, file, have, total, tick, largest)
    if not 0 < have <= largest:
        part.unlink()
        raise DownloadError(_amiss(url, have, largest))
    if total and have < total:
        raise ConnectionError(f"{have:,} of {total:,} bytes came")


def _amiss(url: str, size: int, largest: int) -> str:
    what = f"sends more than the {largest:,} bytes that this file can have" if size else "is empty (0 bytes)"
    return f"{url} {what}; get the file in a browser"


def _total(url: str, headers: Message, have: int, largest: int) -> int | None:
    """Return the whole file's size if it is stated; raises DownloadError for answers that cannot be the file."""
    if headers.get_content_type() == "text/html":
        raise DownloadError(f"{url} is a web page, not the file; open it in a browser and download the file there")
    length = headers.get("Content-Length", "")
    total = have + int(length) if re.fullmatch(r"[0-9]{1,15}", length) else None
    if total is not None and not 0 < total <= largest:
        raise DownloadError(_amiss(url, total, largest))
    return total


def _ask(url: str, have: int, etag: bytes) -> http.client.HTTPResponse:
    """Return the answer for all but the first `have` bytes, or for everything if that cannot be continued."""
    request = urllib.request.Request(url, headers={"User-Agent": AGENT})
    if have:
        # If-Range: the server sends everything when the file has changed since.
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", etag.decode("ascii"))
    try:
        answer = urllib.request.build_opener(_WebRedirect).open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        return _ask(url, 0, b"")  # what is here is as long as the file or longer
    if answer.status != 206 or (have and _continues(answer.headers, have, etag)):
        return answer
    answer.close()
    if not have:
        raise DownloadError(f"{url} was answered by a part of it that was not asked for; try again later")
    return _ask(url, 0, b"")


def _continues(headers: Message, have: int, etag: bytes) -> bool:
    """Whether a partial answer begins where the part ends, and is of the same file."""
    place = re.fullmatch(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)", headers.get("Content-Range", ""))
    same = headers.get("ETag", etag.decode("ascii")) == etag.decode("ascii")
    return bool(place) and same and int(place[1]) == have and place[3] in ("*", str(int(place[2]) + 1))


def _remember(tag: BinaryIO, etag: str) -> None:
    """Write down which file the part belongs to; a weak or strange ETag is none, and the part then starts over."""
    raw = etag.encode("ascii", "replace")
    tag.seek(0)
    tag.truncate()
    tag.write(raw if STRONG_TAG.fullmatch(raw) else b"")
    tag.flush()


def _receive(
    answer: http.client.HTTPResponse, file: BinaryIO, have: int, total: int | None, tick: DownloadProgress, largest: int
) -> int:
    """Write what comes; returns the size, which is above `largest` if there was more than that."""
    while have <= largest and (chunk := answer.read(CHUNK)):
        file.write(chunk)
        have += len(chunk)
        tick(have, total)
    return have


def _hash(path: Path, kind: str) -> str:
    if kind == "git":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
