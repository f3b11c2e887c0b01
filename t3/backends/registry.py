"""The backends, and what each of them states that it can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from ..errors import T3Error

HALF = (torch.float16, torch.bfloat16)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Situation:
    """What a backend's legality, and its speed, depend on.

    windows: lengths, in tokens, of the windows to be attended (of the keys that a query meets), one for each layer or
    class of windows; () where they are not known.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    needs_grad: bool = False
    windows: tuple[int, ...] = ()

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA compute capability; None off NVIDIA cards (ROCm numbers its cards otherwise)."""
        if self.device.type != "cuda" or torch.version.hip:
            return None
        return torch.cuda.get_device_capability(self.device)

    @property
    def card(self) -> str:
        """The card's own name for itself."""
        return torch.cuda.get_device_name(self.device)

    def __str__(self) -> str:
        grad = ", with gradients" if self.needs_grad else ""
        return f"{str(self.dtype).removeprefix('torch.')}, head size {self.head_dim}, on {self.device}{grad}"


@dataclass(frozen=True)
class Backend:
    """Dense attention by one implementation, and its constraints.

    `attend(q, k, v, scale)` takes `[B, N, heads, head_dim]` for q and `[B, M, heads, head_dim]` for k and v, any
    strides whose last is 1, and returns q's shape. It must not write to its inputs.
    `package`: what must be importable; `distribution`: the name under which it is installed.
    `exact`: computes in the inputs' precision (no 8-bit steps); only such backends are picked by `auto`.
    `slow_start`: compiles for seconds when it is first used, which tuning does not wait for.
    `scores`: builds the whole score matrix, so that its memory grows with the square of the window.
    `keys_multiple`: a function that gives the number that the number of keys must be a multiple of.
    """

    name: str
    about: str
    attend: Attend
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    max_head_dim: int | None = None
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None
    package: str | None = None
    distribution: str | None = None
    exact: bool = True
    slow_start: bool = False
    differentiable: bool = True
    scores: bool = False
    torch_check: str | None = None
    keys_multiple: Callable[[], int] | None = None

    def check_keys(self, keys: int) -> None:
        """Raise `T3Error` if this backend gives wrong results for so many keys."""
        if self._wrong_for(keys):
            raise T3Error(
                f"attention backend {self.name!r}, as installed, is wrong for {keys:,} keys: it needs a multiple of "
                f"{self._multiple}. Use another backend, or a plan whose windows have {self._nearest(keys):,}."
            )

    @property
    def _multiple(self) -> int:
        return self.keys_multiple() if self.keys_multiple else 1

    def _nearest(self, keys: int) -> int:
        return round(keys / self._multiple) * self._multiple

    def _wrong_for(self, keys: int) -> bool:
        return bool(keys % self._multiple)

    def refusal(self, s: Situation) -> str | None:
        """Why this backend cannot serve `s`, or None if it can."""
        if self.devices and s.device.type not in self.devices:
            return f"needs {' or '.join(self.devices)}, not {s.device.type}"
        if self.package and not installed(self.package):
            return f"the package {self.package} is not installed"
        if self.min_capability:
            if s.capability is None:
                return "needs an NVIDIA card"
            if s.capability < self.min_capability:
                return f"needs compute capability {_dot(self.min_capability)}, this card has {_dot(s.capability)}"
            if self.max_capability and s.capability > self.max_capability:
                return f"ends at compute capability {_dot(self.max_capability)}, this card has {_dot(s.capability)}"
        if self.dtypes and s.dtype not in self.dtypes:
            return f"takes {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, not {s.dtype}"
        if self.head_dims and s.head_dim not in self.head_dims:
            return f"takes head sizes {', '.join(map(str, self.head_dims))}, not {s.head_dim}"
        if self.max_head_dim and (s.head_dim > self.max_head_dim or s.head_dim % 8):
            return f"takes head sizes up to {self.max_head_dim} in steps of 8, not {s.head_dim}"
        if s.needs_grad and not self.differentiable:
            return "has no gradients"
        if wrong := next((n for n in s.windows if self._wrong_for(n)), None):
            return (
                f"as installed, is wrong for {wrong:,} keys: it needs a multiple of {self._multiple}, as "
                f"{self._nearest(wrong):,} is"
            )
        if self.torch_check and not _torch_allows(self.torch_check, s):
            return "this build of torch refuses these tensors for it"
        return None


def _dot(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@lru_cache(maxsize=32)
def installed(package: str) -> bool:
    """Whether a package can be found, without importing it (its parents are imported)."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a parent package is missing, or half-initialised
        return False


def _torch_allows(check: str, s: Situation) -> bool:
    """Ask torch itself, with tensors like those to come: builds differ in the kernels they hold."""
    probe = torch.empty(1, 2, 128, s.head_dim, device=s.device, dtype=s.dtype, requires_grad=s.needs_grad)
    params = torch.backends.cuda.SDPAParams(probe, probe, probe, None, 0.0, False, False)
    return getattr(torch.backends.cuda, check)(params)


def _sdpa(kernel: str | None) -> Attend:
    def attend(q, k, v, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if kernel is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel(getattr(SDPBackend, kernel)):
                out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2)

    return attend


def _flash_attn_2(q, k, v, scale):
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=scale)


def _flash_attn_3(q, k, v, scale):
    from flash_attn_interface import flash_attn_func

    return _first(flash_attn_func(q, k, v, softmax_scale=scale))


def _flash_attn_4(q, k, v, scale):
    from flash_attn.cute import flash_attn_func

    return _first(flash_attn_func(q, k, v, softmax_scale=scale))


def _first(out):
    """Some versions also return the log-sum-exp."""
    return out[0] if isinstance(out, tuple) else out


@lru_cache(maxsize=1)
def _sage_keys_multiple() -> int:
    """Version 1 reads keys in blocks of 64 and counts the missing ones of the last block as keys of score 0."""
    return 64 if version("sageattention").startswith("1.") else 1


def _sage(q, k, v, scale):
    from sageattention import sageattn

    # Version 1 subtracts the mean from k in place: it gets a tensor of its own.
    return sageattn(q, k.clone(), v, tensor_layout="NHD", is_causal=False, sm_scale=scale)


def _comfy_kitchen_int8(q, k, v, scale):
    from comfy_kitchen.sage_attention import int8_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return int8_attention(q, k, v, scale=scale).transpose(1, 2)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("sdpa", "torch SDPA, the kernel torch prefers", _sdpa(None)),
        Backend(
            "sdpa-cudnn",
            "torch SDPA, cuDNN kernel",
            _sdpa("CUDNN_ATTENTION"),
            devices=("cuda",),
            dtypes=HALF,
            max_head_dim=256,
            min_capability=(8, 0),
            torch_check="can_use_cudnn_attention",
        ),
        Backend(
            "sdpa-flash",
            "torch SDPA, FlashAttention-2 kernel",
            _sdpa("FLASH_ATTENTION"),
            devices=("cuda",),
            dtypes=HALF,
            max_head_dim=256,
            torch_check="can_use_flash_attention",
        ),
        Backend(
            "sdpa-efficient",
            "torch SDPA, memory-efficient kernel",
            _sdpa("EFFICIENT_ATTENTION"),
            devices=("cuda",),
            dtypes=(*HALF, torch.float32),
            torch_check="can_use_efficient_attention",
        ),
        Backend("sdpa-math", "torch SDPA, plain matrix products", _sdpa("MATH"), scores=True),
        Backend(
            "flash-attn-2",
            "the flash-attn package",
            _flash_attn_2,
            devices=("cuda",),
            dtypes=HALF,
            max_head_dim=256,
            package="flash_attn.flash_attn_interface",
            distribution="flash-attn",
        ),
        Backend(
            "flash-attn-3",
            "the flash-attn-3 package, for Hopper (not tried by us)",
            _flash_attn_3,
            devices=("cuda",),
            dtypes=HALF,
            max_head_dim=256,
            min_capability=(9, 0),
            max_capability=(9, 0),
            package="flash_attn_interface",
            distribution="flash-attn-3",
        ),
        Backend(
            "flash-attn-4",
            "the flash-attn-4 package (CuTe)",
            _flash_attn_4,
            devices=("cuda",),
            dtypes=HALF,
            max_head_dim=128,
            min_capability=(8, 0),
            package="flash_attn.cute",
            distribution="flash-attn-4",
            slow_start=True,
        ),
        Backend(
            "sage",
            "the sageattention package (8-bit q and k)",
            _sage,
            devices=("cuda",),
            dtypes=HALF,
            head_dims=(64, 96, 128),
            min_capability=(8, 0),
            package="sageattention",
            distribution="sageattention",
            exact=False,
            differentiable=False,
            keys_multiple=_sage_keys_multiple,
        ),
        Backend(
            "comfy-kitchen-int8",
            "comfy-kitchen's int8 attention (8-bit q, k, v and weights)",
            _comfy_kitchen_int8,
            devices=("cuda",),
            dtypes=(*HALF, torch.float32),
            max_head_dim=256,
            min_capability=(7, 5),
            package="comfy_kitchen.sage_attention",
            distribution="comfy-kitchen",
            exact=False,
            differentiable=False,
        ),
    )
}
