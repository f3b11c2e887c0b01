"""A picture of a plan: which tokens one token attends, layer by layer, and what that costs. No torch import."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .attended import Axis, attended, attended_count
from .cost import ModelShape, attention_pairs, macs_text, model_cost
from .errors import T3Error
from .plan import Grid, Partition, Plan
from .plan_facts import layer_facts

NOTHING, LOCAL, STRIDED, BOTH = 0, 1, 2, 3
# By the numbers above; blue, orange and dark plum stay apart for colour-blind eyes and in grey.
COLOURS = np.array([(230, 233, 237), (74, 144, 217), (238, 146, 40), (112, 40, 110)], np.uint8)
PAPER, INK, FAINT, LINE = (252, 252, 250), (28, 32, 38), (104, 112, 122), (196, 202, 208)
TITLE, HEAD, BODY, SMALL = 36, 28, 23, 20

MOST_ROWS = 10  # layers in one picture
MAPS = 3  # frames in a row
MARGIN, GAP, TEXT = 44, 26, 420
MAP_WIDTH, MAP_HEIGHT, MOST_CELL = 480, 480, 40
WIDEST = 1024  # a map of more tokens is drawn smaller than one pixel a token
LEAST_DOT, SEPARATED = 4, 6  # pixels: what is drawn of a lone token, and the size of a token from which lines part them
STRIP = 18


class Row(NamedTuple):
    """One layer of the picture."""

    layer: int
    partition: Partition
    axes: tuple[Axis, Axis, Axis]
    frames: list[int]


def draw_plan(
    plan: Plan,
    grid: Sequence[int],
    token: Sequence[int],
    model: ModelShape,
    model_name: str,
    *,
    layers: Sequence[int] | None = None,
    title: str = "",
) -> Image.Image:
    """An RGB picture of what `token` `(t, h, w)` attends under `plan` on `grid`.

    Args:
        model, model_name: whose attention the totals at the bottom are of.
        layers: layers to show, counted from 0; those of the plan's cycle if not given, at most `MOST_ROWS`.
        title: the heading, e.g. the video's size.

    Raises:
        T3Error: a token outside the grid, or a negative layer.
    """
    here = Grid(*grid)
    wanted = list(range(len(plan.layers)) if layers is None else layers)
    if any(layer < 0 for layer in wanted):
        raise T3Error(f"layer {min(wanted)} does not exist; layers are counted from 0. Nearest: 0.")
    rows = [_row(plan, here, token, layer) for layer in wanted[:MOST_ROWS]]
    maps = min(MAPS, here.t)
    cell = cell_size(here, maps)
    width, height = _pixels(here.w, cell), _pixels(here.h, cell)
    band = maps * width + (maps - 1) * GAP
    header = _header(plan, here, token, title, len(wanted) - len(rows))
    left = MARGIN + TEXT
    right = max(left + band, MARGIN + max(text_width(text, size) for text, size, _ in header), MARGIN + _legend_width())
    strip = 0 if here.t == 1 else 2 * STRIP + SMALL
    row_height = max(height + SMALL + 12 + strip, HEAD + 5 * (BODY + 9)) + GAP
    top = MARGIN + sum(size + 12 for _, size, _ in header) + BODY + 2 * GAP
    panel = top + len(rows) * (row_height + GAP)
    image = Image.new("RGB", (right + MARGIN, panel + _PANEL_HEIGHT + MARGIN), PAPER)
    canvas = ImageDraw.Draw(image)
    y = MARGIN
    for text, size, colour in header:
        canvas.text((MARGIN, y), text, font=font(size), fill=colour)
        y += size + 12
    _draw_legend(canvas, MARGIN, y + 6)
    for number, row in enumerate(rows):
        y = top + number * (row_height + GAP)
        canvas.line((MARGIN, y - GAP // 2, right, y - GAP // 2), fill=LINE)
        _draw_facts(canvas, y, row, plan, here, model)
        _draw_maps(image, canvas, left, y, row, here, token, cell)
        if strip:
            _draw_strip(canvas, left, y + SMALL + 12 + height + 14, band, row, token[0])
    canvas.line((MARGIN, panel - GAP // 2, right, panel - GAP // 2), fill=LINE)
    _draw_totals(canvas, panel, right, plan, here, model, model_name)
    return image


def frame_map(axes: tuple[Axis, Axis, Axis], t: int, cell: int) -> np.ndarray:
    """One frame, uint8 `[H*cell, W*cell, 3]`: every token a square of its colour.

    Tokens attended in lone rows or columns are drawn at least `LEAST_DOT` pixels thick, so that a comb of 2-pixel
    tokens can be seen. From `SEPARATED` pixels on, lines part the tokens.
    """
    time, high, wide = axes
    kinds = np.zeros((_pixels(high.local.size, cell), _pixels(wide.local.size, cell)), np.uint8)
    for kind, name in ((LOCAL, "local"), (STRIDED, "strided")):
        if getattr(time, name)[t]:
            rows, columns = (_stretch(getattr(axis, name), cell) for axis in (high, wide))
            kinds |= kind * np.outer(rows, columns).astype(np.uint8)
    picture = COLOURS[kinds]
    if cell >= SEPARATED:
        picture[::cell] = picture[:, ::cell] = PAPER
    return picture


def cell_size(grid: Grid, maps: int) -> int:
    """Pixels of a token's square; 0 where a frame has more tokens than pixels."""
    room = (MAPS * MAP_WIDTH + (MAPS - 1) * GAP) // maps
    cell = max(1, min(room // grid.w, MAP_HEIGHT // grid.h, MOST_CELL))
    return 0 if max(grid.w, grid.h) > WIDEST else cell


def chosen_frames(time: Axis, t: int, count: int) -> list[int]:
    """The frames worth showing, in order: the token's, one of its local and one of its strided windows, and others."""
    others = [frame for frame in sorted(range(time.local.size), key=lambda f: (abs(f - t), f)) if frame != t]
    only_local = [f for f in others if time.local[f] and not time.strided[f]]
    only_strided = [f for f in others if time.strided[f] and not time.local[f]]
    ends = [f for f in (0, time.local.size - 1) if time.both[f]]
    ranked = [t, *only_local[:1], *only_strided[:1], *ends, *others]
    return sorted(list(dict.fromkeys(ranked))[:count])


def _row(plan: Plan, grid: Grid, token: Sequence[int], layer: int) -> Row:
    partition = plan.partition(layer, grid)
    axes = attended(grid, partition, token)
    return Row(layer, partition, axes, chosen_frames(axes[0], token[0], min(MAPS, grid.t)))


def _pixels(length: int, cell: int) -> int:
    return length * cell or min(length, WIDEST)


def _stretch(mask: np.ndarray, cell: int) -> np.ndarray:
    """A mask of tokens as a mask of pixels."""
    if not cell:
        pixels = min(mask.size, WIDEST)
        return np.logical_or.reduceat(mask, np.arange(pixels) * mask.size // pixels)
    out = np.repeat(mask, cell)
    if cell < LEAST_DOT:
        alone = mask & ~np.roll(mask, 1) & ~np.roll(mask, -1)
        for at in np.flatnonzero(alone) * cell + cell // 2:
            out[max(0, at - LEAST_DOT // 2) : at + LEAST_DOT // 2] = True
    return out


@lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which is there on every machine."""
    return ImageFont.load_default(size=size)


def text_width(text: str, size: int) -> int:
    """Pixels."""
    return int(font(size).getlength(text)) + 1


def _header(plan: Plan, grid: Grid, token: Sequence[int], title: str, left_out: int) -> list[tuple[str, int, tuple]]:
    """Lines of text with their size and colour."""
    t, h, w = token
    lines = [
        (title or f"Plan {plan.name}", TITLE, INK),
        (
            (f"Plan {plan.name}. " if title else "")
            + f"{grid.t} x {grid.h} x {grid.w} = {grid.tokens:,} tokens (time x height x width)",
            BODY,
            INK,
        ),
        (f"What the token at latent frame {t}, row {h}, column {w} attends: the coloured tokens.", BODY, INK),
    ]
    if all(grid_partition.windows == 1 for grid_partition in plan.partitions(grid, len(plan.layers))):
        lines.append(("Every layer is one window here: full attention.", BODY, INK))
    if left_out:
        lines.append((f"{left_out} more layers of the plan are not shown.", BODY, INK))
    return lines


_LEGEND = (("local window", LOCAL), ("strided window", STRIDED), ("both", BOTH), ("not attended", NOTHING))


def _legend_width() -> int:
    names = ["the token", *(name for name, _ in _LEGEND)]
    return sum(BODY + 10 + text_width(name, BODY) + 36 for name in names)


def _draw_legend(canvas: ImageDraw.ImageDraw, x: int, y: int) -> None:
    mark(canvas, x + BODY // 2, y + BODY // 2, 1)
    x += BODY + 10
    canvas.text((x, y + BODY // 2), "the token", font=font(BODY), fill=INK, anchor="lm")
    x += text_width("the token", BODY) + 36
    for name, kind in _LEGEND:
        canvas.rectangle((x, y, x + BODY, y + BODY), fill=tuple(COLOURS[kind]))
        x += BODY + 10
        canvas.text((x, y + BODY // 2), name, font=font(BODY), fill=INK, anchor="lm")
        x += text_width(name, BODY) + 36


def row_texts(row: Row, plan: Plan, grid: Grid, model: ModelShape) -> list[str]:
    """What stands beside a layer's maps; the first line is its heading."""
    cycle = len(plan.layers)
    facts = layer_facts(row.layer % cycle, row.partition, grid, model.layers, cycle)
    sizes = " to ".join(f"{size:,}" for size in facts["tokens_per_window"])
    share = attention_pairs(grid, row.partition) / grid.tokens**2
    count = attended_count(row.axes)
    one = row.partition.windows == 1
    coincide = "local and strided are the same" if facts["branches"] == 1 else "local and strided windows"
    return [
        f"Layer {row.layer}",
        f"one window of {sizes} tokens" if one else " x ".join(map(str, row.partition)) + " windows (t x h x w)",
        "full attention" if one else f"{sizes} tokens in each",
        "" if one else coincide,
        f"this token attends {count:,}",
        f"{_percent(share)} of full attention's work",
    ]


def _draw_facts(canvas: ImageDraw.ImageDraw, y: int, row: Row, plan: Plan, grid: Grid, model: ModelShape) -> None:
    heading, *lines = row_texts(row, plan, grid, model)
    canvas.text((MARGIN, y), heading, font=font(HEAD), fill=INK)
    others = [n for n in range(row.layer % len(plan.layers), model.layers, len(plan.layers)) if n != row.layer]
    if others:
        shown = ", ".join(map(str, others[:3])) + (" ..." if len(others) > 3 else "")
        x = MARGIN + text_width(heading, HEAD) + 14
        canvas.text((x, y + HEAD), f"same: {shown}", font=font(SMALL), fill=FAINT, anchor="ls")
    y += HEAD + 14
    for line in filter(None, lines):
        canvas.text((MARGIN, y), line, font=font(BODY), fill=INK)
        y += BODY + 9


def _draw_maps(
    image: Image.Image,
    canvas: ImageDraw.ImageDraw,
    x: int,
    y: int,
    row: Row,
    grid: Grid,
    token: Sequence[int],
    cell: int,
) -> None:
    for frame in row.frames:
        picture = frame_map(row.axes, frame, cell)
        height, width = picture.shape[:2]
        top = y + SMALL + 12
        own = frame == token[0]
        label = f"latent frame {frame}" + (", the token's" if own and grid.t > 1 else "")
        if text_width(label, SMALL) > width + GAP // 2:
            label = str(frame)
        canvas.text((x, y), label, font=font(SMALL), fill=INK if own else FAINT)
        image.paste(Image.fromarray(picture), (x, top))
        border, edge = (INK, 3) if own else (LINE, 1)
        canvas.rectangle(
            (x - edge, top - edge, x + width + edge - 1, top + height + edge - 1), outline=border, width=edge
        )
        if own:
            _, h, w = token
            mark(canvas, x + _middle(w, grid.w, cell), top + _middle(h, grid.h, cell), cell)
        x += width + GAP


def _middle(position: int, length: int, cell: int) -> int:
    return position * cell + cell // 2 if cell else (2 * position + 1) * _pixels(length, 0) // (2 * length)


def mark(canvas: ImageDraw.ImageDraw, x: int, y: int, cell: int) -> None:
    """The chosen token: a ring around it, or inside its square where that is large."""
    radius = 8 if cell < 24 else cell // 3
    for grow, width, colour in ((2, radius, PAPER), (0, 3, INK)):
        r = radius + grow
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=min(width, 3 + 2 * grow))
    canvas.ellipse((x - 2, y - 2, x + 2, y + 2), fill=INK)


def _draw_strip(canvas: ImageDraw.ImageDraw, x: int, y: int, width: int, row: Row, t: int) -> None:
    """All frames in a line, coloured by how the token attends them; those shown above have a number below."""
    time = row.axes[0]
    length = time.local.size
    kinds = LOCAL * time.local.astype(int) + STRIDED * time.strided.astype(int)
    last = -1
    for frame in range(length):
        left, right = x + frame * width // length, x + (frame + 1) * width // length - (2 if width // length > 6 else 1)
        canvas.rectangle((left, y, max(left, right), y + STRIP), fill=tuple(COLOURS[kinds[frame]]))
        middle = (left + right) // 2
        if frame == t:
            canvas.rectangle((left - 1, y - 3, max(left, right) + 1, y + STRIP + 3), outline=INK, width=3)
        if frame in row.frames and middle - text_width(str(frame), SMALL) // 2 > last:
            colour = INK if frame == t else FAINT
            canvas.text((middle, y + STRIP + 6), str(frame), font=font(SMALL), fill=colour, anchor="ma")
            last = middle + text_width(str(frame), SMALL) // 2 + 6
    canvas.text((x - 12, y + STRIP // 2), "all frames", font=font(SMALL), fill=FAINT, anchor="rm")


_BAR, _BAR_COLOUR = 26, (58, 134, 118)
_PANEL_HEIGHT = HEAD + 20 + 3 * (_BAR + 14) + BODY


def _draw_totals(
    canvas: ImageDraw.ImageDraw, y: int, right: int, plan: Plan, grid: Grid, model: ModelShape, name: str
) -> None:
    cost = model_cost(model, plan, grid)
    heading = f"Self-attention of {name}, one forward pass"
    canvas.text((MARGIN, y), heading, font=font(HEAD), fill=INK)
    y += HEAD + 20
    start, room = MARGIN + 200, 330
    bars = (
        ("full attention", cost.attention_dense),
        ("T3 as released", cost.attention_released),
        ("T3 here", cost.attention_t3),
    )
    longest = max(macs for _, macs in bars)
    for label, macs in bars:
        share = macs / cost.attention_dense
        end = start + max(2, round(macs / longest * (right - room - start)))
        canvas.text((MARGIN, y + _BAR // 2), label, font=font(BODY), fill=INK, anchor="lm")
        canvas.rectangle((start, y, end, y + _BAR), fill=_BAR_COLOUR)
        text = f"{macs_text(macs)} MACs, {_percent(share)}"
        canvas.text((end + 14, y + _BAR // 2), text, font=font(BODY), fill=INK, anchor="lm")
        y += _BAR + 14
    warning = "T3 needs weights that were tuned for it. Stock weights give noise."
    canvas.text((MARGIN, y + 4), warning, font=font(SMALL), fill=FAINT)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.2%}" if share >= 0.001 else f"{100 * share:.2g}%"
