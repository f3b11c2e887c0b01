"""Shared fixtures, and one hook: the repository root is a ComfyUI pack, not a Python package to collect."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent


class RootIsNotAPackage:
    """The root's `__init__.py` is ComfyUI's entry point; pytest must not import it on the way to the tests."""

    @pytest.hookimpl
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    config.pluginmanager.register(RootIsNotAPackage())


def pytest_generate_tests(metafunc):
    # Tests of kernels have a `device` of their own.
    if "device" in metafunc.fixturenames and ROOT / "tests/kernels" not in metafunc.definition.path.parents:
        import torch

        metafunc.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a text-to-video model of random weights: what tests take that need some model, whichever."""
    from small_models import build

    return build("t2v", tmp_path_factory.mktemp("models é") / "tiny")
