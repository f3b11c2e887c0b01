"""The encoders of Wan's video VAEs, 2.1 and 2.2, for a whole picture or any window of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .down_layers import DownPast, DownStage
from .down_structure import DownStructure, read_down_structure
from .down_tiles import DownWindows, down_windows
from .layers import Attention, Conv, Norm, ResidualBlock, frames_back
from .past import Past
from .state import build
from .sums import Sum, laid_out
from .tiles import Window


class WanEncoder(nn.Module):
    """Pixels to latents, with the weights of a Wan2.1 (16-channel) or Wan2.2 (48-channel) VAE.

    Everything before the middle block is local and works on any window of the picture (`features`); the rest
    (`middle`) works on whole latent frames. Both take one frame at a time and keep what the next needs in a past.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], structure: DownStructure) -> None:
        """Use `from_state_dict`."""
        super().__init__()
        self.structure = structure
        self.first = Conv(state, "encoder.conv1")
        self.levels = nn.ModuleList(DownStage(state, level, structure.residual) for level in structure.levels)
        self.middle_before = ResidualBlock(state, "encoder.middle.0")
        self.middle_attention = Attention(state, "encoder.middle.1")
        self.middle_after = ResidualBlock(state, "encoder.middle.2")
        self.head_norm, self.head = Norm(state, "encoder.head.0"), Conv(state, "encoder.head.2")
        self.quant = Conv(state, "conv1")

    @classmethod
    def from_state_dict(
        cls,
        sd: Mapping[str, torch.Tensor],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WanEncoder:
        """The encoder with these weights, which stay as they are.

        Args:
            sd: of a Wan2.1 or Wan2.2 VAE of any width, under the original names (as in ComfyUI's `first_stage_model`)
                or diffusers'. The decoder's part may be missing under original names; what is not the encoder's is not
                looked at.
            device, dtype: of the encoder; those of the weights if None.

        Raises:
            T3Error: not the weights of a whole Wan VAE encoder, or `dtype` is not a float of 16 bits or more.
        """
        return build(cls, "encoder", read_down_structure, sd, device, dtype)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def windows(self, core: Window) -> DownWindows:
        """The windows of the picture and at each level that it takes to encode `core`, given in latents."""
        return down_windows(core, self.structure.reach, self.structure.first_radius)

    def features(self, frame: torch.Tensor, past: DownPast, windows: DownWindows) -> torch.Tensor | None:
        """One frame `[B, 3, h, w]` in [-1, 1] down to the middle stage: `[B, width, h/scale, w/scale]`.

        frame: what `windows.pixels` holds of the picture. None while the frames of a latent frame are not complete:
        the first frame makes one by itself, then every `structure.step` frames one.
        """
        picture = Sum(self._patchify(frame), windows.pixels)
        del frame
        x: Sum = self.first(picture, past, windows.levels[0][0])
        for i, (level, have) in enumerate(zip(self.levels, windows.levels, strict=True)):
            need = windows.levels[i + 1][0] if i + 1 < len(windows.levels) else have[-1]
            result = level(x, past, have, need)
            if result is None:
                return None
            x = result
        return x.value()

    def middle(self, x: torch.Tensor, past: Past, memory: int | None = None) -> torch.Tensor:
        """One whole latent frame through the middle stage: `[B, width, H, W]` to its latents `[B, C, H, W]`, the mean.

        memory: bytes that attention scores may take (not needed where attention keeps none).
        """
        y = self.before(x, past)
        del x
        return self.after(self.attended(y, memory), past)

    def before(self, x: torch.Tensor, past: Past) -> Sum:
        """The middle stage up to its attention."""
        whole = Window.whole(*x.shape[2:])
        return self.middle_before(Sum(laid_out(x), whole), past, whole)

    def attended(self, x: Sum, memory: int | None) -> torch.Tensor:
        """Its attention, which sees this frame alone. Added up, so that it is the same when another process goes on."""
        return self.middle_attention(x, memory).value()

    def after(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        """What follows the attention, to the mean."""
        whole = Window.whole(*x.shape[2:])
        y = self.middle_after(Sum(x, whole), past, whole)
        return self.quant.pointwise(self.head(y, past, whole, self.head_norm).value()).chunk(2, dim=1)[0]

    @property
    def lookback(self) -> tuple[int, int]:
        """Frames that `before` and `after` look back at."""
        return frames_back(self.middle_before), frames_back(self.middle_after) + frames_back(self.head)

    def _patchify(self, frame: torch.Tensor) -> torch.Tensor:
        """`patch` x `patch` pixels to channels (colour, column, row)."""
        patch = self.structure.patch
        if patch > 1:
            frame = F.pixel_unshuffle(frame, patch).unflatten(1, (3, patch, patch)).transpose(2, 3).flatten(1, 3)
        return laid_out(frame)

    @torch.inference_mode()
    def untiled(self, video: torch.Tensor) -> torch.Tensor:
        """Encode whole pictures at once: the reference for tiles, and for small pictures.

        video: `[B, 3, frames, H, W]` in [-1, 1], with legal numbers of frames and pixels: what the hosts' own encoders
        take. Returns `[B, C, T, H/scale, W/scale]` in the encoder's dtype, the mean.
        """
        scale = self.structure.scale
        windows = self.windows(Window.whole(video.shape[3] // scale, video.shape[4] // scale))
        past, middle_past = DownPast(video.shape[2]), Past(self.structure.latent_frames(video.shape[2]))
        found = (self.features(frame, past, windows) for frame in video.to(self.device, self.dtype).unbind(2))
        return torch.stack([self.middle(x, middle_past) for x in found if x is not None], dim=2)
