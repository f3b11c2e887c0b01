"""Chromium on ComfyUI's page, through Playwright: open, load workflows, take pictures, collect what went wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from install import ROOT

IMAGES = ROOT / "docs" / "images"
# With this variable set, the tests rewrite the pictures of the docs.
WRITE_IMAGES = "T3_SCREENSHOTS"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WINDOW = {"width": 1600, "height": 900}
TABS = 38  # height of the bar of open workflows


def why_not() -> str | None:
    """The reason there can be no browser here, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "the Python package playwright is not installed"
    return None if CHROMIUM else "there is no chromium on the PATH"


class HostPage:
    """ComfyUI's page in a browser. `problems` collects console errors, page errors and failed requests."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url, self.problems = page, url, []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        page.on("response", self._response)
        page.goto(url)
        page.get_by_test_id("queue-button").wait_for(timeout=60_000)
        # The page is ready when the workflow it begins with is on the canvas.
        page.wait_for_function("document.querySelectorAll('[data-testid=dom-widget-textarea]').length > 0")

    def _console(self, message: Any) -> None:
        # What failed to load is judged by `_response`, which knows the address. The other is the page's own, at start.
        known = ("Failed to load resource", "ComfyApp graph accessed before initialization")
        if message.type == "error" and not any(words in message.text for words in known):
            self.problems.append(f"console: {message.text}")

    def _response(self, response: Any) -> None:
        if response.status >= 400 and not self._harmless(response):
            self.problems.append(f"{response.status} {response.request.method} {response.url}")

    def _harmless(self, response: Any) -> bool:
        """Files a fresh ComfyUI does not have, and translations of help pages."""
        path = response.url.removeprefix(self.url)
        return response.status == 404 and any(part in path for part in ("/userdata", "/user.css", "/en.md"))

    def open(self, workflow: Mapping[str, Any], name: str = "workflow") -> list[str]:
        """Load a UI workflow; gives the types the page does not know."""
        self.page.evaluate("([graph, name]) => window.app.loadGraphData(graph, true, true, name)", [workflow, name])
        return self.page.evaluate("""() => window.app.graph.nodes
            .filter(node => !LiteGraph.registered_node_types[node.type]).map(node => node.type)""")

    def prompt(self) -> dict[str, Any]:
        """The open workflow as the Run button would send it."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def set_widgets(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Set widgets: `{node id: {widget: value}}`."""
        self.page.evaluate(
            """values => {
                for (const [id, widgets] of Object.entries(values)) {
                    const node = window.app.graph.getNodeById(Number(id))
                    for (const [name, value] of Object.entries(widgets)) {
                        node.widgets.find(widget => widget.name === name).value = value
                    }
                }
            }""",
            values,
        )

    def set_setting(self, name: str, value: Any) -> None:
        """One of ComfyUI's settings."""
        self.page.evaluate("([name, value]) => window.app.extensionManager.setting.set(name, value)", [name, value])

    def add_node(self, kind: str, size: tuple[int, int] | None = None) -> int:
        """A new node in the middle of the window, selected; gives its number."""
        number = self.page.evaluate(
            """([kind, size]) => {
                const node = LiteGraph.createNode(kind)
                window.app.graph.add(node)
                if (size) node.setSize(size)
                window.app.canvas.selectNode(node)
                window.app.canvas.ds.scale = 1
                window.app.canvas.centerOnNode(node)
                return node.id
            }""",
            [kind, size],
        )
        return int(number)

    def boxes(self) -> dict[int, list[float]]:
        """Where each node is drawn, title bar included: left, top, right, bottom."""
        found = self.page.evaluate(
            """() => window.app.graph.nodes.map(node =>
                [node.id, [node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + node.size[1]]])"""
        )
        return {int(number): box for number, box in found}

    def fit_view(self) -> None:
        """The whole graph in the window, by the page's own key."""
        self.page.locator("#graph-canvas").focus()
        self.page.keyboard.press(".")
        self.page.wait_for_timeout(500)

    def picture(self, name: str, folder: Path, box: Sequence[float] | None = None, width: int = 1800) -> Path:
        """A screenshot into `folder`, or into the docs where the pictures are to be rewritten.

        Of the page below its tabs; or of a `box` of the canvas (left, top, right, bottom), `width` pixels wide, with
        nothing over it.
        """
        path = (IMAGES if os.environ.get(WRITE_IMAGES) else folder) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if box is None:
            size = self.page.viewport_size
            self.page.screenshot(
                path=path, clip={"x": 0, "y": TABS, "width": size["width"], "height": size["height"] - TABS}
            )
            return path
        self.close_panel()
        left, top, right, bottom = box
        scale = width / (right - left)
        height = round((bottom - top) * scale)
        # The tools at the window's edges stay outside.
        edge = 170
        self.page.set_viewport_size({"width": width + 2 * edge, "height": height + 2 * edge})
        self.page.wait_for_timeout(300)
        self.page.evaluate(
            """([left, top, scale, edge]) => {
                const canvas = window.app.canvas, place = canvas.canvas.getBoundingClientRect()
                canvas.deselectAll()
                canvas.ds.scale = scale
                canvas.ds.offset = [(edge - place.left) / scale - left, (edge - place.top) / scale - top]
                canvas.setDirty(true, true)
            }""",
            [left, top, scale, edge],
        )
        self.page.wait_for_timeout(500)
        self.page.screenshot(path=path, clip={"x": edge, "y": edge, "width": width, "height": height})
        self.page.set_viewport_size(WINDOW)
        return path

    def close_panel(self) -> None:
        """The panel on the right, where it is open."""
        panel = self.page.get_by_test_id("properties-panel")
        if panel.count():
            self.page.get_by_role("button", name="Toggle properties panel").click()
            panel.wait_for(state="hidden")

    def around(self, number: int, margin: int = 30) -> list[float]:
        """The box around one node."""
        left, top, right, bottom = self.boxes()[number]
        return [left - margin, top - margin, right + margin, bottom + margin]

    def whole(self, margin: int = 80) -> list[float]:
        """The box around all nodes, with their groups."""
        left, top, right, bottom = zip(*self.boxes().values(), strict=True)
        return [min(left) - margin, min(top) - margin, max(right) + margin, max(bottom) + margin]


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """One Chromium with an empty profile; gives a function that opens ComfyUI's page at a URL."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=CHROMIUM,
            headless=True,
            chromium_sandbox=False,
            args=FLAGS,
            viewport=WINDOW,
            service_workers="block",
        )
        context.set_default_timeout(30_000)
        try:
            yield lambda url: HostPage(context.new_page(), url)
        finally:
            context.close()


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
