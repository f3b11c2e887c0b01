"""A stand-in for a GGUF model as the pack that loads them hands it on: packed weights, unpacked where they are used.

Such a pack's tensors say the shape they stand for, and their storage is bytes; its linear layers unpack them and apply
patches then; its patcher leaves the patches of a packed tensor to them. What is packed here is Q8_0: 32 whole numbers
and their scale, in 34 bytes.
"""

from __future__ import annotations

import comfy.lora
import comfy.model_patcher
import torch

BLOCK = 32


class PackedTensor(torch.Tensor):
    """Bytes that stand for a matrix. Stays itself through what models and patchers do to parameters."""

    @staticmethod
    def __new__(cls, raw, shape, patches=()):
        tensor = torch.Tensor._make_subclass(cls, raw)
        tensor.tensor_type, tensor.tensor_shape, tensor.patches = "Q8_0", torch.Size(shape), list(patches)
        return tensor

    @property
    def shape(self):
        return self.tensor_shape

    def size(self, dim=None):
        return self.tensor_shape if dim is None else self.tensor_shape[dim]

    def to(self, *args, **kwargs):
        return PackedTensor(self.raw.to(*args, **kwargs).to(torch.uint8), self.tensor_shape, self.patches)

    def clone(self, *args, **kwargs):
        return self

    def detach(self, *args, **kwargs):
        return self

    @property
    def raw(self):
        return self.as_subclass(torch.Tensor)


def pack(weight: torch.Tensor) -> PackedTensor:
    blocks = weight.detach().float().reshape(-1, BLOCK)
    scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).half()
    numbers = (blocks / scale.float().clamp_min(1e-30)).round().clamp(-127, 127).to(torch.int8)
    return PackedTensor(torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], dim=1), weight.shape)


def unpack(weight: PackedTensor) -> torch.Tensor:
    raw = weight.raw
    scale = raw[:, :2].contiguous().view(torch.float16).float()
    return (raw[:, 2:].contiguous().view(torch.int8).float() * scale).reshape(weight.tensor_shape)


class PackedLinear(torch.nn.Module):
    """A linear layer of packed weight and plain bias."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(pack(plain.weight), requires_grad=False)
        self.bias = plain.bias

    def unpacked(self) -> torch.Tensor:
        weight = unpack(self.weight)
        for patches, key in self.weight.patches:
            weight = comfy.lora.calculate_weight(patches, weight, key)
        return weight

    def forward(self, x):
        return torch.nn.functional.linear(x, self.unpacked(), self.bias)


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """Hands the patches of packed weights to them; the rest as the host does."""

    def patch_weight_to_device(self, key, *args, **kwargs):
        weight = comfy.utils.get_attr(self.model, key)
        if not isinstance(weight, PackedTensor):
            return super().patch_weight_to_device(key, *args, **kwargs)
        if key in self.patches:
            weight.patches = [(self.patches[key], key)]
        return weight

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for parameter in self.model.parameters():
                if isinstance(parameter, PackedTensor):
                    parameter.patches = []
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)


def pack_model(patcher) -> PackedPatcher:
    """The same model with the matrices of its blocks packed, in place, and a patcher for it."""
    for block in patcher.model.diffusion_model.blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                owner, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(owner), leaf, PackedLinear(module))
    return PackedPatcher(patcher.model, load_device=patcher.load_device, offload_device=patcher.offload_device)


def weights(patcher) -> dict[str, torch.Tensor]:
    """Original name -> what each layer computes with now, packed ones unpacked with their patches."""
    model = patcher.model.diffusion_model
    out = {name: p.detach().clone() for name, p in model.named_parameters() if not isinstance(p, PackedTensor)}
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    return out | {f"{name}.weight": module.unpacked() for name, module in packed.items()}
