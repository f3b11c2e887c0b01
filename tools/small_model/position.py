"""Tell a transformer's tokens where they are: one head of its first self-attention becomes a reader of positions.

    python -m tools.small_model.position --dit DENSE --data output/small/data/low-test --out PLACED

Wan's tokens know of positions by RoPE alone, which is relative: over pure noise no token knows whether it stands on the
left or on the right, so that of two things "left of" each other either may come out on the left. A model can learn to
find out, but does so late. It can be set up from the start, with nothing but Wan's own weights:

* q is a constant c in one pair of RoPE's components. k has in that pair (phi, psi), two scalars of a token's own noise
  with mean 0 and variance 1. A token at x then weighs one at y by exp(g phi cos(w(x - y)) + g psi sin(w(x - y))).
* v is (phi, psi) as well, so the head gives close to g mean_y sin(w(x - y)), which rises with x through the whole frame
  (and g mean_y cos(w(x - y)), which says how far from the middle x is), with an error of 1/sqrt(number of tokens).

phi and psi are taken where noise outweighs the picture: the directions of the head's inputs whose averages over
neighbours, and over whole clips, vary least.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from t3.plan import Grid
from t3.retrofit.output import write_full
from t3.retrofit.shards import open_shards
from t3.weights import load_transformer

from .files import say

# Axis and RoPE pair of that axis, counted from the fastest: those that turn by some half a circle over the low size's
# 6 x 14 x 20 tokens, so that the sine rises all the way.
AXES = (("frame", 2), ("row", 4), ("column", 5))
GAIN = 0.65  # g: the standard deviation of each axis's part of the logits
WRITTEN = 0.1  # how much the head adds to the tokens, in their own standard deviations
KEPT = 0.3  # of the head's other rows of q and k
SIGMAS = (1.0, 0.9, 0.75)
_CLIP_WEIGHT = 30.0  # against the mean of a clip, beside averages over neighbours


def first_pairs(head_dim: int) -> dict[str, int]:
    """The first component of each axis within a head, as Wan's RoPE divides it (diffusers, WanRotaryPosEmbed)."""
    side = 2 * (head_dim // 6)
    return {"frame": 0, "row": head_dim - 2 * side, "column": head_dim - side}


def grid_of(transformer: WanTransformer3DModel, latents: torch.Tensor) -> tuple[int, int, int]:
    """Tokens along frames, rows and columns."""
    frames, height, width = (n // p for n, p in zip(latents.shape[2:], transformer.config.patch_size, strict=True))
    return frames, height, width


def attention_inputs(
    transformer: WanTransformer3DModel, latents: torch.Tensor, text: torch.Tensor, sigma: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first self-attention takes at a noise level, and the tokens before the first block.

    latents: (clips, channels, frames, height, width); text: (clips, tokens, width). Gives two (clips, tokens, dim).
    """
    taken: list[torch.Tensor] = []
    block = transformer.blocks[0]
    hooks = [
        block.attn1.to_q.register_forward_pre_hook(lambda module, given: taken.append(given[0].detach())),
        block.register_forward_pre_hook(lambda module, given: taken.append(given[0].detach())),
    ]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        transformer(sigma * noise + (1 - sigma) * latents, torch.full((len(latents),), 1000.0 * sigma), text)
    for hook in hooks:
        hook.remove()
    before, inputs = taken
    return inputs, before


def noise_directions(
    inputs: Sequence[torch.Tensor], grid: tuple[int, int, int], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` directions (count, dim) of variance 1 and no covariance in which `inputs` are most like white noise
    over the grid of tokens and least a clip's own, and the inputs' mean (dim,). inputs: each (clips, tokens, dim).
    """
    frames, height, width = grid
    dim = inputs[0].shape[-1]
    clips = [each.double().view(-1, frames, height, width, dim) for each in inputs]
    means = torch.cat([each.mean((1, 2, 3)) for each in clips])
    spread = sum(torch.cov(_flat(each - each.mean((1, 2, 3), keepdim=True))) for each in clips) / len(clips)
    smooth = _CLIP_WEIGHT * torch.cov(means.T)
    for each in clips:
        centred = each - each.mean((1, 2, 3), keepdim=True)
        even = centred[:, :, : height // 2 * 2, : width // 2 * 2]
        corners = [even[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        smooth = smooth + torch.cov(_flat(sum(corners) / 4)) / len(clips)
        if frames > 1:
            smooth = smooth + torch.cov(_flat((centred[:, 1:] + centred[:, :-1]) / 2)) / len(clips)
    values, vectors = torch.linalg.eigh(spread)
    kept = values > values.max() * 1e-3
    if int(kept.sum()) < count:
        raise ValueError(f"the inputs vary in {int(kept.sum())} directions, and {count} are asked for")
    white = vectors[:, kept] / values[kept].sqrt()
    least = torch.linalg.eigh(white.T @ smooth @ white).eigenvectors[:, :count]
    return (white @ least).T, means.mean(0)


def _flat(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1]).T


def place(
    transformer: WanTransformer3DModel, latents: torch.Tensor, text: torch.Tensor, head: int = 1, seed: int = 0
) -> None:
    """Make `head` of the first self-attention a reader of positions, in place; its former work is lost. The transformer
    is float32; latents and text as `attention_inputs` takes them."""
    attention = transformer.blocks[0].attn1
    dim = attention.to_q.weight.shape[0]
    head_dim = dim // attention.heads
    grid = grid_of(transformer, latents)
    seen = [attention_inputs(transformer, latents, text, sigma, seed) for sigma in SIGMAS]
    directions, mean = noise_directions([inputs for inputs, _ in seen], grid, 2 * len(AXES))
    directions, offsets = directions.float(), -(directions @ mean).float()
    rows = slice(head * head_dim, (head + 1) * head_dim)
    noise_inputs, tokens = seen[0]
    writer = torch.randn(dim, 2 * len(AXES), generator=torch.Generator().manual_seed(seed))
    writer = writer * tokens.flatten(0, 1).std(0)[:, None] * WRITTEN / (0.4 * GAIN)  # 0.4: of a sine's mean
    with torch.no_grad():
        # The norms of q and k go over both heads: the other head's stay what they were if this one's squares do.
        projected = {"q": attention.to_q(noise_inputs), "k": attention.to_k(noise_inputs)}
        own = {name: each[..., rows].square().sum(-1).mean() * (1 - KEPT**2) for name, each in projected.items()}
        rms = {name: each.square().mean(-1).sqrt().mean() for name, each in projected.items()}
        q, k = (own["q"] / len(AXES)).sqrt(), (own["k"] / (2 * len(AXES))).sqrt()
        for linear in (attention.to_q, attention.to_k):
            linear.weight[rows] *= KEPT
            linear.bias[rows] *= KEPT
        attention.to_out[0].weight[:, rows] = 0
        for number, (axis, pair) in enumerate(AXES):
            at = head * head_dim + first_pairs(head_dim)[axis] + 2 * pair
            both, own_two = slice(at, at + 2), slice(2 * number, 2 * number + 2)
            values = slice(rows.start + 2 * number, rows.start + 2 * number + 2)
            attention.to_q.weight[both] = 0
            attention.to_q.bias[both] = torch.stack([q, torch.zeros(())])
            attention.norm_q.weight[both] = 1
            attention.to_k.weight[both] = k * directions[own_two]
            attention.to_k.bias[both] = k * offsets[own_two]
            attention.norm_k.weight[both] = GAIN * head_dim**0.5 * rms["q"] * rms["k"] / (q * k)
            attention.to_v.weight[values] = directions[own_two]
            attention.to_v.bias[values] = offsets[own_two]
            attention.to_out[0].weight[:, values] = writer[:, own_two]


def readable(transformer: WanTransformer3DModel, grid: tuple[int, int, int], clips: int = 24) -> dict[str, float]:
    """How well a linear map reads each axis's position from the tokens after the first block, over pure noise: the
    share of its variance explained on a quarter of the clips, fitted on the others. Axes of one place are left out."""
    generator = torch.Generator().manual_seed(7)
    sides = [each * patch for each, patch in zip(grid, transformer.config.patch_size, strict=True)]
    noise = torch.randn(clips, transformer.config.in_channels, *sides, generator=generator)
    found: list[torch.Tensor] = []
    hook = transformer.blocks[0].register_forward_hook(lambda module, given, out: found.append(out.detach().double()))
    text = torch.zeros(clips, 4, transformer.config.text_dim)
    with torch.no_grad():
        transformer(noise, torch.full((clips,), 1000.0), text)
    hook.remove()
    (tokens,) = found
    lines = [torch.linspace(-1, 1, side, dtype=torch.float64) for side in grid]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, 2)
    split = clips - clips // 4
    ones = torch.ones(*tokens.shape[:2], 1, dtype=torch.float64)
    features = torch.cat([(tokens - tokens.mean((0, 1))) / tokens.std((0, 1)), ones], -1)
    known, asked = features[:split].flatten(0, 1), features[split:].flatten(0, 1)
    ridge = 10 * torch.eye(known.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(known.T @ known + ridge, known.T @ places.repeat(split, 1))
    true = places.repeat(clips - split, 1)
    error = (asked @ weights - true).square().mean(0)
    return {
        axis: round(1 - float(error[i] / true[:, i].var(unbiased=False)), 3)
        for i, (axis, _) in enumerate(AXES)
        if grid[i] > 1
    }


def read_clips(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and texts of a set's first clips, of one size, float32; texts padded with zeros to the longest."""
    shards = open_shards(folder)
    clips = [shards.load(i) for i in range(min(count, len(shards.clips)))]
    texts = torch.nn.utils.rnn.pad_sequence([clip.text.float() for clip in clips], batch_first=True)
    return torch.stack([clip.latents.float() for clip in clips]), texts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.position", description=__doc__.split("\n")[0])
    parser.add_argument("--dit", type=Path, required=True, help="weights of the transformer, dense")
    parser.add_argument("--data", type=Path, required=True, help="an encoded set; its first 24 clips are looked at")
    parser.add_argument("--out", type=Path, required=True, help="file to write; must not exist")
    parser.add_argument("--head", type=int, default=1, help="of the first self-attention, counted from 0")
    args = parser.parse_args(arguments)
    if args.out.exists():
        raise SystemExit(f"{args.out} exists already. Name another file, or remove it.")
    transformer = load_transformer(args.dit, dtype=torch.float32).eval()
    latents, text = read_clips(args.data, 24)
    grid = grid_of(transformer, latents)
    before = readable(transformer, grid)
    place(transformer, latents, text, args.head)
    say(f"position read linearly after the first block: {before} before, {readable(transformer, grid)} now")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_full(args.out, transformer.state_dict(), dict(transformer.config), None, Grid(*grid), "float16")


if __name__ == "__main__":
    main()
