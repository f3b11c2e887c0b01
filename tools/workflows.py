"""Write `workflows/`: `python -m tools.workflows URL`, where URL is a running ComfyUI that has this pack.

Each graph is described here once; `graph.py` writes it for the canvas (`workflows/`) and for the server
(`workflows/api/`), `thumbnails.py` draws its picture for the template browser.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t3.generate import DEFAULTS, EMBEDDED_DEFAULTS, EMBEDDED_PROMPT, NEGATIVE_PROMPT

from . import notes
from .graph import Column, Graph, Link
from .notes import SMALL_FILES, STYLE_LORA, T3_LORA, TEXT_ENCODER, WAN14, WAN21, WAN22, Base, Model
from .thumbnails import draw

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
SHIFT, GUIDANCE = 5.0, 5.0
STEPS, FRAMES, FPS = DEFAULTS["steps"], DEFAULTS["frames"], DEFAULTS["fps"]
QUICK_STEPS = 20
LATENTS = "latents/t3"
# Words and an end token: what the embedded model's prompt of 6 tokens lacks of 512, and the empty one of 1.
PADDING_WORDS, EMPTY_PADDING_WORDS = 505, 510
GREEN, RED = ("#232", "#353"), ("#322", "#533")
PROMPT = (
    "A small wooden sailing boat in a storm, seen from a drone that circles it slowly. Dark green waves with white "
    "foam, rain in the evening light, every rope and every drop in sharp focus, the sail torn at one corner. "
    "Cinematic, natural colours, slow motion."
)
IMAGE_PROMPT = "The scene comes to life: a light wind, slow natural motion, the camera moves forward very slowly."


def graphs() -> list[Graph]:
    """Every workflow of the pack."""
    return [
        text_to_video(WAN21),
        quick_look(WAN21),
        sample_first(WAN21),
        decode_later(WAN21),
        text_to_video(WAN22),
        image_to_video(WAN22),
        retrofitted(WAN14),
        small(),
    ]


def text_to_video(model: Model) -> Graph:
    graph = Graph(f"{model.name} T3 4K text-to-video")
    about(graph, model, notes.needs_4k(model, STEPS), notes.SETTINGS)
    latent = sampled(graph, model, "4K landscape", STEPS)
    decoded(graph, latent, model)
    return graph


def quick_look(model: Model) -> Graph:
    graph = Graph(f"{model.name} T3 1080p quick look")
    about(graph, model, notes.QUICK)
    latent = sampled(graph, model, "1080p landscape", QUICK_STEPS)
    decoded(graph, latent, model)
    empty = next(node for node in graph.nodes if node.kind == "T3EmptyLatent")
    windows = graph.column("Look at the windows", 520)
    note(windows, "T3 Plan Preview", notes.PLAN_PREVIEW)
    windows.add("T3PlanPreview", tall=960, latent=empty["latent"])
    return graph


def sample_first(model: Model) -> Graph:
    graph = Graph(f"{model.name} T3 4K step 1 sample")
    about(graph, model, notes.SAMPLE_FIRST, notes.needs_4k(model, STEPS))
    latent = sampled(graph, model, "4K landscape", STEPS)
    keep = graph.column("Keep the latents", 320)
    keep.add("SaveLatent", samples=latent, filename_prefix=LATENTS)
    return graph


def decode_later(model: Model) -> Graph:
    graph = Graph(f"{model.name} T3 4K step 2 decode")
    column = graph.column("", 440)
    note(column, "Decode later: step 2", notes.DECODE_LATER)
    note(column, "Where the file comes from", notes.files(model.vae))
    loaded = graph.column("Latents", 340).add("T3LoadLatent")
    report(graph.columns[-1], loaded["report"], "Report")
    decoded(graph, loaded["latent"], model)
    return graph


def image_to_video(model: Model) -> Graph:
    graph = Graph(f"{model.name} T3 4K image-to-video")
    about(graph, model, notes.IMAGE_TO_VIDEO, notes.needs_4k(model, STEPS), title="UNPROVEN: image to video")

    def start(column: Column, vae: Link) -> Link:
        image = column.add("LoadImage", "Start image", tall=340, image="example.png")
        size = {"width": DEFAULTS["width"], "height": DEFAULTS["height"]}
        scaled = column.add(
            "ImageScale", "Size of the video", image=image["IMAGE"], upscale_method="bilinear", crop="center", **size
        )
        encoded = column.add("T3VAEEncode", pixels=scaled["IMAGE"], vae=vae, length=FRAMES)
        report(column, encoded["report"], "How the encode went")
        return encoded["latent"]

    latent = sampled(graph, model, start, STEPS, prompt=IMAGE_PROMPT)
    decoded(graph, latent, model)
    return graph


def retrofitted(model: Base) -> Graph:
    graph = Graph(f"{model.name} T3 LoRA with style LoRA")
    column = graph.column("", 440)
    note(column, "UNPROVEN: a T3 LoRA of your own", notes.OWN_WEIGHTS)
    note(column, "Files", notes.files(model.dit, TEXT_ENCODER, model.vae, T3_LORA, STYLE_LORA))
    note(column, "How it works", f"{notes.OWN_PLAN}\n\n{notes.OWN_SIZE}")

    def weights(column: Column, base: Link) -> Link:
        t3 = column.add("T3RetrofitLoader", model=base, file=f"{T3_LORA.folder}/{T3_LORA.name}")
        report(column, t3["report"], "What was applied")
        style = column.add("LoraLoaderModelOnly", "Style LoRA", model=t3["model"], lora_name=STYLE_LORA.name)
        return style["MODEL"]

    latent = sampled(graph, model, "1080p landscape", STEPS, weights=weights)
    decoded(graph, latent, model)
    return graph


def small() -> Graph:
    """The embedded model. Its prompt and negative prompt are no others', so it shares no column with the rest."""
    graph = Graph("Small model T3 on any machine")
    dit, vae, text = (SMALL_FILES[part] for part in ("transformer", "vae", "text_encoder"))
    column = graph.column("", 440)
    note(column, "Read me first", notes.SMALL)
    note(column, "Files", f"{notes.files(dit, text, vae)}\n\n{notes.SMALL_FILES_NOTE}")
    note(column, "How it works", notes.SMALL_SETTINGS)
    models = graph.column("Models", 340)
    base = models.add("UNETLoader", unet_name=dit.name)
    clip = models.add("CLIPLoader", clip_name=text.name, type="wan")
    weights = graph.column("Plan", 380)
    t3 = weights.add("T3RetrofitLoader", model=base["MODEL"], file=f"{dit.folder}/{dit.name}")
    report(weights, t3["report"], "What was applied")
    size = graph.column("Size", 340)
    shifted = size.add("ModelSamplingSD3", model=t3["model"], shift=SHIFT)
    pixels = {name: EMBEDDED_DEFAULTS[name] for name in ("width", "height", "frames")}
    latent = size.add("T3EmptyLatent", size="720p landscape", family=WAN21.family, **pixels)
    prompts = graph.column("Prompt", 420)

    def padded(title: str, color: tuple[str, str], text: str, words: int) -> Link:
        """A prompt with zeros behind it."""
        prompt = prompts.add("CLIPTextEncode", title, tall=120, color=color, clip=clip["CLIP"], text=text)
        padding = prompts.add("CLIPTextEncode", "Padding", tall=120, clip=clip["CLIP"], text=" ".join(["a"] * words))
        zeros = prompts.add("ConditioningZeroOut", conditioning=padding["CONDITIONING"])
        both = {"conditioning_to": prompt["CONDITIONING"], "conditioning_from": zeros["CONDITIONING"]}
        return prompts.add("ConditioningConcat", **both)["CONDITIONING"]

    positive = padded("Prompt", GREEN, EMBEDDED_PROMPT, PADDING_WORDS)
    negative = padded("Negative prompt", RED, EMBEDDED_DEFAULTS["negative_prompt"], EMPTY_PADDING_WORDS)
    sampling = graph.column("Sample", 380)
    sampler = sampling.add(
        "KSampler",
        model=shifted["MODEL"],
        positive=positive,
        negative=negative,
        latent_image=latent["latent"],
        seed=0,
        steps=EMBEDDED_DEFAULTS["steps"],
        cfg=EMBEDDED_DEFAULTS["cfg"],
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    decoding = graph.column("Decode and save", 460)
    loaded = decoding.add("VAELoader", vae_name=vae.name)
    fps = float(EMBEDDED_DEFAULTS["fps"])
    video = decoding.add("T3VAEDecodeToVideo", samples=sampler["LATENT"], vae=loaded["VAE"], fps=fps)
    report(decoding, video["report"], "How the decode went")
    decoding.add("SaveVideo", tall=340, video=video["video"], filename_prefix="video/t3")
    return graph


def about(graph: Graph, model: Model, *texts: str, title: str = "Read me first") -> None:
    """The notes on the left: this workflow, its files, its weights."""
    column = graph.column("", 440)
    note(column, title, "\n\n".join(texts))
    note(column, "Files and weights", f"{notes.files(model.dit, TEXT_ENCODER, model.vae)}\n\n{notes.WEIGHTS}")
    note(column, "What the report says", notes.reading_report(model))


def note(column: Column, title: str, text: str) -> None:
    # Lines of the source are for its reader; on the canvas a paragraph flows.
    paragraphs = [part if part.startswith("- ") else " ".join(part.split("\n")) for part in text.split("\n\n")]
    flowing = "\n\n".join(paragraphs)
    column.note(title, flowing)


def sampled(
    graph: Graph,
    model: Base,
    size: Any,
    steps: int,
    prompt: str = PROMPT,
    weights: Callable[[Column, Link], Link] | None = None,
) -> Link:
    """Loaders, T3, prompts and sampler, with the release's settings; gives the latents.

    `size` is one of T3 Empty Latent's, or a function that adds nodes for the latents to a column, given the VAE.
    `weights` adds nodes that put weights on the loaded model, and T3 with them; without it T3 Attention does that.
    """
    models = graph.column("Models", 340)
    dit = models.add("UNETLoader", files=[model.dit.entry], unet_name=model.dit.name)
    clip = models.add("CLIPLoader", files=[TEXT_ENCODER.entry], clip_name=TEXT_ENCODER.name, type="wan")
    vae = None
    if callable(size):
        vae = load_vae(models, model)
    loaded = weights(graph.column("Weights", 380), dit["MODEL"]) if weights else dit["MODEL"]
    t3 = graph.column("Size" if weights else "T3 and size", 340)
    shifted = t3.add("ModelSamplingSD3", model=loaded, shift=SHIFT)
    windowed = None if weights else t3.add("T3Attention", model=shifted["MODEL"])
    if callable(size):
        latent = size(t3, vae)
    else:
        latent = t3.add("T3EmptyLatent", size=size, family=model.family, frames=FRAMES)["latent"]
    prompts = graph.column("Prompt", 420)
    positive = prompts.add("CLIPTextEncode", "Prompt", tall=220, color=GREEN, clip=clip["CLIP"], text=prompt)
    negative = prompts.add(
        "CLIPTextEncode",
        "Negative prompt (Wan's own)",
        tall=220,
        color=RED,
        clip=clip["CLIP"],
        text=NEGATIVE_PROMPT,
    )
    sampling = graph.column("Sample", 380)
    sampler = sampling.add(
        "KSampler",
        model=windowed["model"] if windowed else shifted["MODEL"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=latent,
        seed=0,
        steps=steps,
        cfg=GUIDANCE,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    if windowed:
        report(sampling, windowed["report"], "What T3 Attention did")
    return sampler["LATENT"]


def load_vae(column: Column, model: Base) -> Link:
    return column.add("VAELoader", files=[model.vae.entry], vae_name=model.vae.name)["VAE"]


def report(column: Column, text: Link, title: str) -> None:
    column.add("PreviewAny", title, tall=260, source=text)


def decoded(graph: Graph, latent: Link, model: Base) -> None:
    """VAE decode and the video file."""
    existing = [node for node in graph.nodes if node.kind == "VAELoader"]
    column = graph.column("Decode and save", 460)
    vae = existing[0]["VAE"] if existing else load_vae(column, model)
    video = column.add("T3VAEDecodeToVideo", samples=latent, vae=vae, fps=float(FPS))
    report(column, video["report"], "How the decode went")
    column.add("SaveVideo", tall=340, video=video["video"], filename_prefix="video/t3")


def write(info: dict[str, Any], folder: Path = FOLDER) -> None:
    """All workflows and their pictures into `folder`."""
    (folder / "api").mkdir(parents=True, exist_ok=True)
    for graph in graphs():
        (folder / f"{graph.name}.json").write_text(as_text(graph.ui(info)), encoding="utf-8")
        (folder / "api" / f"{graph.name}.json").write_text(as_text(graph.api(info)), encoding="utf-8")
        draw(graph.name, folder / f"{graph.name}.jpg")


def as_text(graph: dict[str, Any]) -> str:
    return json.dumps(graph, indent=1, ensure_ascii=False) + "\n"


def object_info(url: str) -> dict[str, Any]:
    """What the ComfyUI at `url` says about its nodes."""
    with urllib.request.urlopen(f"{url.rstrip('/')}/object_info") as answer:
        return json.load(answer)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(object_info(sys.argv[1]))
