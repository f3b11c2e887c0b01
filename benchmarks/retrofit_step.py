"""Where the time of a training step goes: a recipe of the small model's on made-up clips, by parts and by kernels.

    python benchmarks/retrofit_step.py tools/small_model/recipes/dense-image.toml --frames 1 --out step.txt
    torchrun --standalone --nproc-per-node 4 benchmarks/retrofit_step.py …/dense-image.toml --frames 1

`--padded` pads texts to the model's full length, as before short texts (`t3/retrofit/text.py`). Clips are noise: their
values do not matter to the time. Changes to the recipe: `--set train.batch=512`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from headless_4k import machine

from t3.retrofit import data, model
from t3.retrofit.config import read_config
from t3.retrofit.loop import Loop
from t3.retrofit.session import make_accelerator, start
from t3.retrofit.shards import ShardWriter
from tools.small_model.encode import SIZES
from tools.small_model.init_dit import prepare_folder

ROOT = Path(__file__).resolve().parent.parent
CLIPS = 64


def write_clips(folder: Path, size: tuple[int, int], frames: int) -> None:
    """A data set of noise with captions of 6 to 19 tokens."""
    source = torch.Generator().manual_seed(0)
    height, width = size
    shape = 16, (frames + 3) // 4, height // 8, width // 8
    with ShardWriter(folder) as writer:
        writer.empty_text(torch.randn(1, 128, generator=source))
        for i in range(CLIPS):
            text = torch.randn(6 + i % 14, 128, generator=source)
            facts = {"frames": frames, "height": height, "width": width, "fps": 16}
            writer.add(torch.randn(shape, generator=source), text, caption="", source=str(i), **facts)


class Timer:
    """Milliseconds of repeated work, the device's included."""

    def __init__(self, cuda: bool) -> None:
        self.wait = torch.cuda.synchronize if cuda else lambda: None

    def __call__(self, work, times: int) -> float:
        work()
        self.wait()
        found = []
        for _ in range(3):
            begin = time.perf_counter()
            for _ in range(times):
                work()
            self.wait()
            found.append((time.perf_counter() - begin) / times * 1e3)
        return round(statistics.median(found), 3)


def measure(session, loop, times: int) -> dict[str, float]:
    """Milliseconds of a step and of its parts, each alone."""
    stage, timer = session.config.stages[0], Timer(session.accelerator.device.type == "cuda")
    batch = session.feeder.example(session.feeder.pools(stage)[0], stage)

    def both():
        loop.backward(batch, stage)

    def forward():
        with torch.no_grad():
            session.objective(batch, stage)

    def update():
        session.accelerator.clip_grad_norm_(session.parameters, session.config.train.clip)
        session.update_weights()
        if session.average is not None:
            session.average.update(1000)

    def step():
        loop.agree()
        loop.take_step(stage, 0.5)

    rows = {"step": timer(step, times), "forward and backward": timer(both, times), "forward": timer(forward, times)}
    rows |= {"clip, optimiser, average": timer(update, times)}
    session.forget_gradients()
    rows |= {"batch": timer(lambda: session.feeder.next(stage), times), "agree": timer(loop.agree, times)}
    return rows


def kernels(session, loop, steps: int = 5) -> str:
    """A profiler's table of a few steps."""
    stage = session.config.stages[0]
    kinds = [torch.profiler.ProfilerActivity.CPU]
    on_card = session.accelerator.device.type == "cuda"
    if on_card:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(steps):
            loop.take_step(stage, 0.5)
        if on_card:
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if on_card else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=90)


def main() -> None:
    """Measure one recipe and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--size", choices=SIZES, default="low")
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--times", type=int, default=20, help="of each part, three times (default: 20)")
    parser.add_argument("--padded", action="store_true", help="texts at the model's full length")
    parser.add_argument("--no-kernels", dest="kernels", action="store_false")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--out", type=Path, help="text, appended to")
    options = parser.parse_args()
    out = options.out and options.out.absolute()
    recipe = options.recipe.absolute()
    if options.padded:
        data.rows_for = lambda longest, tokens: tokens
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # recipes name folders under output/
        root = Path("output/small")
        root.mkdir(parents=True)
        prepare_folder(root)
        bare = read_config(recipe, options.set)
        for name in {*(entry.folder for entry in bare.data.sets), *bare.data.validation}:
            write_clips(Path(name), SIZES[options.size], options.frames)
        config = read_config(recipe, [*options.set, 'model.dit=["output/small/model/transformer"]'])
        found = model.find(config.model)
        config = model.at_its_noise(config, found)
        clips = data.open_clips(config.data, found.config, config.model.text_tokens)
        accelerator = make_accelerator(config)
        begin = time.perf_counter()
        session = start(config, found, clips, accelerator)
        loop = Loop(session, Path(folder) / "run", time.monotonic())
        loop.warm_up()
        what = {"recipe": recipe.name, "frames": options.frames, "size": options.size, "set": options.set}
        what |= {"processes": accelerator.num_processes, "batch": config.train.batch, "text rows": clips.rows}
        what |= {"start and compiling, s": round(time.perf_counter() - begin, 1)}
        lines = [json.dumps(machine()), json.dumps(what)]
        lines.append(json.dumps({"ms": measure(session, loop, options.times)}))
        if options.kernels:
            lines.append(kernels(session, loop))
        if session.main:
            print("\n".join(lines), flush=True)
            if out:
                with out.open("a") as stream:
                    stream.write("\n".join(lines) + "\n")
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
