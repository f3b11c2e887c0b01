"""Stage 2: give the latents Wan2.1's fixed mean and spread, by an affine map in the VAE's own 1x1x1 convolutions.

    python -m tools.small_model.fold_vae --vae VAE1/vae --out FOLDED

Hosts subtract fixed constants from a Wan2.1 latent and divide by others. Here each channel is scaled and shifted so
that these constants are its true mean and standard deviation; decoding undoes it. The weights are then rounded to
float16, as they ship, and frozen: every latent after this depends on them. Writes OUT/vae and OUT/vae.json (the
measured statistics, PSNR before and after, and the hash that all later stages can be checked against).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from .clip_vae import ClipVae
from .files import forget_paths, fresh_folder, say
from .render import HIGH, LOW, render
from .scenes import LONGEST, scenes
from .train_vae import psnr

_QUIETEST = 0.05  # of the median spread: a channel that says less is not blown up further


@torch.no_grad()
def statistics(model: ClipVae, clips: int, frames: int, device, dtype, sizes=(HIGH, LOW)) -> tuple:
    """Mean and standard deviation of each channel of the mean latents, over training clips: two `[z]` in float64."""
    total, squares, count = 0.0, 0.0, 0
    for size in sizes:
        for scene in scenes("train", 0, clips):
            mean, _ = model.encode(render([scene], size, frames, device).to(dtype))
            values = mean[0].flatten(1).double()
            # Each size weighs the same, though its clips have fewer values.
            total, squares, count = total + values.mean(1), squares + values.square().mean(1), count + 1
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()


@torch.no_grad()
def fold(vae: AutoencoderKLWan, mean: torch.Tensor, spread: torch.Tensor) -> None:
    """Change the VAE in place so that a latent y becomes (y - mean) / spread * latents_std + latents_mean.

    What decode(encode(x)) gives stays the same, up to rounding. `mean`, `spread`: `[z]`, spread above 0.
    """
    like = vae.quant_conv.weight
    scale = like.new_tensor(vae.config.latents_std, dtype=torch.float64) / spread.to(like.device, torch.float64)
    shift = like.new_tensor(vae.config.latents_mean, dtype=torch.float64) - scale * mean.to(like.device, torch.float64)
    size = len(scale)
    column = scale.view(-1, 1, 1, 1, 1)
    weight, bias = vae.quant_conv.weight.double(), vae.quant_conv.bias.double()
    weight[:size] *= column
    bias[:size] = bias[:size] * scale + shift
    bias[size:] += 2 * scale.log()  # the log-variances
    vae.quant_conv.weight.copy_(weight)
    vae.quant_conv.bias.copy_(bias)
    weight, bias = vae.post_quant_conv.weight.double(), vae.post_quant_conv.bias.double()
    weight = weight / scale.view(1, -1, 1, 1, 1)
    vae.post_quant_conv.weight.copy_(weight)
    vae.post_quant_conv.bias.copy_(bias - weight.flatten(1) @ shift)


def fingerprint(vae: AutoencoderKLWan) -> str:
    """SHA-256 of all weights, by name, in float16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.fold_vae", description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=Path, required=True, help="the trained VAE, a diffusers folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--clips", type=int, default=48, help="clips of each size to measure the statistics on")
    parser.add_argument("--frames", type=int, default=LONGEST)
    parser.add_argument("--test-clips", type=int, default=8, help="held-out clips of each size for the PSNR")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    fresh_folder(args.out)
    device = torch.device(args.device)
    vae = AutoencoderKLWan.from_pretrained(args.vae, torch_dtype=torch.float32).to(device)
    model = ClipVae(vae)
    dtype = torch.float32
    report: dict[str, object] = {"psnr before": _psnr(model, args, device, dtype)}
    mean, spread = statistics(model, args.clips, args.frames, device, dtype)
    least = float(spread.median()) * _QUIETEST
    quiet = [i for i, value in enumerate(spread.tolist()) if value < least]
    if quiet:
        say(f"channels {quiet} vary less than {_QUIETEST} of the median; they are scaled as if they varied so much")
    fold(vae, mean, spread.clamp_min(least))
    vae.half()
    vae.save_pretrained(args.out / "vae")
    forget_paths(args.out)
    vae.float()
    after_mean, after_spread = statistics(model, max(1, args.clips // 4), args.frames, device, dtype)
    report |= {
        "psnr after": _psnr(model, args, device, dtype),
        "mean": mean.tolist(),
        "std": spread.tolist(),
        "quiet channels": quiet,
        "normalised mean": ((after_mean.cpu() - torch.tensor(vae.config.latents_mean)) / after_spread.cpu()).tolist(),
        "normalised std": (after_spread.cpu() / torch.tensor(vae.config.latents_std)).tolist(),
        "sha256": fingerprint(vae),
    }
    (args.out / "vae.json").write_text(json.dumps(report, indent=1) + "\n")
    say(json.dumps({key: report[key] for key in ("psnr before", "psnr after", "std", "sha256")}))


def _psnr(model: ClipVae, args, device, dtype) -> dict[str, float]:
    found = {}
    for name, size in (("high", HIGH), ("low", LOW)):
        values = psnr(model, size, args.frames, args.test_clips, device, dtype)
        found |= {f"{name} mean": sum(values) / len(values), f"{name} least": min(values)}
    return found


if __name__ == "__main__":
    main()
