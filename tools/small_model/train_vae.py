"""Stage 1: train the VAE on crops of clips drawn on the fly. Still images first, then video.

    python -m tools.small_model.train_vae --minutes 8 --out OUT
    python -m tools.small_model.train_vae --minutes 8 --resume OUT --out OUT2

Writes OUT/vae (a diffusers folder with the averaged weights), OUT/weights.safetensors (the raw weights, to go on
from), OUT/progress.json and OUT/log.csv, every two minutes and at the end. Loss: L1 + MSE, and little of KL.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from .clip_vae import CONFIG, CONVOLUTIONS, ClipVae
from .files import Stopwatch, fresh_folder, say
from .render import HIGH, LOW, render
from .scenes import ASPECT, LONGEST, MOTIONS, SPEED, STRIP, Scene, scenes

KL = 1e-4  # per latent value: noise of about a hundredth of their spread, and no channel that is left unused
EMA = 0.999


@dataclass
class Phase:
    """What a batch is: so many crops of so many frames, `crop` pixels square."""

    batch: int
    frames: int
    crop: int


@dataclass
class Progress:
    """How far training is, over all runs: seconds and steps."""

    seconds: float = 0.0
    steps: int = 0


def crops(pool: list[Scene], phase: Phase, rng: torch.Generator, device: torch.device) -> torch.Tensor:
    """A batch `[batch, 3, frames, crop, crop]` in [-1, 1]: one of the two sizes, mostly around something to see."""
    size = (HIGH, LOW)[int(torch.randint(2, (1,), generator=rng))]
    chosen = [pool[i] for i in torch.randint(len(pool), (phase.batch,), generator=rng).tolist()]
    first = torch.randint(LONGEST - phase.frames + 1, (phase.batch,), generator=rng).tolist()
    corners = []
    for scene, start in zip(chosen, first, strict=True):
        x, y = _look_at(scene, start + phase.frames / 2, rng)
        jitter = (torch.rand(2, generator=rng) - 0.5) * phase.crop * 0.7
        place = []
        for centre, extent, shift in ((y, size[0], jitter[0]), (x, size[1], jitter[1])):
            corner = round(centre * size[0] + extent / 2 + float(shift) - phase.crop / 2)
            place.append(min(max(corner, 0), max(extent - phase.crop, 0)))
        corners.append(place)
    crop = (min(phase.crop, size[0]), min(phase.crop, size[1]))
    return render(chosen, size, phase.frames, device, first=first, corners=torch.tensor(corners), crop=crop)


def _look_at(scene: Scene, time: float, rng: torch.Generator) -> tuple[float, float]:
    kind = float(torch.rand(1, generator=rng))
    if kind < 0.65:
        thing = scene.things[int(torch.randint(len(scene.things), (1,), generator=rng))]
        travel = MOTIONS[scene.motion]
        return thing.x + travel[0] * SPEED * time, thing.y + travel[1] * SPEED * time
    if kind < 0.85:
        side = 1 if kind < 0.75 else -1
        return side * (ASPECT / 2 - STRIP / 2), scene.marker.y + scene.marker.speed * time
    x, y = (torch.rand(2, generator=rng) - 0.5).tolist()
    return x * ASPECT, y


def loss_of(model: ClipVae, video: torch.Tensor, dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """L1 + MSE of the round trip through a drawn latent, and `KL` times the latents' KL to a unit Gaussian."""
    mean, log_variance = (x.float() for x in model.encode(video.to(dtype)))
    noise = torch.randn(mean.shape, generator=rng, device=mean.device)
    decoded = model.decode((mean + (log_variance / 2).exp() * noise).to(dtype)).float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    difference = decoded - video
    return difference.abs().mean() + difference.square().mean() + KL * kl


@torch.no_grad()
def round_trip(model: ClipVae, video: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Whole clips through the mean latent and back, in [-1, 1]; float32."""
    return model.decode(model.encode(video.to(dtype))[0]).float().clamp(-1, 1)


def psnr(model: ClipVae, size: tuple[int, int], frames: int, clips: int, device, dtype) -> list[float]:
    """PSNR in dB of each of the first test clips, one at a time, whole."""
    values = []
    for scene in scenes("test", 0, clips):
        video = render([scene], size, frames, device)
        error = (round_trip(model, video, dtype) - video).square().mean()
        values.append(-10 * math.log10(float(error) / 4 + 1e-12))
    return values


@torch.no_grad()
def start_as_images(vae: AutoencoderKLWan) -> None:
    """Weights of a new network such that frames do not mix: what still images taught then holds for video at once.

    A convolution sees the present frame only; of four frames the last is kept, and decoding repeats it. Convolutions
    keep the variance of what they get, where the library's own start makes it a third: the signal would fade on its
    way through, steps would be large against the weights, and nothing would be learned for long. Latents start with
    little noise for the same reason.
    """
    for name, module in vae.named_modules():
        if name.endswith("time_conv"):
            size = module.weight.shape[1]
            module.weight.zero_()
            module.weight[:, :, 2, 0, 0] = torch.eye(size).repeat(module.weight.shape[0] // size, 1)
            module.bias.zero_()
        elif isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            fan_in = module.weight.shape[1] * module.weight[0, 0].numel()
            if module.kernel_size == (3, 3, 3):
                module.weight[:, :, :2].zero_()
                fan_in //= 3
            # From a uniform spread of 1 / sqrt(3 * (whole fan-in)).
            module.weight.mul_((3 * module.weight[0].numel() / fan_in) ** 0.5)
    vae.quant_conv.bias[vae.config.z_dim :] = -8.0


def rate(done: float, peak: float) -> float:
    """Learning rate after `done` (0 to 1) of all training: cosine from `peak` to a twentieth."""
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def pick_convolution(vae: AutoencoderKLWan, phase: Phase, pool, device, dtype, compiled: bool) -> str:
    """The faster way to convolve here, from three steps of each after two to warm up."""
    times = {}
    rng, noise = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)
    for name in CONVOLUTIONS:
        model = ClipVae(vae, name, compiled)
        for step in range(5):
            if step == 2:
                _wait(device)
                start = time.perf_counter()
            loss_of(model, crops(pool, phase, rng, device), dtype, noise).backward()
        _wait(device)
        times[name] = (time.perf_counter() - start) / 3
        vae.zero_grad(set_to_none=True)
    say("seconds a step by convolution: " + ", ".join(f"{name} {value:.3f}" for name, value in times.items()))
    return min(times, key=times.get)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.small_model.train_vae", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--resume", type=Path, help="folder of a former run to go on from")
    parser.add_argument("--minutes", type=float, default=8, help="wall clock of this run, from start to last file")
    parser.add_argument("--total-minutes", type=float, default=16, help="of all runs: what the learning rate follows")
    parser.add_argument("--images", type=float, default=0.15, help="part of all training that is on still images")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--image-batch", type=int, default=64)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--frames", type=int, default=13)
    parser.add_argument("--crop", type=int, default=160)
    parser.add_argument("--pool", type=int, default=8000, help="scenes to draw crops from")
    parser.add_argument("--clips", type=int, default=4, help="held-out clips of each size to measure")
    parser.add_argument("--convolution", choices=("auto", *CONVOLUTIONS), default="auto")
    parser.add_argument("--no-compile", action="store_true", help="do not fuse norm and activation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    train(args)


def train(args: argparse.Namespace) -> None:
    """Run one stretch of training as the arguments ask; see the top of this file."""
    watch = Stopwatch(args.minutes * 60)
    fresh_folder(args.out)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIG)
    start_as_images(vae)
    average = AutoencoderKLWan(**CONFIG).requires_grad_(False)
    average.load_state_dict(vae.state_dict())
    progress = Progress()
    if args.resume:
        vae.load_state_dict(load_file(args.resume / "weights.safetensors"))
        average.load_state_dict(load_file(args.resume / "vae" / "diffusion_pytorch_model.safetensors"))
        progress = Progress(**json.loads((args.resume / "progress.json").read_text()))
    vae.to(device), average.to(device)
    pool = scenes("train", 0, args.pool)
    say(f"{args.pool} scenes drawn; {watch.used():.0f} s")
    still = Phase(args.image_batch, 1, args.crop)
    moving = Phase(args.batch, args.frames, args.crop)
    compiled = device.type == "cuda" and not args.no_compile
    how = args.convolution
    if how == "auto":
        how = pick_convolution(vae, moving, pool, device, dtype, compiled)
    model, averaged = ClipVae(vae, how, compiled), ClipVae(average, how, compiled)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
    rng = torch.Generator().manual_seed(1 + progress.steps)
    noise = torch.Generator(device).manual_seed(1 + progress.steps)
    before, first_step, last_save, last_say = progress.seconds, progress.steps, watch.used(), 0.0
    reserve = min(25.0, watch.limit * 0.3)
    rows: list[dict] = []
    losses: list[torch.Tensor] = []
    while watch.used() < watch.limit - reserve:
        progress.seconds = before + watch.used()
        done = progress.seconds / (args.total_minutes * 60)
        warm = min(1.0, (progress.steps - first_step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = rate(done, args.lr) * warm
        loss = loss_of(model, crops(pool, still if done < args.images else moving, rng, device), dtype, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress.steps += 1
        decay = min(EMA, (1 + progress.steps) / (10 + progress.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - decay)
        losses.append(loss.detach())
        if watch.used() - last_say > 15:
            value = float(torch.stack(losses).mean())
            say(f"{progress.seconds:.0f} s, step {progress.steps}: loss {value:.4f}")
            if not math.isfinite(value):
                raise SystemExit("the loss is not finite; the last files written are from before that.")
            losses, last_say = [], watch.used()
        if watch.used() - last_save > 120:
            started = watch.used()
            rows.append(_save(args, average, averaged, vae, progress, device, dtype, rows))
            last_save = watch.used()
            reserve = max(reserve, 1.5 * (last_save - started))
    _save(args, average, averaged, vae, progress, device, dtype, rows)
    say(f"done: {args.out}; {watch.used():.0f} s of {watch.limit:.0f}")


def _save(args, average, averaged, vae, progress: Progress, device, dtype, rows: list[dict]) -> dict:
    args.out.mkdir(parents=True, exist_ok=True)
    average.save_pretrained(args.out / "vae")
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, args.out / "weights.safetensors")
    (args.out / "progress.json").write_text(json.dumps(asdict(progress)) + "\n")
    row = {"seconds": round(progress.seconds), "steps": progress.steps}
    for name, size in (("high", HIGH), ("low", LOW)):
        values = psnr(averaged, size, args.frames if device.type == "cpu" else LONGEST, args.clips, device, dtype)
        row[f"{name}_mean"], row[f"{name}_min"] = (round(sum(values) / len(values), 2), round(min(values), 2))
    say("PSNR in dB: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    with open(args.out / "log.csv", "w", newline="") as file:
        table = csv.DictWriter(file, row)
        table.writeheader()
        table.writerows([*rows, row])
    return row


if __name__ == "__main__":
    main()
