"""Fetching one file over HTTP: resumed when cut, checked by its digest, renamed when whole.

Only ever called because somebody asked for that file.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from . import __version__

CHUNK = 2**20
TIMEOUT_SECONDS = 60
AGENT = f"comfyui-tudsr/{__version__}"


class DownloadError(ValueError):
    """A file that could not be fetched; the message names it, says why and what to do."""


def download(
    url: str, path: Path, digest: str | None = None, tick: Callable[[int, int | None], None] | None = None
) -> str:
    """Fetch `url` to `path`, return its digest, `sha256:<hex>` unless another kind was asked for.

    What arrives is kept in `<name>.part`, from which a later call goes on; it is renamed only when it
    is complete and its digest is `digest` (or the one that Hugging Face's server states). `tick(done,
    total)` counts bytes, total None if unknown; it may raise to cancel. Raises DownloadError, and
    FileExistsError if `path` exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; delete it to download it again")
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.etag")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stated = None if digest else _stated_digest(url)
        _fetch(url, part, tag, tick or (lambda done, total: None))
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url} was refused ({error.code} {error.reason}); get the file in a browser") from error
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(f"{url} was cut off ({reason}); run the same command to go on from there") from error
    except OSError as error:
        raise DownloadError(
            f"{path} was not written: {error.strerror or error}; free some space, then run again"
        ) from error
    digest = digest or stated
    kind = digest.partition(":")[0] if digest else "sha256"
    found = f"{kind}:{_hash(part, kind)}"
    if digest and found != digest:
        part.unlink()
        tag.unlink(missing_ok=True)
        raise DownloadError(
            f"{path.name} has the digest {found}, expected was {digest}; it was deleted: the download is damaged or "
            "the file was replaced by another one. Try again, or get it from its authors' page"
        )
    os.replace(part, path)
    tag.unlink(missing_ok=True)
    return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args, **kwargs) -> None:
        return None


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


def _fetch(url: str, part: Path, tag: Path, tick: Callable[[int, int | None], None]) -> None:
    """Fetch what is missing of `part`."""
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": AGENT})
    if have:
        # If-Range: the server sends everything when the file has changed since.
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag.read_text("utf-8"))
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        part.unlink()  # as long as the file or longer: begin anew
        _fetch(url, part, tag, tick)
        return
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise DownloadError(f"{url} is a web page, not the file; open it in a browser and download the file there")
        have = have if answer.status == 206 else 0
        left = answer.headers.get("Content-Length")
        total = have + int(left) if left else None
        if total and shutil.disk_usage(part.parent).free < total - have:
            raise OSError(f"there is no room for {(total - have) / 2**30:.1f} GiB in {part.parent}")
        etag = answer.headers.get("ETag")
        if etag and not etag.startswith("W/"):
            tag.write_text(etag, encoding="utf-8")
        else:
            tag.unlink(missing_ok=True)
        with part.open("ab" if have else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                tick(have, total)
        if total and have < total:
            raise ConnectionError(f"{have:,} of {total:,} bytes came")


def _hash(path: Path, kind: str) -> str:
    if kind == "git":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
