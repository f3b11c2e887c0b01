"""`extract`: base plus what it wrote is the tuned model, for every kind, dialect, form of input and rank."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from weights_fixtures import one_thread, original_state, save, tiny_transformer  # noqa: F401
from weights_kinds import DIALECTS, FULL_PREFIXES, KINDS, PLAIN, full_tensors, kind_state, noise

from t3 import Plan
from t3.errors import T3Error
from t3.inspect import weight_facts
from t3.weights import T3Metadata, apply_weights, identify, open_weights
from t3.weights.adapters import apply_piece
from t3.weights.extract import Cancelled, extract, is_matrix
from t3.weights.extract_factors import break_even, by_error, by_rank

RANK = 4


def tuned_of(state, rank=RANK, scale=0.02):
    """A tuned copy: low rank (or, with None, any) changes of all matrices, small ones of all else."""
    out = {}
    for i, (name, tensor) in enumerate(state.items()):
        change = noise(*tensor.shape, seed=2000 + i, scale=scale)
        if rank and is_matrix(name, tuple(tensor.shape)):
            rows, columns = change.flatten(1).shape
            change = (noise(rows, rank, seed=i) @ noise(rank, columns, seed=i + 1)).reshape(tensor.shape) * scale
        out[name] = tensor + change
    return out


def applied(path, state):
    """Original name -> float64 sum of the base and a file's pieces; and the pieces."""
    file = open_weights(path)
    found = identify(file)
    assert found.problem is None and not found.refused and not found.unused
    out = {name: tensor.double() for name, tensor in state.items()}
    for piece in found.adapter.pieces:
        out[piece.target] = apply_piece(file, piece, out[piece.target])
    return out, found.adapter.pieces


def errors(have, base, tuned):
    """Relative Frobenius error of each parameter's change."""
    change = {name: (tuned[name].float() - base[name].float()).double() for name in base}
    return {
        name: float((have[name] - base[name].double() - delta).norm() / delta.norm())
        for name, delta in change.items()
        if delta.any()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_is_recovered(tmp_path, kind):
    """Every kind of model, in float32, at the rank of the change: to 1e-6 of it. Every key has its place."""
    base = kind_state(kind)
    tuned = tuned_of(base)
    path = tmp_path / "lora.safetensors"
    report = extract(base, tuned, path, rank=RANK, dtype="float32")
    have, pieces = applied(path, base)
    assert max(errors(have, base, tuned).values()) < 1e-6
    assert {p.target for p in pieces} == set(base) and {p.kind for p in pieces} == {"lora", "diff"}
    assert "patch_embedding.weight" in {p.target for p in pieces if p.kind == "lora"}
    assert report.error < 1e-6 and not report.missed and report.nbytes == path.stat().st_size
    facts = weight_facts(open_weights(path), identify(open_weights(path)))
    assert facts["ok"] and facts["refused"] == facts["unused"] == 0
    assert (facts["form"], facts["dialect"], facts["rank"], facts["width"]) == ("lora+diff", "comfyui", RANK, 128)
    preset = "wan2.2-4k" if kind == "ti2v" else "wan2.1-4k"
    assert facts["tuned"] == "yes" and facts["plan"] == json.loads(Plan.preset(preset).to_json())
    assert any("does not say what plan" in note for note in report.notes)


@pytest.mark.parametrize("error", [0.3, 0.1, 0.01, 1e-5])
def test_full_rank_meets_the_error(tmp_path, error):
    """Noise has no low rank, a decaying change some: each layer within the error, and as measured as reported."""
    base = kind_state("t2v")
    tuned = tuned_of(base, rank=None)
    for i, name in enumerate(name for name in base if name.endswith("ffn.0.weight")):
        rows, columns = base[name].shape
        sizes = torch.arange(1, columns + 1) ** -1.5
        tuned[name] = base[name] + noise(rows, columns, seed=i) * sizes @ noise(columns, columns, seed=i + 9)
    report = extract(base, tuned, tmp_path / "lora.safetensors", error=error)
    have, _ = applied(tmp_path / "lora.safetensors", base)
    found = errors(have, base, tuned)
    assert max(found.values()) <= error and not report.missed
    for change in report.changes:
        assert change.error == pytest.approx(found[change.name], rel=0.02, abs=3e-7)
    forms = {change.name: change.form for change in report.changes}
    assert forms["blocks.0.ffn.0.weight"] == ("diff" if error == 1e-5 else "lora")
    assert forms["blocks.0.ffn.2.weight"] == "diff"  # noise at any of these errors
    wide = {"F32"} if error < 0.01 else {"F32", "BF16"}
    assert {open_weights(report.path).dtype(key) for key in open_weights(report.path)} == wide
    data = sum(tensor.nbytes for tensor in load_file(report.path).values())
    assert sum(change.nbytes for change in report.changes) == data < report.nbytes


@pytest.mark.parametrize("source", [*FULL_PREFIXES, "diffusers"])
def test_dialects_in(tmp_path, source):
    base = kind_state("i2v")
    tuned = tuned_of(base)
    files = [save(tmp_path / "base.safetensors", full_tensors("i2v", "original", base))]
    files += [save(tmp_path / "tuned.safetensors", full_tensors("i2v", source, tuned))]
    extract(*map(open_weights, files), tmp_path / "lora.safetensors", rank=RANK, dtype="float32")
    have, _ = applied(tmp_path / "lora.safetensors", base)
    assert max(errors(have, base, tuned).values()) < 1e-6


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_out(tmp_path, dialect):
    base = kind_state("vace")
    tuned = tuned_of(base)
    path = tmp_path / "lora.safetensors"
    report = extract(base, tuned, path, rank=RANK, dtype="float32", dialect=dialect)
    told = any("other programs may not" in note for note in report.notes)
    assert told == (dialect not in ("original", "comfyui"))
    assert identify(open_weights(path)).dialect == dialect
    have, _ = applied(path, base)
    assert max(errors(have, base, tuned).values()) < 1e-6


@pytest.mark.parametrize("kind", PLAIN)
def test_in_the_engine(tmp_path, kind):
    """Put on the headless engine's model it gives the tuned one; no warning of another base."""
    model = tiny_transformer(KINDS[kind])
    base = original_state(model, KINDS[kind])
    tuned = tuned_of(base)
    extract(base, tuned, tmp_path / "lora.safetensors", error=1e-5)
    report = apply_weights(model, open_weights(tmp_path / "lora.safetensors"))
    assert report.tuned == "yes" and not any("WARNING" in note for note in report.notes)
    have = original_state(model, KINDS[kind])
    for name, want in tuned.items():
        assert (have[name] - want).norm() <= 2e-5 * (want - base[name]).norm() + 1e-6 * want.norm()
    other = apply_weights(tiny_transformer(KINDS[kind], seed=5), open_weights(tmp_path / "lora.safetensors"))
    assert any("another base" in note for note in other.notes)


def test_equal_tensors_give_no_entries(tmp_path):
    base = kind_state("t2v")
    tuned = {name: t.clone() for name, t in base.items()}
    with pytest.raises(T3Error, match="nothing to extract"):
        extract(base, tuned, tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())
    base["blocks.0.modulation"] = torch.zeros(1, 6, 128)
    tuned["blocks.0.modulation"] = torch.full((1, 6, 128), 1e-25)  # whose squares float32 does not hold
    tuned["blocks.0.self_attn.q.weight"][3, 5] += 1
    tuned["blocks.1.self_attn.q.bias"][7] += 1
    report = extract(base, tuned, tmp_path / "lora.safetensors")
    assert len(report.unchanged) == len(base) - 3 and len(report.changes) == 3
    stem = "diffusion_model.blocks"
    names = [f"{stem}.0.self_attn.q.lora_A.weight", f"{stem}.0.self_attn.q.lora_B.weight"]
    written = load_file(report.path)
    assert report.changes[0].relative is None and "of a weight that was 0" in report.changes[0].describe()
    diffs = [f"{stem}.0.modulation.diff", f"{stem}.1.self_attn.q.diff_b"]
    assert sorted(written) == sorted(names + diffs) and written[names[0]].shape == (1, 128)


def test_a_highest_rank_is_kept_and_what_misses_is_told(tmp_path):
    base = kind_state("t2v")
    report = extract(base, tuned_of(base, rank=None), tmp_path / "lora.safetensors", max_rank=6)
    assert max(change.rank for change in report.changes) == report.metadata.rank == 6
    assert {change.name for change in report.missed} == {n for n, t in base.items() if is_matrix(n, tuple(t.shape))}
    assert any("WARNING" in note and "highest rank allowed" in note for note in report.notes)
    every = extract(base, tuned_of(base, rank=None), tmp_path / "other.safetensors")
    assert any("not of low rank" in note for note in every.notes)


def test_scaled_fp8_bases(tmp_path):
    """Read as weight times scale: the sum with that is the tuned model. That the rounding takes rank is told."""
    base = kind_state("t2v")
    tuned = tuned_of(base)
    name = "blocks.0.ffn.0"
    stored = base | {f"{name}.weight": (base[f"{name}.weight"] / 0.01).to(torch.float8_e4m3fn)}
    file = open_weights(save(tmp_path / "fp8.safetensors", stored | {f"{name}.scale_weight": torch.tensor(0.01)}))
    report = extract(file, tuned, tmp_path / "lora.safetensors", error=1e-4)
    base[f"{name}.weight"] = file.read(f"{name}.weight")
    have, _ = applied(report.path, base)
    assert max(errors(have, base, tuned).values()) <= 1e-4
    assert any("BASE is stored as F8_E4M3" in note for note in report.notes)


def test_half_precision_models_and_half_precision_factors(tmp_path):
    base = {name: tensor.bfloat16() for name, tensor in kind_state("t2v").items()}
    tuned = {name: tensor.half() for name, tensor in tuned_of(kind_state("t2v"), rank=None).items()}
    for dtype, most in (("bfloat16", 0.003), ("float16", 0.0004)):
        report = extract(base, tuned, tmp_path / f"{dtype}.safetensors", error=0.05, dtype=dtype)
        have, _ = applied(report.path, base)
        assert max(errors(have, base, tuned).values()) <= 0.05
        diffs = [
            change.error for change in report.changes if change.form == "diff" and is_matrix(change.name, change.shape)
        ]
        assert diffs and max(diffs) <= most / 1.5


def test_rounding_that_hides_a_change_is_told(tmp_path):
    """The estimate against rounding that is measured: noise of a size is told above the error, not below."""
    base = {name: tensor.bfloat16() for name, tensor in kind_state("t2v").items()}
    for part, told in ((0.005, True), (0.1, False)):
        tuned = {
            n: t.float() + t.float().std() * noise(*t.shape, seed=i, scale=part)
            for i, (n, t) in enumerate(base.items())
        }
        report = extract(base, {n: t.bfloat16() for n, t in tuned.items()}, tmp_path / f"{part}.safetensors")
        assert any("rounding of bf16 files" in note for note in report.notes) == told


def test_plans_and_grids(tmp_path):
    base = kind_state("t2v")
    other = Plan.from_json('{"t3_plan": 1, "name": "mine", "grid": [3, 16, 16], "layers": [["each", 1, 1], [1, 4, 4]]}')
    header = T3Metadata(plan=other, grid=(3, 20, 20)).to_header()
    tuned = open_weights(save(tmp_path / "tuned.safetensors", tuned_of(base), header))
    preset = Plan.preset("wan2.2-4k")
    for plan, want, said in (("auto", other, ""), (None, None, ""), ("wan2.2-4k", preset, ""), (preset, preset, "ask")):
        report = extract(base, tuned, tmp_path / "lora.safetensors", rank=RANK, plan=plan, overwrite=True)
        found = identify(open_weights(report.path)).t3
        assert found == report.metadata and found.plan == want and found.writer.startswith("t3.extract ")
        assert found.grid == ((3, 20, 20) if plan else None) and found.base and found.rank == RANK
        assert not said or any("as asked" in note for note in report.notes)


def test_stopping_leaves_nothing(tmp_path):
    base, seen = kind_state("t2v"), []

    def stop(done, total, name, change):
        seen.append((done, total, name, change and change.form))
        if done == 5:
            raise KeyboardInterrupt

    tuned = tuned_of(base)
    with pytest.raises(KeyboardInterrupt):
        extract(base, tuned, tmp_path / "lora.safetensors", progress=stop)
    assert [done for done, *_ in seen] == [1, 2, 3, 4, 5] and seen[0][1:] == (
        len(base),
        "blocks.0.cross_attn.k.bias",
        "diff",
    )
    with pytest.raises(Cancelled, match="nothing was written"):
        extract(base, tuned, tmp_path / "lora.safetensors", cancel=lambda: len(seen) == 5)
    assert not list(tmp_path.iterdir())


class Lazy(dict):
    """Counts how often each tensor is asked for."""

    def __getitem__(self, name):
        self.asked = {**getattr(self, "asked", {})}
        self.asked[name] = self.asked.get(name, 0) + 1
        return super().__getitem__(name)


def test_a_mapping_may_load_on_access(tmp_path):
    base = kind_state("t2v")
    tuned = Lazy({f"diffusion_model.{name}": tensor for name, tensor in tuned_of(base).items()})
    extract(base, tuned, tmp_path / "lora.safetensors", rank=RANK)
    assert set(tuned.asked.values()) == {2}


@settings(max_examples=60)
@given(st.integers(2, 90), st.integers(2, 90), st.integers(1, 6), st.integers(-8, 8), st.integers(0, 2**16))
def test_a_low_rank_is_found_and_recovered(rows, columns, rank, size, seed):
    """Whatever its size and scale, and whether its rank is asked for or found."""
    delta = noise(rows, rank, seed=seed) @ noise(rank, columns, seed=seed + 1) * 10.0**size
    rank = min(rank, rows, columns)
    found = by_error(delta, 1e-6, min(rows, columns), torch.float32)
    for factors in (found, by_rank(delta, rank, torch.float32)):
        assert factors.rank <= rank and factors.error <= 1e-6
        have = factors.up.double() @ factors.down.double()
        assert (have - delta.double()).norm() <= 1e-6 * delta.double().norm()


def test_both_factors_are_of_one_size_so_that_half_precision_holds_them():
    """Their product reaches 10^6, far beyond float16; neither factor does."""
    delta = 2e5 * noise(40, 3, seed=1) @ noise(3, 30, seed=2)
    found = by_rank(delta, 3, torch.float16)
    lengths = [factor.float().norm(dim=axis) for factor, axis in ((found.up, 0), (found.down, 1))]
    torch.testing.assert_close(*lengths, rtol=1e-3, atol=0)
    assert delta.abs().max() > 65_504 and found.error < 1e-3


def test_the_precision_of_products_is_put_back():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        by_rank(noise(8, 8, seed=1), 2, torch.float32)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_factors_of_any_shape():
    """The lowest rank that is enough, against an SVD in float64, by the sketch and by all vectors."""
    for rows, columns in ((200, 160), (160, 200), (40, 300), (9, 9)):
        small = min(rows, columns)
        basis, _ = torch.linalg.qr(noise(rows, small, seed=1))
        delta = basis * torch.arange(1, small + 1) ** -1.0 @ torch.linalg.qr(noise(columns, small, seed=2))[0].T
        squares = torch.linalg.svdvals(delta.double()) ** 2
        for error in (0.5, 0.25):
            best = next(r for r in range(small + 1) if squares[r:].sum() <= error**2 * squares.sum())
            found = by_error(delta, error, small, torch.float32)
            assert best <= found.rank <= best + 1 and found.error <= error
        for rank in (1, small // 16 or 1, small // 2):
            found = by_rank(delta, rank, torch.float32)
            assert found.rank == rank and found.error <= 1.01 * float(squares[rank:].sum() / squares.sum()) ** 0.5
    assert by_error(noise(64, 64, seed=3), 0.01, break_even(64, 64), torch.float32) is None
    assert by_rank(torch.zeros(20, 20), 3, torch.float32).error == 0.0
    spread = torch.diag(torch.tensor([1e-25] * 9 + [1e-27]))  # squares that float32 does not hold
    assert by_error(spread, 0.1, 9, torch.bfloat16).rank == 9
    assert [break_even(2, 2), break_even(1, 50), break_even(1536, 1536)] == [0, 0, 767]
