"""Calling single nodes as the host does: defaults filled in, values validated, then executed."""

from __future__ import annotations

import inspect
import re

import pytest


def defaults(node):
    return {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}


def run(node, **inputs):
    """Validate as the host does, with the arguments the node asks for, then execute with defaults filled in."""
    values = {**defaults(node), **inputs}
    asked = inspect.getfullargspec(node.validate_inputs).args[1:]
    linked = {"custom_plan", "latent"} if node.GET_SCHEMA().node_id == "T3PlanPreview" else set()
    given = {name: None if name in linked else values[name] for name in asked if name in values}
    verdict = node.validate_inputs(**given)
    assert verdict is True, verdict
    return node.execute(**values).result


def refusal(node, **inputs):
    """What is said about bad widget values before anything runs: one sentence."""
    values = {**defaults(node), **inputs}
    asked = inspect.getfullargspec(node.validate_inputs).args[1:]
    sentence = node.validate_inputs(**{name: values[name] for name in asked if name in values})
    assert isinstance(sentence, str) and "\n" not in sentence and sentence.endswith((".", "'"))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        node.execute(**values)
    return sentence
