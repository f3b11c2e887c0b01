"""Muon of many matrices at once against float64 and against torch's own, and what it is given to train."""

from functools import partial

import pytest
import torch

from t3.errors import T3Error
from t3.retrofit.config import Train
from t3.retrofit.optimizers import make_optimizers
from t3.retrofit.session import _check_sharded

if not hasattr(torch.optim, "Muon"):
    pytest.skip("Muon comes with torch 2.9", allow_module_level=True)

from t3.retrofit.muon import StackedMuon, orthogonalised

SHAPES = [(24, 24), (24, 24), (8, 40), (40, 8), (40, 8), (1, 16)]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def reference(matrices: torch.Tensor) -> torch.Tensor:
    """The iteration on singular values alone, in float64: `[K, m, n]`."""
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    a, b, c = COEFFICIENTS
    values = values / values.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return left * values[:, None] @ right


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 8, 40), (2, 40, 8), (1, 1, 16)])
def test_orthogonalised_matrices_equal_the_float64_reference(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64) * torch.logspace(-6, 3, shape[0])[:, None, None]
    found, right = orthogonalised(matrices, COEFFICIENTS, 5, 1e-7).double(), reference(matrices)
    # Five rounds of three products in bfloat16, each of which rounds values near one by 2^-9 and is multiplied by up
    # to |a| + 2 |b| + |c| on its way.
    assert (found - right).norm(dim=(1, 2)).div(right.norm(dim=(1, 2))).max() < 5 * 3 * 2**-9
    torchs = [torch.optim._muon._zeropower_via_newtonschulz(m.float(), COEFFICIENTS, 5, 1e-7) for m in matrices]
    assert (found - right).norm() < 2 * (torch.stack(torchs).double() - right).norm()


def test_steps_equal_those_of_torchs_own():
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in SHAPES]
    made = []
    for kind in (partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), StackedMuon):
        parameters = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = kind(parameters, lr=0.02, weight_decay=0.1)
        random = torch.Generator().manual_seed(1)
        for _ in range(6):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=random)
            parameters[1].grad = None
            optimizer.step()
        made.append((parameters, optimizer))
    (theirs, their_optimizer), (ours, our_optimizer) = made
    assert torch.equal(ours[1], starts[1])
    for start, their, our in zip(starts, theirs, ours, strict=True):
        assert (their - our).norm() <= 0.03 * (their - start).norm()
    before, after = their_optimizer.state_dict()["state"], our_optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    for key, state in before.items():
        torch.testing.assert_close(after[key]["momentum_buffer"], state["momentum_buffer"])


def test_muon_gets_the_matrices_of_blocks_and_adamw_the_rest():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embedding = torch.nn.Conv3d(2, 4, 1)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 6), torch.nn.LayerNorm(4)])
            self.blocks[1].scale_shift_table = torch.nn.Parameter(torch.zeros(1, 6, 4))
            self.proj_out = torch.nn.Linear(4, 2)

    model = Model()
    adamw, muon = make_optimizers(model, Train(optimizer="muon", weight_decay=0.3))
    assert [p for group in muon.param_groups for p in group["params"]] == [model.blocks[0].weight]
    assert muon.param_groups[0]["weight_decay"] == 0.3
    decays = {p: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert decays.keys() == set(model.parameters()) - {model.blocks[0].weight}
    assert {p for p, decay in decays.items() if decay} == {model.patch_embedding.weight, model.proj_out.weight}
    [alone] = make_optimizers(model, Train())
    assert {p for group in alone.param_groups for p in group["params"]} == set(model.parameters())


def test_muon_is_refused_with_fsdp(tmp_path):
    from retrofit_fixtures import config_text

    from t3.retrofit.config import parse_config

    with pytest.raises(T3Error, match="needs whole matrices, and FSDP spreads them"):
        _check_sharded(parse_config(config_text(tmp_path, train={"optimizer": "muon"})))
