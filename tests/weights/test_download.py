import hashlib
import os
import random
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tudsr_core.weights.download import DownloadError, download_file
from tudsr_core.weights.known_files import KNOWN_FILES, known_file, where_to_get

ROOT = Path(__file__).parents[2]
CONTENT = random.Random(0).randbytes(3_000_000)  # the same in every process, as test names hold its digest
SHA = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
GIT = "git:" + hashlib.sha1(f"blob {len(CONTENT)}\0".encode() + CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT with ranges; its class attributes make it misbehave."""

    cut_after = None
    ranges = True
    etag = '"v1"'
    linked = None
    kind = "application/octet-stream"
    place = None
    content = CONTENT
    length = True
    to = None
    reason = None
    asked: list = []

    def do_HEAD(self):
        self.send_response(302 if self.linked else 200)
        if self.linked:
            self.send_header("X-Linked-Etag", f'"{self.linked}"')
            self.send_header("Location", self.path)
        self.end_headers()

    def do_GET(self):
        wanted = self.headers.get("Range")
        Server.asked.append(wanted)
        start = 0
        if self.path == "/missing":
            return self.send_error(404, self.reason)
        if wanted and self.ranges and self.headers.get("If-Range") == self.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(CONTENT):
            return self.send_error(416)
        if self.to and self.path == "/file.bin":
            self.send_response(302)
            self.send_header("Location", self.to)
            return self.end_headers()
        body = self.content[start:]
        self.send_response(206 if start or self.place == "unasked" else 200)
        self.send_header("Content-Type", self.kind)
        if start and self.place != "none":
            place = self.place or f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
            self.send_header("Content-Range", place)
        if self.length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.etag)
        self.end_headers()
        if self.cut_after is not None:
            self.wfile.write(body[: self.cut_after])
            self.connection.shutdown(2)
        else:
            with suppress(ConnectionError):  # whoever asked may have heard enough
                self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    usual = dict(cut_after=None, ranges=True, etag='"v1"', linked=None, asked=[], place=None, content=CONTENT, to=None)
    for name, value in (usual | {"length": True}).items():
        monkeypatch.setattr(Server, name, value)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/file.bin"
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("digest", [SHA, GIT, None])
def test_a_file_arrives_whole_under_its_own_name(server, tmp_path, digest):
    seen = []
    found = download_file(server, tmp_path / "models" / "x.bin", digest, lambda done, total: seen.append((done, total)))
    assert found == (digest or SHA)
    assert (tmp_path / "models" / "x.bin").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "models") == ["x.bin"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and len(seen) >= 3
    with pytest.raises(FileExistsError):
        download_file(server, tmp_path / "models" / "x.bin")


def cut(server, path, monkeypatch, after=1_200_000):
    monkeypatch.setattr(Server, "cut_after", after)
    with pytest.raises(DownloadError, match="run the same command to go on"):
        download_file(server, path, SHA)
    assert not path.exists() and 0 < path.with_name("x.bin.part").stat().st_size <= after
    monkeypatch.setattr(Server, "cut_after", None)


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path, monkeypatch):
    cut(server, tmp_path / "x.bin", monkeypatch)
    have = (tmp_path / "x.bin.part").stat().st_size
    download_file(server, tmp_path / "x.bin", SHA)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert Server.asked == [None, f"bytes={have}-"]


def test_a_server_without_ranges_or_with_a_new_file_starts_over(server, tmp_path, monkeypatch):
    for name, value in (("ranges", False), ("etag", '"v2"')):
        path = tmp_path / name / "x.bin"
        cut(server, path, monkeypatch)
        monkeypatch.setattr(Server, name, value)
        download_file(server, path, SHA)
        assert path.read_bytes() == CONTENT


def test_a_part_that_is_already_whole_is_not_fetched_twice_wrongly(server, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "x.bin.part.etag").write_text('"v1"', encoding="utf-8")
    download_file(server, tmp_path / "x.bin", SHA)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


def test_a_wrong_digest_keeps_nothing(server, tmp_path, monkeypatch):
    with pytest.raises(DownloadError, match="expected was sha256:0000"):
        download_file(server, tmp_path / "x.bin", "sha256:" + "0" * 64)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(Server, "linked", "f" * 64)
    with pytest.raises(DownloadError, match="expected was sha256:ffff"):
        download_file(server, tmp_path / "x.bin")
    monkeypatch.setattr(Server, "linked", SHA.removeprefix("sha256:"))
    assert download_file(server, tmp_path / "x.bin") == SHA


def test_refusals_and_web_pages_are_named(server, tmp_path, monkeypatch):
    with pytest.raises(DownloadError, match="refused .404"):
        download_file(server.replace("file.bin", "missing"), tmp_path / "x.bin", SHA)
    with pytest.raises(DownloadError, match="cut off"):
        download_file("http://127.0.0.1:9/x", tmp_path / "x.bin", SHA)
    monkeypatch.setattr(Server, "kind", "text/html; charset=utf-8")
    with pytest.raises(DownloadError, match="is a web page"):
        download_file(server, tmp_path / "x.bin", SHA)
    assert os.listdir(tmp_path) == []


def test_cancelling_keeps_the_part(server, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_file(server, tmp_path / "x.bin", SHA, stop)
    assert not (tmp_path / "x.bin").exists() and (tmp_path / "x.bin.part").exists()
    download_file(server, tmp_path / "x.bin", SHA)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "place", ["none", "bytes 0-2999999/3000000", "bytes {have}-2999999/4000000", "bytes x-y/z", "bytes {have}-9/3"]
)
def test_a_continuation_from_elsewhere_starts_over(server, tmp_path, monkeypatch, place):
    cut(server, tmp_path / "x.bin", monkeypatch)
    have = (tmp_path / "x.bin.part").stat().st_size
    monkeypatch.setattr(Server, "place", place.format(have=have))
    assert download_file(server, tmp_path / "x.bin") == SHA
    assert Server.asked == [None, f"bytes={have}-", None]


def test_a_continuation_of_another_file_starts_over(server, tmp_path, monkeypatch):
    """A server that answers 206 though the ETag is another one, and says so."""
    cut(server, tmp_path / "x.bin", monkeypatch)
    tag = tmp_path / "x.bin.part.etag"

    class Other(str):
        def __eq__(self, other):
            return other == tag.read_text(encoding="utf-8") or str.__eq__(self, other)

        __hash__ = str.__hash__

    monkeypatch.setattr(Server, "etag", Other('"v2"'))
    assert download_file(server, tmp_path / "x.bin") == SHA
    assert Server.asked[-1] is None and len(Server.asked) == 3


def test_a_part_that_nobody_asked_for_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "place", "unasked")
    with pytest.raises(DownloadError, match="that was not asked for"):
        download_file(server, tmp_path / "x.bin")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("length", [True, False])
def test_empty_and_endless_answers_are_refused(server, tmp_path, monkeypatch, length):
    monkeypatch.setattr(Server, "length", length)
    with pytest.raises(DownloadError, match="more than the 1,000,000 bytes that this file can have"):
        download_file(server, tmp_path / "x.bin", largest=1_000_000)
    assert os.listdir(tmp_path) == []
    assert download_file(server, tmp_path / "x.bin", largest=3_000_000) == SHA
    monkeypatch.setattr(Server, "content", b"")
    with pytest.raises(DownloadError, match="is empty .0 bytes"):
        download_file(server, tmp_path / "y.bin")
    assert os.listdir(tmp_path) == ["x.bin"]


def test_only_web_addresses_are_followed(server, tmp_path, monkeypatch):
    (tmp_path / "secret").write_bytes(b"secret")
    for place in (f"file://{tmp_path}/secret", "ftp://127.0.0.1:9/x", "data:,x"):
        with pytest.raises(DownloadError, match="only http and https are fetched"):
            download_file(place, tmp_path / "x.bin", SHA)
        monkeypatch.setattr(Server, "to", place)
        with pytest.raises(DownloadError, match="only http and https are fetched|is not allowed"):
            download_file(server, tmp_path / "x.bin", SHA)
    monkeypatch.setattr(Server, "to", server.replace("file.bin", "other.bin"))
    assert download_file(server, tmp_path / "x.bin", SHA) == SHA
    assert sorted(os.listdir(tmp_path)) == ["secret", "x.bin"]


@pytest.mark.parametrize("name", ["x.bin.part", "x.bin.part.etag"])
def test_links_and_pipes_in_the_parts_place_are_not_written_to(server, tmp_path, name):
    victim = tmp_path / "victim"
    for make in (
        lambda place: place.symlink_to(victim),
        lambda place: (victim.write_bytes(b"mine"), place.symlink_to(victim)),
        os.mkfifo,
        os.mkdir,
    ):
        make(tmp_path / name)
        with pytest.raises(DownloadError, match="is a link, a folder"):
            download_file(server, tmp_path / "x.bin", SHA)
        assert not victim.exists() or victim.read_bytes() == b"mine"
        (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
    assert download_file(server, tmp_path / "x.bin", SHA) == SHA


def test_two_at_once_do_not_write_to_one_part(server, tmp_path):
    second = []

    def tick(done, total):
        if not second:
            script = "import sys, pathlib; from tudsr_core.weights.download import download_file"
            script += "; download_file(sys.argv[1], pathlib.Path(sys.argv[2]))"
            command = [sys.executable, "-c", script, server, str(tmp_path / "x.bin")]
            second.append(subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT).stderr)

    assert download_file(server, tmp_path / "x.bin", SHA, tick) == SHA
    assert "is being fetched by another process" in second[0]
    assert os.listdir(tmp_path) == ["x.bin"] and (tmp_path / "x.bin").read_bytes() == CONTENT


def test_what_a_server_says_is_printed_escaped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "reason", "\x1b[2J")
    with pytest.raises(DownloadError) as caught:
        download_file(server.replace("file.bin", "missing"), tmp_path / "x.bin", SHA)
    assert str(caught.value).isprintable() and r"\x1b[2J" in str(caught.value)


def test_the_table_is_complete():
    for file in KNOWN_FILES:
        assert file.licence and file.gives and file.page.startswith("https://")
        assert file.folder in ("tudsr", "tudsr/dape", "checkpoints")
        assert file.url is None or file.url.startswith("https://")
        assert file.digest is None or file.digest.partition(":")[0] in ("sha256", "git")
    assert known_file("sub/osediff.pkl").licence == "Apache-2.0"
    assert "github.com/zsyOAOA/InvSR (licence: S-Lab" in where_to_get("noise_predictor_sd_turbo_v5.pth")
    assert known_file("other.bin") is None
