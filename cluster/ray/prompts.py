"""Run `python -m t3.generate` on every GPU of a Ray cluster, over one prompt file: see README.md beside this file."""

import argparse
import subprocess
import sys

import ray


@ray.remote(num_gpus=1, max_retries=2, retry_exceptions=True)
def work(options: list[str]) -> int:
    """One process on one GPU, which takes clips until none is left. Raises where it fails, so that Ray tries again."""
    status = subprocess.run([sys.executable, "-m", "t3.generate", *options]).returncode
    if status not in (0, 2):
        raise RuntimeError(f"t3.generate ended with {status}; what it says is in this worker's log")
    return status


def main() -> int:
    """Start the workers, wait for all; 0 if each ended well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, required=True, help="GPUs to use")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="after --: of t3.generate")
    args = parser.parse_args()
    options = [option for option in args.options if option != "--"]
    ray.init()
    return max(ray.get([work.options(name=f"t3-{i}").remote(options) for i in range(args.workers)]))


if __name__ == "__main__":
    sys.exit(main())
