"""Models that are given more than text: their inputs and losses by hand in float64, whole runs, what data may lack."""

import csv

import pytest
import torch
from accelerate.state import AcceleratorState
from retrofit_fixtures import PLAN, SHAPE, make_transformer, write_clips, write_config, write_model
from safetensors.torch import load_file, save_file
from test_retrofit_objectives import GRID, ROWS, Masked, layer_masks, mse

from t3 import Plan
from t3.errors import T3Error
from t3.processor import self_attentions
from t3.retrofit.batches import Feeder
from t3.retrofit.command import main
from t3.retrofit.conditioning import TEXT_BESIDE_IMAGE, Conditioning
from t3.retrofit.config import Data, DataSet, Model, Stage, Trainable, Validation, parse_config
from t3.retrofit.data import Layout, open_clips
from t3.retrofit.loop import Loop
from t3.retrofit.model import at_its_noise, find, load
from t3.retrofit.objectives import LOSSES, Batch, Objective
from t3.retrofit.operator import Operator, install
from t3.retrofit.teacher import Teacher
from t3.retrofit.trainable import make_trainable, trained
from t3.retrofit.validation import points
from t3.sources import find_sources
from t3.weights import apply_weights, open_weights

# What the data of each kind hold beside latents and text, and the shares that are trained with.
GIVEN = {
    "i2v": (("first", "image"), {}),
    "flf2v": (("ends", "image", "last_image"), {}),
    "a14b-i2v": (("first", "ends"), {"first": 3.0, "ends": 1.0}),
    "ti2v": ((), {"none": 1.0, "first": 1.0}),
    "vace": (("first", "ends"), {"none": 2.0, "first": 1.0, "ends": 1.0}),
}


def shape_of(kind):
    return (48, *SHAPE[1:]) if kind == "ti2v" else SHAPE


def clips_of(kind, text):
    """Two clips' tensors and a grey one's latents, in float64."""
    torch.manual_seed(1)
    shape = shape_of(kind)
    clips = {name: torch.randn(2, *shape).double() for name in ("latents", "first", "ends", "noise")}
    clips.update({name: torch.randn(2, 5, 8).double() for name in ("image", "last_image")})
    return {**clips, "text": torch.randn(2, text, 8).double()}, torch.randn(shape).double()


def by_hand(kind, clips, grey, sigma, chosen):
    """The transformer's arguments, each clip's written out; and the latent frames that are to be made."""
    hidden, control, images, steps, made = [], [], [], [], []
    for i, condition in enumerate(chosen):
        x = (1 - sigma[i]) * clips["latents"][i] + sigma[i] * clips["noise"][i]
        t, h, w = x.shape[1:]
        step, to_make = torch.full((t, h // 2, w // 2), float(1000 * sigma[i]), dtype=torch.float64), slice(0, t)
        if kind == "ti2v" and condition == "first":
            x = torch.cat([clips["latents"][i][:, :1], x[:, 1:]], dim=1)
            step[0], to_make = 0, slice(1, t)
        elif kind == "vace":
            kept = grey if condition == "none" else clips[condition][i]
            control.append(torch.cat([kept, grey, torch.ones(64, t, h, w, dtype=torch.float64)]))
        elif kind != "ti2v":
            mask = torch.zeros(4, t, h, w, dtype=torch.float64)
            mask[:, 0] = 1  # the first frame counts four times, the last one is the last of its four
            if condition == "ends":
                mask[3, t - 1] = 1
            x = torch.cat([x, mask, clips[condition][i]])
        hidden.append(x)
        steps.append(step.flatten())
        made.append(to_make)
        images += [clips[name][i] for name in ("image", "last_image")[: {"i2v": 1, "flf2v": 2}.get(kind, 0)]]
    arguments = {
        "hidden_states": torch.stack(hidden),
        "timestep": torch.stack(steps) if kind == "ti2v" else 1000 * sigma,
        "encoder_hidden_states": clips["text"],
    }
    if control:
        arguments["control_hidden_states"] = torch.stack(control)
    if images:
        arguments["encoder_hidden_states_image"] = torch.stack(images)
    return arguments, made


def reference(kind, dense=False):
    """The kind's model with self-attention by definition; what each layer got and gave."""
    transformer, plan, seen = make_transformer(kind).double().train(), Plan.from_json(PLAN), {}
    for number, (attention, layer) in enumerate(self_attentions(transformer)):
        whole = [torch.ones(24, 24, dtype=torch.bool)]
        attention.set_processor(Masked(whole if dense else layer_masks(plan.partition(layer, GRID))))
        attention.register_forward_hook(
            lambda module, given, out, number=number: seen.update({number: (given[0], given[3], out)})
        )
    return transformer, seen


def objective(kind, stage):
    transformer, operator = make_transformer(kind).double().train(), Operator(Plan.from_json(PLAN))
    make_trainable(transformer, Trainable(what="lora", rank=2, also=("norms", "biases", "modulation")), torch.float64)
    transformer.double()
    install(transformer, operator)
    teacher = Teacher(transformer, operator, shared=True, dtype=torch.float64)
    for parameter in trained(transformer).values():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return Objective(transformer, operator, teacher, torch.float64)


def with_adapters(kind, ours):
    """The reference model with what `ours` has learnt."""
    transformer, seen = reference(kind)
    weights = dict(ours.transformer.named_parameters())
    for name, parameter in transformer.named_parameters():
        stem, _, leaf = name.rpartition(".")
        base = weights.get(name, weights.get(f"{stem}.base_layer.{leaf}")).detach()
        if leaf == "weight" and f"{stem}.lora_A.default.weight" in weights:
            base = base + (weights[f"{stem}.lora_B.default.weight"] @ weights[f"{stem}.lora_A.default.weight"]).detach()
        parameter.data = base.clone()
    return transformer, seen


@pytest.mark.parametrize(
    ("kind", "chosen", "inputs"),
    [
        ("i2v", ["first", "first"], "teacher"),
        ("a14b-i2v", ["ends", "first"], "teacher"),
        ("flf2v", ["ends", "ends"], "student"),
        ("ti2v", ["none", "first"], "teacher"),
        ("vace", ["none", "ends"], "teacher"),
        ("vace", ["first", "none"], "student"),
    ],
)
def test_inputs_and_losses_are_those_written_out_by_hand(kind, chosen, inputs):
    stage = Stage(flow=0.5, velocity=2.0, attention=3.0, inputs=inputs)
    ours = objective(kind, stage)
    conditioning = Conditioning.of(ours.transformer.config, GIVEN[kind][1])
    clips, grey = clips_of(kind, TEXT_BESIDE_IMAGE if conditioning.images else 5)
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    given = conditioning.given(clips, grey, chosen)
    batch = Batch(clips["latents"], clips["text"], clips["noise"], sigma, ROWS, given)
    seen = []
    handle = ours.transformer.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    total, parts = ours(batch, stage)
    handle.remove()
    wanted, made = by_hand(kind, clips, grey, sigma, chosen)
    for arguments in seen:
        assert set(arguments) == {*wanted, "return_dict"}
        for name, tensor in wanted.items():
            torch.testing.assert_close(arguments[name].double(), tensor, rtol=1e-6, atol=1e-6, msg=name)
    student, own = with_adapters(kind, ours)
    dense, dense_given = reference(kind, dense=True)
    velocity = student(**wanted, return_dict=False)[0]
    target = dense(**wanted, return_dict=False)[0].detach()
    errors = [mse(velocity[i][:, m], (clips["noise"] - clips["latents"])[i][:, m]) for i, m in enumerate(made)]
    agreement = torch.stack([mse(velocity[i][:, m], target[i][:, m]) for i, m in enumerate(made)]).mean()
    relative = []
    for number in own:
        attend = [self_attentions(transformer)[number][0] for transformer in (student, dense)]
        if inputs == "teacher":
            x, rotary, right = dense_given[number]
            found = attend[0](x.detach(), None, None, rotary)
        else:
            x, rotary, found = own[number]
            right = attend[1](x.detach(), None, None, rotary)
        relative.append(mse(found[:, ROWS], right[:, ROWS]) / (right[:, ROWS] ** 2).mean())
    assert len(relative) == len(ours.transformer.blocks) + len(getattr(ours.transformer, "vace_blocks", ()))
    expected = (torch.stack(errors).mean(), agreement, torch.stack(relative).mean())
    for name, part, value in zip(LOSSES, parts, expected, strict=True):
        torch.testing.assert_close(part.double(), value.detach(), rtol=1e-5, atol=0, msg=name)
    torch.testing.assert_close(
        ours(batch, stage, per_clip=True).double(), torch.stack(errors), rtol=1e-5, atol=0, check_dtype=False
    )
    total.backward()
    unused = {"attn2.add_k_proj", "attn2.add_v_proj"} if not conditioning.images else set()
    named = {name: p for name, p in trained(ours).items() if not any(part in name for part in unused)}
    assert all(p.grad is not None and p.grad.any() for p in named.values())
    if kind == "vace":
        assert any(".vace_blocks.1.attn1.to_q.lora_B" in name for name in named)


def test_gradient_checkpointing_of_vace_blocks_changes_nothing():
    stage = Stage(velocity=1.0, attention=1.0, inputs="student")
    grads = []
    for checkpointing in (False, True):
        ours = objective("vace", stage)
        if checkpointing:
            ours.transformer.enable_gradient_checkpointing()
        clips, grey = clips_of("vace", 5)
        given = Conditioning.of(ours.transformer.config, GIVEN["vace"][1]).given(clips, grey, ["none", "ends"])
        sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
        ours(Batch(clips["latents"], clips["text"], clips["noise"], sigma, ROWS, given), stage)[0].backward()
        grads.append([p.grad for p in trained(ours).values()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_vace_block_has_the_windows_of_the_layer_it_joins():
    layers = '["each", 1, 1], [1, 2, 2], [1, 3, 1], [1, 1, 2]'
    plan = Plan.from_json(f'{{"t3_plan": 1, "name": "four", "grid": [2, 3, 4], "layers": [{layers}]}}')
    transformer, operator = make_transformer("vace"), Operator(plan)
    install(transformer, operator)
    operator.place(GRID)
    placed = [tuple(block.attn1.processor.partition) for block in (*transformer.blocks, *transformer.vace_blocks)]
    assert placed == [tuple(plan.partition(layer, GRID)) for layer in (0, 1, 2, 3, 0, 3)]
    assert len(set(placed)) == 4


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """Train a kind on data that have what it is given; returns the status and the run's folder."""

    def start(kind, name="run", *flags, **tables):
        AcceleratorState._reset_state(reset_partial_state=True)
        if not (tmp_path / "model").exists():
            write_model(tmp_path / "model", kind)
            given, _ = GIVEN[kind]
            write_clips(tmp_path / "clips", 5, shape_of(kind), given=given, grey=kind == "vace")
        conditions = GIVEN[kind][1]
        data = {"holdout": 2, **({"conditions": conditions} if conditions else {})}
        usual = {
            "model": {"text_tokens": 512 if kind in ("i2v", "flf2v") else 6},
            "trainable": {"what": "lora", "rank": 2, "also": ["norms"]},
            "schedule": {"steps": 2, "velocity": 0.5, "attention": 0.5, "inputs": "student", "lr": 1e-3},
            "validation": {"levels": 4, "draws": 2},
        }
        merged = {table: {**usual.get(table, {}), **tables.get(table, {})} for table in {*usual, *tables}}
        merged["data"] = {**data, **tables.get("data", {})}
        return main([write_config(tmp_path, name, run=name, **merged), *flags]), tmp_path / name

    return start


def weights_of(folder, step, name="weights"):
    return load_file(folder / "checkpoints" / f"step-{step:08}" / f"{name}.safetensors")


@pytest.mark.parametrize("kind", sorted(GIVEN))
def test_a_model_of_every_kind_trains(run, kind, tmp_path, capsys):
    status, folder = run(kind)
    assert status == 0, capsys.readouterr().err
    with (folder / "metrics.csv").open() as stream:
        losses = [float(row["loss"]) for row in csv.DictReader(stream)]
    with (folder / "validation.csv").open() as stream:
        errors = [float(row["whole"]) for row in csv.DictReader(stream)]
    assert losses and errors and all(0 < x < 100 for x in (*losses, *errors))
    ups = {name: t for name, t in weights_of(folder, 2).items() if "attn1" in name and "lora_B" in name}
    assert len(ups) == 4 * (6 if kind == "vace" else 2) and all(tensor.any() for tensor in ups.values())
    lora = folder / "run-lora.safetensors"
    sources = find_sources(model=str(tmp_path / "model"), t3_weights=[str(lora)])
    assert Plan.from_json(sources.plan_json) == Plan.from_json(PLAN)
    transformer = make_transformer(kind)
    before = transformer.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    apply_weights(transformer, open_weights(lora))
    changed = {name for name, tensor in transformer.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.replace(".lora_B.default", "").removeprefix("transformer.") for name in ups} <= changed
    run(kind, "run", "--dry-run")
    said = capsys.readouterr()
    assert "GiB on each process" in said.out


def test_resume_of_a_vace_run_equals_uninterrupted_bit_for_bit(run, monkeypatch):
    tables = {"schedule": {"steps": 4, "velocity": 0.0, "attention": 0.0}, "data": {"resident": "host"}}
    assert run("vace", "whole", **tables)[0] == 0
    step = Loop.take_step

    def killed(self, stage, done):
        if self.at.step == 3:
            raise RuntimeError("killed")
        step(self, stage, done)

    monkeypatch.setattr(Loop, "take_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run("vace", "cut", **tables)
    monkeypatch.setattr(Loop, "take_step", step)
    status, cut = run("vace", "cut", "--resume", **tables)
    assert status == 0
    for name in ("weights", "average", "optimizer"):
        one, other = (weights_of(folder, 4, name) for folder in (cut.with_name("whole"), cut))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_everything_of_a_vace_model_is_trained_and_written(run, tmp_path):
    status, folder = run(
        "vace",
        trainable={"what": "everything", "also": []},
        schedule={"steps": 1, "velocity": 0.0, "attention": 0.0},
        train={"ema": 0.0},
        output={"dtype": "float32"},
    )
    assert status == 0
    transformer = make_transformer("vace", seed=9)
    apply_weights(transformer, open_weights(folder / "run.safetensors"))
    for name, tensor in weights_of(folder, 1).items():
        torch.testing.assert_close(transformer.state_dict()[name.removeprefix("transformer.")], tensor)


# --- experts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "low", "high"), [("transformer", 0.9, 1.0), ("transformer_2", 0.0, 0.9)])
def test_an_expert_is_trained_at_its_own_noise(tmp_path, part, low, high):
    write_model(tmp_path / "model", "a14b-i2v")
    write_clips(tmp_path / "clips", 3, given=("first",))
    found = find(Model(source=str(tmp_path / "model"), part=part))
    assert found.noise_range == (low, high)
    config = parse_config(
        f'[output]\nfolder = "x"\n[[data.sets]]\nname = "a"\nfolder = "{tmp_path / "clips"}"\n[schedule]\nsteps = 1\n'
    )
    stage = at_its_noise(config, found).stages[0]
    clips = open_clips(config.data, found.config, 6)
    settings = {"seed": 1, "caption_dropout": 0.0, "patch": (1, 2, 2), "device": torch.device("cpu")}
    feeder = Feeder(clips, Layout(3, 1, 0), resident=True, **settings)
    levels = torch.cat([feeder.next(stage).sigma for _ in range(100)])
    assert low <= levels.min() < levels.max() <= high
    assert (levels.max() - levels.min()) > 0.9 * (high - low)
    measured = [point.sigma for point in points(8, Validation(), *found.noise_range)]
    assert low <= min(measured) < max(measured) <= high
    elsewhere = f"[[stages]]\nsigma_min = {0.0 if low else 0.95}\nsigma_max = {0.5 if low else 1.0}\n"
    other = parse_config(f'{elsewhere}[output]\nfolder = "x"\n[[data.sets]]\nname = "a"\nfolder = "b"\n')
    with pytest.raises(T3Error, match="this expert is for"):
        at_its_noise(other, found)


def test_one_file_of_an_expert_is_told_where_its_noise_ends(tmp_path):
    write_model(tmp_path / "model", "a14b-i2v")
    file = str(tmp_path / "model" / "transformer_2" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(T3Error, match="boundary = 0.875 .image-to-video: 0.9"):
        find(Model(dit=(file,), part="transformer_2"))
    assert find(Model(dit=(file,), part="transformer_2", boundary=0.9)).noise_range == (0.0, 0.9)
    assert find(Model(dit=(file,))).noise_range == (0.0, 1.0)


@pytest.mark.parametrize(("part", "at", "low", "high"), [("transformer", 0, 0.9, 1.0), ("transformer_2", 1, 0.0, 0.9)])
def test_of_two_lone_files_the_named_expert_is_trained(tmp_path, part, at, low, high):
    """As with the VAE beside them, high noise first."""
    write_model(tmp_path / "model", "a14b-i2v")
    folders = [tmp_path / "model" / name for name in ("transformer", "transformer_2")]
    files = tuple(str(folder / "diffusion_pytorch_model.safetensors") for folder in folders)
    changed = {name: tensor + 1 for name, tensor in load_file(files[1]).items()}
    save_file(changed, files[1])
    for boundary in (None, 0.9):
        asked = Model(dit=files, part=part, **({"boundary": boundary} if boundary else {}))
        found = find(asked)
        assert found.noise_range == (low, high)
        loaded = load(found, torch.float32).state_dict()
        for name, tensor in load_file(files[at]).items():
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    with pytest.raises(T3Error, match="3 files are named as dit"):
        find(Model(dit=(*files, files[0])))


# --- what data may lack -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "grey", "asked", "said"),
    [
        ("i2v", ("image",), False, {}, "lacks the latents of its first frame alone, which an image-to-video model is"),
        ("i2v", ("first",), False, {}, "lacks the image encoder's embedding of its first frame"),
        ("i2v", (), False, {}, "t3.retrofit encode CLIPS --out FOLDER --model MODEL --condition first"),
        ("flf2v", ("ends", "image"), False, {}, "lacks the image encoder's embedding of its last frame"),
        ("flf2v", ("first", "image", "last_image"), False, {}, "--model MODEL --condition ends"),
        ("a14b-i2v", ("first",), False, {"first": 1, "ends": 1}, "--condition first --condition ends"),
        ("vace", (), False, {}, "lacks latents [16, 2, 6, 8] of a grey clip"),
        ("vace", (), True, {"none": 1, "first": 1}, "lacks the latents of its first frame alone, which a VACE model"),
        ("vace", ("first",), True, {"none": 1, "first": 0, "ends": 1}, "its first and last frame alone"),
        ("t2v", (), False, {"first": 1}, "conditions has 'first', which a text-to-video model does not take"),
        ("i2v", ("ends", "image"), False, {"ends": 1}, "conditions has 'ends', which an image-to-video model"),
        ("i2v", ("first", "image"), False, {}, "text_tokens is 6; a model that takes an image's embedding needs 512"),
    ],
)
def test_what_a_data_set_lacks_for_a_model_is_named(tmp_path, kind, given, grey, asked, said):
    write_clips(tmp_path / "set", 2, given=given, grey=grey)
    data = Data(sets=(DataSet("a", str(tmp_path / "set")),), conditions={name: float(x) for name, x in asked.items()})
    with pytest.raises(T3Error) as caught:
        open_clips(data, make_transformer(kind).config, 6)
    assert said in str(caught.value)


def test_a_clip_of_one_latent_frame_is_not_given_its_first(tmp_path):
    write_clips(tmp_path / "set", 2, (48, 1, 6, 8))
    config = make_transformer("ti2v").config
    data = Data(sets=(DataSet("a", str(tmp_path / "set")),), conditions={"none": 1.0, "first": 1.0})
    with pytest.raises(T3Error, match="nothing is left to make"):
        open_clips(data, config, 6)
    assert open_clips(Data(sets=data.sets), config, 6).conditioning.tensors == ()


def test_shares_of_conditions_are_kept():
    conditioning = Conditioning.of(make_transformer("vace").config, {"none": 2.0, "first": 1.0, "ends": 1.0})
    chosen = [conditioning.choose((i + 0.5) / 400) for i in range(400)]
    assert [chosen.count(name) for name in ("none", "first", "ends")] == [200, 100, 100]
