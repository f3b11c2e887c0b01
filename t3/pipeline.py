"""The headless engine: a diffusers Wan pipeline with T3 attention installed, from prompt to latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKLWan,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import AutoTokenizer, UMT5EncoderModel

from .backends import Situation, choose, installed
from .cost import ModelShape, activation_bytes
from .encoder import Encoder
from .errors import T3Error
from .images import load_image
from .jobs import Clip, Options
from .memory import FAST, shares
from .plan import Grid, Plan
from .processor import T3Installation, compile_blocks, install_t3
from .scheduler import ReleasedScheduler
from .sources import Sources
from .vace import Control, VacePipeline
from .weights import apply_weights, load_text_encoder, load_transformer, load_vae, open_weights
from .weights.load import transformer_class

if TYPE_CHECKING:
    from .parallel.team import Team

Say = Callable[[str], None]
# fp8: weights stored in 8 bits, computed in bfloat16 (diffusers' layerwise casting).
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}


class Engine:
    """A loaded model under a plan. Build it with `Engine.load`; `sample` and `vae` are what callers use."""

    def __init__(self, pipe: Any, sources: Sources, plan: Plan, device: torch.device, dtype: str) -> None:
        self.pipe = pipe
        self.sources = sources
        self.plan = plan
        self.device = device
        self.dtype = dtype
        self.backend = self.backend_why = ""
        self.installations: list[T3Installation] = []
        self._encode = Encoder(pipe.vae, device)
        self._encode.for_pipeline()
        self._control = Control(self._encode)

    @classmethod
    def load(
        cls, sources: Sources, plan: Plan, options: Options, grid: Grid, say: Say, team: Team | None = None
    ) -> Engine:
        """Load all weights, apply T3 weights and LoRAs, install T3, and place everything.

        `grid` is the largest to be sampled (it decides whether `offload="auto"` offloads); `say` takes one line of
        text each time there is something the user should know. team: the ranks that make a clip together; all of them
        must load, and then sample the same clips.
        Raises `T3Error` when a part cannot be loaded or an option cannot be met here.
        """
        device = pick_device(options.device)
        dtype = pick_dtype(options.dtype, device)
        compute = DTYPES[dtype]
        transformers = _load_transformers(sources, compute, say)
        shape = ModelShape.from_config(sources.transformer)
        pipe = assemble(sources, transformers, compute, options.shift)
        engine = cls(pipe, sources, plan, device, dtype)
        windows = plan.window_lengths(grid, shape.layers)
        situation = Situation(device, compute, sources.transformer["attention_head_dim"], windows=windows)
        chosen, engine.backend_why = choose(options.backend, situation)
        engine.backend = chosen.name
        compiled = options.compile and can_compile(device, say)
        memory = options.memory if options.attention_memory is None else options.attention_memory
        engine._encode.say = say
        engine._encode.ranks = None if team is None else team.ranks()
        spread = None if team is None else team.spread()
        for transformer in transformers:
            transformer.register_forward_hook(_velocity_in_float32)
            if dtype == "fp8":
                transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
            engine.installations.append(
                install_t3(transformer, plan, backend=chosen, memory=memory, say=say, spread=spread)
            )
            if compiled:
                compile_blocks(transformer, plan)
            if team is not None:
                team.divide(transformer, spread)
        weights = sources.parameters * (1 if dtype == "fp8" else compute.itemsize)
        # Where "auto" is lean if need be, weights stay on the card as long as that fits.
        ways = shares(shape.heads)
        share = None if compiled or options.offload == "group" else ways[0] if memory == FAST else ways[-1]
        tokens = grid.tokens if spread is None else max(spread.shares(grid.tokens))
        activations = activation_bytes(shape, tokens, element=compute.itemsize, share=share)
        try:
            _place(pipe, device, options.offload, weights + activations, say)
        except torch.OutOfMemoryError as error:
            raise T3Error(
                f"the model does not fit in what is free on {device}: {str(error).splitlines()[0]} Try --offload model "
                "or group, or --dtype fp8."
            ) from None
        return engine

    @property
    def vae(self) -> AutoencoderKLWan:
        return self.pipe.vae

    @torch.inference_mode()
    def sample(self, clip: Clip) -> torch.Tensor:
        """Sample one clip. Returns latents `[1, C, T, H, W]` in float32 on the CPU, in the VAE's space.

        Sigmas, noise (drawn on the CPU in float32) and guidance are those of the released sampler; latents stay
        float32 between steps where it rounds them to bfloat16.
        Raises `T3Error` when the result is not finite.
        """
        return self.sample_batch([clip])

    @torch.inference_mode()
    def sample_batch(self, clips: list[Clip]) -> torch.Tensor:
        """As `sample`, for clips that differ in prompt and seed only, in one batch: `[len(clips), C, T, H, W]`."""
        first = clips[0]
        pipe, image_arguments = self._pipe_for(first)
        prompts: dict[str, Any] = {
            "prompt": [clip.prompt for clip in clips],
            "negative_prompt": [clip.negative for clip in clips],
            "generator": [torch.Generator("cpu").manual_seed(clip.seed) for clip in clips],
        }
        if self.sources.is_vace:  # whose pipeline takes one clip at a time
            if len(clips) > 1:
                return torch.cat([self.sample(clip) for clip in clips])
            prompts = {name: values[0] for name, values in prompts.items()}
        out = pipe(
            **prompts,
            height=first.height,
            width=first.width,
            num_frames=first.frames,
            num_inference_steps=first.steps,
            guidance_scale=first.cfg,
            output_type="latent",
            **image_arguments,
        )
        if pipe is not self.pipe:
            self.pipe.maybe_free_model_hooks()  # as a pipeline does after itself: `pipe` has the parts, not the hooks
        mean, std = (_statistics(self.vae, name) for name in ("latents_mean", "latents_std"))
        latents = out.frames.to("cpu", torch.float32) * std + mean
        bad = int((~torch.isfinite(latents)).sum())
        if bad:
            raise T3Error(
                f"sampling gave {bad:,} values that are not numbers, of {latents.numel():,}. float16 overflows with "
                "some weights: use --dtype bf16. If it was not float16, the weights are damaged."
            )
        return latents

    def _pipe_for(self, clip: Clip) -> tuple[Any, dict[str, Any]]:
        if self.sources.is_vace:
            return self.pipe, self._control.of(clip)
        if clip.image is None:
            return self.pipe, {}
        # Wan2.2 5B is one model for both tasks; the image-to-video pipeline shares its parts.
        pipe = self.pipe
        if not isinstance(pipe, WanImageToVideoPipeline):
            parts = {**pipe.components, "image_encoder": None, "image_processor": None}
            pipe = WanImageToVideoPipeline(**parts, expand_timesteps=True)
            _label_progress(pipe)
        arguments = {"image": load_image(clip.image, clip.height, clip.width)}
        if clip.last_image:
            arguments["last_image"] = load_image(clip.last_image, clip.height, clip.width)
        return pipe, arguments


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA card, then Apple's, then the CPU. Raises `T3Error` for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # "meta" takes tensors, and has no numbers
    except (RuntimeError, AssertionError) as error:
        # One sentence: what follows is torch's list of all that it might have been built for.
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise T3Error(f"--device {name} cannot be used: {reason}. Use auto, cpu, cuda, cuda:1, ... or mps.") from None
    return device


def pick_dtype(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU. Raises `T3Error` for other names."""
    if name == "auto":
        if device.type == "cpu":
            return "fp32"
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "fp16"
        return "bf16"
    if name not in DTYPES:
        raise T3Error(f"unknown dtype {name!r}; use auto, {', '.join(DTYPES)}.")
    return name


def _load_transformers(sources: Sources, dtype: torch.dtype, say: Say) -> list[WanTransformer3DModel]:
    if sources.dits:
        transformers = [load_transformer(path, dtype=dtype) for path in sources.dits]
    else:
        folder = fetch_folder(sources)
        parts = ["transformer", "transformer_2"][: sources.experts]
        transformers = [load_part(transformer_class(sources.transformer), folder, part, dtype) for part in parts]
    if len(transformers) > 1:
        for adapter in sources.loras:
            if adapter.expert is None:
                say(f"{adapter.path.name} goes to both experts; --lora-high and --lora-low are for one of them.")
    for i, transformer in enumerate(transformers):
        # One file serves all experts; several go to them in order.
        own = sources.t3_weights[i : i + 1] if len(sources.t3_weights) > 1 else sources.t3_weights
        for adapter in (*own, *sources.loras_of(i)):
            report = apply_weights(transformer, open_weights(adapter.path), adapter.strength)
            say(f"{adapter.path.name}: {report.describe()}")
    return transformers


def fetch_folder(sources: Sources) -> Path:
    """The folder to load from; downloads from the hub if need be."""
    if not sources.hub_id:
        assert sources.folder is not None
        return sources.folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
        return Path(snapshot_download(sources.hub_id, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise T3Error(f"{sources.hub_id} cannot be downloaded: {str(error).splitlines()[0]}") from None


def load_part(cls: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """A model of the class `cls` from `folder/name`, to be run. Raises `T3Error` if it cannot be loaded."""
    try:
        return cls.from_pretrained(
            folder, subfolder=name, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise T3Error(f"{folder / name} cannot be loaded: {str(error).splitlines()[0]}") from None


def assemble(sources: Sources, transformers: list[WanTransformer3DModel], dtype: torch.dtype, shift: float) -> Any:
    """The pipeline for `sources`, on the CPU, with all parts but the transformers, which are given (None: left out).

    dtype: of text encoder and VAE; shift: of the sampler's sigmas. Raises `T3Error` for a part that cannot be loaded.
    """
    folder = None if sources.folder is None and not sources.hub_id else fetch_folder(sources)
    if sources.text_encoder:
        tokenizer_path = sources.tokenizer or (folder / "tokenizer" if folder else None)
        encoder, tokenizer = load_text_encoder(sources.text_encoder, dtype=dtype, tokenizer=tokenizer_path)
    else:
        assert folder is not None
        encoder = load_part(UMT5EncoderModel, folder, "text_encoder", dtype)
        tokenizer = AutoTokenizer.from_pretrained(sources.tokenizer or folder / "tokenizer", local_files_only=True)
    if sources.vae_file:
        vae = load_vae(sources.vae_file, dtype=dtype)
    else:
        assert folder is not None
        vae = load_part(AutoencoderKLWan, folder, "vae", dtype)
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "vae": vae,
        "scheduler": ReleasedScheduler(shift),
        "transformer": transformers[0],
        "transformer_2": transformers[1] if len(transformers) > 1 else None,
        "boundary_ratio": sources.boundary,
        "expand_timesteps": False,
    }
    if sources.is_vace:
        del parts["expand_timesteps"]
        pipe = VacePipeline(**parts)
    elif sources.needs_image:
        pipe = WanImageToVideoPipeline(**parts, **_image_encoder(sources, folder, dtype))
    else:
        pipe = WanPipeline(**parts)
    _label_progress(pipe)
    return pipe


def _image_encoder(sources: Sources, folder: Path | None, dtype: torch.dtype) -> dict[str, Any]:
    if not sources.needs_image_encoder:
        return {}
    from transformers import CLIPImageProcessor, CLIPVisionModel

    source = sources.image_encoder or (folder / "image_encoder" if folder else None)
    if source is None or not (source / "config.json").exists():
        raise T3Error(
            "this image-to-video model needs the CLIP vision encoder of its diffusers release: give the folder as "
            "--image-encoder (the one with config.json and model.safetensors)."
        )
    processor = folder / "image_processor" if folder and (folder / "image_processor").exists() else None
    return {
        "image_encoder": load_part(CLIPVisionModel, source.parent, source.name, dtype),
        "image_processor": CLIPImageProcessor.from_pretrained(processor) if processor else CLIPImageProcessor(),
    }


def _velocity_in_float32(module: Any, args: Any, output: Any) -> Any:
    """Forward hook: the pipeline forms guidance in the dtype it gets, and the step after it is taken in float32."""
    return tuple(x.float() for x in output) if isinstance(output, tuple) else output


def can_compile(device: torch.device, say: Say) -> bool:
    """Whether torch.compile can work on this device; if not, `say` is told once why."""
    if device.type != "cuda" or installed("triton"):
        return True
    say("--compile needs Triton on a GPU, and it is not installed; going on without. On Windows: triton-windows.")
    return False


def _label_progress(pipe: Any) -> None:
    pipe.set_progress_bar_config(desc="sampling", unit="step")


def _place(pipe: Any, device: torch.device, offload: str, sampling: int, say: Say) -> None:
    """Put the parts where they are to be; `sampling`: bytes of the transformer and its activations."""
    if device.type == "cpu":
        if offload not in ("auto", "none"):
            say(f"--offload {offload} does nothing on a CPU.")
        return
    if offload == "auto":
        offload = "none"
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            beside = sum(_bytes(getattr(pipe, name, None)) for name in ("text_encoder", "image_encoder", "vae"))
            if sampling + beside > 0.8 * free:
                offload = "model"
            say(
                f"offload {offload}: the transformer and its activations need about {sampling / 2**30:.1f} GiB, the "
                f"other parts {beside / 2**30:.1f}, of {free / 2**30:.1f} free."
            )
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipe.to(device)


def _bytes(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def _statistics(vae: AutoencoderKLWan, name: str) -> torch.Tensor:
    return torch.tensor(vae.config[name], dtype=torch.float32).view(1, -1, 1, 1, 1)
