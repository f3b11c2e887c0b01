"""The cluster scripts give t3.generate the command they promise."""

import os
import subprocess
from pathlib import Path

import pytest

from t3.generate import build_parser

ROOT = Path(__file__).resolve().parent.parent
SLURM = ROOT / "cluster/slurm"


@pytest.fixture
def cluster(tmp_path):
    """An environment in which `srun` runs its command here, and Python is a script that writes down its arguments."""
    programs = {
        "srun": '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
        # More than a pipe holds: a reader that leaves after the first line would kill it.
        "scontrol": "#!/bin/bash\necho node-a\nseq -f node-%g 20000\n",
        "python-of-the-test": f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\nexit 3\n',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "T3_PYTHON": "python-of-the-test",
        "T3_MODEL": "a model",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }


def run(script: str, cluster: dict, tmp_path: Path, *arguments: str, gpus: int, **more: str) -> list[str]:
    environ = {**cluster, "SLURM_GPUS_ON_NODE": str(gpus), **more}
    done = subprocess.run(["bash", str(SLURM / script), *arguments], env=environ, capture_output=True, text=True)
    assert done.returncode == 3, "the status of t3.generate is the job's" + done.stderr
    return (tmp_path / "arguments").read_text().splitlines()


def test_a_task_with_one_gpu_runs_one_process(cluster, tmp_path):
    found = run("prompts.sbatch", cluster, tmp_path, "my prompts.txt", "clips", "--steps", "8", gpus=1)
    assert found[:2] == ["-m", "t3.generate"]
    args = build_parser().parse_args(found[2:])
    assert (args.prompts, args.out, args.model, args.steps) == ("my prompts.txt", "clips", "a model", 8)
    assert args.json and not args.t3_weights and args.shard is None, "clips are claimed, not dealt out"


def test_a_task_with_more_runs_torchrun(cluster, tmp_path):
    found = run("prompts.sbatch", cluster, tmp_path, "p.txt", "clips", gpus=4, T3_WEIGHTS="t3 weights")
    split = found.index("t3.generate")
    assert found[:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m"]
    assert build_parser().parse_args(found[split + 1 :]).t3_weights == ["t3 weights"]


def test_one_clip_over_machines(cluster, tmp_path):
    found = run("one-clip.sbatch", cluster, tmp_path, "a red kite", "kite.mp4", gpus=4)
    split = found.index("t3.generate")
    launch = found[2 : split - 1]
    assert dict(zip(launch[::2], launch[1::2], strict=True)) == {
        "--nnodes": "2",
        "--nproc-per-node": "4",
        "--rdzv-id": "7",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node-a:29500",
    }
    args = build_parser().parse_args(found[split + 1 :])
    assert (args.prompt, args.out) == ("a red kite", "kite.mp4")


@pytest.mark.parametrize("script", ["prompts.sbatch", "one-clip.sbatch"])
def test_what_is_missing_is_said(script, cluster):
    done = subprocess.run(["bash", str(SLURM / script), "one"], env=cluster, capture_output=True, text=True)
    assert done.returncode != 0 and "usage: sbatch" in done.stderr
