"""Small random Wan models of every kind ComfyUI has, as files for its loaders or as models in this process.

Weights come from ComfyUI's own classes, so that key names and shapes are those of its loaders. Real head size (128),
everything else as small as the host lets it be.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "dim": 256,
    "ffn_dim": 320,
    "num_heads": 2,
    "num_layers": 5,
    "text_dim": 48,
    "patch_size": (1, 2, 2),
    "in_dim": 16,
    "out_dim": 16,
}
# What each kind adds to SIZES, and the names of the host's model config and base class it is run by.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t2v": ("WAN21_T2V", "WAN21", {"model_type": "t2v"}),
    "ti2v-5b": ("WAN22_T2V", "WAN22", {"model_type": "t2v", "in_dim": 48, "out_dim": 48}),
    "i2v": ("WAN21_I2V", "WAN21", {"model_type": "i2v", "in_dim": 36}),
    "flf2v": ("WAN21_I2V", "WAN21", {"model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 514}),
    "fun-control": ("WAN21_FunControl2V", "WAN21", {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16}),
    "vace": ("WAN21_Vace", "WAN21_Vace", {"model_type": "vace", "vace_in_dim": 96, "vace_layers": 2, "num_layers": 6}),
    "camera": ("WAN21_Camera", "WAN21_Camera", {"model_type": "camera", "in_dim": 32}),
    "camera-2.2": ("WAN22_Camera", "WAN21_Camera", {"model_type": "camera_2.2", "in_dim": 32}),
    "humo": ("WAN21_HuMo", "WAN21_HuMo", {"model_type": "humo", "audio_token_num": 4}),
    "s2v": (
        "WAN22_S2V",
        "WAN22_S2V",
        {"model_type": "s2v", "audio_dim": 64, "num_audio_token": 2, "audio_inject_layers": [0, 2]},
    ),
    "animate": ("WAN22_Animate", "WAN22_Animate", {"model_type": "animate", "in_dim": 36}),
    "scail": ("WAN21_SCAIL", "WAN21_SCAIL", {"model_type": "scail", "in_dim": 20}),
    "scail-2": ("WAN21_SCAIL2", "WAN21_SCAIL2", {"model_type": "scail2", "in_dim": 20}),
    "wandancer": (
        "WAN22_WanDancer",
        "WAN22_WanDancer",
        {"model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0, 2]},
    ),
    "flow-rvs": ("WAN21_FlowRVS", "WAN21_FlowRVS", {"model_type": "t2v"}),
    "causal-ar": ("WAN21_CausalAR_T2V", "WAN21_CausalAR", {"model_type": "t2v"}),
}


def metadata(text_dim: int = SIZES["text_dim"]) -> dict[str, str]:
    """Safetensors metadata by which the host learns the text width."""
    return {"config": json.dumps({"transformer": {"text_dim": text_dim}})}


def base_model(kind: str, *, seed: int = 0, **sizes: Any):
    """A host `BaseModel` of this kind in float32, with random weights that matter everywhere."""
    import comfy.model_base
    import comfy.supported_models

    config_name, base_name, changes = KINDS[kind]
    unet_config = {**SIZES, "image_model": "wan2.1", **changes, **sizes}
    config = getattr(comfy.supported_models, config_name)(unet_config)
    config.set_inference_dtype(torch.float32, None)
    base = getattr(comfy.model_base, base_name)(config, device=torch.device("cpu"))
    randomise(base.diffusion_model, seed)
    return base.eval()


def patcher(kind: str, *, seed: int = 0, **sizes: Any):
    """The same as the host's `ModelPatcher`, as a loader node would hand it on."""
    import comfy.model_patcher

    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base_model(kind, seed=seed, **sizes), load_device=cpu, offload_device=cpu)


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Random weights: matrices keep the scale of what passes through them; q and k norms make attention pick tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "modulation" not in name:
                parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))
            elif name.endswith(("norm_q.weight", "norm_k.weight")):
                parameter.copy_(1.5 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        for _, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=generator))


def dit_state_dict(kind: str = "t2v", *, seed: int = 0, **sizes: Any) -> dict[str, torch.Tensor]:
    """Weights of a diffusion model under the published key names, float32."""
    model = base_model(kind, seed=seed, **sizes).diffusion_model
    return {key: tensor.detach().contiguous().clone() for key, tensor in model.state_dict().items()}


def write_dit(
    path: Path, kind: str = "t2v", *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any
) -> Path:
    """A diffusion model file that the host's UNETLoader opens."""
    from safetensors.torch import save_file

    state = {key: tensor.to(dtype) for key, tensor in dit_state_dict(kind, seed=seed, **sizes).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata=metadata(sizes.get("text_dim", SIZES["text_dim"])))
    return path


def conditions(
    name: str, model: torch.nn.Module, batch: int, latent: tuple[int, int, int], generator
) -> dict[str, Any]:
    """Random conditions of one sort for latents `[batch, C, *latent]`, as the host's `apply_model` takes them."""
    t, h, w = latent

    def rand(channels: int, *size: int) -> torch.Tensor:
        return torch.randn(batch, channels, *size, generator=generator)

    def image(clip_tokens: int) -> dict[str, Any]:
        return {"c_concat": rand(model.in_dim - 16, t, h, w), "clip_fea": rand(clip_tokens, 1280)}

    sorts: dict[str, Any] = {
        "": lambda: {},
        "image": lambda: image(257),
        "first and last image": lambda: image(514),
        "vace": lambda: {"vace_context": rand(1, 96, t, h, w), "vace_strength": [0.8]},
        "fun reference": lambda: {"c_concat": rand(model.in_dim - 16, t, h, w), "reference_latent": rand(16, h, w)},
        "appended frames": lambda: {"time_dim_concat": rand(16, 1, h, w)},
        "context": lambda: {"context_latents": [rand(16, 1, h, w), rand(16, 1, 7, 6)]},
        "camera": lambda: {**image(257), "camera_conditions": rand(24, t, 8 * h, 8 * w)},
        "humo": lambda: {"reference_latent": rand(16, 2, h, w)},
        "s2v": lambda: {"reference_latent": rand(16, 1, h, w), "reference_motion": rand(16, 19, h, w)},
        "animate": lambda: {**image(257), "pose_latents": rand(16, t - 1, h, w)},
        "scail": lambda: {
            "c_concat": rand(4, t, h, w),
            "reference_latent": rand(20, 2, h, w),
            "pose_latents": rand(20, t, h // 2, w // 2),
        },
        "scail and frames": lambda: {**sorts["scail"](), "time_dim_concat": rand(20, 1, h, w)},
        "wandancer": lambda: {**image(257), "clip_fea_ref": rand(257, 1280), "fps": 30},
    }
    return sorts[name]()


def rotate(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """The host's rotation by 2x2 matrices, in any dtype. x: `[B, N, heads, d]`; freqs: `[1, N, 1, d/2, 2, 2]`."""
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (freqs[..., 0] * pairs[..., 0] + freqs[..., 1] * pairs[..., 1]).flatten(-2)
