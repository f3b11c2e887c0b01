"""Whole runs of the training command on a tiny model: what is written, resume, stops and failures."""

import csv
import errno
import itertools
import json
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import WanTransformer3DModel
from retrofit_fixtures import PLAN, write_clips, write_config, write_model
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from t3 import Plan
from t3.claims import take
from t3.processor import install_t3
from t3.retrofit import checkpoint, samples
from t3.retrofit.command import main
from t3.retrofit.finish import Finish
from t3.retrofit.loop import Loop
from t3.sources import find_sources
from t3.weights import apply_weights, identify, open_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrofit")
    write_model(folder / "model")
    write_clips(folder / "clips")
    write_clips(folder / "held", 5, seed=1)
    write_clips(folder / "wide", 3, shape=(16, 2, 6, 12), seed=2)
    return folder


@pytest.fixture
def run(base, request):
    """Run a config in this process; a fresh output folder for each test and name."""
    tag = request.node.name.replace("[", "-").replace("]", "")

    def start(name="run", *flags, **tables):
        # accelerate keeps one precision for a process; each run here is a process of its own elsewhere.
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = f"{tag}-{name}"
        status = main([write_config(base, folder, run=folder, **tables), *flags])
        return status, base / folder

    return start


def weights_of(folder, step, name="weights"):
    return load_file(folder / "checkpoints" / f"step-{step:08}" / f"{name}.safetensors")


def rows(folder, name):
    with (folder / f"{name}.csv").open() as stream:
        return list(csv.DictReader(stream))


def velocity(transformer, seed=0):
    torch.manual_seed(seed)
    latents, text = torch.randn(1, 16, 2, 6, 8), torch.randn(1, 4, 8)
    with torch.no_grad():
        return transformer(latents, torch.tensor([400.0]), text, return_dict=False)[0]


def test_a_full_run_writes_a_model_that_the_package_takes(run, base):
    status, folder = run(validation={"every": 2, "levels": 4}, data={"validation": [str(base / "held")]})
    assert status == 0
    file = open_weights(folder / f"{folder.name}.safetensors")
    found = identify(file)
    assert found.problem is None
    assert (found.form, found.component, found.t3.plan) == ("full", "dit", Plan.from_json(PLAN))
    assert found.t3.trained_grid == (2, 3, 4)
    written = file.read(found.names["blocks.0.ffn.0.weight"])
    average = weights_of(folder, 4, "average")["transformer.blocks.0.ffn.net.0.proj.weight"]
    assert written.dtype == torch.bfloat16
    torch.testing.assert_close(written, average.bfloat16(), rtol=0, atol=0)
    metrics, measured = rows(folder, "metrics"), rows(folder, "validation")
    assert [int(row["step"]) for row in metrics] == [2, 4]
    assert [int(row["step"]) for row in measured] == [0, 2, 4, 4]
    assert metrics[-1]["clips"] == "8"
    points = (folder / "validation" / "step-00000000.csv").read_text().splitlines()
    assert len(points) == 1 + 5


def test_what_is_frozen_stays_and_is_written(run, base, capsys):
    frozen = ("blocks.0.self_attn.q", "blocks.0.self_attn.norm_k.weight", "head")
    status, folder = run(trainable={"frozen": frozen}, output={"dtype": "float32"})
    assert status == 0
    file = open_weights(folder / f"{folder.name}.safetensors")
    before = open_weights(base / "model" / "transformer")
    now, then = ({name: of.read(key) for name, key in identify(of).names.items()} for of in (file, before))
    same = {name for name in now if torch.equal(now[name].float(), then[name].float())}
    assert same == {name for name in now if f"{name}.".startswith(tuple(f"{each}." for each in frozen))}
    assert len(same) >= 5
    assert run("again", trainable={"frozen": ("blocks.0.self_attm.q",)})[0] == 2
    assert "no key 'blocks.0.self_attm.q'. Did you mean 'blocks.0.self_attn.q'?" in capsys.readouterr().err
    assert run("nothing", trainable={"frozen": tuple({name.split(".")[0] for name in now})})[0] == 2
    assert "leaves nothing to train" in capsys.readouterr().err


def test_sources_take_a_written_lora_with_its_plan(run, base):
    everything = ("norms", "biases", "modulation")
    status, folder = run(
        trainable={"what": "lora", "rank": 2, "alpha": 3.0, "also": everything}, output={"dtype": "float32"}
    )
    assert status == 0
    lora = folder / f"{folder.name}-lora.safetensors"
    sources = find_sources(model=str(base / "model"), t3_weights=[str(lora)])
    assert Plan.from_json(sources.plan_json) == Plan.from_json(PLAN)
    assert sources.tuned == "yes"
    adapter = sources.t3_weights[0].identity
    assert (adapter.form, adapter.t3.rank) == ("lora+diff", 2)
    # Applied to the model it was trained from, it gives the averaged weights of the run.
    plain = WanTransformer3DModel.from_pretrained(base / "model" / "transformer")
    report = apply_weights(plain, open_weights(lora))
    assert not [note for note in report.notes if "another base" in note]
    trained = {
        name.removeprefix("transformer.").replace(".base_layer", ""): tensor
        for name, tensor in weights_of(folder, 4, "average").items()
    }
    parameters = dict(plain.named_parameters())
    before = dict(WanTransformer3DModel.from_pretrained(base / "model" / "transformer").named_parameters())
    small = [name for name in trained if "lora_" not in name]
    assert small
    for name in small:
        torch.testing.assert_close(parameters[name], trained[name], rtol=1e-6, atol=1e-7)
    stem = "blocks.1.attn1.to_v"
    product = 1.5 * trained[f"{stem}.lora_B.default.weight"] @ trained[f"{stem}.lora_A.default.weight"]
    assert product.any()
    torch.testing.assert_close(parameters[f"{stem}.weight"], before[f"{stem}.weight"] + product, rtol=1e-5, atol=1e-7)


def test_a_written_model_computes_what_was_trained(run, base):
    """The file, under the headless engine's T3, gives the velocity that the training operator gives its weights."""
    from t3.retrofit.operator import Operator, install

    status, folder = run(output={"dtype": "float32"}, train={"ema": 0.0})
    assert status == 0
    plan = Plan.from_json(PLAN)
    config = WanTransformer3DModel.load_config(base / "model" / "transformer")
    there, here = (WanTransformer3DModel.from_config(config) for _ in range(2))
    apply_weights(there, open_weights(folder / f"{folder.name}.safetensors"))
    install_t3(there, plan)
    state = {name.removeprefix("transformer."): t for name, t in weights_of(folder, 4).items()}
    here.load_state_dict(state)
    install(here, Operator(plan))
    torch.testing.assert_close(velocity(there), velocity(here), rtol=1e-5, atol=1e-5)


def test_the_attention_backend_is_chosen_before_the_first_step(run, monkeypatch, capsys):
    """Compiled code cannot: on a card torch is asked with objects that a compiler does not know."""
    from t3.retrofit import attention

    monkeypatch.setattr(attention, "choose", None)
    assert run(train={"backend": "auto"})[0] == 0
    assert "backend sdpa: the fastest exact one" in capsys.readouterr().err


def test_a_run_whose_seconds_ended_before_its_first_step_says_so(run, capsys):
    status, folder = run(stages=[{"name": "late", "max_seconds": 0.001}])
    assert status == 1 and not list(folder.glob("*.safetensors"))
    assert "no step was taken" in capsys.readouterr().err


class LikeBitsandbytes(torch.optim.Optimizer):
    """Keeps what AdamW8bit keeps: a number of steps that is no tensor, tensors in a dictionary, one table for all."""

    def __init__(self, groups, **settings):
        super().__init__(groups, settings)
        self.table = torch.linspace(-1, 1, 256)

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, "kept": {"mean": torch.zeros_like(parameter), "table": self.table}}
                state["step"] += 1
                mean = state["kept"]["mean"].lerp_(parameter.grad, 0.1)
                parameter.data -= group["lr"] * mean.sign() / state["step"]


@pytest.mark.parametrize("kind", ["full", "lora", "attention", "8-bit", "muon"])
def test_resume_equals_uninterrupted_bit_for_bit(run, kind, monkeypatch):
    """Also from where only attention has had a gradient so far, and with what bitsandbytes' optimisers keep."""
    tables = {
        "train": {"accumulate": 2},
        "data": {"resident": "host"},
        "stages": [
            {"name": "first", "steps": 3, "windows_from_dense": 0.7, "window_levels": 2},
            {"name": "second", "steps": 3, "velocity": 0.5, "merge_from_lse": 0.5, "lr": 2e-3},
        ],
    }
    if kind == "lora":
        tables["trainable"] = {"what": "lora", "rank": 2, "also": ["biases"]}
    if kind == "attention":
        tables["stages"] = [{"name": "first", "steps": 5, "flow": 0.0, "attention": 1.0}, {"name": "flow", "steps": 1}]
    if kind == "muon":
        if not hasattr(torch.optim, "Muon"):
            pytest.skip("Muon comes with torch 2.9")
        tables["train"]["optimizer"] = "muon"
    if kind == "8-bit":
        tables["train"]["optimizer"] = "adamw-8bit"
        monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=LikeBitsandbytes))
    assert run("whole", **tables)[0] == 0
    step = Loop.take_step

    def killed(self, stage, done):
        if self.at.step == 5:
            raise RuntimeError("killed")
        step(self, stage, done)

    monkeypatch.setattr(Loop, "take_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run("cut", **tables)
    monkeypatch.setattr(Loop, "take_step", step)
    status, cut = run("cut", "--resume", **tables)
    assert status == 0
    whole = cut.with_name(cut.name.removesuffix("cut") + "whole")
    for name in ("weights", "average", "optimizer"):
        one, other = weights_of(whole, 6, name), weights_of(cut, 6, name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert kind == "attention" or [row["step"] for row in rows(cut, "metrics")] == ["2", "4", "6"]
    states = [json.loads((f / "checkpoints" / "step-00000006" / "state.json").read_text()) for f in (whole, cut)]
    assert states[0]["feeder"] == states[1]["feeder"]


def test_a_stop_leaves_a_checkpoint_and_status_130(run, monkeypatch):
    step, before = Loop.take_step, signal.getsignal(signal.SIGINT)

    def interrupted(self, stage, done):
        step(self, stage, done)
        if self.at.step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Loop, "take_step", interrupted)
    status, folder = run(output={"checkpoint_every": 0})
    assert status == 130
    assert [path.name for path in checkpoint.listed(folder)] == ["step-00000003"]
    assert not list(folder.glob("*.safetensors"))
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(Loop, "take_step", step)
    status, folder = run("run", "--resume", output={"checkpoint_every": 0})
    assert status == 0
    assert checkpoint.listed(folder)[-1].name == "step-00000004"


def test_a_full_disk_keeps_the_former_checkpoint_and_is_told(run, monkeypatch, capsys):
    save, calls = checkpoint.save_file, itertools.count()

    def full(tensors, path):
        if next(calls) >= 4:  # the second checkpoint's second file
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    status, folder = run()
    assert status == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    said = capsys.readouterr().err
    assert "step 4: no checkpoint could be written (No space left on device); the one of step-00000002 is kept." in said
    assert all(torch.isfinite(t).all() for t in weights_of(folder, 2).values())


def test_too_little_room_is_seen_before_anything_is_written(run, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    status, folder = run(schedule={"steps": 1})
    assert status == 1
    assert not list((folder / "checkpoints").iterdir())
    assert "0 MiB are free" in capsys.readouterr().err


def test_steps_lower_the_loss_on_a_fixed_batch(run, base):
    write_clips(base / "one", 2, seed=9)
    status, folder = run(
        sets=("one",),
        data={"caption_dropout": 0.0},
        schedule={"steps": 60, "lr": 1e-2, "warmup": 0.1},
        output={"log_every": 20, "checkpoint_every": 0},
    )
    assert status == 0
    losses = [float(row["loss"]) for row in rows(folder, "metrics")]
    assert losses[-1] < 0.8 * losses[0]


def test_a_folder_has_one_run_at_a_time(run, base, capsys, request):
    """The one that goes on after a first that is still at work is refused; a claim goes with its run."""
    folder = base / f"{request.node.name}-run"
    claim = take(folder / "config.toml")
    before = sorted(folder.iterdir())
    assert run("run", "--resume")[0] == 2
    said = capsys.readouterr().err
    assert f"is in use by {claim.holder}" in said and "name another [output] folder" in said
    assert sorted(folder.iterdir()) == before
    claim.release()
    assert run("run", "--resume", schedule={"steps": 1})[0] == 0
    assert not list(folder.glob(".*"))


def test_a_run_in_the_way_is_not_overwritten(run, capsys):
    assert run()[0] == 0
    status, folder = run()
    assert status == 2
    assert f"{folder} holds a run already" in capsys.readouterr().err


def test_another_config_is_not_resumed(run, capsys):
    assert run()[0] == 0
    assert run("run", "--resume", train={"batch": 1})[0] == 2
    assert "[train] batch has changed" in capsys.readouterr().err


def test_moments_come_back_under_names_that_wrappers_change(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), checkpoint_wrapper(torch.nn.Linear(4, 4)))
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = make()
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    folder = checkpoint.save(tmp_path, 1, checkpoint.collect(model, optimizer, None), {}, 1)
    again, other = make()
    checkpoint.load(folder, again, other, None)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], other.state[two]["exp_avg"])


def test_a_damaged_checkpoint_is_named(run, capsys):
    _, folder = run()
    (folder / "checkpoints" / "step-00000004" / "weights.safetensors").write_bytes(b"cut short")
    assert run("run", "--resume")[0] == 2
    assert "step-00000004 is damaged" in capsys.readouterr().err


def test_what_is_no_number_does_not_push_out_a_good_checkpoint(run, capsys, monkeypatch):
    """Losses are looked at now and then only; a checkpoint is, every time."""
    step = Loop.take_step

    def spoilt(self, stage, done):
        step(self, stage, done)
        if self.at.step == 3:
            self.session.parameters[0].data.fill_(float("nan"))

    monkeypatch.setattr(Loop, "take_step", spoilt)
    output = {"checkpoint_every": 2, "log_every": 20, "keep": 1}
    status, folder = run(schedule={"steps": 8}, output=output)
    assert status == 2 and [path.name for path in checkpoint.listed(folder)] == ["step-00000002"]
    said = capsys.readouterr().err
    assert "weights are not finite after step 4" in said and "step-00000002 is from before" in said
    assert not list(folder.glob("*.safetensors"))
    monkeypatch.setattr(Loop, "take_step", step)
    assert run("run", "--resume", schedule={"steps": 8}, output=output)[0] == 0


def test_clips_that_came_meanwhile_are_not_gone_on_with(run, base, capsys):
    shutil.copytree(base / "clips", base / "growing")
    tables = {"data": {"holdout": 2}, "sets": ("growing",)}
    assert run(**tables)[0] == 0
    write_clips(base / "growing", 2, seed=9)
    assert run("run", "--resume", **tables)[0] == 2
    assert "growing changed since" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(run, capsys):
    status, folder = run(schedule={"lr": 1e30, "warmup": 0.0}, train={"clip": 0.0}, output={"checkpoint_every": 0})
    assert status == 2
    assert "training went astray" in capsys.readouterr().err
    assert not list(folder.glob("*.safetensors"))


def test_no_steps_is_a_measurement(run, base):
    status, folder = run(schedule={"steps": 0}, data={"validation": [str(base / "held")]})
    assert status == 0
    assert [int(row["step"]) for row in rows(folder, "validation")] == [0]
    assert not list(folder.glob("*.safetensors"))
    _, folder = run("few", schedule={"steps": 0}, validation={"clips": 2}, data={"validation": [str(base / "held")]})
    assert len((folder / "validation" / "step-00000000.csv").read_text().splitlines()) == 1 + 2


def test_seconds_end_a_run_with_its_result_inside(run):
    status, folder = run(schedule={"steps": 0, "max_seconds": 8.0}, output={"log_every": 1})
    assert status == 0
    assert (folder / f"{folder.name}.safetensors").exists()
    assert float(rows(folder, "metrics")[-1]["seconds"]) < 8.0


def test_one_branch_carries_no_plan(run, capsys):
    status, folder = run(model={"branches": "local"}, schedule={"steps": 1})
    assert status == 0
    assert identify(open_weights(folder / f"{folder.name}.safetensors")).t3.plan is None
    assert "carries none" in capsys.readouterr().err


def test_bf16_computes_on_float32_weights(run):
    status, folder = run(train={"precision": "bf16"}, schedule={"steps": 2})
    assert status == 0
    assert {tensor.dtype for tensor in weights_of(folder, 2).values()} == {torch.float32}


def test_seconds_of_the_steps_end_a_run(run):
    status, folder = run(schedule={"steps": 0, "training_seconds": 1.0}, output={"log_every": 1})
    assert status == 0
    line = rows(folder, "metrics")[-1]
    # The line is written a moment before the clock is looked at.
    assert 0.9 <= float(line["training"]) < float(line["seconds"])


def test_warming_up_changes_nothing(run, base, monkeypatch):
    from t3.retrofit import loop

    tables = {"data": {"validation": [str(base / "held")]}, "schedule": {"steps": 2, "merge_from_lse": 0.6}}
    assert run("plain", **tables)[0] == 0
    measure = Loop.validate

    def warmed(self, stage):
        if self.at.step == 0:
            self.warm_up()
        measure(self, stage)

    monkeypatch.setattr(loop.Loop, "validate", warmed)
    _, folder = run("warm", **tables)
    plain = folder.with_name(folder.name.removesuffix("warm") + "plain")
    for name in ("weights", "average", "optimizer"):
        one, other = weights_of(plain, 2, name), weights_of(folder, 2, name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_written_model_is_trained_on_by_itself(run, base):
    _, folder = run("first", schedule={"steps": 1})
    file = str(folder / f"{folder.name}.safetensors")
    status, second = run("second", model={"source": "", "dit": [file], "plan": "auto"}, schedule={"steps": 1})
    assert status == 0
    assert identify(open_weights(second / f"{second.name}.safetensors")).t3.plan == Plan.from_json(PLAN)


def test_a_missing_optimiser_is_told_before_any_step(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    status, folder = run(train={"optimizer": "adamw-8bit"})
    assert status == 2
    assert "the package bitsandbytes is not installed" in capsys.readouterr().err
    assert not (folder / "metrics.csv").exists()


def test_a_torch_without_muon_is_told_before_any_step(run, monkeypatch, capsys):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    assert run(train={"optimizer": "muon"})[0] == 2
    assert 'is "muon", which comes with torch 2.9' in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("disk"), torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")])
def test_samples_that_fail_do_not_end_the_run(tmp_path, monkeypatch, error):
    """A clip to look at may well be larger than those that are trained on."""

    def fail(*_):
        raise error

    monkeypatch.setattr(samples, "sample", fail)
    said: list[str] = []
    finish = object.__new__(Finish)
    finish.session = SimpleNamespace(
        config=SimpleNamespace(samples=SimpleNamespace(prompts=["a dot"])),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        say=said.append,
    )
    finish.folder, finish.sampler, finish.words = tmp_path, object(), None
    finish.aside, finish.took = lambda seconds: None, {}
    finish.sample(7)
    assert len(said) == 1 and said[0].startswith("step 7: no samples: ") and "\n" not in said[0]
    assert set(finish.took) == {"samples"}
