"""The T3 Attention node as a user meets it: its schema, its report, and a sentence for every bad input."""

from __future__ import annotations

import asyncio
import re

import host_models
import pytest
from host_runs import with_t3


@pytest.fixture(scope="module")
def node(pack):
    return pack.nodes.attention.T3Attention


@pytest.fixture(scope="module")
def model(pack):
    return host_models.patcher("t2v")


def defaults(node):
    return {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}


def test_defaults_need_no_thought(pack, node, model):
    """Only the model has to be connected; the plan is that of its family."""
    required = [i.id for i in node.GET_SCHEMA().inputs if not i.optional and getattr(i, "default", None) is None]
    assert required == ["model"]
    assert node.validate_inputs(0.0, 1.0, "") is True
    for kind, name in (("t2v", "wan2.1-4k"), ("ti2v-5b", "wan2.2-4k")):
        patched, report = node.execute(host_models.patcher(kind), **defaults(node)).result
        assert f"Plan {name}" in report and "cannot be told" in report
        assert patched.object_patches


@pytest.mark.parametrize("left_out", ["start_percent", "end_percent", "dense_blocks"])
def test_an_input_that_a_graph_leaves_out_is_named_by_the_host(node, monkeypatch, left_out):
    """As graphs written by hand do: ComfyUI says which one is missing, which it cannot if our own check fails."""
    import execution

    import nodes as host_nodes

    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "T3Attention", node)
    values = {name: value for name, value in defaults(node).items() if name != left_out}
    graph = {"1": {"class_type": "T3Attention", "inputs": values}}
    _, errors, _ = asyncio.run(execution.validate_inputs("p", graph, "1", {}))
    missing = [error["details"] for error in errors if error["type"] == "required_input_missing"]
    assert sorted(missing) == sorted(["model", left_out])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"start_percent": 0.5, "end_percent": 0.5}, "start_percent is 0.5 and end_percent 0.5: T3 would never run"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "Start must be less than end"),
        ({"dense_blocks": "0; 1"}, "dense_blocks has '0; 1'; write numbers and ranges"),
        ({"dense_blocks": "first"}, "dense_blocks has 'first'"),
        ({"dense_blocks": "-3"}, "dense_blocks has '-3'"),
        # To mean all others. It once filled the memory before it was refused.
        ({"dense_blocks": "5-99999"}, "dense_blocks has '5-99999'; "),
        ({"dense_blocks": "5-2"}, "runs backwards. Write 2-5"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(node, model, inputs, words):
    values = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", **inputs}
    sentence = node.validate_inputs(**values)
    assert words in sentence and "\n" not in sentence
    with pytest.raises(ValueError, match=re.escape(words)):
        node.execute(model, **{**defaults(node), **inputs})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"dense_blocks": "0, 3-7"}, "'3-7'; this model has blocks 0 to 4. Nearest: 4."),
        (
            {"backend": "sdpa-cudnn"},
            "'sdpa-cudnn' cannot be used for float32, head size 128, on cpu: needs cuda, not cpu",
        ),
        ({"backend": "sage"}, "needs cuda, not cpu. Usable here: sdpa, sdpa-math"),
    ],
)
def test_what_only_the_model_shows_is_refused_before_sampling(node, model, inputs, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        node.execute(model, **{**defaults(node), **inputs})
    assert "\n" not in str(caught.value)
    assert not model.object_patches


def test_blocks_are_read_as_written(pack):
    parse = pack.nodes.attention.parse_blocks
    assert parse("0, 1, 47-49", None) == {0, 1, 47, 48, 49}
    assert parse(" 2 - 4 ,, 3", 5) == {2, 3, 4}
    assert parse("", 5) == parse(None, 5) == frozenset()


def test_the_report_says_what_was_done(pack, model):
    _, report = with_t3(pack, model, start_percent=0.1, dense_blocks="0, 4")
    assert "5 self-attentions, of which blocks 0, 4 stay dense" in report
    assert "Plan test (the connected plan)" in report
    assert "From 10% to 100% of sampling; full attention else." in report
    _, report = with_t3(pack, model, custom_plan=None, plan="dense")
    assert "T3-tuned" not in report


def test_the_report_names_the_attention_the_user_chose(pack, model):
    from test_composition import plain_override

    assert "by another node's attention override" in with_t3(pack, plain_override(model))[1]
    assert "chosen by" not in with_t3(pack, model)[1]


def test_an_8_bit_backend_is_named_as_such(pack, monkeypatch):
    """In the page, the choices that are not exact can be told from those that are."""
    tooltip = next(i.tooltip for i in pack.nodes.attention.T3Attention.GET_SCHEMA().inputs if i.id == "backend")
    assert "sage" in tooltip and "comfy-kitchen-int8" in tooltip
