"""The log-sum-exp of attention scores in windows, with its gradient, without keeping the scores."""

from __future__ import annotations

import torch

# Scores that are held at once, in numbers.
_SCORES = 2**26


def window_logsumexp(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """`log(sum_j exp(scale * q_i . k_j))` in each window and head: q, k `[windows, tokens, heads, head_dim]`.

    Returns float32 (float64 for such inputs) `[windows, tokens, heads]`. The scores are built again for the gradient,
    some windows at a time: memory grows with the tokens, not with the scores.
    """
    return _LogSumExp.apply(q, k, scale)


def _pieces(q: torch.Tensor):
    windows, size, heads, _ = q.shape
    some = max(1, _SCORES // (size * size * heads))
    return [slice(start, start + some) for start in range(0, windows, some)]


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """`[windows, heads, queries, keys]`, in float32 at least."""
    scores = torch.einsum("wqhd,wkhd->whqk", q, k)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(q, k, scale):
        sums = [torch.logsumexp(_scores(q[some], k[some], scale), dim=-1) for some in _pieces(q)]
        return torch.cat(sums).transpose(1, 2).contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, scale = inputs
        ctx.save_for_backward(q, k, output)
        ctx.scale = scale

    @staticmethod
    def backward(ctx, grad):
        q, k, sums = ctx.saved_tensors
        grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
        for some in _pieces(q):
            weights = torch.exp(_scores(q[some], k[some], ctx.scale) - sums[some].transpose(1, 2)[..., None])
            weights = (weights * grad[some].transpose(1, 2)[..., None] * ctx.scale).to(q.dtype)
            grad_q[some] = torch.einsum("whqk,wkhd->wqhd", weights, k[some])
            grad_k[some] = torch.einsum("whqk,wqhd->wkhd", weights, q[some])
        return grad_q, grad_k, None
