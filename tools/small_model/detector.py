"""What a clip shows, measured from its pixels by classical means: no network, nothing learned.

Things are connected patches of colour between the strips of the markers; their shape is the rendered template with
the largest overlap, their motion a robust fit of centroids, their count a majority over frames.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from .render import distance
from .scenes import AREA, ASPECT, BACKGROUNDS, COLOURS, MARKER_RADIUS, SHAPES, SIZES, SPEED, STRIP, TURN, Scene

_ROWS = 112  # clips are measured at this height
_CHROMA = 0.33  # half of a clean colour's: where an edge runs
_PATCH, _REACH = 32, 0.85  # samples across a template, and half its width in units of size
_STEP = 3  # degrees between templates
_PERIOD = {"circle": _STEP, "square": 90, "triangle": 120, "cross": 90}
_LEAST_OVERLAP = 0.6
_LEAST_THING = 0.3 * AREA * SIZES["small"] ** 2
_SAME_HUE, _SAME_HEIGHT = 20.0, 0.05  # degrees; parts of the frame's height


@dataclass(frozen=True)
class Measured:
    """What was found. None where nothing could be made out.

    things: colour to (how many, shape); markers: largest typical difference of hue in degrees and of height between
    the edges, infinite where one is missing.
    """

    things: dict[str, tuple[int, str | None]]
    size: str | None
    motion: str | None
    background: str | None
    relations: dict[tuple[str, str], str]
    hue_gap: float
    height_gap: float

    @property
    def agreement(self) -> bool:
        """Whether the markers at the two edges agree in hue and height, all along."""
        return self.hue_gap <= _SAME_HUE and self.height_gap <= _SAME_HEIGHT


def judge(measured: Measured, scene: Scene, *, everything: bool = False, frames: int = 21) -> dict[str, bool]:
    """Attribute by attribute whether a clip shows what the caption of `scene` states (or all that the scene holds)."""
    said = {"size", "motion", "background"} if everything else scene.said
    wanted: dict[str, list[str]] = {}
    for thing in scene.things:
        wanted.setdefault(thing.colour, []).append(thing.shape)
    found = measured.things
    result = {
        "count": sum(count for count, _ in found.values()) == len(scene.things),
        "colour": set(found) == set(wanted),
        "shape": all(colour in found and found[colour][1] == shapes[0] for colour, shapes in wanted.items()),
    }
    if scene.relation:
        pair = tuple(thing.colour for thing in scene.things)
        result["relation"] = measured.relations.get(pair) == scene.relation
    for name in ("size", "motion", "background"):
        if name in said and (name != "motion" or frames > 1):
            result[name] = getattr(measured, name) == getattr(scene, name)
    return result


@torch.no_grad()
def detect(video: torch.Tensor) -> Measured:
    """Measure one clip `[3, T, H, W]` in [-1, 1], of the shape scenes are made for (10:7), on any device."""
    frames, height, width = video.shape[1:]
    image = (video.transpose(0, 1).float().clamp(-1, 1) + 1) / 2
    columns = round(_ROWS * width / height)
    image = F.interpolate(image, (_ROWS, columns), mode="area")
    chroma = image.amax(1) - image.amin(1)
    hue = _hue(image)
    x = ((torch.arange(columns, device=video.device) + 0.5) / _ROWS - columns / _ROWS / 2).expand(_ROWS, columns)
    y = ((torch.arange(_ROWS, device=video.device) + 0.5) / _ROWS - 0.5)[:, None].expand(_ROWS, columns)
    inside = x.abs() < ASPECT / 2 - STRIP
    hue_gap, height_gap = _markers(chroma, hue, x, y)
    gray = image.mean(1)[(chroma < 0.1)]
    background = _nearest_level(float(gray.median())) if gray.numel() > 0.2 * chroma.numel() else None
    frame, masks = _patches((chroma > _CHROMA) & inside)
    if not len(masks):
        return Measured({}, None, None, background, {}, hue_gap, height_gap)
    weight = masks.flatten(1).float()
    area = weight.sum(1)
    centre = torch.stack([(weight * axis.flatten()).sum(1) / area for axis in (x, y)], 1)
    colour = _colours(hue[frame], masks)
    overlap, angle = _templates_fit(chroma[frame], masks, centre, area)
    return _put_together(
        frames,
        frame.cpu(),
        area.cpu() / _ROWS**2,
        centre.cpu(),
        colour.cpu(),
        overlap.cpu(),
        angle.cpu(),
        background,
        hue_gap,
        height_gap,
    )


def _hue(image: torch.Tensor) -> torch.Tensor:
    """Degrees, from `[T, 3, H, W]`; what is mixed in of gray does not matter."""
    red, green, blue = image.unbind(1)
    return torch.rad2deg(torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue))


def _turn(a, b):
    """The difference of two angles in degrees, within -180 to 180."""
    return (a - b + 180) % 360 - 180


def _nearest_level(value: float) -> str | None:
    name = min(BACKGROUNDS, key=lambda name: abs(BACKGROUNDS[name] - value))
    return name if abs(BACKGROUNDS[name] - value) < 0.15 else None


def _patches(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Connected patches of `[T, H, W]` that are large enough: their frames `[M]` and masks `[M, H, W]`."""
    frames, rows, columns = mask.shape
    own = torch.arange(1, rows * columns + 1, device=mask.device).view(rows, columns)
    label = own * mask
    while True:
        # Every pixel takes the highest number beside it, then the number held by the pixel of that number: the number
        # of jumps grows with the logarithm of a patch's extent only.
        before = label
        label = F.max_pool2d(label[:, None].float(), 3, 1, 1)[:, 0].long() * mask
        for _ in range(2):
            label = label.flatten(1).gather(1, (label - 1).clamp_min(0).flatten(1)).view_as(label) * mask
        if torch.equal(label, before):
            break
    which, place, masks = [], [], []
    for t in range(frames):
        values, counts = label[t].unique(return_counts=True)
        large = values[(counts >= _LEAST_THING * _ROWS**2) & (values > 0)]
        which += [t] * len(large)
        place.append(large)
    frame = torch.tensor(which, device=mask.device, dtype=torch.long)
    masks = label[frame] == torch.cat(place)[:, None, None] if which else mask[:0]
    return frame, masks


def _colours(hue: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The colour most of a patch's pixels have, as its number in `COLOURS`: `[M]`."""
    names = torch.tensor(list(COLOURS.values()), device=hue.device)[:, :, None, None]
    votes = _turn(hue[..., None], _hue(names).flatten()).abs().argmin(-1)
    return torch.stack([((votes == i) & masks).flatten(1).sum(1) for i in range(len(COLOURS))], 1).argmax(1)


@lru_cache(maxsize=4)
def _templates(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every shape at every angle, `[K, P*P]`; which shape it is; its angle in degrees."""
    line = torch.linspace(-_REACH, _REACH, _PATCH, device=device)
    dy, dx = torch.meshgrid(line, line, indexing="ij")
    pictures, shapes, angles = [], [], []
    for number, shape in enumerate(SHAPES):
        for degrees in range(0, _PERIOD[shape], _STEP):
            cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            inside = distance(shape, dx * cos + dy * sin, dy * cos - dx * sin, 1.0) < 0
            pictures.append(inside.flatten().float())
            shapes.append(number)
            angles.append(float(degrees))
    return torch.stack(pictures), torch.tensor(shapes, device=device), torch.tensor(angles, device=device)


def _templates_fit(chroma, masks, centre, area) -> tuple[torch.Tensor, torch.Tensor]:
    """For each patch and shape the largest overlap (intersection over union), and the angle it has there: `[M, 4]`."""
    rows, columns = masks.shape[1:]
    scale = (area / AREA).sqrt() / _ROWS
    line = torch.linspace(-_REACH, _REACH, _PATCH, device=masks.device)
    dy, dx = torch.meshgrid(line, line, indexing="ij")
    x = (centre[:, 0, None, None] + dx * scale[:, None, None]) * 2 * rows / columns
    y = (centre[:, 1, None, None] + dy * scale[:, None, None]) * 2
    # The patch's own coverage at its edge, and nothing of its neighbours.
    near = F.max_pool2d(masks.float()[:, None], 3, 1, 1)
    sampled = F.grid_sample(chroma[:, None] * near, torch.stack((x, y), -1), align_corners=False)
    patch = (sampled > _CHROMA).flatten(1).float()
    pictures, shapes, angles = _templates(masks.device)
    both = patch @ pictures.T
    overlap = both / (patch.sum(1, keepdim=True) + pictures.sum(1) - both).clamp_min(1)
    best, at = zip(*(_best(overlap, shapes == i) for i in range(len(SHAPES))), strict=True)
    return torch.stack(best, 1), angles[torch.stack(at, 1)]


def _best(overlap: torch.Tensor, these: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return overlap.masked_fill(~these, -1).max(1)


def _put_together(frames, frame, area, centre, colour, overlap, angle, background, hue_gap, height_gap) -> Measured:
    names = list(COLOURS)
    counts = [Counter(colour[frame == t].tolist()) for t in range(frames)]
    things: dict[str, tuple[int, str | None]] = {}
    centres: dict[str, torch.Tensor] = {}
    period = torch.zeros(len(frame))
    degrees = torch.zeros(len(frame))
    for number, name in enumerate(names):
        count = _majority([found[number] for found in counts])
        if not count:
            continue
        these = colour == number
        score = overlap[these].mean(0)
        shape = SHAPES[int(score.argmax())] if float(score.max()) >= _LEAST_OVERLAP else None
        things[name] = (count, shape)
        centres[name] = centre[these].mean(0)
        if shape and shape != "circle":
            period[these] = _PERIOD[shape]
            degrees[these] = angle[these, SHAPES.index(shape)]
    total = sum(count for count, _ in things.values())
    whole = [t for t in range(frames) if sum(counts[t].values()) == total]
    size = float((area.median() / AREA).sqrt())
    middle = math.sqrt(SIZES["small"] * SIZES["large"])
    named = None if not 0.7 * SIZES["small"] < size < 1.3 * SIZES["large"] else "small" if size < middle else "large"
    relations = {
        (one, other): _relation(centres[one] - centres[other]) for one in centres for other in centres if one != other
    }
    motion = _motion(frame, centre, degrees, period, whole)
    return Measured(things, named, motion, background, relations, hue_gap, height_gap)


def _majority(values: list[int]) -> int:
    return Counter(values).most_common(1)[0][0]


def _relation(apart: torch.Tensor) -> str:
    x, y = apart.tolist()
    if abs(x) > abs(y):
        return "left of" if x < 0 else "right of"
    return "above" if y < 0 else "below"


def _motion(frame, centre, degrees, period, whole: list[int]) -> str | None:
    """From the frames that show all things: the slope of their mean centre, or how fast they turn."""
    if len(whole) < 2:
        return None
    time = torch.tensor(whole, dtype=torch.float32)
    path = torch.stack([centre[frame == t].mean(0) for t in whole])
    later, earlier = torch.triu_indices(len(whole), len(whole), 1).flip(0)
    slope = ((path[later] - path[earlier]) / (time[later] - time[earlier])[:, None]).median(0).values
    x, y = slope.tolist()
    if max(abs(x), abs(y)) > SPEED / 2:
        if min(abs(x), abs(y)) > 0.5 * max(abs(x), abs(y)):
            return None
        return ("left" if x < 0 else "right") if abs(x) > abs(y) else ("up" if y < 0 else "down")
    return "turning" if _turning(frame, degrees, period, whole) > TURN / 2 else "still"


def _turning(frame, degrees, period, whole: list[int]) -> float:
    """Degrees a frame, clockwise: the median over frames some way apart, for things that have corners."""
    lag = max(1, min(3, len(whole) // 2))
    speeds = []
    for kind in period.unique().tolist():
        if not kind:
            continue
        turns = {}
        for t in whole:
            some = torch.deg2rad(degrees[(frame == t) & (period == kind)] * 360 / kind)
            if len(some):
                turns[t] = float(torch.rad2deg(torch.atan2(some.sin().mean(), some.cos().mean())))
        speeds += [_turn(turns[t + lag], turns[t]) * kind / 360 / lag for t in turns if t + lag in turns]
    return sorted(speeds)[len(speeds) // 2] if speeds else 0.0


def _markers(chroma, hue, x, y) -> tuple[float, float]:
    """How far the markers at the two edges differ in hue (over time, too) and height; infinite if one is missing."""
    area = math.pi * (MARKER_RADIUS * _ROWS) ** 2
    heights, hues, there = [], [], []
    for strip in (x < -(ASPECT / 2 - STRIP), x > ASPECT / 2 - STRIP):
        weight = ((chroma > 0.25) & strip).flatten(1).float()
        total = weight.sum(1).clamp_min(1)
        height = (weight * y.flatten()).sum(1) / total
        spread = ((weight * (y.flatten() - height[:, None]).square()).sum(1) / total).sqrt()
        # One patch of about the right size; specks all over the strip are no marker. A disc spreads by half its radius.
        there.append((total > 0.4 * area) & (total < 2 * area) & (spread < MARKER_RADIUS))
        heights.append(height)
        turn = torch.deg2rad(hue).flatten(1)
        hues.append(torch.rad2deg(torch.atan2((weight * turn.sin()).sum(1), (weight * turn.cos()).sum(1))))
    both = there[0] & there[1]
    if both.float().mean() < 0.8:
        return math.inf, math.inf
    gap = _turn(hues[0][both], hues[1][both]).abs()
    # A marker that changes its hue on the way agrees with nothing.
    drift = max(float(_turn(h[both], h[both][0]).abs().median()) for h in hues)
    return max(float(gap.median()), drift), float((heights[0][both] - heights[1][both]).abs().median())
