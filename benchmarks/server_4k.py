"""The pack in a real ComfyUI server on a GPU, with its default flags, at 4K: seconds, memory, and what came out.

    python benchmarks/server_4k.py --out results.json

Samples in a process by the host's own functions first, without a server and its dynamic VRAM. Then, in the server, runs
the shipped 4K text-to-video workflow, two steps with guidance and the decode to video; and its sampling alone with a
T3 LoRA, as at first once more, and with the host's compile node after and before T3 Attention. Latents are compared
with those of the one process. Random weights of the real sizes (Wan2.1 1.3B and its VAE); the text encoder is as small
as ComfyUI's loader lets it be.
Needs a GPU and ComfyUI (`python tests/host/install.py`, or `--comfyui FOLDER`). About nine minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/host"))

import torch
from host_server import HostServer
from install import COMFYUI, ROOT
from keep import parse_with_out, save
from most import Most

from tools.notes import T3_LORA, TEXT_ENCODER, WAN21

WORKFLOW = ROOT / "workflows/api/Wan2.1 1.3B T3 4K text-to-video.json"
SIZES = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
TINY = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 5}
TEXT_WIDTH = 768  # of the small text encoder
GIB = 2**30


def make_models(folder: Path, tree: Path, tiny: bool) -> None:
    """The files that the workflow loads, and a LoRA."""
    import host_comfy

    host_comfy.load(tree)
    import host_models
    import host_standins
    from decode_4k import weights
    from safetensors.torch import save_file

    from t3 import Plan
    from t3.weights import T3Metadata

    sizes = TINY if tiny else SIZES
    files = {file: folder / file.folder / file.name for file in (WAN21.dit, WAN21.vae, TEXT_ENCODER, T3_LORA)}
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    host_models.write_dit(files[WAN21.dit], dtype=torch.bfloat16, text_dim=TEXT_WIDTH, **sizes)
    save_file(weights("2.1", tiny), files[WAN21.vae])
    state, metadata = host_standins.BUILDERS[TEXT_ENCODER]()
    save_file(state, files[TEXT_ENCODER], metadata=metadata)
    random, rank, width = torch.Generator().manual_seed(7), 64, sizes["dim"]
    lora = {}
    for layer in range(sizes["num_layers"]):
        for name in "qkvo":
            key = f"diffusion_model.blocks.{layer}.self_attn.{name}"
            lora[f"{key}.lora_A.weight"] = torch.randn(rank, width, generator=random).bfloat16() * width**-0.5
            lora[f"{key}.lora_B.weight"] = torch.randn(width, rank, generator=random).bfloat16() * 0.01
    header = T3Metadata(plan=Plan.preset("wan2.1-4k"), rank=rank, writer="benchmark").to_header()
    save_file(lora, files[T3_LORA], metadata=header)


def number(graph: dict, kind: str) -> str:
    return next(key for key, node in graph.items() if node["class_type"] == kind)


def shipped(tiny: bool) -> dict:
    """The workflow, two steps, with its latents saved as well."""
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    sampler = number(graph, "KSampler")
    graph[sampler]["inputs"]["steps"] = 2
    if tiny:
        graph[number(graph, "T3EmptyLatent")]["inputs"].update(width=480, height=272, frames=21)
    graph["latents"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": [sampler, 0], "filename_prefix": "latents/t3"},
    }
    return graph


def sampling_only(graph: dict) -> dict:
    return {k: v for k, v in graph.items() if v["class_type"] not in ("T3VAEDecodeToVideo", "SaveVideo", "PreviewAny")}


def insert(graph: dict, before: str, kind: str, **inputs) -> dict:
    """The graph with one more model node, right before the only node of the kind `before`."""
    graph = copy.deepcopy(graph)
    node = graph[number(graph, before)]
    graph[kind] = {"class_type": kind, "inputs": {"model": node["inputs"]["model"], **inputs}}
    node["inputs"]["model"] = [kind, 0]
    return graph


def in_use() -> int:
    """Memory in use on the card, by all processes, in bytes."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def latents_of(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(path)["latent_tensor"].float()


def run(server: HostServer, graph: dict, idle: int, expected: torch.Tensor) -> dict:
    """Seconds, memory, distance of the latents from those expected, and what the pack logged."""
    seen = len(server.log())
    with Most(in_use, every=0.05) as memory:
        start = time.perf_counter()
        history = server.run(graph, limit=500)
        seconds = time.perf_counter() - start
    saved = server.saved(history)
    latents = latents_of(next(path for path in saved if path.suffix == ".latent"))
    return {
        "seconds": round(seconds, 1),
        "card_gib": round((memory.most - idle) / GIB, 1),
        "finite": bool(torch.isfinite(latents).all()),
        "from_one_process": distance(latents, expected),
        "log": [line for line in server.log()[seen:].splitlines() if "T3" in line or "[ERROR]" in line][:12],
        "saved": [path.name for path in saved],
    }


def distance(latents: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS."""
    return float(f"{((latents - expected).norm() / expected.norm()).item():.3g}")


def rows(server: HostServer, options, idle: int, expected: torch.Tensor, results: dict, keep) -> None:
    graph = shipped(options.tiny)
    attention = number(graph, "T3Attention")
    sampling = sampling_only(graph)
    again = copy.deepcopy(sampling)
    again[attention]["inputs"]["verbose"] = True  # else ComfyUI answers from its cache
    compiled = {"backend": "inductor"}
    cases = {
        "as shipped, with decode to video": graph,
        "with a T3 LoRA": insert(
            sampling, "ModelSamplingSD3", "T3RetrofitLoader", file=f"{T3_LORA.folder}/{T3_LORA.name}", strength=1.0
        ),
        "as at first, again": again,
        "T3 Attention, then TorchCompileModel": insert(sampling, "KSampler", "TorchCompileModel", **compiled),
        "TorchCompileModel, then T3 Attention": insert(sampling, "T3Attention", "TorchCompileModel", **compiled),
    }
    for label, case in cases.items():
        if options.only and not any(word in label for word in options.only):
            continue
        try:
            results[label] = run(server, case, idle, expected)
        except (AssertionError, TimeoutError) as problem:
            results[label] = f"failed: {problem}"
        print(label, json.dumps(results[label])[:1500], flush=True)
        keep()


def in_process(base: Path, tree: Path, tiny: bool) -> None:
    """The same sampling by the host's own functions, without server and dynamic VRAM; writes `in_process.latent`."""
    import host_comfy

    host_comfy.load(tree, cpu=not torch.cuda.is_available())
    import folder_paths
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    from safetensors.torch import save_file

    import nodes

    folder_paths.add_model_folder_path("diffusion_models", str(base / "models/diffusion_models"))
    folder_paths.add_model_folder_path("text_encoders", str(base / "models/text_encoders"))
    graph = shipped(tiny)
    pack = sys.modules[host_comfy.PACK]

    def inputs(kind: str, **links) -> dict:
        values = graph[number(graph, kind)]["inputs"]
        return {**{key: value for key, value in values.items() if not isinstance(value, list)}, **links}

    with torch.inference_mode():
        (model,) = nodes.UNETLoader().load_unet(**inputs("UNETLoader"))
        (clip,) = nodes.CLIPLoader().load_clip(**inputs("CLIPLoader"))
        model = ModelSamplingSD3().patch(model, inputs("ModelSamplingSD3")["shift"])[0]
        model = pack.nodes.attention.T3Attention.execute(**inputs("T3Attention", model=model)).result[0]
        latent = pack.nodes.latent.T3EmptyLatent.execute(**inputs("T3EmptyLatent")).result[0]
        sampler = graph[number(graph, "KSampler")]["inputs"]
        texts = [graph[sampler[name][0]]["inputs"]["text"] for name in ("positive", "negative")]
        positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in texts)
        links = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
        (out,) = nodes.KSampler().sample(**inputs("KSampler", **links))
    save_file({"latent_tensor": out["samples"].contiguous().cpu()}, base / "in_process.latent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=COMFYUI)
    parser.add_argument("--flags", nargs="*", default=[], metavar="FLAG", help="of the server, without the dashes")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="rows of the server whose name has such a word"
    )
    parser.add_argument("--step", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parse_with_out(parser)
    tree = options.comfyui.resolve()
    if options.step:
        name, folder = options.step
        step = {"make": make_models, "sample": in_process}[name]
        step(Path(folder), tree, options.tiny)
        return
    results: dict = {"machine": machine(options)}

    def keep() -> None:
        save(options.out, results)

    def child(name: str, folder: Path) -> None:
        words = ["--comfyui", str(tree), "--step", name, str(folder), *(["--tiny"] if options.tiny else [])]
        subprocess.run([sys.executable, __file__, *words], check=True)

    idle = in_use()
    with tempfile.TemporaryDirectory() as folder:
        base, models = Path(folder) / "base", Path(folder) / "models"
        base.mkdir()
        child("make", models)
        (base / "models").symlink_to(models, target_is_directory=True)
        start = time.perf_counter()
        child("sample", base)
        results["in one process"] = {"seconds": round(time.perf_counter() - start, 1)}
        print("in one process", json.dumps(results["in one process"]), flush=True)
        expected = latents_of(base / "in_process.latent")
        flags = [f"--{flag}" for flag in options.flags]
        with HostServer(base, flags=flags, tree=tree) as server:
            rows(server, options, idle, expected, results, keep)
        results["start"] = [line for line in server.log().splitlines() if "VRAM" in line or "attention" in line][:8]
        keep()


def machine(options) -> dict:
    from importlib.metadata import version

    flags = f" --flags {' '.join(options.flags)}" if options.flags else ""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "comfy-kitchen": version("comfy-kitchen"),
        "date": time.strftime("%Y-%m-%d"),
        "command": f"benchmarks/server_4k.py{flags}",
    }


if __name__ == "__main__":
    main()
