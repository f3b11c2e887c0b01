"""One of two processes that share a model's weights: train, save, load into a fresh model, train on, compare.

Started by `test_retrofit_processes`; the argument is the folder for the checkpoint.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from retrofit_fixtures import PLAN, SHAPE, TINY
from torch.distributed.fsdp import fully_shard

from t3 import Plan
from t3.parallel.faults import leave
from t3.retrofit import checkpoint
from t3.retrofit.config import Stage
from t3.retrofit.ema import Average
from t3.retrofit.objectives import Batch, Objective
from t3.retrofit.operator import Operator, install


def make():
    torch.manual_seed(0)
    transformer, operator = WanTransformer3DModel(**TINY), Operator(Plan.from_json(PLAN))
    install(transformer, operator)
    objective = Objective(transformer, operator, None, torch.float32)
    for block in transformer.blocks:
        fully_shard(block)
    fully_shard(objective)
    parameters = list(objective.parameters())
    return objective, torch.optim.AdamW(parameters, lr=1e-3), Average(parameters, 0.9)


def step(run, number):
    objective, optimizer, average = run
    source = torch.Generator().manual_seed(2 * number + dist.get_rank())
    latents, noise = (torch.randn(2, *SHAPE, generator=source) for _ in range(2))
    text, sigma = torch.randn(2, 5, 8, generator=source), torch.rand(2, generator=source)
    objective(Batch(latents, text, noise, sigma), Stage())[0].backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update(number + 1)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    run = make()
    step(run, 0)
    step(run, 1)
    parts = checkpoint.collect(*run)
    if dist.get_rank() == 0:
        checkpoint.save(folder, 2, parts, {}, 1)
    dist.barrier()
    step(run, 2)
    again = make()
    checkpoint.load(checkpoint.listed(folder)[-1], *again)
    step(again, 2)
    whole, resumed = checkpoint.collect(*run), checkpoint.collect(*again)
    if dist.get_rank() == 0:
        assert set(whole) == {"weights", "average", "optimizer"}
        for name, tensors in whole.items():
            assert tensors.keys() == resumed[name].keys()
            assert all(torch.equal(tensors[key], resumed[name][key]) for key in tensors), name
        # Whole tensors, of a model that moved.
        moved = [not torch.equal(parts["weights"][key], whole["weights"][key]) for key in whole["weights"]]
        assert all(moved)
    dist.barrier()
    dist.destroy_process_group()
    leave(0)  # as the command does, and why


if __name__ == "__main__":
    main(Path(sys.argv[1]))
