"""The pictures of the help pages, made of the same drawing as T3 Plan Preview."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from t3 import Grid, Partition, Plan
from t3.attended import Axis, attended, token_at
from t3.cost import ModelShape
from t3.preview import (
    BODY,
    COLOURS,
    FAINT,
    HEAD,
    INK,
    LOCAL,
    PAPER,
    SMALL,
    STRIDED,
    TITLE,
    draw_plan,
    font,
    frame_map,
    mark,
)
from t3.vae.structure import read_structure
from t3.vae.tiles import Window, cores, tile_windows
from t3.weights import known_config
from t3.weights.layout_vae import vae_layout

WIDTH, MARGIN = 900, 30
MODEL = ModelShape.from_config(known_config("wan2.1-t2v-1.3b")), "Wan2.1 1.3B"
GRID_4K = Grid(21, 136, 240)
BLUE, ORANGE = tuple(COLOURS[LOCAL]), tuple(COLOURS[STRIDED])


def attention() -> Image.Image:
    """One token's view: all tokens, a local and a strided window."""
    grid, token, cell = Grid(1, 9, 15), (0, 4, 7), 17
    image = Image.new("RGB", (WIDTH, 264), PAPER)
    canvas = ImageDraw.Draw(image)
    axes = attended(grid, Partition(1, 3, 5), token)
    everything = tuple(Axis(np.ones(n, bool), np.ones(n, bool)) for n in grid)
    nothing = tuple(np.zeros(n, bool) for n in grid)
    views = (
        ("full attention", everything),
        ("local window", tuple(Axis(axis.local, none) for axis, none in zip(axes, nothing, strict=True))),
        ("strided window", tuple(Axis(none, axis.strided) for axis, none in zip(axes, nothing, strict=True))),
    )
    for number, (label, view) in enumerate(views):
        x, y = MARGIN + number * (grid.w * cell + 38), 84
        canvas.text((x, MARGIN), label, font=font(TITLE), fill=INK)
        image.paste(Image.fromarray(frame_map(view, 0, cell)), (x, y))
        mark(canvas, x + token[2] * cell + cell // 2, y + token[1] * cell + cell // 2, cell)
    return image


def plan() -> Image.Image:
    """A plan of two layers on a small video."""
    layers = Plan("custom", Grid(21, 68, 120), (("each", 1, 1), (3, 4, 6)))
    grid = layers.grid
    return draw_plan(layers, grid, token_at(grid, (0.4, 0.4, 0.6)), *MODEL)


def plan_preview() -> Image.Image:
    """The released plan at 4K."""
    title = "3840 x 2176 pixels, 81 frames"
    return draw_plan(Plan.preset("wan2.1-4k"), GRID_4K, token_at(GRID_4K, (0.5, 0.5, 0.5)), *MODEL, title=title)


def empty_latent() -> Image.Image:
    """The sizes on offer, to scale."""
    image = Image.new("RGB", (WIDTH, 540), PAPER)
    canvas = ImageDraw.Draw(image)
    sizes = (("4K", 3840, 2176), ("1440p", 2560, 1440), ("1080p", 1920, 1088), ("720p", 1280, 720))
    for number, (name, width, height) in enumerate(sizes):
        right, bottom = MARGIN + round(width * 840 / 3840), MARGIN + round(height * 840 / 3840)
        canvas.rectangle(
            (MARGIN, MARGIN, right, bottom), fill=_light(BLUE, 0.15 + 0.2 * number), outline=PAPER, width=2
        )
        tokens = Grid.from_video(81, height, width, 16).tokens
        canvas.text((right - 14, bottom - 34), f"{name}   {width} x {height}", font=font(BODY), fill=INK, anchor="rs")
        canvas.text((right - 14, bottom - 10), f"{tokens:,} tokens", font=font(SMALL), fill=FAINT, anchor="rs")
    return image


def load_latent() -> Image.Image:
    """From one graph to the next."""
    image = Image.new("RGB", (WIDTH, 330), PAPER)
    canvas = ImageDraw.Draw(image)
    for y, heading, steps in (
        (MARGIN, "First graph: hours", ("KSampler", "Save Latent", "output/latents")),
        (180, "Second graph: minutes", ("T3 Load Latent", "T3 VAE Decode to Video", "Save Video")),
    ):
        canvas.text((MARGIN, y), heading, font=font(HEAD), fill=INK)
        for number, step in enumerate(steps):
            x, top = MARGIN + number * 290, y + 50
            is_folder = "/" in step
            fill = PAPER if is_folder else _light(BLUE, 0.3)
            canvas.rounded_rectangle((x, top, x + 240, top + 56), 10, fill=fill, outline=FAINT, width=2)
            size = BODY if len(step) < 20 else SMALL
            canvas.text((x + 120, top + 28), step, font=font(size), fill=INK, anchor="mm")
            if number < 2:
                _arrow(canvas, x + 244, x + 286, top + 28)
    return image


def vae_decode() -> Image.Image:
    """A 4K picture in tiles, and what one of them needs of the latents around it."""
    shapes = {name: tuple(param.shape) for name, param in vae_layout(known_config("wan2.1-vae")).items()}
    structure = read_structure(shapes)
    height, width, scale = 272, 480, (WIDTH - 2 * MARGIN) / 480
    bottom = MARGIN + round(height * scale)
    image = Image.new("RGB", (WIDTH, bottom + 76), PAPER)
    canvas = ImageDraw.Draw(image)

    def box(window: Window) -> tuple[int, ...]:
        edges = (window.cols.start, window.rows.start, window.cols.stop, window.rows.stop)
        return tuple(MARGIN + round(edge * scale) for edge in edges)

    tiles = cores(height, width, (68, 80))
    chosen = tiles[8]
    needed = tile_windows(chosen.scaled(structure.upscale), structure.reach, structure.head_radius)[0][0]
    canvas.rectangle(box(Window.whole(height, width)), fill=_light(BLUE, 0.15))
    canvas.rectangle(box(needed), fill=_light(ORANGE, 0.5))
    canvas.rectangle(box(chosen), fill=BLUE)
    for tile in tiles:
        canvas.rectangle(box(tile), outline=PAPER, width=2)
    canvas.rectangle(box(needed), outline=ORANGE, width=3)
    for x, colour, words in (
        (MARGIN, BLUE, "one tile"),
        (220, ORANGE, "what its pixels are made of, computed with it"),
    ):
        canvas.rectangle((x, bottom + 26, x + 28, bottom + 54), fill=colour)
        canvas.text((x + 42, bottom + 40), words, font=font(BODY), fill=INK, anchor="lm")
    return image


def vae_encode() -> Image.Image:
    """A video that begins with an image: which of its latents are made of it, and which the sampler makes."""
    image = Image.new("RGB", (WIDTH, 330), PAPER)
    canvas = ImageDraw.Draw(image)
    rows = (
        ("length 1: the latents of the images", 3, 3, "9 images"),
        ("length 81: a video that begins with them", 3, 21, ""),
    )
    side, step = 34, 40
    for number, (heading, kept, total, words) in enumerate(rows):
        y = MARGIN + number * 120
        canvas.text((MARGIN, y), heading, font=font(HEAD), fill=INK)
        for frame in range(total):
            x = MARGIN + frame * step
            colour = BLUE if frame < kept else _light(ORANGE, 0.5)
            canvas.rectangle((x, y + 46, x + side, y + 46 + 54), fill=colour)
        canvas.text((MARGIN + total * step + 10, y + 73), words, font=font(BODY), fill=FAINT, anchor="lm")
    for x, colour, words in (
        (MARGIN, BLUE, "a latent frame of the images, kept"),
        (490, _light(ORANGE, 0.5), "an empty one, for the sampler"),
    ):
        canvas.rectangle((x, 278, x + 28, 306), fill=colour)
        canvas.text((x + 42, 292), words, font=font(BODY), fill=INK, anchor="lm")
    return image


def retrofit_loader() -> Image.Image:
    """What a file brings: changes of weights, and a plan; onto a clone of the model."""
    image = Image.new("RGB", (WIDTH, 300), PAPER)
    canvas = ImageDraw.Draw(image)

    def box(x: int, y: int, wide: int, words: tuple[str, ...], fill: tuple[int, ...]) -> None:
        canvas.rounded_rectangle((x, y, x + wide, y + 100), 10, fill=fill, outline=FAINT, width=2)
        for line, text in enumerate(words):
            size, ink = (BODY, INK) if line == 0 else (SMALL, FAINT)
            canvas.text((x + wide // 2, y + 32 + 34 * line), text, font=font(size), fill=ink, anchor="mm")

    box(MARGIN, 30, 240, ("model", "stays as it is"), PAPER)
    box(MARGIN, 170, 240, ("file", "LoRA, diff, whole"), _light(ORANGE, 0.5))
    box(350, 30, 220, ("weights", "model + change"), _light(BLUE, 0.3))
    box(350, 170, 220, ("attention", "the file's plan"), _light(BLUE, 0.3))
    box(650, 100, 220, ("a clone", "for the sampler"), _light(BLUE, 0.3))
    _arrow(canvas, 274, 346, 80)
    canvas.line((274, 205, 310, 205, 310, 110, 330, 110), fill=FAINT, width=3)
    _arrow(canvas, 328, 346, 110)
    _arrow(canvas, 274, 346, 235)
    _arrow(canvas, 574, 646, 120)
    _arrow(canvas, 574, 646, 180)
    return image


def extract() -> Image.Image:
    """A layer's change, which is nearly two thin matrices."""
    image = Image.new("RGB", (WIDTH, 330), PAPER)
    canvas = ImageDraw.Draw(image)
    side, thin, top = 180, 22, 80
    middle = top + side // 2

    def matrix(x: int, wide: int, high: int, colour: tuple[int, ...], words: str) -> None:
        y = middle - high // 2
        canvas.rectangle((x, y, x + wide, y + high), fill=colour)
        canvas.text((x + wide // 2, top + side + 34), words, font=font(BODY), fill=INK, anchor="mm")

    def sign(x: int, text: str) -> None:
        canvas.text((x, middle), text, font=font(TITLE), fill=INK, anchor="mm")

    canvas.text((MARGIN, MARGIN), "one layer", font=font(HEAD), fill=INK)
    matrix(MARGIN, side, side, _light(BLUE, 0.6), "tuned")
    sign(248, "-")
    matrix(286, side, side, _light(BLUE, 0.3), "base")
    sign(504, "=")
    matrix(560, thin, side, ORANGE, "up")
    matrix(604, side, thin, ORANGE, "down")
    canvas.text((806, middle), "+ error", font=font(BODY), fill=FAINT, anchor="lm")
    return image


def vae_decode_to_video() -> Image.Image:
    """Memory that 81 frames of 4K take."""
    numbers = 81 * 2176 * 3840 * 3
    rows = (("IMAGE", 4, FAINT), ("VIDEO, 10 bits", 2, BLUE), ("VIDEO, 8 bits", 1, BLUE))
    image = Image.new("RGB", (WIDTH, 320), PAPER)
    canvas = ImageDraw.Draw(image)
    canvas.text((MARGIN, MARGIN), "81 frames of 3840 x 2176 in memory", font=font(HEAD), fill=INK)
    for number, (name, size, colour) in enumerate(rows):
        y, left = 96 + number * 70, 230
        canvas.text((MARGIN, y + 24), name, font=font(BODY), fill=INK, anchor="lm")
        right = left + round(size * 130)
        canvas.rectangle((left, y, right, y + 48), fill=colour)
        canvas.text((right + 14, y + 24), f"{numbers * size / 1e9:.1f} GB", font=font(BODY), fill=INK, anchor="lm")
    return image


def _light(colour: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(255 - (255 - c) * share) for c in colour)


def _arrow(canvas: ImageDraw.ImageDraw, start: int, end: int, y: int) -> None:
    canvas.line((start, y, end - 8, y), fill=FAINT, width=3)
    canvas.polygon(((end, y), (end - 12, y - 7), (end - 12, y + 7)), fill=FAINT)


PICTURES = {
    "T3Attention": attention,
    "T3RetrofitLoader": retrofit_loader,
    "T3Plan": plan,
    "T3PlanPreview": plan_preview,
    "T3EmptyLatent": empty_latent,
    "T3LoadLatent": load_latent,
    "T3VAEDecode": vae_decode,
    "T3VAEDecodeToVideo": vae_decode_to_video,
    "T3VAEEncode": vae_encode,
    "T3Extract": extract,
}
