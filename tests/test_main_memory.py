"""How much main memory a decode on the CPU may plan with: on every system, and within a container."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from t3.vae import memory

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 60 GiB to be had; the folder where a container's limits would stand."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=60 * GIB))
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_without_a_container_half_of_what_is_to_be_had(machine):
    assert memory.free_bytes(CPU) == 30 * GIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [
        (32, 2, 0, 30),
        (32, 31.5, 29, 29.5),  # weights that were read: their pages go as soon as the room is needed
        (32, 33, 0, 0),
        (128, 4, 0, 60),
    ],
)
def test_a_container_s_limit_counts_and_files_in_its_memory_do_not(machine, version, limit, used, cached, free):
    names = [("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"), ("memory.max", "memory.current")]
    (machine / "memory").mkdir()
    for name, value in zip(names[version - 1], (limit, used), strict=True):
        (machine / name).write_text(f"{int(value * GIB)}\n")
    prefix = "memory/memory.stat" if version == 1 else "memory.stat"
    total = "total_" if version == 1 else ""
    lines = ["anon 1", f"{total}active_file {int(cached * GIB) // 2}", f"{total}inactive_file {int(cached * GIB) // 2}"]
    (machine / prefix).write_text("\n".join(lines) + "\n")
    assert memory.free_bytes(CPU) == int(free * GIB) // 2


def test_a_container_without_a_limit(machine):
    (machine / "memory.max").write_text("max\n")
    (machine / "memory.current").write_text("1\n")
    assert memory.free_bytes(CPU) == 30 * GIB


def test_processes_share_the_main_memory_and_have_a_card_each(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 12 * GIB)
    assert memory.free_for_each(CPU, 4) == 3 * GIB
    assert memory.free_for_each(torch.device("cuda", 1), 4) == 12 * GIB
