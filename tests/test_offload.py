"""What is kept on a card, decided without one: `--offload auto` counts every part that stays there."""

import pytest
import torch
from generate_runs import TINY, run

from t3 import pipeline

GIB = 2**30


def weights_of(count):
    """A part with so many bytes of weights, which are nowhere: only the size counts."""
    return torch.nn.Linear(count // 4, 1, bias=False, device="meta")


class Pipe:
    """A pipeline's parts, and what was done with them."""

    def __init__(self, *, text_encoder, vae):
        self.text_encoder, self.vae = weights_of(text_encoder), weights_of(vae)
        self.done = None

    def to(self, device):
        self.done = "none"

    def enable_model_cpu_offload(self, device):
        self.done = "model"


@pytest.mark.parametrize(
    ("free", "sampling", "chosen"),
    [
        (11.5, 3.6, "model"),  # 1.3B at 480p on 12 GB: umT5 alone is 10.6 GiB in bfloat16
        (23.5, 13.1, "model"),  # 1.3B at 4K on 24 GB
        (23.5, 6.0, "none"),
        (79.0, 45.0, "none"),
        (8.0, 40.0, "model"),
    ],
)
def test_what_stays_on_the_card_fits_with_all_its_parts(monkeypatch, free, sampling, chosen):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), 80 * GIB))
    pipe, said = Pipe(text_encoder=int(10.6 * GIB), vae=int(0.25 * GIB)), []
    pipeline._place(pipe, torch.device("cuda"), "auto", int(sampling * GIB), said.append)
    assert pipe.done == chosen
    assert said[0].startswith(f"offload {chosen}: ")
    assert f"about {sampling:.1f} GiB, the other parts 10.8, of {free:.1f} free" in said[0]


def test_a_model_that_does_not_fit_is_no_traceback(monkeypatch, capsys, tiny_model, tmp_path):
    def no_room(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it.")

    monkeypatch.setattr(pipeline, "_place", no_room)
    asked = [*TINY, "--model", tiny_model, "--prompt", "a kite", "--out", tmp_path / "clip.mp4", "--json"]
    status, _, err = run(capsys, *asked)
    assert status == 2 and not list(tmp_path.iterdir())
    assert "does not fit" in err and "2.00 GiB. Try --offload model or group" in err
