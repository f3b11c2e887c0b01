"""Scenes to pixels: anti-aliased, a batch at a time, on any device, whole frames or crops of them."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import torch

from .scenes import (
    AREA,
    ASPECT,
    BACKGROUNDS,
    COLOURS,
    MARKER_RADIUS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEED,
    STRIP,
    TURN,
    Scene,
)

HIGH, LOW = (448, 640), (224, 320)
_MOST_THINGS = 3


def render(
    scenes: Sequence[Scene],
    size: tuple[int, int],
    frames: int,
    device: torch.device | str = "cpu",
    *,
    first: Sequence[int] | None = None,
    corners: torch.Tensor | None = None,
    crop: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Pixels `[B, 3, frames, H, W]`, float32 in [-1, 1].

    Args:
        scenes: what to draw, B of them.
        size: height and width of the whole frame in pixels.
        frames: how many frames.
        first: the time of each clip's first frame; 0 if not given.
        corners: top and left of each clip's crop in pixels, `[B, 2]`; with `crop`, its height and width.
    """
    device = torch.device(device)
    height, width = size
    rows, columns = crop or size
    if corners is None:
        corners = torch.zeros(len(scenes), 2)
    corners = _send(corners.float(), device)
    y = (corners[:, :1] + torch.arange(rows, device=device) + 0.5 - height / 2) / height
    x = (corners[:, 1:] + torch.arange(columns, device=device) + 0.5 - width / 2) / height
    y, x = y[:, None, :, None], x[:, None, None, :]  # broadcast to [B, frames, rows, columns]
    start = _send(torch.tensor([0] * len(scenes) if first is None else list(first)), device)
    time = start[:, None] + torch.arange(frames, device=device)
    level = _column([BACKGROUNDS[scene.background] for scene in scenes], device)
    image = level.view(-1, 1, 1, 1, 1).expand(len(scenes), 3, frames, rows, columns).clone()
    for number in range(_MOST_THINGS):
        there = [i for i, scene in enumerate(scenes) if number < len(scene.things)]
        for shape in SHAPES:
            some = [i for i in there if scenes[i].things[number].shape == shape]
            if some:
                _paint_things(image, some, [scenes[i] for i in some], number, shape, (x, y), time, height)
    _paint_markers(image, scenes, (x, y), time, height, width / height)
    return image.mul_(2).sub_(1)


def _paint_things(image, some, scenes, number: int, shape: str, grid, time, height: int) -> None:
    device = image.device
    things = [scene.things[number] for scene in scenes]
    travel = _column([MOTIONS[scene.motion] for scene in scenes], device) * SPEED
    start = _column([(thing.x, thing.y) for thing in things], device)
    index = _send(torch.tensor(some), device)
    t = time[index].to(torch.float32)
    centre = start[:, None] + travel[:, None] * t[..., None]
    turns = _column([TURN if scene.motion == "turning" else 0.0 for scene in scenes], device)
    angle = (turns[:, None] * t * (math.pi / 180))[..., None, None]
    scale = _column([SIZES[scene.size] for scene in scenes], device).view(-1, 1, 1, 1)
    dx = grid[0][index] - centre[..., 0, None, None]
    dy = grid[1][index] - centre[..., 1, None, None]
    if shape != "circle":
        cos, sin = angle.cos(), angle.sin()
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    cover = _cover(distance(shape, dx, dy, scale), height)
    colour = _column([COLOURS[thing.colour] for thing in things], device)
    _blend(image, index, cover, colour)


def distance(shape: str, dx: torch.Tensor, dy: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Signed distance to the outline, negative inside, exact near the edges; same units as `dx` and `dy` (y down)."""
    if shape == "circle":
        return torch.sqrt(dx * dx + dy * dy) - math.sqrt(AREA / math.pi) * scale
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - math.sqrt(AREA) / 2 * scale
    if shape == "triangle":
        inner = math.sqrt(AREA / (3 * math.sqrt(3))) * scale  # radius of the inscribed circle; a corner points up
        slant = dx.abs() * (math.sqrt(3) / 2) - dy * 0.5
        return torch.maximum(slant, dy) - inner
    # A plus sign: two bars three times as long as wide.
    half = math.sqrt(AREA * 9 / 5) / 2 * scale
    a, b = dx.abs(), dy.abs()
    return torch.maximum(torch.maximum(a, b) - half, torch.minimum(a, b) - half / 3)


def _paint_markers(image, scenes: Sequence[Scene], grid, time, height: int, aspect: float) -> None:
    device = image.device
    markers = [scene.marker for scene in scenes]
    index = torch.arange(len(scenes), device=device)
    colour = _column([colorsys.hsv_to_rgb(marker.hue, 0.85, 0.85) for marker in markers], device)
    y = _column([marker.y for marker in markers], device)[:, None]
    y = y + _column([marker.speed for marker in markers], device)[:, None] * time
    dy = grid[1] - y[..., None, None]
    # The two edges are one shape seen from the middle.
    dx = grid[0].abs() - (aspect / 2 - STRIP / 2)
    cover = _cover(torch.sqrt(dx * dx + dy * dy) - MARKER_RADIUS, height)
    _blend(image, index, cover, colour)


def _cover(outline: torch.Tensor, height: int) -> torch.Tensor:
    """The share of each pixel inside, from the signed distance of its centre: a ramp one pixel wide."""
    return (0.5 - outline * height).clamp_(0, 1)


def _blend(image, index, cover, colour) -> None:
    cover = cover[:, None]
    old = image[index]
    image[index] = old + cover * (colour[:, :, None, None, None] - old)


def _column(values, device) -> torch.Tensor:
    return _send(torch.tensor(values, dtype=torch.float32), device)


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device without waiting for what it is at: a picture is drawn while the last one is trained on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fits(size: tuple[int, int]) -> bool:
    """Whether a frame of this height and width has the shape scenes are made for."""
    return abs(size[1] / size[0] - ASPECT) < 1e-6
