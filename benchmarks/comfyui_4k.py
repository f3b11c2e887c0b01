"""Time T3 Attention in ComfyUI at 4K: its own model, loader, sampler and patcher, random weights of the real sizes.

    python benchmarks/comfyui_4k.py --models 1.3b 5b --out results.json

Needs a GPU and ComfyUI, from `python tests/host/install.py` or elsewhere (`--comfyui FOLDER`). Speed and memory do not
depend on what the weights are. Forward passes are timed by the host's step callback, between two synchronisations of
the card; a row gives the first (which loads, warms up or compiles) and the median of the others.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/host"))

import host_comfy
import torch

MODELS = {
    "1.3b": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "in_dim": 16, "out_dim": 16},
    "5b": {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "in_dim": 48, "out_dim": 48},
}
LATENTS = {"1.3b": (1, 16, 21, 272, 480), "5b": (1, 48, 21, 136, 240)}
TINY = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 5}
TINY_LATENT = (6, 34, 60)


def write_weights(path: Path, sizes: dict) -> None:
    """A diffusion model file in the published layout, bfloat16, random."""
    import comfy.ldm.wan.model
    import comfy.memory_management
    import comfy.ops
    from safetensors.torch import save_file

    # With dynamic VRAM the host's layers have no weights until they are loaded.
    with mock.patch.object(comfy.memory_management, "aimdo_enabled", False):
        model = comfy.ldm.wan.model.WanModel(
            model_type="t2v", **sizes, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = {}
    for name, parameter in model.state_dict().items():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "modulation" not in name else 0.2
        noise = torch.randn(parameter.shape, device=device) * scale
        state[name] = (noise + (1.0 if "norm" in name else 0.0)).to(torch.bfloat16).cpu()
    save_file(state, path)


def text_conds(width: int = 4096):
    """Random text of full length as positive and negative condition."""
    texts = [torch.randn(1, 512, width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return [[[text, {}]] for text in texts]


class Watch:
    """A clone of a patcher that notes the batch size of each call, outside what may be compiled, and its seconds."""

    def __init__(self, patcher) -> None:
        self.batches: list[int] = []
        self.marks: list[float] = []
        self.patcher = patcher.clone()
        self.patcher.set_model_unet_function_wrapper(self._call)

    def _call(self, apply_model, arguments):
        self.batches.append(arguments["input"].shape[0])
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    def mark(self, *_) -> None:
        torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def sample(patcher, latent, steps: int, cfg: float) -> dict:
    """One sampling as KSampler does it; seconds per step, peak memory, how condition and negative were run."""
    import comfy.model_management
    import comfy.sample

    comfy.model_management.soft_empty_cache()
    torch.cuda.reset_peak_memory_stats()
    latent = torch.zeros(latent)
    noise = comfy.sample.prepare_noise(latent, 1)
    watch = Watch(patcher)
    watch.mark()
    out = comfy.sample.sample(
        watch.patcher, noise, steps, cfg, "euler", "simple", *text_conds(), latent, seed=1, callback=watch.mark
    )
    seconds = watch.seconds()
    assert torch.isfinite(out).all(), "sampling gave values that are not numbers"
    return {
        # Loading the model is part of the first step.
        "first_s": round(seconds[0], 2),
        "step_s": round(statistics.median(seconds[1:]), 2) if seconds[1:] else None,
        "batches": watch.batches,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
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


def measure(pack, name: str, tiny: bool, only: list[str]) -> dict:
    import comfy.sd
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    sizes, latent = dict(MODELS[name]), LATENTS[name]
    if tiny:
        sizes.update(TINY)
        latent = (*latent[:2], *TINY_LATENT)

    def t3(model, **changes):
        inputs = {"plan": "auto", "backend": "auto", "memory": "auto", "start_percent": 0.0, "end_percent": 1.0}
        inputs |= {"dense_blocks": "", "verbose": True, **changes}
        return pack.nodes.attention.T3Attention.execute(model, **inputs).result[0]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_weights(path, sizes)

        def load(dtype=None):
            return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype} if dtype else {})

        model = load()
        patched = t3(model)
        rows = {"weights_gib": round(path.stat().st_size / 2**30, 2), "patcher": type(model).__name__}
        estimating = pack.nodes.estimate
        rows["estimate_gib"] = {
            "host": round(model.model.memory_required(latent) / 2**30, 1),
            "T3": round(estimating.memory_required(model.model, latent) / 2**30, 1),
        }
        runs = {
            "one forward a step (cfg 1)": lambda: sample(patched, latent, 4, 1.0),
            "guidance (cfg 5)": lambda: sample(patched, latent, 3, 5.0),
            "memory lean": lambda: sample(t3(model, memory="lean"), latent, 3, 1.0),
            "the host's attention in windows": lambda: sample(t3(pass_through(model)), latent, 3, 1.0),
            "one block of all dense": lambda: sample(t3(model, dense_blocks="1"), latent, 2, 1.0),
            "weights in fp8": lambda: sample(t3(load(torch.float8_e4m3fn)), latent, 3, 1.0),
            "torch.compile": lambda: sample(TorchCompileModel.execute(patched, "inductor").result[0], latent, 3, 1.0),
            "cancel_s": lambda: cancel(patched, latent, 0.1 if tiny else 4.0),
        }
        for label, run in runs.items():
            if only and not any(word in label for word in only):
                continue
            try:
                rows[label] = run()
            except Exception as error:
                rows[label] = f"failed: {type(error).__name__}: {error}"
            print(name, label, json.dumps(rows[label]), flush=True)
        return rows


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
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name has one of these words")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.dynamic_vram:
        import comfy_aimdo.control

        comfy_aimdo.control.init()  # before anything touches the card
    pack = host_comfy.load(options.comfyui.resolve(), cpu=False)
    results = {"machine": machine(), "dynamic_vram": options.dynamic_vram and enable_dynamic_vram()}
    with torch.inference_mode():
        for name in options.models:
            results[name] = measure(pack, name, options.tiny, options.only)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
