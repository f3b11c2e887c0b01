"""The parameters that VACE, Fun-Control and Camera models add to a plain Wan transformer.

As for the plain model: names, and the shapes that follow from a config. Original names: Wan2.1 `wan/modules/model.py`
(VACE) and VideoX-Fun; diffusers has a class for VACE only, so the other parts keep their original names there.
"""

from __future__ import annotations

import re
from typing import Any

Shapes = dict[str, tuple[int, ...]]

# Inside `vace_blocks.N.`, beside everything a block has. Only the first block has the one that comes before.
VACE_LINEARS = {"before_proj": "proj_in", "after_proj": "proj_out"}
CONTROL_MODULES = ("vace_patch_embedding", "ref_conv", "control_adapter.conv")
_RESIDUAL = re.compile(r"control_adapter\.residual_blocks\.(0|[1-9]\d*)\.conv[12]\.(?:weight|bias)$")
_CONTROL_PARAMS = {f"{module}.{leaf}" for module in CONTROL_MODULES for leaf in ("weight", "bias")}
# Added to the plain model's config, each only where the model has the part.
CONFIG_KEYS = ("vace_layers", "vace_in_channels", "ref_conv_channels", "camera_channels", "camera_blocks")


def is_control_param(key: str) -> bool:
    """Whether a name is a parameter of a reference convolution, a camera adapter or VACE's patch embedding."""
    return key in _CONTROL_PARAMS or _RESIDUAL.match(key) is not None


def vace_index(key: str) -> int | None:
    """The N of `vace_blocks.N.`, or None elsewhere."""
    match = re.match(r"vace_blocks\.(0|[1-9]\d*)\.", key)
    return int(match[1]) if match else None


def control_config(shapes: Shapes, layers: int) -> dict[str, Any]:
    """The config keys above that fit these original-named shapes; empty for a plain model."""
    config: dict[str, Any] = {}
    numbers = [index for key in shapes if (index := vace_index(key)) is not None]
    if numbers:
        # Every so many blocks, as all published models have it: the file does not say where its blocks join.
        config["vace_layers"] = list(range(0, layers, max(1, layers // (1 + max(numbers)))))[: 1 + max(numbers)]
        config["vace_in_channels"] = shapes["vace_patch_embedding.weight"][1]
    if "ref_conv.weight" in shapes:
        config["ref_conv_channels"] = shapes["ref_conv.weight"][1]
    if "control_adapter.conv.weight" in shapes:
        residual = [int(match[1]) for key in shapes if (match := _RESIDUAL.match(key))]
        config["camera_channels"] = shapes["control_adapter.conv.weight"][1]
        config["camera_blocks"] = 1 + max(residual, default=-1)
    return config


def control_shapes(config: dict[str, Any], dim: int, block: Shapes) -> Shapes:
    """Original name -> shape of the added parameters. `block`: the parameters of one plain block."""
    patch = tuple(config["patch_size"])
    convolutions: Shapes = {}
    shapes: Shapes = {}
    if "vace_layers" in config:
        convolutions["vace_patch_embedding"] = (dim, config["vace_in_channels"], *patch)
        for index in range(len(config["vace_layers"])):
            own = {name: shape for name, shape in block.items() if "_img" not in name}
            for module in VACE_LINEARS:
                if index == 0 or module != "before_proj":
                    own[f"{module}.weight"], own[f"{module}.bias"] = (dim, dim), (dim,)
            shapes.update({f"vace_blocks.{index}.{name}": shape for name, shape in own.items()})
    if "ref_conv_channels" in config:
        convolutions["ref_conv"] = (dim, config["ref_conv_channels"], *patch[1:])
    if "camera_channels" in config:
        convolutions["control_adapter.conv"] = (dim, config["camera_channels"], *patch[1:])
        for index in range(config["camera_blocks"]):
            for name in ("conv1", "conv2"):
                convolutions[f"control_adapter.residual_blocks.{index}.{name}"] = (dim, dim, 3, 3)
    for module, shape in convolutions.items():
        shapes[f"{module}.weight"], shapes[f"{module}.bias"] = shape, (shape[0],)
    return shapes
