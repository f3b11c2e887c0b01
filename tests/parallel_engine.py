"""One of several ranks that sample what each of them also samples alone, through the whole engine; run by
`test_parallel_engine`.

Arguments: a folder for models and images, then names of `CASES`.
"""

import sys
from pathlib import Path

from PIL import Image
from small_models import build

from t3 import Plan
from t3.jobs import Clip, Options
from t3.parallel.split import Split
from t3.parallel.team import form_team
from t3.parallel.world import World
from t3.pipeline import Engine
from t3.plan import Grid
from t3.sources import find_sources

PLAN = Plan("small", Grid(2, 4, 6), (("each", 1, 1), (1, 2, 3), (1, 4, 2)))
CASES = {
    "t2v": ("t2v", Split(1, 1, 2), {}),
    "t2v-guidance": ("t2v", Split(1, 2, 1), {}),
    "a14b-t2v": ("a14b-t2v", Split(1, 2, 1), {}),
    "a14b-t2v-sequence": ("a14b-t2v", Split(1, 1, 2), {}),
    "i2v": ("i2v", Split(1, 2, 1), {"image": "picture.png"}),
    "i2v-sequence": ("i2v", Split(1, 1, 2), {"image": "picture.png"}),
    "vace": ("vace", Split(1, 2, 1), {}),
    "vace-sequence": ("vace", Split(1, 1, 2), {"image": "picture.png"}),
    "ti2v-5b": ("ti2v-5b", Split(1, 1, 2), {"image": "picture.png"}),
}


def main(folder: Path, names: list[str]) -> None:
    world = World.from_environment().start("cpu")
    for name in names:
        kind, split, files = CASES[name]
        if world.is_first and not (folder / kind).exists():
            build(kind, folder / kind)
        if world.is_first:
            Image.radial_gradient("L").resize((112, 80)).convert("RGB").save(folder / "picture.png")
        world.gather("built")
        side = 32 if kind == "ti2v-5b" else 16
        # An odd number of tokens: 2 x 3 x 5 of them for one latent frame more.
        grid = Grid(3, 3, 5)
        images = {key: folder / value for key, value in files.items()}
        clip = Clip("a kite", "rain", 3 * side, 5 * side, 9, 2, 5.0, 1, **images)
        sources, options = find_sources(model=str(folder / kind)), Options(dtype="fp32", device="cpu")
        said: list[str] = []
        alone = Engine.load(sources, PLAN, options, grid, said.append).sample(clip)
        team = form_team(world, split)
        found = Engine.load(sources, PLAN, options, grid, said.append, team).sample(clip)
        error = float((found - alone).abs().max() / alone.abs().max())
        # Two steps of float32, in another order of heads.
        assert error < 1e-4, f"{name}: {error}"
        assert len(set(world.gather(float(found.double().sum())))) == 1
        print(f"{name}: equal")
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
