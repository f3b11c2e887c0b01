"""What the page shows about the nodes: tooltips, help pages with pictures, and translations that match the schemas."""

from __future__ import annotations

import json
import re

import pytest
import write_web
from help_pictures import PICTURES
from PIL import Image
from write_web import DOCS, LOCALES, ROOT

NAMES = [
    "T3Attention",
    "T3RetrofitLoader",
    "T3Plan",
    "T3PlanPreview",
    "T3EmptyLatent",
    "T3LoadLatent",
    "T3VAEDecode",
    "T3VAEDecodeToVideo",
    "T3VAEEncode",
    "T3Extract",
]
LANGUAGES = ["en", "zh"]


@pytest.fixture(scope="module")
def schemas(pack):
    return write_web.schemas(pack)


def locale(language):
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def keys(content, path=""):
    """The path of every text in a nested dict."""
    if isinstance(content, dict):
        return {found for key, value in content.items() for found in keys(value, f"{path}/{key}")}
    assert isinstance(content, str) and content.strip(), path
    return {path}


def test_no_node_is_forgotten(schemas):
    assert list(schemas) == NAMES
    assert set(PICTURES) == set(NAMES) == {path.stem for path in DOCS.glob("*.md")}


@pytest.mark.parametrize("name", NAMES)
def test_every_input_and_output_has_a_tooltip(schemas, name):
    for socket in [*schemas[name].inputs, *schemas[name].outputs]:
        assert socket.tooltip and socket.tooltip.endswith("."), socket.id
    assert all(output.display_name for output in schemas[name].outputs)
    assert schemas[name].description.endswith(".")


def test_english_is_what_the_schemas_say(pack):
    """`python tests/host/write_web.py` writes it anew."""
    written = (LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8")
    assert written == write_web.as_text(write_web.english(pack))


def test_chinese_has_every_text_of_english_and_no_other(pack):
    assert keys(locale("zh")) == keys(write_web.english(pack))
    for path, text in _texts(locale("zh")):
        if path.endswith(("/tooltip", "/description")):
            assert re.search(r"[\u4e00-\u9fff]", text), path
            assert text.endswith(("。", "）")), path


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_hold_no_sign_the_page_would_interpret(language):
    """The page's message format gives @, |, { and } a meaning."""
    for path, text in _texts(locale(language)):
        assert not set("@|{}") & set(text), path


def _texts(content, path=""):
    if isinstance(content, str):
        yield path, content
        return
    for key, value in content.items():
        yield from _texts(value, f"{path}/{key}")


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_of_choices_are_named_as_they_are(schemas, language):
    """Options are not translated, so a tooltip that explains one must call it by its name."""
    content = locale(language)
    for name, schema in schemas.items():
        for socket in schema.inputs:
            for word in re.findall(r"\b(auto|dense|lean|newest)\b", socket.tooltip):
                assert word in content[name]["inputs"][socket.id]["tooltip"]


@pytest.mark.parametrize("name", NAMES)
def test_the_help_page(schemas, name):
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    schema = schemas[name]
    assert text.startswith(f"# {schema.display_name}\n")
    for heading in ("## Inputs", "## Outputs", "## What can go wrong"):
        assert heading in text
    first_cells = " ".join(re.findall(r"^\| ([^|]+) \|", text, flags=re.MULTILINE))
    words = set(re.findall(r"\w+", first_cells))
    assert {i.id for i in schema.inputs} <= words
    assert {output.display_name for output in schema.outputs} <= words
    assert "T3-tuned" in text and re.search(r"stock weights[^.]*noise|stock weights\.", text, flags=re.IGNORECASE)
    assert len(text) < 5000


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_there_and_small(name):
    """A relative link is looked up in `web/docs`."""
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", text)
    assert pictures
    for alternative, link in pictures:
        assert alternative and "/" not in link
        path = DOCS / link
        assert path.stat().st_size < 150_000
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG" and image.width >= 600
    assert {path.stem for path in DOCS.glob("*.png")} >= {name}


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_what_their_source_draws(name):
    """`python tests/host/write_web.py` draws them anew. Sizes only: fonts differ a little between Pillow's versions."""
    with Image.open(DOCS / f"{name}.png") as image:
        assert image.size == PICTURES[name]().size


def test_the_page_finds_the_folder(pack):
    assert (ROOT / pack.WEB_DIRECTORY / "docs") == DOCS
