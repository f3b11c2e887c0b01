"""The decoders of Wan's video VAEs, 2.1 and 2.2, for a whole picture or any window of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import T3Error
from .layers import Attention, Conv, Norm, ResidualBlock, UpLevel, frames_back
from .past import Past
from .state import build
from .structure import Shapes, Structure, read_structure
from .sums import Sum, laid_out, layout
from .tiles import TileWindows, Window, tile_windows


def _read(shapes: Shapes) -> Structure:
    structure = read_structure(shapes)
    if structure.patch > 1 and not structure.residual:
        raise T3Error(
            f"this Wan2.1 VAE gives {3 * structure.patch**2} channels where the released one gives 3; what they "
            "stand for differs from one to the next. Use the node or program it was made for."
        )
    return structure


class WanDecoder(nn.Module):
    """Latents to pixels, with the weights of a Wan2.1 (16-channel) or Wan2.2 (48-channel) VAE.

    The middle stage (`middle`) works on whole latent frames; everything after it is local and works on any window of
    the picture (`pixels`). Both take one latent frame at a time and keep what the next needs in a `Past`.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], structure: Structure) -> None:
        """Use `from_state_dict`."""
        super().__init__()
        self.structure = structure
        self.post_quant = Conv(state, "conv2")
        self.first = Conv(state, "decoder.conv1")
        self.middle_before = ResidualBlock(state, "decoder.middle.0")
        self.middle_attention = Attention(state, "decoder.middle.1")
        self.middle_after = ResidualBlock(state, "decoder.middle.2")
        self.levels = nn.ModuleList(UpLevel(state, level, structure.residual) for level in structure.levels)
        self.head_norm, self.head = Norm(state, "decoder.head.0"), Conv(state, "decoder.head.2")

    @classmethod
    def from_state_dict(
        cls,
        sd: Mapping[str, torch.Tensor],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WanDecoder:
        """The decoder with these weights, which stay as they are.

        Args:
            sd: of a Wan2.1 or Wan2.2 VAE of any width, under the original names (as in ComfyUI's `first_stage_model`)
                or diffusers'. The encoder's part may be missing under original names; what is not the decoder's is not
                looked at.
            device, dtype: of the decoder; those of the weights if None.

        Raises:
            T3Error: not the weights of a whole Wan VAE decoder, or `dtype` is not a float of 16 bits or more.
        """
        return build(cls, "decoder", _read, sd, device, dtype)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def middle(self, latent: torch.Tensor, past: Past, memory: int | None = None) -> torch.Tensor:
        """One latent frame `[B, C, H, W]` through the middle stage: `[B, width, H, W]`.

        memory: bytes that attention scores may take (not needed where attention keeps none).
        """
        return self.after(self.attended(self.before(latent, past), memory), past)

    def before(self, latent: torch.Tensor, past: Past) -> Sum:
        """The middle stage up to its attention."""
        whole = Window.whole(*latent.shape[2:])
        x = Sum(self.post_quant.pointwise(latent.contiguous(memory_format=layout(latent.device))), whole)
        return self.middle_before(self.first(x, past, whole), past, whole)

    def attended(self, x: Sum, memory: int | None) -> torch.Tensor:
        """Its attention, which sees this frame alone. Added up, so that it is the same when another process goes on."""
        return self.middle_attention(x, memory).value()

    def after(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        """What follows the attention."""
        whole = Window.whole(*x.shape[2:])
        return self.middle_after(Sum(x, whole), past, whole).value()

    @property
    def lookback(self) -> tuple[int, int]:
        """Frames that `before` and `after` look back at."""
        return frames_back(self.first) + frames_back(self.middle_before), frames_back(self.middle_after)

    def windows(self, core: Window) -> TileWindows:
        """The windows at each level that it takes to decode `core`, given in latents."""
        structure = self.structure
        return tile_windows(core.scaled(structure.upscale), structure.reach, structure.head_radius)

    def pixels(self, x: torch.Tensor, past: Past, core: Window, windows: TileWindows) -> Iterator[torch.Tensor]:
        """One latent frame after the middle stage to its frames, `[B, 3, h, w]` each, about in [-1, 1].

        x: what `windows[0][0]` holds of the middle stage's result. core: the part to decode, in latents.
        Frames go through the levels one by one, the first to the end before the second starts: that is what keeps
        memory small.
        """
        output = core.scaled(self.structure.upscale)
        waiting = [(0, Sum(laid_out(x), windows[0][0]))]
        del x
        while waiting:
            level, frame = waiting.pop()
            need = windows[level + 1][0] if level + 1 < len(windows) else windows[level][-1]
            frames = self.levels[level](frame, past, windows[level], need)
            del frame
            if level + 1 < len(windows):
                waiting.extend((level + 1, later) for later in reversed(frames))
                del frames
                continue
            (last,) = frames
            yield self._unpatchify(self.head(last, past, output, self.head_norm).value())
            del last, frames

    def _unpatchify(self, y: torch.Tensor) -> torch.Tensor:
        """Channels (colour, column, row) to `patch` x `patch` pixels."""
        patch = self.structure.patch
        if patch == 1:
            return y
        return F.pixel_shuffle(y.unflatten(1, (3, patch, patch)).transpose(2, 3).flatten(1, 3), patch)

    @torch.inference_mode()
    def untiled(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode whole pictures at once: the reference for tiles, and for small pictures.

        latents: `[B, C, T, H, W]` as for `decode_frames`. Returns `[B, 3, frames, H, W]`, about in [-1, 1], in the
        decoder's dtype: what the hosts' own decoders return.
        """
        core = Window.whole(*latents.shape[3:])
        windows = self.windows(core)
        middle_past, past = Past(latents.shape[2]), Past(self.structure.frames(latents.shape[2]))
        frames: list[torch.Tensor] = []
        for latent in latents.to(self.device, self.dtype).unbind(2):
            frames.extend(self.pixels(self.middle(latent, middle_past), past, core, windows))
        return torch.stack(frames, dim=2)
