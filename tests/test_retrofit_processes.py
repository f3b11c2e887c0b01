"""Two processes against one at the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from retrofit_fixtures import SHAPE, write_clips, write_config, write_model
from safetensors.torch import load_file

from t3.retrofit.curves import read

# Everything that is summed over processes: gradients, their norm, losses, validation.
TABLES = {
    "schedule": {"steps": 3, "velocity": 0.5},
    "validation": {"every": 2, "levels": 4},
    "trainable": {"what": "lora", "rank": 2, "also": ["norms"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t2v", "vace", "ti2v"])
def test_two_processes_equal_one_at_the_same_global_batch(tmp_path, kind):
    write_model(tmp_path / "model", kind)
    shape = (48, *SHAPE[1:]) if kind == "ti2v" else SHAPE
    for name, count, seed in (("clips", 6, 0), ("held", 5, 1)):
        write_clips(tmp_path / name, count, shape, seed=seed, given=("first",), grey=kind == "vace")
    data = {"validation": [str(tmp_path / "held")]}
    if kind != "t2v":
        data["conditions"] = {"none": 1, "first": 1}
    one = write_config(tmp_path, "one", run="one", train={"batch": 4}, data=data, **TABLES)
    two = write_config(tmp_path, "two", run="two", train={"batch": 2}, data=data, **TABLES)
    started = [_start(1, "-m", "t3.retrofit", one), _start(2, "-m", "t3.retrofit", two)]
    for process in started:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    weights, others = (
        load_file(tmp_path / name / "checkpoints/step-00000003/weights.safetensors") for name in ("one", "two")
    )
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        # AdamW divides by the gradient's own size: where that is rounding, a step is, too, up to the learning rate.
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=2e-5, msg=name)
    for table in ("metrics", "validation"):
        found = [read(tmp_path / name / f"{table}.csv") for name in ("one", "two")]
        assert len(found[0]) == len(found[1])
        for a, b in zip(*found, strict=True):
            for key in set(a) - {"seconds", "training", "stage"}:
                assert (a[key] == b[key] == "") or float(a[key]) == pytest.approx(float(b[key]), rel=1e-4)


@pytest.mark.slow
def test_processes_that_share_the_weights_go_on_bit_for_bit(tmp_path):
    worker = _start(2, str(Path(__file__).with_name("retrofit_sharded.py")), str(tmp_path))
    output, _ = worker.communicate(timeout=300)
    assert worker.returncode == 0, output


# The second process takes long to write, the first to sample. What steps are told of the stage's progress is noted.
UNEVEN = """
import json, os, sys, time
from pathlib import Path
from t3.retrofit import finish, samples
from t3.retrofit.command import main
from t3.retrofit.loop import Loop

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
reserve, step, told = finish.Finish.reserve, Loop.take_step, []

def noted(self, stage, done):
    told.append(done)
    (folder / f"{rank}.json").write_text(json.dumps(told))
    step(self, stage, done)

finish.Finish.reserve, Loop.take_step = lambda self: reserve(self) + rank, noted
finish._sampler = lambda session: object() if session.main else None
samples.sample = lambda *_: time.sleep(0.5)
main([sys.argv[2]])
"""


@pytest.mark.slow
def test_processes_of_different_speed_take_the_same_steps(tmp_path):
    """Bounded by time: what one process alone has measured changes neither a learning rate nor the number of steps."""
    write_model(tmp_path / "model")
    write_clips(tmp_path / "clips")
    (tmp_path / "uneven.py").write_text(UNEVEN)
    stages = [{"name": "first", "steps": 1}, {"name": "timed", "steps": 0, "max_seconds": 8.0}]
    samples = {"prompts": ["a dot"], "every": 4}
    output = {"checkpoint_every": 0}
    config = write_config(tmp_path, run="run", stages=stages, samples=samples, output=output)
    worker = _start(2, str(tmp_path / "uneven.py"), str(tmp_path), config)
    said, _ = worker.communicate(timeout=200)
    assert worker.returncode == 0, said
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other and len(one) > 4


def _start(processes: int, *program: str) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    command = [sys.executable, *(launch if processes > 1 else []), *program]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
