"""A real ComfyUI server in a process of its own, with the pack installed in a temporary folder."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from install import COMFYUI, ROOT

# Not the user's first start: no tutorial; text readable when zoomed out; nothing over the canvas.
SETTINGS = {"Comfy.TutorialCompleted": True, "LiteGraph.Canvas.MinFontSizeForLOD": 0, "Comfy.Minimap.Visible": False}
PACK = "T3"


def link_pack(folder: Path) -> None:
    """Install the pack as a symbolic link to this checkout: what developers do."""
    folder.symlink_to(ROOT, target_is_directory=True)


class HostServer:
    """ComfyUI on a free port of this machine, up while the `with` block runs.

    `base` holds its models, input, output and custom nodes. `packs` says how to install the pack under which folder
    names; `models` is a folder to be linked as `base/models`. `flags` are ComfyUI's own; `tree` is its checkout.
    """

    def __init__(
        self,
        base: Path,
        packs: Mapping[str, Callable[[Path], object]] | None = None,
        models: Path | None = None,
        start_limit: float = 120,
        flags: Sequence[str] = ("--cpu",),
        tree: Path = COMFYUI,
    ) -> None:
        self.base, self.start_limit, self.flags, self.tree = base, start_limit, flags, tree
        self.process: subprocess.Popen | None = None
        self.log_file = base / "server.log"
        for name in ("custom_nodes", "input", "output", "user/default"):
            (base / name).mkdir(parents=True, exist_ok=True)
        if models is not None:
            (base / "models").symlink_to(models, target_is_directory=True)
        (base / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
        for name, install in (packs if packs is not None else {PACK: link_pack}).items():
            install(base / "custom_nodes" / name)

    def __enter__(self) -> HostServer:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        options = {
            "--listen": "127.0.0.1",
            "--port": str(self.port),
            "--base-directory": str(self.base),
            "--database-url": "sqlite:///:memory:",
        }
        command = [sys.executable, str(self.tree / "main.py"), *self.flags, "--disable-api-nodes"]
        command += [word for pair in options.items() for word in pair]
        # The pack's tests put the checkout on the path; a user's ComfyUI does not have it there.
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.base,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server; never leaves it behind."""
        if self.process is None or self.process.poll() is not None:
            return
        for sign, patience in ((signal.SIGINT, 15), (signal.SIGKILL, 15)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                return

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.start_limit
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at start:\n{self.log()}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.3)
        raise TimeoutError(f"ComfyUI was not up after {self.start_limit} s:\n{self.log()}")

    def log(self) -> str:
        """What the server has printed so far, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log_file.read_text(encoding="utf-8", errors="replace"))

    def get(self, path: str) -> Any:
        """The JSON at a path of the server."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def object_info(self) -> dict[str, Any]:
        """Schemas of all nodes."""
        return self.get("/object_info")

    def post_prompt(self, graph: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Hand in a graph in API format; gives the HTTP status and the answer."""
        data = json.dumps({"prompt": graph}).encode()
        request = urllib.request.Request(self.url + "/prompt", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def run(self, graph: Mapping[str, Any], limit: float = 120) -> dict[str, Any]:
        """Run a graph to its end; gives its history. Raises where the server refuses it or it fails."""
        status, answer = self.post_prompt(graph)
        if status != 200:
            raise AssertionError(f"refused: {json.dumps(answer, indent=1)}")
        history = self.wait_for(answer["prompt_id"], limit)
        if history["status"]["status_str"] != "success":
            raise AssertionError(f"failed: {json.dumps(history['status'], indent=1)}\n{self.log()[-3000:]}")
        return history

    def wait_for(self, prompt_id: str, limit: float = 120) -> dict[str, Any]:
        """The history of a graph that has ended, well or not."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise TimeoutError(f"{prompt_id} had not ended after {limit} s:\n{self.log()[-3000:]}")

    def saved(self, history: Mapping[str, Any]) -> list[Path]:
        """Every file in the output folder that a run says it has written."""
        found = []
        for output in history["outputs"].values():
            for entries in output.values():
                for entry in entries if isinstance(entries, list) else ():
                    if isinstance(entry, dict) and entry.get("type") == "output":
                        found.append(self.base / "output" / entry["subfolder"] / entry["filename"])
        return found


def _die_with_parent() -> None:
    """In the server, before it starts: end when the tests end, even where they are killed (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def copy_pack(folder: Path) -> None:
    """Install the pack as a copy of what git would deliver from this checkout, files not yet committed included."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
