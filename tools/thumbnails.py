"""Pictures for the template browser: the windows of one layer, local and strided, with the workflow's name."""

from __future__ import annotations

import colorsys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = (512, 512)  # the browser shows squares
SCALE = 2  # drawn larger, then shrunk: smooth edges
CELLS, COUNTS = (12, 16), (4, 4)  # tokens of a frame, and windows along each axis
HUES = {"Wan2.1": 0.55, "Wan2.2": 0.82, "Small": 0.38}


def draw(name: str, path: Path) -> None:
    """The picture of the workflow called `name`, as a JPEG."""
    model, _, task = name.partition(" T3 ")
    hue = HUES[model.split()[0]]
    width, height = (SCALE * side for side in SIZE)
    image = _background(width, height, hue)
    canvas = ImageDraw.Draw(image, "RGBA")
    local, strided = _colours(hue)
    top, side = 0.07 * height, 0.405 * width
    for left, colours, caption in ((0.07 * width, local, "local"), (0.525 * width, strided, "strided")):
        cell = side / CELLS[0]
        for row in range(CELLS[1]):
            for column in range(CELLS[0]):
                x, y, inset = left + column * cell, top + row * cell, 0.07 * cell
                box = (x + inset, y + inset, x + cell - inset, y + cell - inset)
                canvas.rounded_rectangle(box, radius=0.16 * cell, fill=colours[row][column])
        middle = (left + side / 2, top + CELLS[1] * cell + 0.032 * height)
        canvas.text(middle, caption, font=_font(17), fill=(255, 255, 255, 150), anchor="mm")
    _title(canvas, model, task, width, height)
    image.resize(SIZE, Image.Resampling.LANCZOS).save(path, quality=82, optimize=True)


def _background(width: int, height: int, hue: float) -> Image.Image:
    """Dark, a little lighter at the top left."""
    small = Image.new("RGB", (8, 6))
    for x in range(8):
        for y in range(6):
            light = 0.20 - 0.012 * (x + 1.4 * y)
            small.putpixel((x, y), _rgb(hue, 0.55, max(0.06, light)))
    return small.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(30))


def _colours(hue: float) -> tuple[list[list[tuple]], list[list[tuple]]]:
    """The colour of every token by its window: contiguous blocks, and every n-th token. One window stands out."""
    columns, rows = CELLS
    wide, high = columns // COUNTS[0], rows // COUNTS[1]

    def colour(x: int, y: int) -> tuple:
        if (x, y) == (1, 1):
            return (255, 214, 102)
        shade = (x * 5 + y * 3) % 7 / 7
        return _rgb(hue + 0.09 * (x / COUNTS[0] - 0.4), 0.55 - 0.15 * shade, 0.42 + 0.3 * shade)

    local = [[colour(x // wide, y // high) for x in range(columns)] for y in range(rows)]
    strided = [[colour(x % COUNTS[0], y % COUNTS[1]) for x in range(columns)] for y in range(rows)]
    return local, strided


def _title(canvas: ImageDraw.ImageDraw, model: str, task: str, width: int, height: int) -> None:
    left, text = 0.07 * width, task[0].upper() + task[1:]
    canvas.text((left, 0.815 * height), text, font=_fitting(text, 44, 0.86 * width), fill="white", anchor="lm")
    canvas.text((left, 0.915 * height), model, font=_font(27), fill=(255, 255, 255, 185), anchor="lm")
    font = _font(27)
    badge = canvas.textlength("T3", font=font)
    right, middle = 0.93 * width, 0.915 * height
    box = (right - badge - 36, middle - 30, right, middle + 30)
    canvas.rounded_rectangle(box, radius=14, fill=(255, 214, 102, 255))
    canvas.text(((box[0] + box[2]) / 2, middle), "T3", font=font, fill=(30, 30, 40), anchor="mm")


def _fitting(text: str, size: int, width: float) -> ImageFont.FreeTypeFont:
    """The largest font up to `size` in which `text` fits the width."""
    while _font(size).getlength(text) > width:
        size -= 1
    return _font(size)


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font: the same on every machine.
    font = ImageFont.load_default(SCALE * size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
