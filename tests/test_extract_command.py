"""`python -m t3.extract`: what it says and writes, what it refuses and when, and how much memory it takes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_extract import RANK, applied, errors, tuned_of
from weights_fixtures import (  # noqa: F401
    TWO_HEADS,
    one_thread,
    original_names,
    original_state,
    save,
    tiny_transformer,
    write_header,
)
from weights_kinds import adapter, kind_state

from t3 import extract
from t3.plan import Plan
from t3.weights import identify, open_weights


def run(capsys, *arguments):
    status = extract.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = kind_state("t2v")
    tuned = tuned_of(base)
    tuned["blocks.0.norm3.bias"] = base["blocks.0.norm3.bias"]
    return save(Path("base.safetensors"), base), save(Path("tuned.safetensors"), tuned), base, tuned


def test_end_to_end(pair, capsys):
    base, tuned, old, new = pair
    Path("plan.json").write_text(Plan.preset("wan2.2-4k").to_json())
    options = ["--rank", RANK, "--dtype", "float32", "--plan", "plan.json", "--device", "cpu", "--json"]
    status, out, err = run(capsys, base, tuned, "--out", "lora.safetensors", *options)
    assert status == 0, err
    have, _ = applied("lora.safetensors", old)
    assert max(errors(have, old, new).values()) < 1e-6
    facts = json.loads(out)
    assert facts["ok"] and facts["unchanged"] == ["blocks.0.norm3.bias"] and facts["error"] < 1e-6
    assert facts["bytes"] == Path("lora.safetensors").stat().st_size and len(facts["changes"]) == len(old) - 1
    assert identify(open_weights("lora.safetensors")).t3.plan == Plan.preset("wan2.2-4k")
    total = len(old)
    for line in (
        rf"\[{total}/{total}\] ",
        r"blocks\.0\.ffn\.0\.weight: rank 4, error [\d.e-]+, change [\d.e+]+ % of the weight",
        r"blocks\.0\.norm3\.bias: unchanged",
        r"wrote      .*lora\.safetensors: [\d.]+ MiB in",
        r"lora       \d+ layers, rank 4 to 4",
        r"diff       \d+ parameters in full",
        r"unchanged  1 parameters, left out",
        r"error      .* of the whole change, at most",
    ):
        assert re.search(line, err), line


def test_dry_run_writes_nothing(pair, capsys):
    base, tuned, old, _ = pair
    before = sorted(Path().iterdir())
    status, out, err = run(capsys, base, tuned, "--out", "lora.safetensors", "--dry-run", "--json")
    assert status == 0 and sorted(Path().iterdir()) == before
    facts = json.loads(out)
    assert facts["out"] is None and facts["tensors"] == len(old) and facts["matrices"] > 20
    assert "dry run" in err and "taken is the released one" in err


def test_interrupted(pair, capsys, monkeypatch):
    base, tuned, *_ = pair
    before = sorted(Path().iterdir())

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(extract, "_progress", stop)
    status, _, err = run(capsys, base, tuned, "--out", "lora.safetensors")
    assert status == 130 and "nothing half-written" in err and sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "tuned", "--rank", "0"], "rank is 0"),
        (["base", "tuned", "--error", "2"], "error is 2"),
        (["base", "tuned", "--rank", "4", "--max-rank", "4"], "exclude each other"),
        (["base", "tuned", "--error", "0.001", "--dtype", "bfloat16"], "below what bfloat16 can hold.*float32"),
        (["base", "tuned", "--device", "tpu"], "'tpu' is not there"),
        (["base", "tuned", "--plan", "nice"], "unknown plan 'nice'; presets are"),
        (["base", "tuned", "--plan", "none.json"], "--plan none.json cannot be used"),
        (["base", "tuned", "--out", "new.ckpt"], "must end in .safetensors"),
        (["base", "tuned", "--out", "tuned.safetensors"], "exists already"),
        (["base", "tuned", "--dialect", "peft", "--out", "peft/new.safetensors"], "holds an adapter_config.json"),
        (["base", "lora"], r"TUNED lora.safetensors is an adapter \(lora\)"),
        (["vae", "tuned"], "BASE vae.safetensors is a vae|no Wan model|no whole Wan"),
        (["gguf", "tuned"], "GGUF"),
        (["base", "nan"], "'blocks.1.ffn.0.weight' holds numbers that are not finite"),
        (["base", "base"], "nothing to extract"),
        (["base", "wide"], r"shapes differ, first .*256 wide|shapes differ, first"),
        (["base", "i2v"], r"only TUNED has 'blocks.0.cross_attn.k_img.weight'|only TUNED has"),
        (["base", "missing"], "does not exist"),
    ],
)
def test_refused(pair, capsys, arguments, message):
    *_, tuned = pair
    save(Path("lora.safetensors"), adapter("t2v", "lora", "comfyui")[0])
    save(Path("vae.safetensors"), {"decoder.middle.0.residual.0.gamma": torch.ones(3)})
    save(Path("wide.safetensors"), original_state(tiny_transformer(TWO_HEADS), TWO_HEADS))
    save(Path("i2v.safetensors"), kind_state("i2v"))
    save(Path("nan.safetensors"), tuned | {"blocks.1.ffn.0.weight": torch.full((320, 128), float("nan"))})
    Path("gguf.safetensors").write_bytes(b"GGUF" + bytes(60))
    Path("peft").mkdir()
    Path("peft/adapter_config.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*.*")}
    files = [f"{name}.safetensors" for name in arguments[:2]]
    out = [] if "--out" in arguments else ["--out", "new.safetensors"]
    status, text, err = run(capsys, *files, *arguments[2:], *out)
    assert status == 2 and not text
    assert re.search(message, err), err
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*.*")} == before


@pytest.mark.parametrize(
    ("most", "said"),
    [(1000, "did not take what was extracted so far"), (100_000, "lora.safetensors could not be written")],
)
def test_a_full_disk_is_told(pair, capsys, most, said):
    """Files may not grow beyond `most` bytes: too few for the temporary file, or for the result."""
    resource = pytest.importorskip("resource")
    base, tuned, *_ = pair
    before, there = resource.getrlimit(resource.RLIMIT_FSIZE), sorted(Path().iterdir())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        status, _, err = run(capsys, base, tuned, "--out", "lora.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and said in err and "to another" in err
    assert sorted(Path().iterdir()) == there


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process as Linux tells it")
def test_memory_is_for_a_few_tensors(tmp_path):
    """Two models of 250 MB, of holes but for the last numbers of one, through a process of its own."""
    small, shapes = kind_state("t2v"), {}
    for name in original_names(layers=60):
        shape = small[re.sub(r"blocks.\d+", "blocks.0", name)].shape
        shapes[name] = tuple(8000 if size == 320 else size for size in shape)
    paths = [write_header(tmp_path / f"{name}.safetensors", shapes) for name in ("base", "tuned")]
    with paths[1].open("r+b") as stream:
        stream.seek(-64, 2)
        stream.write(b"\x80\x3f" * 32)
    assert paths[0].stat().st_size > 245e6
    code = (
        "import sys, torch; from t3 import cli, extract; torch.ones(9, 9).double() @ torch.ones(9, 9).double()\n"
        "before = cli.peak_memory()['host']\n"
        "print(extract.main(sys.argv[1:]), cli.peak_memory()['host'] - before)"
    )
    arguments = [*map(str, paths), "--out", str(tmp_path / "lora.safetensors"), "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    status, peak = map(int, done.stdout.split())
    assert status == 0 and peak < 120e6, peak
