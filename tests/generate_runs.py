"""Running `python -m t3.generate` in this process, and looking at what came of it."""

import json

import av
import numpy as np

from t3 import generate

TINY = ["--height", "64", "--width", "96", "--frames", "5", "--steps", "2", "--cfg", "1"]


def run(capsys, *arguments, main=generate.main):
    """Exit status, the JSON on standard output (None if there is none), and standard error."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    out, err = capsys.readouterr()
    return status, json.loads(out) if out.strip().startswith("{") else None, err


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
