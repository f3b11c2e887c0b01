"""Model files the workflows load, and the texts of their notes.

No `code` in the notes: ComfyUI draws it blue on blue.
"""

from __future__ import annotations

from dataclasses import dataclass

from t3.embedded_files import FILES as EMBEDDED_FILES

HUB = "https://huggingface.co"
RELEASE = f"{HUB}/APRIL-AIGC/T3-Video"
WAN_2_1 = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN_2_2 = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"


@dataclass(frozen=True)
class File:
    """A model file: its name, the folder under `ComfyUI/models` it belongs in, and where to download it.

    A user's own file has no `url`; `about` says in words what it is.
    """

    name: str
    folder: str
    url: str = ""
    about: str = ""

    def __str__(self) -> str:
        if self.url:
            return f"- [{self.name}]({self.url})  \n  into models/{self.folder}"
        return f"- *{self.name}*: {self.about}  \n  into models/{self.folder}"

    @property
    def entry(self) -> dict[str, str]:
        """As the canvas wants it, to offer the download where the file is missing."""
        return {"name": self.name, "url": self.url, "directory": self.folder}


def _file(folder: str, url: str) -> File:
    return File(url.rsplit("/", 1)[-1], folder, url)


TEXT_ENCODER = _file("text_encoders", f"{WAN_2_1}/text_encoders/umt5_xxl_fp16.safetensors")


@dataclass(frozen=True)
class Base:
    """A model, as the workflows need to know it."""

    name: str
    family: str
    dit: File
    vae: File


@dataclass(frozen=True)
class Model(Base):
    """A released T3 model, and what was measured of it at 4K (benchmarks/README.md)."""

    peak_gib: int
    step_seconds: float
    lean_gib: int
    lean_seconds: float
    decode_seconds: int


WAN21 = Model(
    name="Wan2.1 1.3B",
    family="Wan2.1, Wan2.2 14B",
    dit=_file("diffusion_models", f"{RELEASE}/resolve/main/T3-Video-Wan2.1-T2V-1.3B.safetensors"),
    vae=_file("vae", f"{WAN_2_1}/vae/wan_2.1_vae.safetensors"),
    peak_gib=21,
    step_seconds=11.5,
    lean_gib=12,
    lean_seconds=13.2,
    decode_seconds=15,
)
WAN22 = Model(
    name="Wan2.2 5B",
    family="Wan2.2 5B",
    dit=_file("diffusion_models", f"{RELEASE}/resolve/main/T3-Video-Wan2.2-T2V-5B.safetensors"),
    vae=_file("vae", f"{WAN_2_2}/vae/wan2.2_vae.safetensors"),
    peak_gib=16,
    step_seconds=6.5,
    lean_gib=15,
    lean_seconds=7.3,
    decode_seconds=20,
)
WAN14 = Base(
    name="Wan2.1 14B",
    family="Wan2.1, Wan2.2 14B",
    dit=_file("diffusion_models", f"{WAN_2_1}/diffusion_models/wan2.1_t2v_14B_fp16.safetensors"),
    vae=WAN21.vae,
)
# The name that T3 Extract gives its first file.
T3_LORA = File("t3_00001_.safetensors", "loras", about="your T3 LoRA for this base (T3 Extract writes output/loras)")
STYLE_LORA = File("style.safetensors", "loras", about="any ordinary LoRA for this base")
# Part of the embedded model -> its file.
SMALL_FILES = {
    part: File(name.rpartition("/")[2], name.rpartition("/")[0], about="from T3's folder, see below")
    for part, name in EMBEDDED_FILES.items()
}
FILES = (TEXT_ENCODER, *(file for model in (WAN21, WAN22, WAN14) for file in (model.dit, model.vae)))
OWN_FILES = (T3_LORA, STYLE_LORA, *SMALL_FILES.values())


def files(*needed: File) -> str:
    """The files to download."""
    return "## Files\n\n" + "\n".join(map(str, needed))


WEIGHTS = f"""## These weights, and no others

T3 attention needs weights tuned for it. The authors' release is [{RELEASE.removeprefix(HUB + "/")}]({RELEASE}):
whole models in safetensors, to be loaded like any other. **Stock Wan weights give noise.** Nobody can tell the
two apart from the file, so check the name.

Take the text encoder and the VAE from the links: Wan's own are *.pth* files, which can run code when they are
opened. *umt5_xxl_fp8_e4m3fn_scaled* works too and needs half the memory; results then differ a little."""


def needs_4k(model: Model, steps: int) -> str:
    """What a 4K run takes."""
    seconds = model.step_seconds
    minutes = round(seconds * steps / 60)
    return f"""## What it needs

Sampling 3840x2176, 81 frames: **{model.lean_gib} GiB** of GPU memory, at {model.lean_seconds} s a step; with
{model.peak_gib} GiB {seconds} s, so about {minutes} minutes for {steps} steps. Measured in ComfyUI on an H100
card. T3 Attention takes what fits. A card with less memory, or a slower one: begin with the 1080p workflow.

Decoding: {model.decode_seconds} s on that card. *T3 VAE Decode to Video* works in exact tiles of a size that fits the
memory: 8 GiB were enough, and took 21 to 23 s. Frames and encoder take 3 to 4 GB of ordinary memory."""


OWN_WEIGHTS = """## Bring a T3 LoRA

T3 attention needs weights tuned for it: **stock Wan weights give noise**, and the style LoRA alone makes stock weights
no better. The authors released whole models for 1.3B and 5B, none for 14B. This graph is for a T3 LoRA that you
trained, or that *T3 Extract* made of a T3-tuned whole model. Nobody has checked a 14B so far.

*T3 LoRA Retrofit Loader* reads LoRAs of every kind and key style, differences and whole checkpoints. Choose your file
in it. A VACE or image-to-video base works alike, with its own conditioning nodes in place of *T3 Empty Latent*.

The base may be the fp8 file from the same place, to need half the memory."""

OWN_PLAN = """## Where are the windows?

A file of T3's own tools carries the plan it was tuned for, and the loader sets up T3 attention by it: no T3 Attention
node is needed. For a file without a plan, put *T3 Attention* behind the loader. The report says which of the two it
is, what was applied, and whether the base is the one the LoRA was made for.

## Beside a style LoRA

Both are added to the same weights, so their order does not matter. Set a strength of 0 to see what one of them
does. A style was trained with full attention; how it looks under T3 has not been checked."""

OWN_SIZE = """## The size

Begin with 1080p. A T3 LoRA is at its best at the size it was tuned for, which the report names as a grid of tokens: a
token is 16 pixels wide and high. At 3840x2176, 81 frames, the command line took 48 s for one forward pass of a 14B, two
of which make a step, and 107 GiB at its peak, on an H200. In ComfyUI it has not been measured."""


def reading_report(model: Model) -> str:
    """What the report node is for."""
    return f"""## Did it work?

The report shows which windows T3 chose and what to know about the run. T3 Attention's plan stays at *auto*:
it takes the released plan for {model.name} and fits it to the size of the video. *dense* is full attention, to
compare; at 4K it takes hours."""


SETTINGS = """## Settings of the release

euler, simple, shift 5, guidance (cfg) 5, 50 steps, 81 frames at 30 per second, and Wan's own negative prompt.
ComfyUI draws the noise on the CPU, as the release does; it computes in higher precision in some places, so the
same seed gives a similar clip, not the same bits.

Keep steps that divide 1000 (50, 40, 25, 20, 10, 8): ComfyUI's *simple* scheduler picks from 1000 noise levels,
and only then picks exactly those of the release."""

QUICK = """## A quick look

1080p and 20 steps, to try a prompt or a seed before a 4K run. The 4K run will not repeat the same picture:
another size means other noise.

**Why 20 steps?** ComfyUI's *simple* scheduler picks from 1000 noise levels. Where the steps divide 1000 (50,
40, 25, 20, 10, 8) it picks exactly the levels of the release; with 30 it is slightly off.

The released weights were tuned at 4K. At 1080p each layer keeps windows of about the size it was tuned for; how
good the picture is at this size has not been checked."""

PLAN_PREVIEW = """## The windows

A picture of what one token attends to in each layer: a block around it (local) and a comb that spans the whole
clip (strided), and what that costs. It is drawn for the size of the connected latents and needs no model: select
the node and press the play button over it, and only the picture is made."""

IMAGE_TO_VIDEO = """## Not proven

The released Wan2.2 5B weights were tuned for **text to video**. Wan2.2 5B itself can start from an image, and
this graph does what it does for that; whether the tuned weights still can has not been checked. Expect
anything, and please tell what you see.

Load your picture in *Start image*. *Size of the video* scales and crops it to 3840x2176; another size is set there,
and the number of frames in *T3 VAE Encode*. Describe the motion in the prompt.

*T3 VAE Encode* with a *length* gives what ComfyUI's *Wan22ImageToVideoLatent* gives, in exact tiles that fit the
memory."""

SAMPLE_FIRST = """## Step 1 of 2: sample, and keep the latents

This graph ends at a *.latent* file in ComfyUI's *output/latents*. It holds everything that took long. Whatever
happens later, a decode that runs out of memory or a player that dislikes the file, sampling need not be done
again.

Then open **step 2**. It loads the newest latents and decodes them; several times if you like, with other
settings."""

DECODE_LATER = """## Step 2 of 2: decode

*T3 Load Latent* lists what *Save Latent* wrote; *newest* takes the last one. Press *R* to list files made since
the page was opened. A *.latent* file of this project's command line opens here too: put it into ComfyUI's
*output/latents* or *input*.

For latents of Wan2.2 5B choose *wan2.2_vae.safetensors* in *Load VAE*.

The tiles are exact, whatever their size: no seams, no blending. Set *crop* to 2160 for the usual 4K."""

SMALL = """## A model that fits anywhere

The model that T3's command line has built in: 8 million weights, trained from nothing on drawings of coloured shapes
and tuned to T3. It shows the whole way, from prompt to video, without a download; a processor alone does it in about
half a minute. It knows captions like *two small blue circles moving up on a white background*: one to three shapes of
one colour, or *a red cross left of a green circle*; no other words.

**These weights are tuned to T3**, and carry the plan that *T3 LoRA Retrofit Loader* sets up. On stock Wan weights T3
attention gives noise."""

SMALL_FILES_NOTE = """## Write the files first

In T3's folder below *ComfyUI/custom_nodes*, with the Python that runs ComfyUI:

*python -m t3.embedded_files ../../models*

Then press *R*. The text encoder takes 0.6 GB, nearly all of it zeros: ComfyUI's smallest encoder of this kind is that
large."""

SMALL_SETTINGS = """## How it works

The loader puts the transformer's own file on the transformer once more. That changes no weight; it brings the plan
along, which ComfyUI's own loader drops.

**Padding**: Wan's models were trained with every prompt padded by zeros to 512 tokens. ComfyUI does it for Wan's own
encoder; here each *Padding* has what its prompt lacks (506 tokens, and 511), and two nodes set them to zero and append
them.

Guidance (cfg) 2, 25 steps, shift 5. Size and length are those it was tuned at: 320x224, 21 frames. It is an early
stage and follows its prompt roughly: of two or three things it may make one more or less."""
