"""Time T3 Attention in ComfyUI at 4K: its own model, loader, sampler and patcher, random weights of the real sizes.

    python benchmarks/comfyui_4k.py --models 1.3b 5b --out results.json
    python benchmarks/comfyui_4k.py --only "guidance, memory" --cap 16

Needs a GPU and ComfyUI, from `python tests/host/install.py` or elsewhere (`--comfyui FOLDER`). Speed and memory do not
depend on what the weights are. Forward passes are timed by the host's step callback, between two synchronisations of
the card; a row gives the first (which loads, warms up or compiles) and the median of the others. Peaks are of all that
torch has allocated, weights included. `--cap` allows the process so many GiB of the card.

Rows called "estimate" set the peak beside the weights against what the host was asked to keep free, for models that
meet more than a text beside the video. Those have one cycle of the plan's layers: memory does not depend on how many.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/host"))
# As the host's own start does. It decides what fits beside what: torch's other allocator leaves holes.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")

import decode_4k
import host_comfy
import torch
from keep import parse_with_out, save

MODELS = {
    "1.3b": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "in_dim": 16, "out_dim": 16},
    "5b": {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "in_dim": 48, "out_dim": 48},
    "14b-fp8": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "in_dim": 16, "out_dim": 16},
}
LATENTS = {"1.3b": (1, 16, 21, 272, 480), "5b": (1, 48, 21, 136, 240), "14b-fp8": (1, 16, 21, 272, 480)}
# What models of other kinds have that text to video has not, or not so.
KINDS = {
    "text to video": {},
    "image to video": {"model_type": "i2v", "in_dim": 36},
    "a reference image": {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
    "a frame in context": {},
    "VACE": {"model_type": "vace", "vace_in_dim": 96, "vace_layers": 5},
}
CYCLE = 5  # layers after which a plan's windows repeat
VAES = {"1.3b": "2.1", "5b": "2.2", "14b-fp8": "2.1"}
TINY = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 5}
TINY_LATENT = (6, 34, 60)
KERNELS = 30  # of a profiled step, that are listed


def write_weights(path: Path, sizes: dict, matrices: torch.dtype = torch.bfloat16) -> None:
    """A diffusion model file in the published layout, random; bfloat16, and the blocks' matrices as told."""
    import comfy.ldm.wan.model
    import comfy.memory_management
    import comfy.ops
    from safetensors.torch import save_file

    kind = comfy.ldm.wan.model.VaceWanModel if "vace_layers" in sizes else comfy.ldm.wan.model.WanModel
    options = {"device": "meta", "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init}
    # With dynamic VRAM the host's layers have no weights until they are loaded.
    with mock.patch.object(comfy.memory_management, "aimdo_enabled", False):
        model = kind(**{"model_type": "t2v", **sizes, **options})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = {}
    for name, parameter in model.state_dict().items():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "modulation" not in name else 0.2
        noise = torch.randn(parameter.shape, device=device) * scale
        in_block = name.startswith(("blocks.", "vace_blocks."))
        dtype = matrices if in_block and parameter.ndim == 2 else torch.bfloat16
        state[name] = (noise + (1.0 if "norm" in name else 0.0)).to(dtype).cpu()
    save_file(state, path)


def text_conds(width: int = 4096):
    """Random text of full length as positive and negative condition."""
    texts = [torch.randn(1, 512, width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return [[[text, {}]] for text in texts]


def conditions(kind: str, latent) -> dict:
    """What nodes put into a condition for a model of this kind of `KINDS`, for latents of the shape `latent`."""
    import comfy.clip_vision

    batch, channels, frames, *sides = latent

    def like(channels: int, frames: int = frames) -> torch.Tensor:
        return torch.randn(batch, channels, frames, *sides, generator=torch.Generator().manual_seed(3))

    def image(channels: int) -> dict:
        seen = comfy.clip_vision.Output()
        seen.penultimate_hidden_states = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(4))
        mask = torch.zeros(batch, 1, frames, *sides)
        return {"concat_latent_image": like(channels), "concat_mask": mask, "clip_vision_output": seen}

    found = {
        "text to video": lambda: {},
        "image to video": lambda: image(channels),
        "a reference image": lambda: image(2 * channels) | {"reference_latents": [like(channels, 1)]},
        "a frame in context": lambda: {"context_latents": [like(channels, 1)]},
        "VACE": lambda: {"vace_frames": [like(32)], "vace_mask": [like(64)], "vace_strength": [1.0]},
    }
    return found[kind]()


class Watch:
    """A clone of a patcher that notes the batch size of each call, outside what may be compiled, and its seconds.

    profiled: the step, counted from 0, whose kernels `kernels` lists afterwards; None for none.
    """

    def __init__(self, patcher, profiled: int | None = None) -> None:
        self.batches: list[int] = []
        self.marks: list[float] = []
        self.profiled = profiled
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.patcher = patcher.clone()
        self.patcher.set_model_unet_function_wrapper(self._call)

    def _call(self, apply_model, arguments):
        self.batches.append(arguments["input"].shape[0])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    def mark(self, *_) -> None:
        torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        if self.profiled == len(self.marks) - 1:
            self.profiler.start()
        elif self.profiled == len(self.marks) - 2:
            self.profiler.stop()

    def kernels(self) -> list[tuple[str, int, float]]:
        """Name, calls and milliseconds of the kernels of the profiled step that took longest, all others together."""
        found = sorted(self.profiler.key_averages(), key=lambda of: -of.self_device_time_total)
        rows = [(of.key[:160], of.count, round(of.self_device_time_total / 1e3, 2)) for of in found]
        rest = rows[KERNELS:]
        return [*rows[:KERNELS], ("others", sum(row[1] for row in rest), round(sum(row[2] for row in rest), 2))]

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def sample(patcher, latent, steps: int, cfg: float, beside: dict | None = None, *, profiled: bool = False) -> dict:
    """One sampling as KSampler does it; seconds per step, peak memory, how condition and negative were run.

    beside: what the condition and the negative hold beside the text. profiled: one step more, with its kernels.
    """
    import comfy.model_management
    import comfy.sample

    comfy.model_management.soft_empty_cache()
    torch.cuda.reset_peak_memory_stats()
    latent = torch.zeros(latent)
    noise = comfy.sample.prepare_noise(latent, 1)
    conds = [[[text, held | (beside or {})] for text, held in cond] for cond in text_conds()]
    watch = Watch(patcher, steps if profiled else None)
    watch.mark()
    steps += profiled
    out = comfy.sample.sample(
        watch.patcher, noise, steps, cfg, "euler", "simple", *conds, latent, seed=1, callback=watch.mark
    )
    seconds = watch.seconds()[: steps - profiled]
    assert torch.isfinite(out).all(), "sampling gave values that are not numbers"
    return {
        # Loading the model is part of the first step.
        "first_s": round(seconds[0], 2),
        "step_s": round(statistics.median(seconds[1:]), 2) if seconds[1:] else None,
        "batches": watch.batches,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        **({"kernels": watch.kernels()} if profiled else {}),
    }


def against_estimate(patcher, latent, beside: dict) -> dict:
    """Two steps of a model that nothing else is loaded beside; its peak beside the weights, and what was asked for."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    before = torch.cuda.memory_allocated()
    load = comfy.model_management.load_models_gpu
    with mock.patch.object(comfy.model_management, "load_models_gpu", wraps=load) as asked:
        row = sample(patcher, latent, 2, 1.0, beside)
    weights = before + patcher.model_size()
    return row | {
        "weights_gib": round(weights / 2**30, 2),
        "beside_weights_gib": round(row["peak_gib"] - weights / 2**30, 2),
        "estimate_gib": round(asked.call_args.kwargs["minimum_memory_required"] / 2**30, 2),
    }


def cancel(patcher, latent, after: float) -> float:
    """Seconds from pressing Cancel, `after` seconds into a step, until the sampler has stopped."""
    import comfy.model_management

    pressed = []

    def press() -> None:
        pressed.append(time.perf_counter())
        comfy.model_management.interrupt_current_processing(True)

    timer = threading.Timer(after, press)
    timer.start()
    try:
        sample(patcher, latent, 3, 1.0)
    except comfy.model_management.InterruptProcessingException:
        return round(time.perf_counter() - pressed[0], 2)
    finally:
        timer.cancel()
    raise AssertionError("nothing was cancelled")


def pass_through(model):
    """A model whose user chose an attention by a node: the host's own, unchanged."""
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *args, **kw: f(*args, **kw)
    return model


def sample_and_decode(pack, patcher, latent, vae: str, tiny: bool) -> dict:
    """Two steps with guidance, then T3 VAE Decode to Video, as one graph would run them; peaks of both."""
    import comfy.model_management
    import comfy.sample

    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    empty = torch.zeros(latent)
    noise = comfy.sample.prepare_noise(empty, 1)
    samples = comfy.sample.sample(patcher, noise, 2, 5.0, "euler", "simple", *text_conds(), empty, seed=1)
    sampled, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    # The host moves the diffusion model out of the way as its loader asks for room.
    decoder = decode_4k.host_vae(decode_4k.weights(vae, tiny and vae == "2.1"), torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        video, report = pack.nodes.vae_decode.T3VAEDecodeToVideo.execute({"samples": samples}, decoder, 30.0).result
        video.save_to(str(Path(folder) / "clip.mp4"))
        size = (Path(folder) / "clip.mp4").stat().st_size
    return {
        "sample_s": round(sampled, 1),
        "decode_and_save_s": round(time.perf_counter() - started - sampled, 1),
        "sample_peak_gib": round(peak / 2**30, 2),
        "decode_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "video_bytes": size,
        "report": report,
    }


def measure(
    pack, name: str, tiny: bool, only: list[str], layers: int | None, profiled: bool, keep: Callable[[dict], None]
) -> None:
    """`keep` gets all rows so far after each. profiled: the plain forward and the compiled one are."""
    import comfy.sd
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    sizes, latent = dict(MODELS[name]), LATENTS[name]
    if tiny:
        sizes.update(TINY)
        latent = (*latent[:2], *TINY_LATENT)
    if layers:
        sizes["num_layers"] = layers

    def t3(model, **changes):
        inputs = {"plan": "auto", "backend": "auto", "memory": "auto", "start_percent": 0.0, "end_percent": 1.0}
        inputs |= {"dense_blocks": "", "verbose": True, **changes}
        return pack.nodes.attention.T3Attention.execute(model, **inputs).result[0]

    def by_way(model, way):
        """One way that blocks may share out their work, whatever is free."""
        with mock.patch.object(pack.nodes.estimate, "ways", lambda model: [way]):
            return sample(t3(model, memory="fast"), latent, 3, 1.0)

    def of_kind(folder: str, kind: str, memory: str) -> dict:
        """A model of this kind of `KINDS` against its estimate."""
        path = Path(folder) / "kind.safetensors"
        write_weights(path, sizes | KINDS[kind] | {"num_layers": CYCLE}, matrices)
        model = comfy.sd.load_diffusion_model(str(path))
        return against_estimate(t3(model, memory=memory), latent, conditions(kind, latent))

    passes = []

    def noted(*arguments):
        passes.append(plan_forward_pass(*arguments))
        return passes[-1]

    matrices = torch.float8_e4m3fn if name.endswith("fp8") else torch.bfloat16
    plan_forward_pass = pack.nodes.patch.plan_forward_pass
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_weights(path, sizes, matrices)

        def load(dtype=None):
            return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype} if dtype else {})

        model = load()
        patched = t3(model)
        rows = {"weights_gib": round(path.stat().st_size / 2**30, 2), "patcher": type(model).__name__}
        estimating = pack.nodes.estimate
        rows["estimate_gib"] = {"host": round(model.model.memory_required(latent) / 2**30, 1)} | {
            str(way): round(estimating.memory_required(model.model, latent, None, way) / 2**30, 1)
            for way in estimating.ways(model.model.diffusion_model)
        }
        runs = {
            "one forward a step (cfg 1)": lambda: sample(patched, latent, 4, 1.0, profiled=profiled),
            "guidance (cfg 5)": lambda: sample(patched, latent, 3, 5.0),
            "memory fast": lambda: sample(t3(model, memory="fast"), latent, 3, 1.0),
            "memory lean": lambda: sample(t3(model, memory="lean"), latent, 3, 1.0),
            **{f"{way}": lambda way=way: by_way(model, way) for way in estimating.ways(model.model.diffusion_model)},
            "guidance, memory fast": lambda: sample(t3(model, memory="fast"), latent, 2, 5.0),
            "guidance, memory lean": lambda: sample(t3(model, memory="lean"), latent, 2, 5.0),
            "guidance, memory auto": lambda: sample(t3(model), latent, 2, 5.0),
            "sampling, decode": lambda: sample_and_decode(pack, patched, latent, VAES[name], tiny),
            "the host's attention in windows": lambda: sample(t3(pass_through(model)), latent, 3, 1.0),
            "one block of all dense": lambda: sample(t3(model, dense_blocks="1"), latent, 2, 1.0),
            "weights in fp8": lambda: sample(t3(load(torch.float8_e4m3fn)), latent, 3, 1.0),
            "torch.compile": lambda: sample(
                TorchCompileModel.execute(patched, "inductor").result[0], latent, 3, 1.0, profiled=profiled
            ),
            "cancel_s": lambda: cancel(patched, latent, 0.1 if tiny else 4.0),
        }
        # The other kinds are those of the latents of Wan2.1.
        kinds = KINDS if latent[1] == 16 else ["text to video"]
        for kind, memory in itertools.product(kinds, ("fast", "lean")):
            runs[f"estimate: {kind}, memory {memory}"] = partial(of_kind, folder, kind, memory)
        for label, run in runs.items():
            if only and not any(word in label for word in only):
                continue
            passes.clear()
            try:
                with mock.patch.object(pack.nodes.patch, "plan_forward_pass", noted):
                    rows[label] = run()
            except Exception as error:
                rows[label] = f"failed: {type(error).__name__}: {error}"
            if passes and isinstance(rows[label], dict):
                rows[label]["forward"] = "dense" if passes[-1] is None else passes[-1].describe()
            print(name, label, json.dumps(rows[label]), flush=True)
            keep(rows)


def enable_dynamic_vram() -> bool:
    """What the host's start does on NVIDIA cards after its imports; whether it could."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    devices = ((d.index, 0) for d in comfy.model_management.get_all_torch_devices())
    if not comfy_aimdo.control.init_devices(devices):
        return False
    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    return True


def machine() -> dict:
    from importlib.metadata import version

    import comfyui_version

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "comfyui": comfyui_version.__version__,
        "comfy-kitchen": version("comfy-kitchen"),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1.3b"])
    parser.add_argument("--comfyui", type=Path, default=host_comfy.COMFYUI)
    parser.add_argument("--dynamic-vram", action="store_true", help="as the host starts on NVIDIA cards")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has; the estimate of time is yours")
    parser.add_argument("--cap", type=float, metavar="GIB", help="of the card's memory, what this process may take")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name has one of these words")
    parser.add_argument("--profile", action="store_true", help="the kernels of one step more, for the first rows")
    options = parse_with_out(parser, card=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.dynamic_vram:
        import comfy_aimdo.control

        comfy_aimdo.control.init()  # before anything touches the card
    pack = host_comfy.load(options.comfyui.resolve(), cpu=False)
    if options.cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * 2**30 / total))
    results = {
        "cap_gib": options.cap,
        "machine": machine(),
        "dynamic_vram": options.dynamic_vram and enable_dynamic_vram(),
    }
    with torch.inference_mode():
        for name in options.models:

            def keep(rows: dict, name=name) -> None:
                results[name] = rows
                save(options.out, results)

            measure(pack, name, options.tiny, options.only, options.layers, options.profile, keep)


if __name__ == "__main__":
    main()
