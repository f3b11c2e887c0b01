"""Configs: every typo is named with the nearest legal word, before anything is loaded; recipes; the estimate."""

import dataclasses
import subprocess
import sys

import pytest
from retrofit_fixtures import config_text, write_clips, write_config, write_model

from t3.errors import T3Error
from t3.retrofit.command import main
from t3.retrofit.config import parse_config
from t3.retrofit.recipes_command import recipes, summary

GOOD = """
[output]
folder = "runs/x"
[[data.sets]]
name = "low"
folder = "data/low"
[train]
batch = 2
[schedule]
steps = 3
lr = 2e-4
[[stages]]
name = "one"
mix = { low = 1 }
[[stages]]
name = "two"
lr = 1
"""


def test_stages_restate_the_schedule():
    config = parse_config(GOOD)
    assert [(stage.name, stage.steps, stage.lr) for stage in config.stages] == [("one", 3, 2e-4), ("two", 3, 1.0)]
    assert config.stages[0].mix == {"low": 1.0}
    assert config.train.batch == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[train]", "[trian]", "has no key 'trian'. Did you mean 'train'"),
        ("batch = 2", "bacth = 2", "[train] has no key 'bacth'. Did you mean 'batch'"),
        ("batch = 2", "batch = 0", "batch is 0; it must be at least 1. Nearest: 1"),
        ("batch = 2", "batch = 1.5", "batch is 1.5; expected a whole number"),
        ("batch = 2", "batch = true", "batch is True; expected a whole number"),
        ("batch = 2", "beta1 = 2", "beta1 is 2.0; it can be at most 0.99999"),
        ("batch = 2", 'precision = "bf61"', "'bf61'; it must be one of 'bf16', 'fp32'. Did you mean 'bf16'"),
        ("lr = 1\n", "learning_rate = 1\n", "[[stages]] 2 has no key 'learning_rate'"),
        ("lr = 2e-4", "warmpu = 0.1", "[schedule] has no key 'warmpu'. Did you mean 'warmup'"),
        ("{ low = 1 }", "{ lo = 1 }", "mix has no key 'lo'. Did you mean 'low'"),
        ("{ low = 1 }", "{ low = 0 }", "add up to nothing"),
        ("steps = 3", "", "has no end: give it steps, max_seconds or training_seconds"),
        ("lr = 1\n", "flow = 0\n", "nothing to learn from"),
        ("lr = 1\n", "sigma_min = 1\n", "sigma_min 1.0 is not below sigma_max 1.0"),
        ('folder = "data/low"', "", "lacks the key 'folder'"),
        ("[train]", "[data]\nconditions = { frst = 1 }\n[train]", "conditions has no key 'frst'. Did you mean 'first'"),
        ("[train]", "[data]\nconditions = { first = 0 }\n[train]", "the shares add up to nothing"),
        ("[train]", "[trainable]\nalso = ['norms']\n[train]", 'also is for what = "lora"'),
        ("[train]", "[trainable]\nwhat = 'lora'\nfrozen = ['blocks.0']\n[train]", 'frozen is for what = "everything"'),
        ("[train]", "[trainable]\ntargets = ['self_attention']\n[train]", "Did you mean 'self-attention'"),
        ("batch = 2", "compile = true\n[validation]\ndraws = 20", "draws is 20, more than levels. Nearest: 16"),
        ("[train]", "[train", "it is no TOML"),
        ("lr = 2e-4", "lr = nan", "[schedule] lr is nan; expected a finite number"),
        ("lr = 2e-4", "shift = inf", "[schedule] shift is inf; expected a finite number"),
        ("{ low = 1 }", "{ low = inf }", "mix.low is inf; expected a finite number"),
        ("lr = 2e-4", f"lr = 1{'0' * 400}", "[schedule] lr is inf; expected a finite number"),
        ("batch = 2", f"seed = {2**64}", f"seed is {2**64}; it can be at most {2**63}"),
        ('"runs/x"', '" "', "[output] folder is empty"),
        ('[output]\nfolder = "runs/x"', "", "lacks [output]"),
        ('[[data.sets]]\nname = "low"\nfolder = "data/low"', "", "names no data"),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(old, new, said):
    assert old in GOOD
    with pytest.raises(T3Error) as caught:
        parse_config(GOOD.replace(old, new, 1))
    assert said in str(caught.value)


def test_keys_are_changed_for_one_run():
    config = parse_config(GOOD, ["train.seed=3", "stages.2.lr = 5e-4", "validation.every=7", "schedule.warmup=0.5"])
    assert (config.train.seed, config.validation.every) == (3, 7)
    assert [(stage.lr, stage.warmup) for stage in config.stages] == [(2e-4, 0.5), (5e-4, 0.5)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.sed=3", "Did you mean 'seed'"),
        ("seed=3", "write TABLE.KEY=VALUE"),
        ("train.seed", "write TABLE.KEY=VALUE"),
        ("stages.3.lr=1", "there is no stage '3'; they are 1 to 2"),
        ("stages.lr=1", "stages are counted from 1"),
        ("output.folder=runs/b", "is no TOML"),
    ],
)
def test_a_change_that_is_none_is_refused(change, said):
    with pytest.raises(T3Error) as caught:
        parse_config(GOOD, [change])
    assert said in str(caught.value)


def test_two_sets_of_one_name_are_refused():
    twice = GOOD + '[[data.sets]]\nname = "low"\nfolder = "elsewhere"\n'
    with pytest.raises(T3Error, match="two of \\[\\[data.sets\\]\\] are called 'low'"):
        parse_config(twice)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipes_are_valid_and_say_that_nobody_ran_them(name):
    text = recipes()[name]
    config = parse_config(text)
    assert summary(text).endswith(".")
    assert "nobody has run this" in config.note or config.model.source == "models/small"


def test_recipes_are_listed_and_copied(tmp_path, capsys):
    assert main(["recipes"]) == 0
    assert "lora-from-stock" in capsys.readouterr().out
    assert main(["recipes", "--write", "lora-from-stock", str(tmp_path / "mine.toml")]) == 0
    assert (tmp_path / "mine.toml").read_text() == recipes()["lora-from-stock"]
    assert main(["recipes", "--write", "lora-from-stock", str(tmp_path / "mine.toml")]) == 2
    assert main(["recipes", "--write", "lora-fom-stock", str(tmp_path / "other.toml")]) == 2
    assert "Nearest: lora-from-stock" in capsys.readouterr().err


def test_checking_a_config_loads_no_torch(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text(GOOD.replace("batch", "bacth"))
    code = f"""
import sys
from t3.retrofit.command import main
assert main([{str(bad)!r}]) == 2
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_dry_run_estimates_and_leaves_nothing(tmp_path, capsys):
    write_model(tmp_path / "model")
    write_clips(tmp_path / "clips")
    lora = {"what": "lora", "rank": 2, "also": ["norms"]}
    path = write_config(tmp_path, trainable=lora, schedule={"steps": 10, "velocity": 1.0}, train={"batch": 3})
    assert main([path, "--dry-run"]) == 0
    said = capsys.readouterr().out
    # Ten linear layers a block, of which all but the FFN's are 128 wide; four norms of 128.
    blocks = 2 * (2 * 4 * 2 * (128 + 128) + 2 * 2 * (128 + 32) + 4 * 128)
    assert f"of which {blocks:,} are trained" in said
    assert "3 clips of 2 x 3 x 4 tokens" in said
    assert "an assumption, not a measurement" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("samples.height=60", "height is 60; this model needs a multiple of 16 pixels. Nearest: 64"),
        ("samples.frames=6", "Nearest: 5"),
        ("samples.fps=5000", "5000.0 is outside 0.01 to 1000 frames per second"),
        ("output.folder='FILE'", "is a file. Name another folder"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_would_fail_later_is_told_at_once(tmp_path, capsys, change, said, dry):
    write_model(tmp_path / "model")
    write_clips(tmp_path / "clips")
    config = write_config(tmp_path, samples={"prompts": ["a dot"], "height": 64, "width": 96, "frames": 5})
    change = change.replace("FILE", config)
    assert main([config, "--set", change, *(["--dry-run"] if dry else [])]) == 2
    assert said in capsys.readouterr().err


def test_an_output_folder_that_takes_no_file_is_told_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    from t3.retrofit import session

    write_model(tmp_path / "model")
    write_clips(tmp_path / "clips")
    config = write_config(tmp_path)
    monkeypatch.setattr(session, "start", lambda *_: pytest.fail("the model was loaded"))
    assert main([config, "--set", f"output.folder='{config}/run'"]) == 2
    assert "cannot be" in capsys.readouterr().err


def test_the_estimate_of_a_stage_counts_the_clips_that_it_draws(tmp_path, capsys):
    """A stage of small clips with a dense teacher, beside large ones for a stage without."""
    write_model(tmp_path / "model")
    write_clips(tmp_path / "small")
    write_clips(tmp_path / "large", shape=(16, 2, 24, 32))
    stages = [
        {"name": "teach", "steps": 2, "attention": 1.0, "flow": 0.0, "mix": {"small": 1.0}},
        {"name": "tune", "steps": 2, "mix": {"large": 1.0}},
    ]
    assert main([write_config(tmp_path, sets=("small", "large"), stages=stages), "--dry-run"]) == 0
    both = capsys.readouterr().out
    assert main([write_config(tmp_path, sets=("small",), stages=stages[:1]), "--dry-run"]) == 0
    alone = capsys.readouterr().out

    def work(said, name):
        return next(line for line in said.splitlines() if f"stage {name}" in line)

    assert work(both, "teach") == work(alone, "teach")
    # By their places, not by their names, which may be alike.
    unnamed = [{key: value for key, value in stage.items() if key != "name"} for stage in stages]
    assert main([write_config(tmp_path, sets=("small", "large"), stages=unnamed), "--dry-run"]) == 0
    assert work(capsys.readouterr().out, "training") == work(both, "teach").replace("teach", "training")
    memory = next(line for line in both.splitlines() if line.startswith("memory"))
    assert "2 x 12 x 16 tokens" in memory and "layer inputs" not in memory


def test_the_estimate_counts_what_a_run_holds(tmp_path):
    from t3.cost import ModelShape
    from t3.plan import Grid
    from t3.retrofit.conditioning import Conditioning
    from t3.retrofit.estimate import memory

    shape, two_clips = ModelShape(layers=3, dim=8, ffn_dim=16, heads=2), (2, Grid(1, 2, 2))

    def parts(**tables):
        config = parse_config(config_text(tmp_path, **tables))
        return memory(config, config.stages[0], shape, 1000, 100, two_clips)

    full = parts(train={"precision": "bf16"})
    assert (full["weights"], full["gradients"], full["optimiser"], full["average"]) == (4000, 400, 800, 400)
    lora = parts(train={"precision": "bf16", "ema": 0.0, "optimizer": "adamw-8bit"}, trainable={"what": "lora"})
    assert (lora["weights"], lora["optimiser"], lora["average"]) == (2 * 900 + 400, 200, 0)
    assert parts(train={"optimizer": "muon"})["optimiser"] == 400
    saved = parts(train={"gradient_checkpointing": True})
    assert saved["activations"] < parts()["activations"]
    assert "the dense teacher" in parts(schedule={"velocity": 1.0})
    # Two VACE blocks beside three: each holds what a block holds, and adds to a layer.
    control = dataclasses.replace(shape, control_layers=(0, 2))
    config = parse_config(config_text(tmp_path))
    of_vace = memory(config, config.stages[0], control, 1000, 100, two_clips)
    assert of_vace["activations"] == 5 / 3 * parts()["activations"]
    per_token = Conditioning("ti2v", (("none", 0.5), ("first", 0.5)), 48)
    # 2 clips of 4 tokens, 8 wide: six modulations in float32, once and in each of three blocks.
    found = memory(config, config.stages[0], shape, 1000, 100, two_clips, per_token)
    assert found["timesteps of each token"] == 2 * 4 * 8 * 6 * 4 * (1 + 3)
