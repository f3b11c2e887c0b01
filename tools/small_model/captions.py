"""What a caption says of a scene, and the words it takes."""

from __future__ import annotations

from .scenes import BACKGROUNDS, COLOURS, MOTIONS, RELATIONS, SHAPES, SIZES, Scene

COUNTS = ("a", "two", "three")
_PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
_MOTION_WORDS = {
    "still": "standing still",
    "turning": "turning",
    **{motion: f"moving {motion}" for motion in ("left", "right", "up", "down")},
}
# What an attribute can be, besides unsaid (None).
ATTRIBUTES = {
    "count": (1, 2, 3),
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "relation": tuple(RELATIONS),
    "other colour": tuple(COLOURS),
    "other shape": SHAPES,
    "motion": tuple(MOTIONS),
    "background": tuple(BACKGROUNDS),
}


def caption(scene: Scene, frames: int = 21) -> str:
    """The caption of a scene: "two small red circles moving left on a black background"; no motion for one frame."""
    return phrase(stated(scene, frames))


def phrase(said: dict[str, object]) -> str:
    """The caption that states these attributes (see `stated`); "" where there is no shape."""
    if not said["shape"]:
        return ""
    size = f"{said['size']} " if said["size"] else ""
    if said["relation"]:
        text = (
            f"a {size}{said['colour']} {said['shape']} {said['relation']} "
            f"a {size}{said['other colour']} {said['other shape']}"
        )
        joint = ", both "
    else:
        count = said["count"]
        text = f"{COUNTS[count - 1]} {size}{said['colour']} {said['shape'] if count == 1 else _PLURALS[said['shape']]}"
        joint = " "
    if said["motion"]:
        text += joint + _MOTION_WORDS[said["motion"]]
    if said["background"]:
        text += f" on a {said['background']} background"
    return text


def stated(scene: Scene, frames: int = 21) -> dict[str, object]:
    """The value of every attribute in `ATTRIBUTES`, None for those the caption leaves open."""
    first = scene.things[0]
    other = scene.things[1] if scene.relation else None
    return {
        "count": None if scene.relation else len(scene.things),
        "size": scene.size if "size" in scene.said else None,
        "colour": first.colour,
        "shape": first.shape,
        "relation": scene.relation,
        "other colour": other.colour if other else None,
        "other shape": other.shape if other else None,
        "motion": scene.motion if "motion" in scene.said and frames > 1 else None,
        "background": scene.background if "background" in scene.said else None,
    }


def words() -> list[str]:
    """Every word a caption can hold, in a fixed order."""
    phrases = [
        *COUNTS,
        "one",
        *SIZES,
        *COLOURS,
        *SHAPES,
        *_PLURALS.values(),
        *RELATIONS,
        *_MOTION_WORDS.values(),
        *BACKGROUNDS,
        "both on background , .",
    ]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))
