import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tudsr_core.download import DownloadError, download
from tudsr_core.known_files import KNOWN_FILES, known_file, where_to_get

CONTENT = os.urandom(3_000_000)
SHA = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
GIT = "git:" + hashlib.sha1(f"blob {len(CONTENT)}\0".encode() + CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT with ranges; its class attributes make it misbehave."""

    cut_after = None
    ranges = True
    etag = '"v1"'
    linked = None
    kind = "application/octet-stream"
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
            return self.send_error(404)
        if wanted and self.ranges and self.headers.get("If-Range") == self.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(CONTENT):
            return self.send_error(416)
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", self.kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.etag)
        self.end_headers()
        if self.cut_after is not None:
            self.wfile.write(body[: self.cut_after])
            self.connection.shutdown(2)
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name, value in dict(cut_after=None, ranges=True, etag='"v1"', linked=None, asked=[]).items():
        monkeypatch.setattr(Server, name, value)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/file.bin"
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("digest", [SHA, GIT, None])
def test_a_file_arrives_whole_under_its_own_name(server, tmp_path, digest):
    seen = []
    found = download(server, tmp_path / "models" / "x.bin", digest, lambda done, total: seen.append((done, total)))
    assert found == (digest or SHA)
    assert (tmp_path / "models" / "x.bin").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "models") == ["x.bin"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and len(seen) >= 3
    with pytest.raises(FileExistsError):
        download(server, tmp_path / "models" / "x.bin")


def cut(server, path, monkeypatch, after=1_200_000):
    monkeypatch.setattr(Server, "cut_after", after)
    with pytest.raises(DownloadError, match="run the same command to go on"):
        download(server, path, SHA)
    assert not path.exists() and 0 < path.with_name("x.bin.part").stat().st_size <= after
    monkeypatch.setattr(Server, "cut_after", None)


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path, monkeypatch):
    cut(server, tmp_path / "x.bin", monkeypatch)
    have = (tmp_path / "x.bin.part").stat().st_size
    download(server, tmp_path / "x.bin", SHA)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert Server.asked == [None, f"bytes={have}-"]


def test_a_server_without_ranges_or_with_a_new_file_starts_over(server, tmp_path, monkeypatch):
    for name, value in (("ranges", False), ("etag", '"v2"')):
        path = tmp_path / name / "x.bin"
        cut(server, path, monkeypatch)
        monkeypatch.setattr(Server, name, value)
        download(server, path, SHA)
        assert path.read_bytes() == CONTENT


def test_a_part_that_is_already_whole_is_not_fetched_twice_wrongly(server, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "x.bin.part.etag").write_text('"v1"', encoding="utf-8")
    download(server, tmp_path / "x.bin", SHA)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


def test_a_wrong_digest_keeps_nothing(server, tmp_path, monkeypatch):
    with pytest.raises(DownloadError, match="expected was sha256:0000"):
        download(server, tmp_path / "x.bin", "sha256:" + "0" * 64)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(Server, "linked", "f" * 64)
    with pytest.raises(DownloadError, match="expected was sha256:ffff"):
        download(server, tmp_path / "x.bin")
    monkeypatch.setattr(Server, "linked", SHA.removeprefix("sha256:"))
    assert download(server, tmp_path / "x.bin") == SHA


def test_refusals_and_web_pages_are_named(server, tmp_path, monkeypatch):
    with pytest.raises(DownloadError, match="refused .404"):
        download(server.replace("file.bin", "missing"), tmp_path / "x.bin", SHA)
    with pytest.raises(DownloadError, match="cut off"):
        download("http://127.0.0.1:9/x", tmp_path / "x.bin", SHA)
    monkeypatch.setattr(Server, "kind", "text/html; charset=utf-8")
    with pytest.raises(DownloadError, match="is a web page"):
        download(server, tmp_path / "x.bin", SHA)
    assert os.listdir(tmp_path) == []


def test_cancelling_keeps_the_part(server, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server, tmp_path / "x.bin", SHA, stop)
    assert not (tmp_path / "x.bin").exists() and (tmp_path / "x.bin.part").exists()
    download(server, tmp_path / "x.bin", SHA)
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


def test_the_table_is_complete():
    for file in KNOWN_FILES:
        assert file.licence and file.gives and file.page.startswith("https://")
        assert file.folder in ("tudsr", "tudsr/dape", "checkpoints")
        assert file.url is None or file.url.startswith("https://")
        assert file.digest is None or file.digest.partition(":")[0] in ("sha256", "git")
    assert known_file("sub/osediff.pkl").licence == "Apache-2.0"
    assert "github.com/zsyOAOA/InvSR (licence: S-Lab" in where_to_get("noise_predictor_sd_turbo_v5.pth")
    assert known_file("other.bin") is None
