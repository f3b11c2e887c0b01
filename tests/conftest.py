"""Shared fixtures, and hooks: the repository root is a ComfyUI pack, not a Python package to collect; two workers."""

from __future__ import annotations

import os
import random
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Said before torch is imported. With a thread for every core in every worker they wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
# No test asserts a time: a machine that is busy with other work is slow at drawing examples, and nothing is wrong.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


class RootIsNotAPackage:
    """The root's `__init__.py` is ComfyUI's entry point; pytest must not import it on the way to the tests."""

    @pytest.hookimpl
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    config.pluginmanager.register(RootIsNotAPackage())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """What `-n auto` means: two processes; on a card one alone, since tests look at its free memory."""
    import torch

    return 0 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Random numbers hang on the test alone, not on which others ran before it in this process."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


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
