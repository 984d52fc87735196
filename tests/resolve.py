"""What installing the requirements and the pack itself would change in environments as users of ComfyUI have them.

    python tests/resolve.py [REQUIREMENTS]

Makes a virtual environment for each, installs what is named below, and asks pip's resolver (`--dry-run`). Needs a
package registry and a few minutes, most of it for torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH = f"torch=={metadata.version('torch').partition('+')[0]}"
ENVIRONMENTS = {
    "transformers 4.57": (TORCH, "transformers==4.57.6", "huggingface_hub==0.36.0", "numpy==1.26.4", "pillow==11.3.0"),
    "transformers 5": (TORCH, "transformers==5.23.0", "numpy==2.4.6", "pillow"),
}


def pip(python: Path, *arguments: str) -> str:
    """Run pip in an environment; returns its output, raises RuntimeError with its complaint."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def installed(python: Path) -> dict[str, str]:
    """Return version by name."""
    return {canonical(entry["name"]): entry["version"] for entry in json.loads(pip(python, "list", "--format", "json"))}


def canonical(name: str) -> str:
    """Return a distribution's name as registries compare it."""
    return name.lower().replace("_", "-")


def changes(packages: tuple[str, ...], requirements: Path, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return what an environment with `packages` holds, and what pip would install or move there.

    Both are asked for: `requirements`, and the dependencies of pyproject.toml, which comfy-cli --fast-deps reads.
    """
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip(python, "install", "--quiet", "--upgrade", "pip")  # before 23 it has no report
    pip(python, "install", "--quiet", *packages)
    have = installed(python)
    report = folder / "report.json"
    pip(python, "install", "--quiet", "--dry-run", "--report", str(report), "-r", str(requirements), str(ROOT))
    wanted = [entry["metadata"] for entry in json.loads(report.read_bytes())["install"]]
    wanted = [one for one in wanted if canonical(one["name"]) != "comfyui-tudsr"]
    lines = [f"{one['name']} {have.get(canonical(one['name']), 'absent')} -> {one['version']}" for one in wanted]
    return have, sorted(lines)


def main() -> None:
    """Print a table; exit with 1 if anything would change."""
    requirements = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "requirements.txt"
    moved = False
    for name, packages in ENVIRONMENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            have, lines = changes(packages, requirements, Path(folder))
        about = ", ".join(
            f"{one} {have[one]}" for one in ("torch", "transformers", "huggingface-hub", "numpy", "pillow")
        )
        sys.stdout.write(f"{name} ({about}; {len(have)} packages)\n")
        sys.stdout.writelines(f"  {line}\n" for line in lines or ["nothing is installed, nothing moves"])
        moved = moved or bool(lines)
    raise SystemExit(int(moved))


if __name__ == "__main__":
    main()
