"""The pack in ComfyUI's page: templates, workflows on the canvas, the Run button, help pages, messages.

With the environment variable T3_SCREENSHOTS set, the pictures of the docs are taken anew.
"""

from __future__ import annotations

import json
import time

import av
import host_browser
import host_standins
import pytest
from host_browser import load

from tools.graph import NOTE, overlaps
from tools.workflows import FOLDER, graphs

pytest_plugins = ["host_fixtures"]

NAMES = sorted(graph.name for graph in graphs())
SHOWN = next(name for name in NAMES if "4K text-to-video" in name)
EMPTY = {"nodes": [], "links": [], "groups": [], "version": 0.4}
QUICK = next(name for name in NAMES if "quick" in name)


@pytest.fixture(scope="module")
def tab(host, tmp_path_factory):
    """ComfyUI's page, one for all tests."""
    reason = host_browser.why_not()
    if reason:
        pytest.skip(reason)
    with host_browser.browser(tmp_path_factory.mktemp("profile")) as open_page:
        yield open_page(host.url)


@pytest.fixture
def no_problem(tab):
    """Whatever a test does, the page has nothing to complain about."""
    tab.problems.clear()
    yield
    assert tab.problems == []


def make_small(tab):
    """The open workflow, small enough for two cores."""
    small = host_standins.SMALL
    kinds = tab.page.evaluate("() => window.app.graph.nodes.map(node => [node.id, node.type])")
    tab.set_widgets({str(number): small[kind] for number, kind in kinds if kind in small})


def number_of(tab, kind):
    return tab.page.evaluate("kind => window.app.graph.nodes.find(node => node.type === kind).id", kind)


def run(tab, host):
    """Press Run and wait; gives the history of the run."""
    before = host.get("/history")
    tab.page.get_by_test_id("queue-button").click()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        new = host.get("/history").keys() - before.keys()
        if new:
            return host.wait_for(new.pop())
        tab.page.wait_for_timeout(200)
    raise TimeoutError("nothing was run")


def test_the_page_opens_without_complaint(tab):
    assert tab.problems == []


def test_the_template_browser_lists_the_pack(tab, no_problem, tmp_path):
    page = tab.page
    page.get_by_text("Templates", exact=True).first.click()
    dialog = page.get_by_role("dialog").first
    dialog.get_by_text("T3", exact=True).first.click()
    cards = dialog.locator("[data-testid^='template-workflow-']")
    cards.nth(len(NAMES) - 1).wait_for()
    listed = [card.get_attribute("data-testid").removeprefix("template-workflow-") for card in cards.all()]
    assert sorted(listed) == NAMES
    for card in cards.all():
        card.scroll_into_view_if_needed()
    page.wait_for_function(
        """count => [...document.querySelectorAll("[data-testid^='template-workflow-'] img")]
            .filter(image => image.naturalWidth > 0).length === count""",
        arg=len(NAMES),
    )
    cards.first.scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    tab.picture("templates", tmp_path)
    card = dialog.get_by_test_id(f"template-workflow-{SHOWN}")
    card.click()
    dialog.wait_for(state="hidden")
    page.wait_for_function("name => document.title.includes(name)", arg=SHOWN)
    assert tab.prompt() == load(FOLDER / "api" / f"{SHOWN}.json")


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_opens_as_its_twin(tab, no_problem, name):
    """No missing node or model, nothing covered, and the same graph as the one in API format."""
    ui = load(FOLDER / f"{name}.json")
    assert tab.open(ui, name) == []
    assert tab.page.get_by_test_id("error-overlay").count() == 0
    assert tab.prompt() == load(FOLDER / "api" / f"{name}.json")
    boxes = tab.boxes()
    assert boxes.keys() == {node["id"] for node in ui["nodes"]}
    assert overlaps(boxes) == []


@pytest.mark.parametrize("name", NAMES)
def test_tidy_with_the_other_way_of_drawing_nodes(tab, no_problem, name):
    """ComfyUI's "Nodes 2.0", which makes nodes of other heights."""
    tab.set_setting("Comfy.VueNodes.Enabled", True)
    try:
        tab.open(load(FOLDER / f"{name}.json"), name)
        tab.page.wait_for_timeout(300)
        assert tab.page.locator("[data-node-id]").count() > 0
        assert overlaps(tab.boxes()) == []
    finally:
        tab.set_setting("Comfy.VueNodes.Enabled", False)


@pytest.mark.parametrize("name", NAMES)
def test_notes_show_all_of_their_text(tab, no_problem, name):
    tab.open(load(FOLDER / f"{name}.json"), name)
    tab.fit_view()
    hidden = tab.page.evaluate("""() => [...document.querySelectorAll('.comfy-markdown')]
        .filter(note => note.scrollHeight > note.clientHeight + 2).map(note => note.innerText.slice(0, 40))""")
    assert tab.page.locator(".comfy-markdown").count() > 0
    assert hidden == []


def test_the_run_button_makes_a_video(tab, no_problem, host, tmp_path):
    ui = load(FOLDER / f"{SHOWN}.json")
    tab.open(ui, SHOWN)
    tab.picture("workflow", tmp_path, tab.whole())
    make_small(tab)
    # Another seed than other tests', so that ComfyUI really samples.
    tab.set_widgets({str(number_of(tab, "KSampler")): {"seed": 20}})
    history = run(tab, host)
    assert history["status"]["status_str"] == "success", history["status"]
    (video,) = host.saved(history)
    shown = tab.page.evaluate(
        "() => window.app.graph.nodes.filter(node => node.type === 'PreviewAny').map(node => node.widgets[0].value)"
    )
    assert any(text.startswith("T3 Attention on WanModel") for text in shown)
    # Dropping the video on the canvas restores the graph: it is in the file.
    with av.open(str(video)) as opened:
        stored = json.loads(opened.metadata["workflow"])
        assert opened.streams.video[0].frames == host_standins.FRAMES
    assert {node["type"] for node in stored["nodes"]} == {node["type"] for node in ui["nodes"]}


def test_a_bad_input_is_told_in_the_page(tab):
    """In words, and before anything runs."""
    tab.open(load(FOLDER / f"{SHOWN}.json"), SHOWN)
    make_small(tab)
    number = number_of(tab, "T3Attention")
    tab.set_widgets({str(number): {"dense_blocks": "first"}})
    tab.page.get_by_test_id("queue-button").click()
    overlay = tab.page.get_by_test_id("error-overlay")
    overlay.wait_for()
    tab.page.get_by_test_id("error-overlay-see-errors").click()
    tab.page.get_by_role("button", name="Info for T3 Attention - dense_blocks").click()
    tab.page.get_by_text("write numbers and ranges").first.wait_for()
    tab.problems.clear()


def our_nodes(host):
    return {name: node for name, node in host.object_info().items() if name.startswith("T3")}


def test_every_node_has_a_help_page(tab, no_problem, host, tmp_path):
    """The info button shows the page of `web/docs`, with its picture."""
    page = tab.page
    for kind in our_nodes(host):
        tab.open(EMPTY, "help")
        tab.add_node(kind)
        page.get_by_test_id("info-button").click()
        panel = page.get_by_test_id("properties-panel")
        text = (host_browser.ROOT / "web" / "docs" / f"{kind}.md").read_text(encoding="utf-8")
        heading = next(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        panel.get_by_role("heading", name=heading).first.wait_for()
        page.wait_for_function(
            """count => {
                const pictures = [...document.querySelectorAll("[data-testid='properties-panel'] img")];
                return pictures.length === count && pictures.every(p => p.complete && p.naturalWidth > 0);
            }""",
            arg=text.count("!["),
        )
        if kind == "T3Attention":
            page.wait_for_timeout(300)
            tab.picture("help", tmp_path)


def test_the_plan_preview_shows_its_picture(tab, no_problem, host, tmp_path):
    """Alone on the canvas, without a model."""
    tab.open(EMPTY, "preview")
    number = tab.add_node("T3PlanPreview", size=(900, 1400))
    history = run(tab, host)
    assert history["status"]["status_str"] == "success", history["status"]
    tab.page.wait_for_function(
        "number => window.app.graph.getNodeById(number).imgs?.some(image => image.naturalWidth > 0)", arg=number
    )
    tab.page.wait_for_timeout(500)
    tab.picture("plan_preview", tmp_path, tab.around(number), width=1100)


def test_the_notes_are_no_part_of_the_graph(tab, no_problem):
    tab.open(load(FOLDER / f"{QUICK}.json"), QUICK)
    assert not [node for node in tab.prompt().values() if node["class_type"] == NOTE]
