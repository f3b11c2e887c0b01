"""One of several ranks that compute what each of them also computes alone; run by `test_parallel_equal`.

Arguments: names of `CASES`. Ends with an error where the two differ by more than rounding.
"""

import sys
from dataclasses import dataclass, field

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

from t3 import Plan, chunks, memory
from t3.parallel import sequence
from t3.parallel.guidance import GuidanceSplit
from t3.parallel.sequence import Spread
from t3.parallel.split import Split
from t3.parallel.spreading import Spreading
from t3.parallel.team import form_team
from t3.parallel.world import World
from t3.plan import Grid
from t3.processor import install_t3

PLAN = Plan("small", Grid(2, 8, 12), (("each", 1, 1), (1, 2, 3), (1, 4, 2), (2, 2, 3), (2, 1, 1)))
SMALL = {"attention_head_dim": 16, "ffn_dim": 96, "num_layers": 5, "text_dim": 24, "freq_dim": 32}
# The heads and channels of the released models, at a narrow head.
KINDS = {
    "1.3b": {"num_attention_heads": 12},
    "5b": {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48},
    "vace": {"num_attention_heads": 4, "vace_layers": [0, 2], "vace_in_channels": 96},
    "i2v": {"num_attention_heads": 4, "in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 64},
}


@dataclass
class Case:
    kind: str
    split: Split
    grid: tuple[int, int, int]
    batch: int = 1
    dtype: torch.dtype = torch.float64
    by_chunks: bool = False
    groups: int = 1
    parts: int = 1
    memory: object = "auto"
    kernels: bool = False  # the way of our kernels, in plain torch
    more: dict = field(default_factory=dict)


EVEN, ODD = (2, 4, 6), (3, 5, 7)
CASES = {
    "sequence": Case("1.3b", Split(1, 1, 2), EVEN),
    "sequence-odd": Case("1.3b", Split(1, 1, 2), ODD, batch=2),
    "sequence-odd-groups": Case("1.3b", Split(1, 1, 2), ODD, batch=2, groups=3),
    "sequence-odd-parts": Case("1.3b", Split(1, 1, 2), ODD, batch=2, parts=4),
    "sequence-chunks": Case("1.3b", Split(1, 1, 2), ODD, batch=2, by_chunks=True),
    "sequence-chunks-parts": Case("1.3b", Split(1, 1, 2), ODD, batch=2, by_chunks=True, parts=3),
    "sequence-chunks-groups": Case("1.3b", Split(1, 1, 2), ODD, batch=2, by_chunks=True, groups=3),
    # Six heads are not four groups but six, and parts are of one group alone.
    "sequence-chunks-both": Case("1.3b", Split(1, 1, 2), EVEN, by_chunks=True, groups=4, parts=2),
    "sequence-chunks-more-parts-than-tokens": Case("1.3b", Split(1, 1, 2), EVEN, by_chunks=True, parts=50),
    "sequence-chunks-kernels": Case("1.3b", Split(1, 1, 2), ODD, batch=2, by_chunks=True, kernels=True),
    "sequence-kernels": Case("1.3b", Split(1, 1, 2), EVEN, parts=2, kernels=True),
    "sequence-lean": Case("1.3b", Split(1, 1, 2), ODD, by_chunks=True, memory="lean"),
    "sequence-float32": Case("1.3b", Split(1, 1, 2), ODD, dtype=torch.float32, by_chunks=True),
    "sequence-5b": Case("5b", Split(1, 1, 2), ODD, by_chunks=True, more={"timesteps": True}),
    "sequence-vace": Case("vace", Split(1, 1, 2), ODD, by_chunks=True),
    "sequence-i2v": Case("i2v", Split(1, 1, 2), ODD),
    "guidance": Case("1.3b", Split(1, 2, 1), ODD),
    "guidance-5b": Case("5b", Split(1, 2, 1), EVEN, more={"timesteps": True}),
    "guidance-bfloat16": Case("1.3b", Split(1, 2, 1), ODD, dtype=torch.bfloat16),
    "data": Case("1.3b", Split(2, 1, 1), ODD),
    "four-sequence": Case("1.3b", Split(1, 1, 4), ODD, batch=2, by_chunks=True, parts=2),
    "four-guidance-sequence": Case("5b", Split(1, 2, 2), ODD, by_chunks=True),
    "four-data-sequence": Case("1.3b", Split(2, 1, 2), ODD),
    "four-data-guidance": Case("1.3b", Split(2, 2, 1), EVEN),
    "eight": Case("1.3b", Split(2, 2, 2), ODD, by_chunks=True),
}


def build(case: Case):
    torch.manual_seed(0)
    config = {**SMALL, **KINDS[case.kind]}
    model = (WanVACETransformer3DModel if "vace_layers" in config else WanTransformer3DModel)(**config)
    for parameter in model.parameters():  # zero-initialised or constant ones would hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval().to(case.dtype)


def inputs(case: Case, clip: int) -> tuple[dict, list[torch.Tensor]]:
    """Of clip number `clip`: what both predictions are given, and the text of each."""
    source = torch.Generator().manual_seed(1 + clip)
    t, h, w = case.grid
    config = KINDS[case.kind]

    def random(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64).to(case.dtype)

    common = {
        "hidden_states": random(case.batch, config.get("in_channels", 16), t, 2 * h, 2 * w),
        "timestep": torch.full((case.batch,), 500.0),
        "return_dict": False,
    }
    if case.more.get("timesteps"):
        common["timestep"] = 1000 * torch.rand(case.batch, t * h * w, generator=source)
    if case.kind == "vace":
        common["control_hidden_states"] = random(case.batch, 96, t, 2 * h, 2 * w)
    if case.kind == "i2v":
        common["encoder_hidden_states_image"] = random(case.batch, 257, 20)
    return common, [random(case.batch, 512 if case.kind == "i2v" else 20, 24) for _ in range(2)]


def predict(model, common, texts) -> list[torch.Tensor]:
    """Both predictions, asked for as diffusers' pipelines do, and mixed."""
    found = []
    for name, text in zip(("cond", "uncond"), texts, strict=True):
        with model.cache_context(name):
            found.append(model(encoder_hidden_states=text, **common)[0])
    return [x.to(torch.float64) for x in found]


@torch.no_grad()
def check(world: World, name: str, case: Case) -> None:
    team = form_team(world, case.split)
    common, texts = inputs(case, team.index)
    alone = build(case)
    install_t3(alone, PLAN)
    expected = predict(alone, common, texts)
    model = build(case)
    spread = None
    if team.sequence is not None:
        spread = Spread(team.sequence, team.part, case.split.sequence, case.groups, case.parts)
    said = []
    install_t3(model, PLAN, memory=case.memory, spread=spread, say=said.append)
    if spread is not None:
        Spreading(model, spread)
    if team.guidance is not None:
        GuidanceSplit(model, team.guidance, team.prediction)
    found = predict(model, common, texts)
    assert not [text for text in said if "whole" in text], said
    # The sums are the same but for the order in which heads and chunks are worked off.
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(case.dtype, 0)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        scale = want.abs().max()
        error = float((got - want).abs().max() / scale)
        assert error <= tolerance, f"{name}: error {error:.2g} of the largest value"
    # All ranks of a team go on with the very same numbers.
    sums = world.gather([team.index, *(float(x.sum()) for x in found)])
    assert len({tuple(row) for row in sums}) == case.split.data, sums
    print(f"{name}: equal")


def main(names: list[str]) -> None:
    world = World.from_environment().start("cpu")
    usual = memory.CHUNK_BYTES, chunks.TILE, sequence.attend_projections
    refusal = sequence.refusal
    calls: list[int] = []

    def counted(p, windows, spread, most, some):
        calls.append(len(some))
        return usual[2](p, windows, spread, most, some)

    sequence.attend_projections = counted
    for name in names:
        case = CASES[name]
        memory.CHUNK_BYTES, chunks.TILE = (96 * 8 * 20, 4) if case.by_chunks else usual[:2]
        sequence.refusal = (lambda *x: None) if case.kernels else refusal
        calls.clear()
        check(world, name, case)
        assert bool(calls) == case.by_chunks and all(count > 1 for count in calls), calls
    world.close()


if __name__ == "__main__":
    main(sys.argv[1:])
