"""T3 Extract: a file that T3 LoRA Retrofit Loader turns into the tuned model; numbered, cancelled, refused."""

from __future__ import annotations

import os

import pytest
import torch
from host_nodes import refusal, run
from host_runs import plan_of
from host_weights import Folders, model, state, weights
from weights_fixtures import one_thread as one_thread
from weights_kinds import full_tensors, noise

from t3.weights import identify, open_weights

pytest_plugins = ["host_node_fixtures"]


@pytest.fixture
def files(pack, tmp_path, monkeypatch, folders):
    """Model folders of this test's own, where `output/loras` is one of `loras`, as ComfyUI has it."""
    import folder_paths

    (tmp_path / "models").mkdir()
    files = Folders(tmp_path / "models", monkeypatch)
    folder_paths.folder_names_and_paths["loras"][0].append(str(folders["output"] / "loras"))
    return files


@pytest.fixture
def node(nodes):
    return nodes["T3Extract"]


def tuned_of(base):
    """A change of rank 3 to every matrix, and some change to all else."""
    tuned = {}
    for i, (name, tensor) in enumerate(base.items()):
        change = 0.1 * noise(*tensor.shape, seed=2000 + i)
        if tensor.ndim > 1 and name.endswith(".weight"):
            change = 0.1 * noise(tensor.shape[0], 3, seed=i) @ noise(3, tensor[0].numel(), seed=4000 + i)
        tuned[name] = tensor + change.reshape(tensor.shape)
    return tuned


def pair(files, kind="t2v"):
    """Entries of a base and a tuned model, and the tuned model's tensors."""
    tuned = tuned_of(state(kind))
    return (
        files.save(full_tensors(kind, "original", state(kind)), "base.safetensors", folder="diffusion_models"),
        files.save(full_tensors(kind, "comfyui", tuned), "tuned.safetensors", folder="diffusion_models"),
        tuned,
    )


@pytest.mark.parametrize("kind", ["t2v", "vace"])
def test_there_and_back(pack, files, folders, node, nodes, kind):
    """What the loader makes of the file is the tuned model, to the error that was asked for; the plan comes along."""
    base, tuned_file, tuned = pair(files, kind)
    path, report = run(node, base=base, tuned=tuned_file, error=0.01, custom_plan=plan_of(pack))
    assert path == str(folders["output"] / "loras" / "t3_00001_.safetensors")
    assert path in report and "error" in report and "plan 'test' of 5 layers" in report
    assert identify(open_weights(path)).t3.plan.name == "test"
    entry = files.entry("t3_00001_.safetensors")
    loader = nodes["T3RetrofitLoader"]
    assert entry in next(i for i in loader.define_schema().inputs if i.id == "file").options
    patched, report = run(loader, model=model(kind), file=entry)
    assert "T3 attention with plan test, from the file" in report and "WARNING" not in report
    for name, have in weights(patched).items():
        change = (tuned[name] - state(kind)[name]).norm()
        assert (have - tuned[name]).norm() <= 0.01 * change + 1e-6 * have.norm(), name


def test_ranks_plans_and_numbers(pack, files, node, caplog):
    base, tuned, _ = pair(files)
    first, report = run(node, base=base, tuned=tuned, rank=2)
    assert "rank 2 to 2" in report
    # Nobody said what plan; the released one is taken, and that is told.
    assert "taken is the released one" in report and "taken is the released one" in caplog.text
    assert identify(open_weights(first)).t3.plan.name == "wan2.1-4k"
    second, report = run(node, base=base, tuned=tuned, max_rank=1, plan="none")
    assert [path[-18:] for path in (first, second)] == ["00001_.safetensors", "00002_.safetensors"]
    assert "WARNING" in report and identify(open_weights(second)).t3.plan is None
    third, _ = run(node, base=base, tuned=tuned, plan="wan2.2-4k", filename_prefix="elsewhere/mine")
    assert third.endswith("output/elsewhere/mine_00001_.safetensors")


def test_cancelled(pack, files, folders, node, monkeypatch):
    import comfy.model_management
    import comfy.utils

    base, tuned, _ = pair(files)
    shown = []

    def hook(done, total, *_, **__):
        shown.append((done, total))
        comfy.model_management.interrupt_current_processing(done == 1)

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(node, base=base, tuned=tuned)
    assert shown == [(1, len(state("t2v")))]
    assert not [path for path in folders["output"].rglob("*") if path.is_file()]
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    run(node, base=base, tuned=tuned)


def test_files_are_watched(pack, files, node):
    base, tuned, _ = pair(files)
    before = node.fingerprint_inputs(base=base, tuned=tuned, error=0.1)
    assert node.fingerprint_inputs(base=base, tuned=tuned) == before
    os.utime(files.base / tuned, ns=(1, 1))
    assert node.fingerprint_inputs(base=base, tuned=tuned) != before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tuned": "diffusion_models/gone.safetensors"}, "choose one of the list"),
        ({"base": "diffusion_models/../../x.safetensors"}, "choose one of the list"),
        ({"tuned": "diffusion_models/base.safetensors"}, "base and tuned are the same file"),
        ({"rank": 8, "max_rank": 16}, "rank is 8 and max_rank 16: set one of them to 0"),
        ({"filename_prefix": "../elsewhere"}, "give a name under ComfyUI's output folder"),
        ({"filename_prefix": " "}, "give a name under ComfyUI's output folder"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(pack, files, node, changes, words):
    base, tuned, _ = pair(files)
    assert words in refusal(node, **{"base": base, "tuned": tuned, **changes})


def test_models_that_do_not_belong_together_are_refused(pack, files, folders, node):
    base, tuned, _ = pair(files)
    other = files.save(full_tensors("i2v", "original", state("i2v")), "i2v.safetensors", folder="diffusion_models")
    with pytest.raises(ValueError, match=r"\.$") as refused:
        run(node, base=base, tuned=other)
    assert "\n" not in str(refused.value)
    lora = files.save({"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 128)}, "a.safetensors", folder="diffusion_models")
    with pytest.raises(ValueError, match=r"\.$"):
        run(node, base=lora, tuned=tuned)
    assert not [path for path in folders["output"].rglob("*") if path.is_file()]
