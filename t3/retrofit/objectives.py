"""The losses: flow matching, and agreement with the same weights under dense attention.

x_t = (1 - sigma) x + sigma n            n: noise of variance 1
flow       mean |v(x_t) - (n - x)|^2
velocity   mean |v(x_t) - v_dense(x_t)|^2, v_dense: the untouched model with dense attention
attention  mean over layers of |a_i - a_dense_i|^2 / mean a_dense_i^2, a: the self-attention's output (after its
           projection) at the sampled tokens. Both get the same input of layer i: the dense model's own ("teacher"),
           which takes a dense pass, or the trained model's ("student"), where only the sampled tokens are dense.

Means of velocities are over what is to be made: a latent frame that a clip is given without noise does not count.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from torch.utils.checkpoint import checkpoint

from ..attention import attend_window
from ..backends import Backend, Situation, choose
from ..plan import Grid
from ..processor import self_attentions
from .conditioning import Given, clip_errors, model_inputs
from .config import Stage
from .operator import Operator, projected
from .teacher import Teacher

TIMESTEPS = 1000  # Wan's time embedding takes the noise level in thousandths
LOSSES = ("flow", "velocity", "attention")


class Batch(NamedTuple):
    """One round of one process: latents and noise `[B, C, T, H, W]`, text `[B, tokens, dim]`, sigma `[B]` in float32,
    the tokens `[queries]` at which attention outputs are compared, or None, and what the model is given beside."""

    latents: torch.Tensor
    text: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    rows: torch.Tensor | None = None
    given: Given = Given()


class _Compared(NamedTuple):
    """A self-attention's output at the sampled tokens, `[B, queries, D]`: as it is, and as it should be."""

    found: torch.Tensor
    wanted: torch.Tensor


class _Given(NamedTuple):
    """What a layer's self-attention got in the dense model, and gave at the sampled tokens."""

    inputs: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    wanted: torch.Tensor


class Objective(torch.nn.Module):
    """The transformer with its losses on top, so that whatever wraps a module for training sees one forward."""

    def __init__(
        self, transformer: WanTransformer3DModel, operator: Operator, teacher: Teacher | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.operator = operator
        self.dtype = dtype
        self._teacher = (teacher,)  # in a tuple: it is no part of what is trained

    def forward(self, batch: Batch, stage: Stage, per_clip: bool = False):
        """The weighted loss, and `[flow, velocity, attention]` detached, NaN where a stage leaves one out.

        per_clip: instead, the flow-matching error of each clip, `[B]`.
        """
        latents, noise = batch.latents.float(), batch.noise
        sigma = batch.sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - sigma) * latents + sigma * noise
        patch = self.transformer.config.patch_size
        told = model_inputs(noisy, latents, batch.sigma * TIMESTEPS, batch.given, patch)
        inputs: dict[str, Any] = {
            **{name: x if name == "timestep" else x.to(self.dtype) for name, x in told.items()},
            "encoder_hidden_states": batch.text.to(self.dtype),
            "return_dict": False,
        }
        if per_clip:
            velocity = self.transformer(**inputs)[0].float()
            return clip_errors(velocity - (noise - latents), batch.given)
        losses: dict[str, torch.Tensor] = {}
        by_teacher = bool(stage.attention) and stage.inputs == "teacher"
        by_student = bool(stage.attention) and stage.inputs == "student"
        if stage.velocity or by_teacher:
            with self.teacher.on() as dense, _watching(dense, batch.rows if by_teacher else None, _given) as given:
                target = dense(**inputs)[0].float()
        if by_teacher:
            losses["attention"] = self._attention(given, inputs["hidden_states"], batch.rows)
        if stage.flow or stage.velocity or by_student:
            with _watching(self.transformer, batch.rows if by_student else None, self._against_dense) as compared:
                velocity = self.transformer(**inputs)[0].float()
            if stage.flow:
                losses["flow"] = clip_errors(velocity - (noise - latents), batch.given).mean()
            if stage.velocity:
                losses["velocity"] = clip_errors(velocity - target, batch.given).mean()
            if by_student:
                losses["attention"] = torch.stack([relative_error(*compared[i]) for i in sorted(compared)]).mean()
        total = sum(getattr(stage, name) * loss for name, loss in losses.items())
        absent = total.new_full((), float("nan"))
        return total, torch.stack([losses.get(name, absent).detach() for name in LOSSES])

    @property
    def teacher(self) -> Teacher:
        assert self._teacher[0] is not None, "an objective that needs the dense model was started without it"
        return self._teacher[0]

    def _attention(self, given: dict[int, _Given], hidden_states, rows) -> torch.Tensor:
        """The trained model's attention, layer by layer, on the inputs that the dense model's layers had."""
        patch = self.transformer.config.patch_size
        self.operator.place(Grid(*(n // p for n, p in zip(hidden_states.shape[2:], patch, strict=True))))
        losses = []
        for number, (attention, _) in enumerate(self_attentions(self.transformer)):
            inputs, rotary, wanted = given[number]
            if self.transformer.gradient_checkpointing:
                out = checkpoint(attention, inputs, None, None, rotary, use_reentrant=False)
            else:
                out = attention(inputs, None, None, rotary)
            losses.append(relative_error(out[:, rows], wanted))
        return torch.stack(losses).mean()

    def _against_dense(self, number: int, inputs, rotary, found, rows) -> _Compared:
        """Of a self-attention that has just run: what it gave, and what dense attention gives on the same input."""
        with self.teacher.on() as dense:
            attention = self_attentions(dense)[number][0]
            return _Compared(found, dense_rows(attention, inputs.detach(), rotary, rows, self.operator.backend))


@contextlib.contextmanager
def _watching(transformer, rows, look):
    """Collect, by number, what `look(number, inputs, rotary, output at rows, rows)` makes of every self-attention.

    Without rows nothing is collected. Only the sampled tokens' outputs are kept: all of them, of all layers, would
    take as much memory as the checkpointed activations.
    """
    seen: dict[int, Any] = {}

    def watch(number):
        def hook(module, arguments, output):
            seen[number] = look(number, arguments[0], arguments[3], _Rows.apply(output, rows), rows)

        return hook

    watched = [] if rows is None else self_attentions(transformer)
    handles = [attention.register_forward_hook(watch(i)) for i, (attention, _) in enumerate(watched)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Rows(torch.autograd.Function):
    """`x[:, rows]` that saves no tensor: gradient checkpointing runs the block again without it, and counts those."""

    @staticmethod
    def forward(x, rows):
        return x[:, rows]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.rows = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx, grad):
        whole = grad.new_zeros(ctx.shape)
        whole[:, ctx.rows] = grad
        return whole, None


def _given(number: int, inputs, rotary, found, rows) -> _Given:
    return _Given(inputs, rotary, found)


def relative_error(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean square of the difference over the mean square of the target, in float32 at least."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    out, target = out.to(dtype), target.detach().to(dtype)
    return (out - target).square().mean() / target.square().mean()


def dense_rows(attn, hidden_states, rotary, rows, backend: str | Backend) -> torch.Tensor:
    """Full self-attention's output `[B, rows, D]` of some tokens of `hidden_states` `[B, N, D]`."""
    q, k, v = projected(attn, hidden_states[:, rows], hidden_states, rotary, rows)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
    if isinstance(backend, str):
        backend, _ = choose(backend, Situation(q.device, q.dtype, q.shape[-1]))
    out = attend_window(backend, q.shape[-1] ** -0.5, q, k, v)
    return attn.to_out[1](attn.to_out[0](out.flatten(2, 3)))
