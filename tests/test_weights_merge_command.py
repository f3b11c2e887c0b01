"""`python -m t3.convert BASE --t3-weights FILE --lora FILE`: one file of both, its plan, its refusals, its memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_weights_gguf import model_file
from test_weights_refused import CASES, GOOD
from weights_fixtures import one_thread, original_names, save, write_header  # noqa: F401
from weights_kinds import KINDS, adapter, by_hand, close, full_tensors, kind_names, kind_state, same_bits

from t3 import convert
from t3.plan import Grid, Plan
from t3.weights import T3Metadata, apply_weights, identify, load_transformer, open_weights
from t3.weights.fingerprint import fingerprint

PLAN = Plan("mine", Grid(2, 2, 3), ((1, 2, 3), ("each", 1, 1)))
OTHER = Plan("other", Grid(2, 2, 3), ((1, 1, 3),))


def run(capsys, *arguments):
    status = convert.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("kind", KINDS)
def test_two_files_by_the_command(tmp_path, capsys, kind):
    """T3 weights, then a DoRA, which sees what they left; in the base's own names and in those asked for."""
    state, want, arguments = kind_state(kind), kind_state(kind), []
    base = save(tmp_path / "base.safetensors", full_tensors(kind, "comfyui short", state), {"who": "me"})
    for i, (option, form, dialect, strength) in enumerate(
        (("--t3-weights", "mixed", "peft", 1.5), ("--lora", "dora", "kohya", -0.5))
    ):
        tensors, deltas = adapter(kind, form, dialect, seed=10 + 500 * i)
        path = save(tmp_path / f"{i}.safetensors", tensors)
        arguments = [option, f"{path}:{strength}", *arguments]  # the order of the options does not count
        want = by_hand(want, deltas, strength)
    for to, names in ((None, {name: f"diffusion_model.{name}" for name in state}), ("diffusers", kind_names(kind))):
        out = tmp_path / f"{to}.safetensors"
        asked = ["--to", to] if to else []
        status, text, err = run(capsys, base, *arguments, "--out", out, "--json", *asked)
        assert status == 0, err
        result, have = json.loads(text), load_file(out)
        assert have.keys() == set(names.values()) and open_weights(out).metadata["who"] == "me"
        for name in state:
            close(have[names[name]], want[name])
        assert [(a["strength"], a["dialect"], a["form"]) for a in result["applied"]] == [
            (1.5, "peft", "lora+diff"),
            (-0.5, "kohya", "dora"),
        ]
        assert [a["matched"] for a in result["applied"]] == [
            len(load_file(tmp_path / f"{i}.safetensors")) for i in (0, 1)
        ]
        assert result["changed"] + result["unchanged"] == len(state) and result["left_out"] == []
        assert result["dialect"] == {"from": "comfyui", "to": to or "comfyui"}


@pytest.mark.parametrize("kind", ["i2v", "fun-camera"])
def test_nothing_at_strength_zero(tmp_path, capsys, kind):
    state = kind_state(kind)
    # Both are changed at other strengths: scaled 8 bits stay what they are, and a sum would lose the sign of zeros.
    state["blocks.1.ffn.0.weight"] = (state["blocks.1.ffn.0.weight"] * 100).to(torch.float8_e4m3fn)
    state["blocks.1.ffn.0.scale_weight"] = torch.tensor(0.01)
    state["blocks.0.self_attn.q.weight"] = torch.full((128, 128), -0.0)
    base = save(tmp_path / "base.safetensors", state, T3Metadata(plan=OTHER, writer="me").to_header())
    tensors, _ = adapter(kind, "mixed", "comfyui")
    path = save(tmp_path / "a.safetensors", tensors, T3Metadata(plan=PLAN).to_header())
    status, text, _ = run(
        capsys,
        base,
        "--t3-weights",
        f"{path}:0",
        "--lora",
        f"{path}:0",
        "--out",
        tmp_path / "out.safetensors",
        "--json",
    )
    result = json.loads(text)
    assert status == 0 and result["changed"] == 0 and result["plan"]["name"] == "other"
    have = load_file(tmp_path / "out.safetensors")
    assert same_bits(have, state) and have["blocks.0.self_attn.q.weight"].signbit().all()
    assert open_weights(tmp_path / "out.safetensors").metadata == open_weights(base).metadata
    assert sum("is at strength 0, so the plan it carries is not written" in note for note in result["notes"]) == 2


def plain_files(tmp_path, **plans):
    """A base and a difference for each name, which carries the plan."""
    files = [save(tmp_path / "base.safetensors", kind_state("fun-control"), {"t3.other": "kept"})]
    for name, t3 in plans.items():
        change = {"diffusion_model.head.head.diff_b": torch.full((64,), 0.5)}
        files.append(save(tmp_path / f"{name}.safetensors", change, t3.to_header()))
    return files


def test_the_plan_goes_into_the_merged_file(tmp_path, capsys):
    carried = T3Metadata(plan=PLAN, grid=Grid(3, 4, 5), rank=8, writer="my trainer")
    base, tuned, plain = plain_files(tmp_path, tuned=carried, plain=T3Metadata())
    out = tmp_path / "out.safetensors"
    status, text, _ = run(capsys, base, "--t3-weights", tuned, "--lora", plain, "--out", out, "--json")
    found = identify(open_weights(out))
    assert status == 0 and json.loads(text)["plan"] == json.loads(PLAN.to_json())
    assert (found.t3.plan, found.t3.grid, found.t3.rank, found.tuned) == (PLAN, Grid(3, 4, 5), None, "yes")
    assert found.t3.writer.startswith("t3.convert ") and open_weights(out).metadata["t3.other"] == "kept"
    state = kind_state("fun-control")
    assert found.t3.base.distance(fingerprint("any", state, state.__getitem__)) == 0
    # The merged file as a base: its plan stays with it, unless another is merged in.
    again = tmp_path / "again.safetensors"
    assert run(capsys, out, "--lora", plain, "--out", again)[0] == 0
    assert identify(open_weights(again)).t3.plan == PLAN and identify(open_weights(again)).t3.grid == Grid(3, 4, 5)
    other = save(tmp_path / "other.safetensors", load_file(tuned), T3Metadata(plan=OTHER).to_header())
    assert run(capsys, out, "--lora", other, "--out", again, "--overwrite")[0] == 0
    assert identify(open_weights(again)).t3.plan == OTHER and identify(open_weights(again)).t3.grid is None


def test_plans_that_differ_ask_for_a_choice(tmp_path, capsys):
    base, one, two = plain_files(tmp_path, one=T3Metadata(plan=PLAN), two=T3Metadata(plan=OTHER))
    out = tmp_path / "out.safetensors"
    arguments = [base, "--t3-weights", one, "--lora", two, "--out", out]
    status, _, err = run(capsys, *arguments)
    assert status == 2 and re.search(r"carry different plans \('mine' and 'other'\): choose one with --plan", err)
    assert not out.exists()
    for asked, name in (("wan2.1-4k", "wan2.1-4k"), ("none", None)):
        assert run(capsys, *arguments, "--plan", asked, "--overwrite")[0] == 0
        plan = identify(open_weights(out)).t3.plan
        assert (plan and plan.name) == name
    assert run(capsys, base, "--t3-weights", one, "--lora", f"{two}:0", "--out", out, "--overwrite")[0] == 0
    assert identify(open_weights(out)).t3.plan == PLAN


def test_no_plan_is_made_up(tmp_path, capsys):
    base, tuned = plain_files(tmp_path, tuned=T3Metadata())
    status, _, err = run(capsys, base, "--t3-weights", tuned, "--out", tmp_path / "out.safetensors")
    assert status == 0 and "none of the files carries a plan" in err
    assert identify(open_weights(tmp_path / "out.safetensors")).tuned == "cannot tell"


@pytest.mark.parametrize("beside", [True, False])
def test_a_config_beside_the_base_is_not_forgotten(tmp_path, capsys, beside):
    """What only a config.json says (heads, where VACE blocks join) does not go into the weights."""
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "WanVACETransformer3DModel", "vace_layers": [0, 1]})
    )
    base, tuned = save(tmp_path / "base.safetensors", kind_state("vace")), save(tmp_path / "a.safetensors", GOOD)
    out = (tmp_path if beside else tmp_path / "new") / "out.safetensors"
    status, text, _ = run(capsys, base, "--lora", tuned, "--out", out, "--json")
    assert status == 0 and any("config.json" in note for note in json.loads(text)["notes"]) == (not beside)


@pytest.mark.parametrize("fits", [True, False])
def test_weights_for_another_base_are_told(tmp_path, capsys, fits):
    """What counts is the model as the files before leave it, as in the engine."""
    base, tuned = kind_state("fun-control"), {n: -t for n, t in kind_state("fun-control").items()}
    mark = fingerprint("any", tuned, tuned.__getitem__)
    style = {"diffusion_model.head.head.diff_b": torch.ones(64)}
    files = [save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)]
    files.append(save(tmp_path / "style.safetensors", style, T3Metadata(base=mark).to_header()))
    arguments = ["--t3-weights", files[1]] if fits else []
    out = tmp_path / "out.safetensors"
    status, text, err = run(capsys, files[0], *arguments, "--lora", files[2], "--out", out, "--json")
    assert status == 0 and ("WARNING: made for another base" in err) == (not fits)
    assert len(json.loads(text)["applied"][-1]["notes"]) == (not fits)


@pytest.mark.parametrize("scaled", [True, False])
def test_on_an_8_bit_base(tmp_path, capsys, scaled):
    """8 bits become bfloat16, as the engine loads them; their scales are used up, a bundle's other parts stay."""
    state, stored, prefix = kind_state("t2v"), {}, "model.diffusion_model."
    layers = {}
    for name, tensor in state.items():
        stored[prefix + name] = tensor
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            stored[prefix + name] = (tensor / 0.01 if scaled else tensor).to(torch.float8_e4m3fn)
            if scaled:
                stem = prefix + name.removesuffix(".weight")
                stored |= {f"{stem}.scale_weight": torch.tensor(0.01), f"{stem}.scale_input": torch.tensor(1.0)}
                layers[stem] = {"format": "float8_e4m3fn"}
    other = {
        "text_encoders.a.weight": torch.ones(4).to(torch.float8_e4m3fn),
        "text_encoders.a.scale_weight": torch.ones(1),
    }
    marks = {f"{prefix}scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if scaled else {}
    notes = {
        "_quantization_metadata": json.dumps({"layers": layers | {"text_encoders.a": {"format": "float8_e4m3fn"}}})
    }
    base = save(tmp_path / "base.safetensors", stored | other | marks, notes)
    tensors, _ = adapter("t2v", "loha", "comfyui")
    path = save(tmp_path / "a.safetensors", tensors)
    status, text, err = run(capsys, base, "--lora", path, "--out", tmp_path / "out.safetensors", "--json")
    assert status == 0 and re.search(r"20 tensors in 8 bits \(F8_E4M3\): written as bfloat16", err)
    out = open_weights(tmp_path / "out.safetensors")
    assert set(out) == {prefix + name for name in state} | set(other)
    assert len(json.loads(text)["used_up"]) == (41 if scaled else 0)
    assert list(json.loads(out.metadata["_quantization_metadata"])["layers"]) == ["text_encoders.a"]
    assert all(torch.equal(out.read_raw(key), tensor) for key, tensor in other.items())
    model = load_transformer(base, dtype=torch.bfloat16)
    apply_weights(model, open_weights(path))
    for name, theirs in kind_names("t2v").items():
        have, want = out.read_raw(prefix + name), model.get_parameter(theirs)
        if stored[prefix + name].dtype == torch.float8_e4m3fn:
            assert have.dtype == torch.bfloat16 and torch.equal(have, want), name
        else:
            assert have.dtype == torch.float32


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])
    return path


def refused(tmp_path, case):
    """Arguments that must be refused, and words of the reason."""
    base = save(tmp_path / "base.safetensors", kind_state("fun-camera"))

    def file(tensors):
        return save(tmp_path / "a.safetensors", tensors)

    if case in CASES:
        return [base, "--lora", file({**GOOD, **CASES[case][0]})], CASES[case][1]
    good = file(GOOD)
    other = {name: (8, 3072) if name.endswith("A.weight") else (3072, 8) for name in GOOD}
    table = {
        "another width": lambda: ([base, "--lora", write_header(good, other)], "3072 wide.*128 wide"),
        "another kind": lambda: (
            [base, "--lora", file(adapter("vace", "lora", "peft")[0])],
            "not in the loaded model",
        ),
        "cut adapter": lambda: ([base, "--lora", truncated(good)], "a.safetensors"),
        "cut base": lambda: ([truncated(base), "--lora", good], "base.safetensors"),
        "no file": lambda: ([base, "--t3-weights", tmp_path / "none.safetensors"], "no such file"),
        "strength": lambda: ([base, "--lora", f"{good}:much"], "strength 'much' is not a number"),
        "no finite strength": lambda: ([base, "--lora", f"{good}:inf"], "no finite number"),
        "LoRA as base": lambda: ([good, "--lora", good], "merged into a whole transformer"),
        "VAE as base": lambda: (
            [file({"decoder.middle.0.residual.0.gamma": torch.ones(4, 1, 1, 1)}), "--lora", base],
            "is a vae, full",
        ),
        "GGUF base": lambda: ([model_file(tmp_path)[0], "--lora", good], "GGUF file.*T3 LoRA Retrofit Loader"),
        "another checkpoint": lambda: ([base, "--t3-weights", file(kind_state("fun-control"))], "does not fit"),
        "plan": lambda: ([base, "--lora", good, "--plan", "no-such"], "no-such"),
        "names": lambda: ([base, "--lora", good, "--to", "kohya"], "no names for a whole dit"),
        "nothing asked": lambda: ([base], r"--to is missing \(original, comfyui.*--t3-weights or --lora"),
        "plan alone": lambda: ([base, "--to", "diffusers", "--plan", "none"], "--plan is for merged files"),
    }
    return table[case]()


@pytest.mark.parametrize(
    "case",
    [
        *(
            "SDXL",
            "text encoder",
            "deeper model",
            "OFT",
            "ranks",
            "NaN in A",
            "NaN alpha",
            "product too large",
        ),
        *("another width", "another kind", "cut adapter", "cut base", "no file", "strength", "no finite strength"),
        *("LoRA as base", "VAE as base", "GGUF base", "another checkpoint", "plan", "names", "nothing asked"),
        "plan alone",
    ],
)
def test_refused_without_output(tmp_path, capsys, case):
    arguments, words = refused(tmp_path, case)
    (tmp_path / "new").mkdir()
    status, out, err = run(capsys, *arguments, "--out", tmp_path / "new" / "out.safetensors")
    assert status == 2 and not out and re.search(words, err), err
    assert not list((tmp_path / "new").iterdir())


def test_what_exists_is_not_overwritten(tmp_path, capsys):
    base, tuned = plain_files(tmp_path, tuned=T3Metadata(plan=PLAN))
    before = base.read_bytes()
    status, _, err = run(capsys, base, "--t3-weights", tuned, "--out", base)
    assert status == 2 and "exists already" in err and base.read_bytes() == before
    assert run(capsys, base, "--t3-weights", tuned, "--out", base, "--overwrite")[0] == 0  # read while it is replaced
    have, state = load_file(base), kind_state("fun-control")
    assert torch.equal(have.pop("head.head.bias"), state.pop("head.head.bias") + 0.5) and same_bits(have, state)


def shapes_of(layers, width=512, ffn=2048):
    """Original name -> shape of a plain model."""
    sizes = {"patch_embedding": (width, 16, 1, 2, 2), "text_embedding.0": (width, 24), "time_embedding.0": (width, 32)}
    sizes |= {"time_projection.1": (6 * width, width), "head.head": (64, width)}
    shapes = {}
    for name in original_names(layers):
        module, _, leaf = name.rpartition(".")
        inner = module.split(".", 2)[-1]
        if leaf == "modulation":
            shapes[name] = (1, 2 if module == "head" else 6, width)
        else:
            matrix = sizes.get(module) or {"ffn.0": (ffn, width), "ffn.2": (width, ffn)}.get(inner, (width, width))
            shapes[name] = (width,) if "norm" in inner else matrix if leaf == "weight" else matrix[:1]
    return shapes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process as Linux tells it")
def test_memory_is_for_a_few_tensors(tmp_path):
    """After a model of 2 blocks, one of 16 raises the peak of a process by a small part of its size, if at all.

    Base, whole checkpoint and LoRA are holes, 280 MB of them; the largest tensor takes 4 MB in float32.
    """
    commands = []
    for layers in (2, 16):
        base, tuned = (
            write_header(tmp_path / f"{n}{layers}.safetensors", shapes_of(layers)) for n in ("base", "tuned")
        )
        pair = {"A": (16, 512), "B": (512, 16)}
        stems = [f"blocks.{i}.{module}" for i in range(layers) for module in ("self_attn.q", "cross_attn.k")]
        lora = {f"{stem}.lora_{end}.weight": shape for stem in stems for end, shape in pair.items()}
        lora = write_header(tmp_path / f"lora{layers}.safetensors", lora)
        out = tmp_path / f"out{layers}.safetensors"
        commands.append([str(base), "--t3-weights", f"{tuned}:0.5", "--lora", str(lora), "--out", str(out)])
    code = (
        "import torch; from t3 import convert; torch.set_num_threads(1)\n"
        "peak = lambda: int([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1])\n"
        f"for command in {commands!r}: print(convert.main(command), peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (first, small), (second, large) = ([int(n) for n in line.split()] for line in done.stdout.splitlines())
    assert first == second == 0, done.stderr
    size = out.stat().st_size
    assert size > 130e6 and (large - small) * 1024 < size / 3
