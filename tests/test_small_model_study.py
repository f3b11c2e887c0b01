"""The study's harness: its settings, its jobs from data to report on a tiny model, and its statistics."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from retrofit_fixtures import PLAN, write_clips, write_model

from t3.errors import T3Error
from t3.plan import Grid, Plan
from t3.retrofit.output import write_full
from t3.retrofit.shards import read_shards
from tools.small_model import encode
from tools.small_model.captions import caption
from tools.small_model.files import visible_cards
from tools.small_model.init_dit import make_transformer
from tools.small_model.plans import GRID
from tools.small_model.scenes import scenes
from tools.small_model.study import command, data, pool, report, statistics, training, verdicts
from tools.small_model.study.configs import configs
from tools.small_model.study.evidence import Evidence
from tools.small_model.study.jobs import MEASURE, RUN, TUNE, Choice, Job, fingerprint, kept, listed
from tools.small_model.study.results import Results
from tools.small_model.study.sampling import sample, weights
from tools.small_model.study.settings import FILE, read_study
from tools.small_model.study.training import Trainer
from tools.small_model.study.worker import Claims, expected, foreseen, ready, work
from tools.small_model.text import make_encoder, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = """
[study]
root = "{base}"
recipe = "{base}/recipe.toml"
plan = "tiny"
pretraining_seconds = 2.0
fractions = [0.1, 0.3]
first = [0.1, 0.3]
seeds = [0, 1]
tune_fraction = 0.05
overhead_seconds = 5
[validation]
folder = "high-test"
levels = 4
draws = 4
[tuning]
folder = "high-tune"
levels = 4
draws = 2
[adherence]
prompts = 2
seeds = 1
size = "low"
frames = 5
steps = 2
few_steps = [1]
cfg = 1.0
batch = 2
rows = ["dense", "untuned"]
fraction = 0.3
[data]
parts = 2
high = {{ size = "low", split = "train", clips = 5, frames = "5", batch = 2 }}
[rates]
full = [1e-4, 1e-3]
lora = [1e-3, 1e-2]
[plans]
tiny = [["each", 1, 1], [1, 2, 2]]
"""
ROWS = """
[[rows]]
name = "dense"
title = "dense"
plan = "dense"
measure = true
[[rows]]
name = "untuned"
title = "un-tuned"
measure = true
[[rows]]
name = "control"
title = "control"
plan = "dense"
rates = "full"
deciding = true
[[rows]]
name = "full"
title = "full"
rates = "full"
deciding = true
[[rows]]
name = "lora-4"
title = "LoRA"
rates = "lora"
trainable = { what = "lora", rank = 4, also = ["norms"] }
schedule = { flow = 0.0, velocity = 1.0 }
[[rows]]
name = "two"
title = "two phases"
rates = "lora"
phases = [
    { share = 0.5, stages = [{ lr = 1e-4, share = 0.4, mix = { low = 1.0 } }, { share = 0.6 }] },
    { share = 0.5, trainable = { what = "lora", rank = 2 } },
]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model, its clips, a recipe and a study."""
    folder = tmp_path_factory.mktemp("study")
    write_model(folder / "model")
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel.from_pretrained(folder / "model" / "transformer")
    plan = Plan.from_json(PLAN)
    write_full(
        folder / "dense.safetensors", transformer.state_dict(), dict(transformer.config), plan, Grid(2, 3, 4), "float32"
    )
    for i, name in enumerate(("high", "low", "high-test", "high-tune")):
        write_clips(folder / "study" / "data" / name, count=6, seed=i)
    recipe = (ROOT / "tools" / "small_model" / "recipes" / "study.toml").read_text()
    recipe = recipe.replace("output/small/dense-high/dense-high", f"{folder}/dense").replace(
        "output/small", str(folder)
    )
    recipe = recipe.replace("batch = 8", 'batch = 2\nprecision = "fp32"\ndevice = "cpu"').replace(
        "compile = true", "compile = false"
    )
    recipe = recipe.replace('plan = "dense"', 'plan = "dense"\ntext_tokens = 6')
    (folder / "recipe.toml").write_text(recipe)
    (folder / "study.toml").write_text(TINY.format(base=folder) + ROWS)
    return folder


def test_the_study_itself_is_sound(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = replace(read_study(FILE), root=tmp_path)
    jobs = listed(study)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        if job.kind != "adherence":
            made = configs(study, job, 1e-3, tmp_path)
            budget = sum(stage.training_seconds for config in made for stage in config.stages)
            assert budget == pytest.approx(study.seconds(job.fraction) if job.kind != MEASURE else 0)
            assert made[-1].validation.draws == (4 if job.kind == TUNE else 16)
            assert job.plan in (made[-1].model.plan, Path(made[-1].model.plan).stem)
    assert {"dense", "control", "untuned", "full", "lora-4", "lora-11", "lora-32", "local", "strided"} <= set(
        study.rows
    )


def test_jobs_train_measure_and_leave_results(base, capsys):
    study = read_study(base / "study.toml")
    results, trainer = Results(study.results), Trainer(study, base / "work")
    untuned, dense = Job(MEASURE, "untuned", "tiny"), Job(MEASURE, "dense", "dense")
    for job in (untuned, dense):
        assert trainer.run(job, 0.0, True, results) > 0
    assert results.get(untuned)["steps"] == [0]
    errors = results.arrays(untuned)["errors"]
    assert errors.shape == (6, 4) and errors.dtype == np.float16
    assert not np.array_equal(errors, results.arrays(dense)["errors"])
    assert results.get(untuned)["mean"] == pytest.approx(errors.astype(float).mean(), rel=1e-3)
    sigma = results.sigma(untuned)
    assert sorted(np.floor(sigma[0] * 4)) == [0, 1, 2, 3]
    for row, rate in (("lora-4", 1e-3), ("two", 1e-2)):
        job = Job(RUN, row, "tiny", 0.3)
        trainer.run(job, rate, True, results)
        found = results.get(job)
        assert found["training_seconds"] >= 0.6 and found["rate"] == rate  # how much more, the machine decides
        assert min(found["steps"]) > 0 and found["clips"] == 2 * sum(found["steps"])
        assert all(path.exists() for path in kept(study, job))
    assert len(found["steps"]) == 2 and len(kept(study, job)) == 2
    assert not list((base / "work").iterdir())


def test_a_run_that_goes_astray_is_a_result(base, monkeypatch):
    study = read_study(base / "study.toml")
    results, trainer = Results(base / "astray"), Trainer(study, base / "work")
    job = Job(TUNE, "full", "tiny", 0.05, rate=1e30)
    assert trainer.run(job, 1e30, True, results) == float("inf")
    assert results.get(job)["astray"] and results.get(job)["mean"] is None


def test_a_run_that_goes_astray_in_its_first_phase_is_a_result(base, tmp_path):
    (tmp_path / "study.toml").write_text(TINY.format(base=base) + ROWS.replace("lr = 1e-4", "lr = 1e30"))
    study = read_study(tmp_path / "study.toml")
    results, job = Results(tmp_path / "astray"), Job(RUN, "two", "tiny", 0.3)
    Trainer(study, base / "work").run(job, 1e-3, True, results)
    assert results.get(job)["astray"] and len(results.get(job)["steps"]) == 1


def test_results_of_other_settings_or_of_another_dense_model_are_set_aside(base, tmp_path):
    (tmp_path / "recipe.toml").write_text((base / "recipe.toml").read_text().replace(f"{base}/dense.", f"{tmp_path}/"))
    (tmp_path / "safetensors").write_bytes(b"one")
    read = replace(read_study(base / "study.toml"), root=tmp_path, recipe=tmp_path / "recipe.toml")
    results = Results(read.results)
    assert fingerprint(read, Job(RUN, "full", "tiny", 0.1)) == fingerprint(
        read_study(base / "study.toml"), Job(RUN, "full", "tiny", 0.1)
    )
    run, untuned = Job(RUN, "full", "tiny", 0.1), Job(MEASURE, "untuned", "tiny")
    for job in (run, untuned):
        results.put(job, {"made": fingerprint(read, job), "dense": read.dense}, {})
    read.weights.mkdir()
    kept(read, run)[0].write_bytes(b"weights")
    # What decides no result: titles, tries that come later, and where things lie.
    row = replace(read.row("full"), title="another", rates=(1e-4, 1e-3, 1e-2))
    assert results.set_aside(replace(read, rows={**read.rows, "full": row})) == []
    assert results.set_aside(replace(read, pretraining_seconds=3.0)) == [run.name]
    assert results.names() == [untuned.name] and not results.has(run)
    assert (read.results / "former" / f"{run.name}.json").exists() and not kept(read, run)[0].exists()
    results.put(run, {"made": fingerprint(read, run), "dense": "other"}, {})
    (tmp_path / "safetensors").rename(tmp_path / "away")
    with pytest.raises(T3Error, match="2 dense models"):
        Results(read.results).set_aside(replace(read))
    (tmp_path / "away").rename(tmp_path / "safetensors")
    assert Results(read.results).set_aside(replace(read)) == [run.name]


def test_clips_of_the_stages_are_not_taken_for_those_of_the_study(base, tmp_path):
    study = replace(read_study(base / "study.toml"), root=tmp_path)
    made = tmp_path / "data" / "high"
    made.mkdir(parents=True)
    (made / "index.json").write_text("{}")
    assert data.parts(study) == [("high", 0), ("high", 1)] and data.join(study) == ["high"]


def study_command(base, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tools.small_model.study", "--study", str(base / "study.toml"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_two_workers_share_a_list_and_a_second_run_adds_nothing(base, tmp_path):
    asked = ("run", "--kinds", "tune,run", "--rows", "full", "--fractions", "0.1", "--workers", "2")
    ran = study_command(base, *asked, "--seconds", "200", "--out", str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 of 4 jobs done" in ran.stdout
    results = Results(read_study(base / "study.toml").results)
    tried = results.tries(read_study(base / "study.toml"), read_study(base / "study.toml").row("full"))
    seeds = [results.get(Job(RUN, "full", "tiny", 0.1, seed)) for seed in (0, 1)]
    assert {found["rate"] for found in seeds} == {min(tried, key=tried.get)}
    assert seeds[0]["mean"] != seeds[1]["mean"]
    merged = Results(tmp_path / "merged")
    assert merged.merge([tmp_path / "out" / "study.zip"]) == len(results.names()) and merged.names() == results.names()
    np.testing.assert_array_equal(
        merged.arrays(Job(RUN, "full", "tiny", 0.1, 0))["errors"],
        results.arrays(Job(RUN, "full", "tiny", 0.1, 0))["errors"],
    )
    assert merged.merge([tmp_path / "out" / "study.zip"]) == 0
    again = study_command(base, *asked, "--seconds", "60")
    assert "left: none" in again.stdout and again.returncode == 0
    refused = study_command(base, "run", "--kinds", "run", "--rows", "control")
    assert refused.returncode == 2 and "has no tuned rate" in refused.stderr


def test_no_job_starts_that_cannot_end(base, tmp_path):
    study = replace(read_study(base / "study.toml"), root=tmp_path, overhead_seconds=50, pretraining_seconds=100)
    jobs = listed(study, Choice(kinds=("run",), rows=("full",), seeds=(0,)))
    assert [job.fraction for job in jobs] == [0.1, 0.3]
    (tmp_path / "claims").mkdir()
    done = []

    def run(job, rate):
        done.append(job.fraction)
        Results(study.results).put(job, {"training_seconds": 10.0, "wall_seconds": 12.0}, {})
        return 0.0

    # 60 s are needed for the first, 80 for the second: until the first is done, and jobs are known to take 2 s more.
    work(study, jobs, Claims(tmp_path / "claims"), time.time() + 55, run, untuned=True)
    assert done == []
    work(study, jobs, Claims(tmp_path / "claims"), time.time() + 70, run, untuned=True)
    assert done == [0.1, 0.3]


def test_a_start_counts_in_full_for_a_process_that_is_new_to_a_row(base, tmp_path):
    study = replace(read_study(base / "study.toml"), root=tmp_path, pretraining_seconds=100)
    results = Results(study.results)
    times = {"training_seconds": 5.0, "start_seconds": 60.0, "wall_seconds": 67.0}
    results.put(Job(TUNE, "full", "tiny", 0.05, rate=1e-4), times, {})
    results.put(
        Job(RUN, "full", "tiny", 0.1), {"training_seconds": 10.0, "start_seconds": 2.0, "wall_seconds": 16.0}, {}
    )
    seconds, job = expected(study, results), Job(RUN, "full", "tiny", 0.1, 1)
    assert seconds(job, True) == pytest.approx(10 + 1.25 * (2 + 4))
    assert seconds(job, False) == pytest.approx(10 + 1.25 * (60 + 4))
    assert seconds(Job(RUN, "control", "dense", 0.3), True) == pytest.approx(30 + 1.25 * (60 + 4))


def test_what_fits_is_said_beforehand(base, tmp_path, capsys, monkeypatch):
    study = replace(read_study(base / "study.toml"), root=tmp_path, overhead_seconds=10, pretraining_seconds=100)
    jobs = listed(study, Choice(rows=("full", "control"), kinds=("tune", "run"), fractions=(0.1,)))
    results, now = Results(study.results), [1000.0]
    # 4 tries of 15 s, then 4 runs of 20: two cards have done the tries after 30 s, and each has time for one run more.
    found = foreseen(study, jobs, results, 2, 69, False)
    assert [job.kind for job in found] == ["tune"] * 4 + ["run"] * 2
    assert foreseen(study, jobs, results, 1, 14, False) == [] and len(foreseen(study, jobs, results, 9, 60, False)) == 8
    # One process, whose jobs take as long as is expected, does what was foreseen for it.
    foretold = [job.name for job in foreseen(study, jobs, results, 1, 85, False)]
    done = []

    def run(job, rate):
        now[0] += expected(study, results)(job, False)
        done.append(job.name)
        entry = {"training_seconds": study.seconds(job.fraction), "wall_seconds": study.seconds(job.fraction) + 8}
        results.put(job, {**entry, "astray": False, "mean": 1.0}, {})
        return 1.0

    monkeypatch.setattr(time, "time", lambda: now[0])
    (tmp_path / "claims").mkdir()
    work(study, jobs, Claims(tmp_path / "claims"), 1085, run)
    assert len(foretold) == 5 and sorted(done) == sorted(foretold)


def test_weights_that_are_sampled_are_brought_and_missing_ones_are_no_failure(base, tmp_path):
    study = replace(read_study(base / "study.toml"), root=tmp_path)
    results = Results(study.results)
    job = Job("adherence", "full", "tiny", 0.3, steps=2)
    results.put(job.trained, {"astray": False, "mean": 1.0, "made": fingerprint(study, job.trained)}, {})
    assert not ready(study, results, job, False)
    out = tmp_path / "out"
    out.mkdir()
    (out / kept(study, job.trained)[0].name).write_bytes(b"weights")
    command._results(argparse.Namespace(merge=[out]), study)
    assert ready(study, results, job, False)


def test_rows_that_the_sampler_does_not_run_are_not_sampled(base, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(FILE)
    kinds = {job.kind for job in listed(study, Choice(rows=("local", "strided"), kinds=("run", "adherence")))}
    assert kinds == {"run"}
    # Others are on demand: by default only what is listed in [adherence].
    assert {job.kind for job in listed(study, Choice(rows=("lora-4",)))} == {"tune", "run"}
    assert "adherence" in {job.kind for job in listed(study, Choice(rows=("lora-4",), kinds=("adherence",)))}


def test_rows_that_decide_a_claim_have_all_seeds_where_it_is_decided(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(FILE)
    jobs = listed(study, Choice(kinds=("run",)))
    for row in ("full", "control", "lora-11", "lora-11-after-low", "local", "strided"):
        assert {job.seed for job in jobs if (job.row, job.fraction) == (row, study.first[0])} == {0, 1, 2}


def test_failures_are_told_and_end_a_worker_that_only_fails(base, tmp_path, capsys):
    study = replace(read_study(base / "study.toml"), root=tmp_path)
    jobs = listed(study, Choice(kinds=("run",), rows=("full", "control")))
    (tmp_path / "claims").mkdir()

    def run(job, rate):
        raise T3Error("no")

    work(study, jobs, Claims(tmp_path / "claims"), time.time() + 1000, run, untuned=True)
    out = capsys.readouterr().out
    assert out.count("failed: no") == 2 and "2 failures one after the other" in out
    assert not study.results.exists()


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A study that starts with nothing but text encoder, VAE and dense transformer, all of random weights."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "text" / "tokenizer")
    make_encoder(tokenizer).save_pretrained(folder / "text" / "text_encoder")
    AutoencoderKLWan(base_dim=4, z_dim=16).save_pretrained(folder / "folded" / "vae")
    transformer = make_transformer(num_layers=1)
    write_full(folder / "dense.safetensors", transformer.state_dict(), dict(transformer.config), None, GRID, "float32")
    text = (base / "recipe.toml").read_text().replace(str(base), str(folder)).replace("text_tokens = 6", "")
    (folder / "recipe.toml").write_text(text)
    (folder / "study.toml").write_text(TINY.format(base=folder) + ROWS)
    return folder


def test_data_comes_in_parts_that_are_joined(whole, monkeypatch):
    monkeypatch.setitem(encode.SIZES, "low", (48, 64))
    study = read_study(whole / "study.toml")
    for made in (study.shards, whole / "claims"):  # by the test below, where that ran first
        shutil.rmtree(made, ignore_errors=True)
    data.prepare(study)
    assert (whole / "model" / "model_index.json").exists()
    assert data.parts(study) == [("high", 0), ("high", 1)]
    folder = data.part_folder(study, "high", 0).parent
    folder.mkdir(parents=True)
    (whole / "claims").mkdir()
    claims = Claims(whole / "claims")
    claims.take("high-0")
    data.encode_parts(study, claims, time.time() + 100, "cpu")
    assert data.parts(study) == [("high", 0)] and data.join(study) == ["high"]
    (whole / "claims" / "high-0").unlink()
    data.encode_parts(study, claims, time.time() + 100, "cpu")
    assert data.join(study) == [] and data.parts(study) == []
    clips = list(read_shards(study.shards / "high"))
    assert sorted(clip.facts.source for clip in clips) == [f"train/{i}" for i in range(5)]
    assert clips[0].facts.caption == caption(scenes("train", int(clips[0].facts.source[6:]), 1)[0], 5)
    assert not list(folder.iterdir())


def test_adherence_of_dense_and_of_windows_with_the_same_noise(whole, monkeypatch):
    monkeypatch.setitem(encode.SIZES, "low", (112, 160))
    study = read_study(whole / "study.toml")
    data.prepare(study)
    results = Results(study.results)
    jobs = listed(study, Choice(kinds=("adherence",)))
    assert [(job.row, job.steps) for job in jobs] == [("dense", 2), ("untuned", 2)]
    for job in jobs:
        sample(study, job, results, whole / "model", "cpu")
        found, arrays = results.get(job), results.arrays(job)
        assert arrays["all"].shape == (2,) and found["all"] == 100 * arrays["all"].mean()
        assert found["sampling_seconds"] > 0 and set(arrays["count"]) <= {-1, 0, 1}
    shutil.rmtree(study.weights, ignore_errors=True)  # of the test below, where that ran first
    with pytest.raises(T3Error, match=r"full\.tiny\.f300\.s0\.safetensors is not here"):
        weights(study, Job("adherence", "full", "tiny", 0.3, steps=2))


def test_tuned_weights_are_sampled_with_their_plan(whole, monkeypatch):
    study = read_study(whole / "study.toml")
    if not (study.shards / "high").exists():
        test_data_comes_in_parts_that_are_joined(whole, monkeypatch)
    for name in ("low", "high-test", "high-tune"):
        shutil.copytree(study.shards / "high", study.shards / name, dirs_exist_ok=True)
    monkeypatch.setitem(encode.SIZES, "low", (112, 160))
    results, trainer = Results(study.results), Trainer(study, whole / "work")
    for row in ("full", "lora-4", "two"):
        trainer.run(Job(RUN, row, "tiny", 0.3), 1e-3, True, results)
        job = Job("adherence", row, "tiny", 0.3, steps=1)
        assert weights(study, job)["plan"] == "auto"
        sample(study, job, results, whole / "model", "cpu")
        assert results.get(job)["wall_seconds"] > 0


def test_closure_of_numbers_made_by_hand():
    # Two clips, two points each; the second point of each is at high noise.
    sigma = np.array([[0.1, 0.9], [0.2, 0.8]])
    control = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    untuned = control + np.array([[1.0, 0.5], [1.0, 0.5]])
    row = control + np.array([[0.1, 0.25], [0.1, 0.25]])
    curve = statistics.Curve(row, control, untuned, sigma)
    assert curve.closure("low").value == pytest.approx(0.9) and curve.closure("high").value == pytest.approx(0.5)
    assert curve.closure().value == pytest.approx(1 - 0.175 / 0.75)
    assert curve.excess("low").value == pytest.approx(0.1)
    # Every clip has the same difference: whichever are drawn, the excess is the same.
    low = curve.excess("low")
    assert low.low == pytest.approx(0.1) == pytest.approx(low.high)


def test_intervals_cover_what_is_true_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside, truth, hits = np.ones((60, 2), dtype=bool), 0.5, 0
    for _ in range(100):
        clips = rng.normal(size=(1, 60, 1)) + np.zeros((1, 60, 2))
        errors = 5 + clips + truth + 0.3 * rng.normal(size=(1, 60, 2))
        found = statistics.Estimate.of(
            statistics.Draws.make(60, 1, 400).mean(errors, inside)
            - statistics.Draws.make(60, 1, 400).mean(5 + clips, inside)
        )
        assert found.high - found.low < 0.15  # paired: unpaired it would be 0.7
        hits += found.low <= truth <= found.high
    assert 87 <= hits <= 99  # 95 %, three standard errors and what percentiles lack


def test_seeds_are_drawn_too():
    sigma = np.full((40, 1), 0.5)
    control, untuned = np.ones((3, 40, 1)), np.full((1, 40, 1), 2.0)
    same = statistics.Curve(np.full((3, 40, 1), 1.1), control, untuned, sigma)
    apart = statistics.Curve(np.array([1.0, 1.1, 1.2]).reshape(3, 1, 1) + np.zeros((3, 40, 1)), control, untuned, sigma)
    assert same.closure().high - same.closure().low < 1e-9
    assert apart.closure().value == pytest.approx(0.9)
    # Three seeds with a standard deviation of 0.1: Student's interval is +-0.248.
    assert 0.2 < apart.closure().value - apart.closure().low < 0.3 and apart.closure().seeds == 3
    difference = statistics.closure_difference(same, apart)
    assert difference.value == pytest.approx(0, abs=1e-9) and -0.3 < difference.low < -0.2


def test_three_seeds_cover_what_is_true_where_seeds_differ_most():
    rng = np.random.default_rng(0)
    sigma, hits = np.full((40, 2), 0.5), 0
    for _ in range(150):
        clips = 0.2 + 0.1 * rng.random((1, 40, 1))
        control, row = (
            clips + added + 0.003 * rng.normal(size=(3, 1, 1)) + 0.005 * rng.normal(size=(3, 40, 2))
            for added in (0.0, 0.005)
        )
        found = statistics.Curve(row, control, clips + np.full((1, 40, 2), 0.1), sigma).closure()
        hits += found.low <= 0.95 <= found.high
    assert 138 <= hits <= 150  # of a plain bootstrap's intervals: 125


def test_nothing_is_closed_where_there_is_no_gap():
    rng = np.random.default_rng(0)
    sigma = np.array([[0.1, 0.9]] * 30)
    control = np.ones((3, 30, 2))
    untuned = control[:1] + np.array([0.1, 0.0]) + 0.001 * rng.normal(size=(1, 30, 2))
    curve = statistics.Curve(control + 0.01, control, untuned, sigma)
    assert curve.closure("low").value == pytest.approx(0.9, abs=0.01)
    assert curve.closure("high") is None and curve.excess("high").value == pytest.approx(0.01)
    assert statistics.closure_difference(curve, curve, "high") is None
    assert verdicts.closed(curve, "high") == "no gap; excess +10.00 [+10.00, +10.00] thousandths"
    # Equal to the last bit: no division by zero either.
    assert statistics.Curve(control, control, control[:1], sigma).closure() is None


def test_shares_are_compared_in_pairs():
    one = np.array([[True] * 90 + [False] * 10] * 3)
    assert statistics.share_difference(one, one).lower == 0
    other = one.copy()
    other[:, :4] = False
    found = statistics.share_difference(other, one)
    assert found.value == pytest.approx(-4)
    # 4 of 100 prompts: a standard error of 1.96 points.
    assert -8.5 < found.lower < -6 and found.low < found.lower


def test_interpolation_stays_between_what_is_known():
    points = [(100.0, 1.0), (10.0, 3.0)]
    assert statistics.interpolated(points, 10**1.5) == pytest.approx(2.0)
    assert statistics.interpolated(points, 9) is None and statistics.interpolated(points[:1], 100) is None


def made_up(study, results, rng, closures, *, share=1.0):
    """Results of the real study whose closures are known: dense errors by clip, and what each row adds to them."""
    sigma = np.tile((np.arange(16) + 0.5) / 16, (64, 1))
    clips = 0.2 + 0.1 * rng.random((64, 1)) + 0.1 * sigma
    base = {"astray": False, "noise": "made-up", "tuned": True, "device": "paper", "wall_seconds": 9.0}

    def errors(excess):
        return {"errors": clips + 0.2 * excess + 0.001 * rng.normal(size=sigma.shape)}

    for job in listed(study):
        row = study.row(job.row)
        excess = 0.0 if row.plan == "dense" else 1.0
        found = {**base, "made": fingerprint(study, job), "training_seconds": study.seconds(job.fraction), "mean": 0.0}
        if rng.random() > share:
            continue
        if job.kind == "adherence":
            right = {"untuned": 0.5, "untuned-clip": 0.2}.get(job.row, 0.95)
            words = {word: np.arange(512) < right * 512 for word in ("all", "agreement")}
            pace = (0.5 if row.plan == "dense" else 0.2) * job.steps / 25
            results.put(job, {**found, "all": 100 * right, "agreement": 100 * right, "sampling_seconds": pace}, words)
            continue
        if job.kind in (RUN, TUNE) and row.plan != "dense":
            excess = 1 - closures.get(job.row, 0.9)
        arrays = errors(excess)
        if job.kind == TUNE:
            arrays["errors"] = arrays["errors"] + abs(np.log10(job.rate / row.rates[1]))
        found |= {
            "mean": float(arrays["errors"].mean()),
            "clips": 8 * job.fraction * 1e4 * (1 if row.plan == "dense" else 2),
        }
        results.put(job, found, arrays, sigma)


def without_job(found):
    return {key: value for key, value in found.items() if key != "job"}


def test_a_report_decides_by_its_rules(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = replace(read_study(FILE), root=tmp_path)
    closures = {
        "full": 0.97, "lora-11": 0.8, "lora-4": 0.7, "lora-32": 0.92, "lora-11-after-low": 0.96, "local": 0.9,
        "strided": 0.98, "lora-11-velocity": 0.91,
    }  # fmt: skip
    results = Results(study.results)
    made_up(study, results, np.random.default_rng(0), closures)
    evidence = Evidence(study, results)
    assert evidence.closure("full", 0.1).value == pytest.approx(0.97, abs=0.002)
    assert evidence.ahead("full", "lora-11", 0.3).value == pytest.approx(0.17, abs=0.002)
    assert evidence.at_equal_samples("full", 0.05)[1] is not None and evidence.at_equal_samples("full", 0.3)[1] is None
    assert [verdict.verdict for verdict in verdicts.claims(evidence)] == [
        "reproduced", "reproduced", "reproduced", "reproduced", "not reproduced", "reproduced", "not testable",
    ]  # fmt: skip
    decided = {verdict.what: verdict.verdict for verdict in verdicts.bars(evidence)}
    assert decided["full fine-tune at 10 %"] == decided["full fine-tune at 30 %"] == "passes"
    # The LoRA after full tuning does not start from dense, and a plain one of a higher rank is no recipe.
    assert decided["best LoRA straight from dense (lora-32) at 10 %"] == "fails"
    assert decided["best recipe for a LoRA against plain at 10 %"] == "undecided: 1 of 3 seeds"
    for seed in (1, 2):
        for job in listed(study, Choice(("run",), ("lora-11-velocity",), (0.1,), (seed,))):
            first = replace(job, seed=0)
            results.put(job, without_job(results.get(first)), results.arrays(first), results.sigma(first))
    assert verdicts.bars(Evidence(study, results))[5].verdict == "passes"
    assert "is small-frame" in verdicts.mildest(evidence)
    gates = {gate.what: gate.verdict for gate in verdicts.gates(evidence)}
    assert gates["un-tuned, small-frame (the study)"] == "passes" == gates["detector on real clips"]
    docs = tmp_path / "docs.md"
    docs.write_text(f"before\n{report.BEGIN}\nformer tables\n{report.END}\nafter\n")
    text = report.write(study, Results(study.results), tmp_path / "out")
    report.put(docs, text)
    assert docs.read_text().startswith("before\n") and docs.read_text().endswith("\nafter\n")
    assert "former tables" not in docs.read_text() and "| full fine-tune | " in docs.read_text()
    assert "dense at 8 steps (0.160 s) 95.0 %" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "study.md", "study.json", "study-budget.png", "study-bands.png",
    }  # fmt: skip
    with pytest.raises(T3Error, match="no place for the tables"):
        report.put(tmp_path / "out" / "study.md", text)


def test_one_seed_decides_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = replace(read_study(FILE), root=tmp_path)
    results = Results(study.results)
    made_up(study, results, np.random.default_rng(0), {"full": 0.97, "lora-11": 0.5})
    for job, _ in results.all():
        if job.seed or job.noise:
            (study.results / f"{job.name}.json").unlink()
    evidence = Evidence(study, Results(study.results))
    found = [verdict.verdict for verdict in (*verdicts.bars(evidence), *verdicts.claims(evidence))]
    assert set(found) == {"undecided: 1 of 3 seeds", "undecided: 1 of 3 seeds of noise", "not testable"}
    assert "is open" in verdicts.mildest(evidence)


def test_equal_samples_are_compared_by_equal_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = replace(read_study(FILE), root=tmp_path)
    results = Results(study.results)
    made_up(study, results, np.random.default_rng(0), {})
    before = Evidence(study, results).at_equal_samples("full", 0.1)[1]
    for fraction in study.fractions:
        job = Job(RUN, "control", "dense", fraction, 2)
        results.put(job, {**without_job(results.get(job)), "mean": 9.0}, results.arrays(job), results.sigma(job))
        (study.results / f"{replace(job, row='full', plan='small-frame').name}.json").unlink()
    assert Evidence(study, Results(study.results)).at_equal_samples("full", 0.1)[1] == pytest.approx(before, abs=0.001)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_report_of_what_there_is(tmp_path, monkeypatch, share):
    monkeypatch.chdir(ROOT)
    study = replace(read_study(FILE), root=tmp_path)
    made_up(study, Results(study.results), np.random.default_rng(1), {}, share=share)
    text = report.write(study, Results(study.results), tmp_path / "out")
    assert "not run" in text and (share > 0 or "**reproduced**" not in text)


def test_workers_are_ended_when_the_time_is_over(tmp_path):
    started = time.time()
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    quick = "import os, sys; sys.stderr.write(os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(3)"
    calls = []
    commands = [["-c", stubborn], ["-c", quick]]
    assert pool.run_all(commands, tmp_path, started + 2, tmp_path / "cache", lambda: calls.append(1)) == [3]
    assert time.time() - started < 15 and len(calls) > 1
    assert (tmp_path / "worker-1.log").read_text() == visible_cards(2)[1]


def test_workers_end_with_the_process_that_started_them(tmp_path):
    worker = (
        "import time; from tools.small_model.study.pool import end_with_parent\n"
        f"end_with_parent(); open({str(tmp_path / 'up')!r}, 'w').write('x'); time.sleep(600)"
    )
    parent = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {worker!r}]); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "up").exists():
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=150)  # the pipe is the child's too: it ends when both have


def test_a_job_that_is_cut_off_leaves_nothing(base, monkeypatch):
    study = replace(read_study(base / "study.toml"), root=base)
    monkeypatch.setattr(training.StudyLoop, "run", lambda self: 130)
    results, job = Results(base / "cut"), Job(RUN, "full", "tiny", 0.3, seed=7)
    with pytest.raises(SystemExit):
        Trainer(study, base / "work").run(job, 1e-3, True, results)
    assert not results.has(job) and not (base / "cut").exists() and not list((base / "work").iterdir())
