"""A real ComfyUI server for tests: found through COMFYUI_PATH or `comfy which`, run as a subprocess."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

PACK = Path(__file__).parent.parent


def find() -> Path | None:
    """Return ComfyUI's folder, or None."""
    if path := os.environ.get("COMFYUI_PATH"):
        return Path(path)
    if shutil.which("comfy"):
        done = subprocess.run(["comfy", "--skip-prompt", "which"], capture_output=True, text=True, encoding="utf-8")
        try:
            return Path(json.loads(done.stdout)["data"]["workspace_path"])
        except (ValueError, KeyError, TypeError):
            return None
    return None


class Server:
    """One running server with this pack linked in under `name`, unless one is there already, and folders of its own."""

    def __init__(self, comfyui: Path, base: Path, name: str = "comfyui-tudsr", packs: dict[str, str] | None = None):
        self.base, self.log = base, base / "server.log"
        for folder in ("custom_nodes", "input", "output", "user/default", "models"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        if not (base / "custom_nodes" / name).exists():
            (base / "custom_nodes" / name).symlink_to(PACK)
        for other, source in (packs or {}).items():
            (base / "custom_nodes" / f"{other}.py").write_text(source, encoding="utf-8")
        (base / "user/default/comfy.settings.json").write_text('{"Comfy.TutorialCompleted": true}', encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(base)]
        command += ["--database-url", "sqlite:///:memory:", "--preview-method", "latent2rgb"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"HOME": str(base)}
        # A ComfyUI without this pack's command line: nodes must need nothing that it does not require itself.
        environment["PYTHONPATH"] = str(PACK / "tests" / "without")
        self.process = subprocess.Popen(
            command, cwd=comfyui, env=environment, stdout=self.log.open("w", encoding="utf-8"), stderr=subprocess.STDOUT
        )
        self._wait()

    def _wait(self, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"ComfyUI ended with {self.process.returncode}:\n{self.log.read_text('utf-8')[-3000:]}"
                )
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        raise TimeoutError("ComfyUI did not answer")

    def stop(self) -> None:
        """End the server."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str):
        """Return the JSON of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict):
        """Return the JSON of a POST, also of a refusal."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as refused:
            text = refused.read()
        return json.loads(text) if text.strip() else {}

    def queue(self, graph: dict) -> str:
        """Queue an API-form graph; returns its id. Raises AssertionError with the server's reasons."""
        answer = self.post("/prompt", {"prompt": graph, "client_id": "tests"})
        assert "prompt_id" in answer, json.dumps(answer, indent=1)[:3000]
        return answer["prompt_id"]

    def wait(self, prompt: str, seconds: float = 900) -> dict:
        """Return the history of a queued graph once it has ended, however it did."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt}")
            if prompt in history and history[prompt].get("status", {}).get("status_str"):
                return history[prompt]
            time.sleep(0.1)
        raise TimeoutError(prompt)

    def run(self, graph: dict) -> dict:
        """Run a graph to success; returns its outputs by node id."""
        history = self.wait(self.queue(graph))
        assert history["status"]["status_str"] == "success", json.dumps(history["status"], indent=1)[-3000:]
        return history["outputs"]

    def fail(self, graph: dict) -> str:
        """Run a graph that must fail; returns the exception's message."""
        history = self.wait(self.queue(graph))
        messages = dict(history["status"]["messages"])
        assert history["status"]["status_str"] == "error"
        return messages["execution_error"]["exception_message"]

    def images(self, outputs: dict, node: str) -> list[np.ndarray]:
        """Return the saved pictures of a SaveImage node, as arrays."""
        found = outputs[node]["images"]
        return [np.array(Image.open(self.base / "output" / item["subfolder"] / item["filename"])) for item in found]

    def put_image(self, name: str, array: np.ndarray) -> str:
        """Write an input picture; returns its name for Load Image."""
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        (self.base / "input" / name).write_bytes(buffer.getvalue())
        return name
