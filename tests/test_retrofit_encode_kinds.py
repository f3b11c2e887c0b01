"""Clips to what image-to-video and VACE models are given, against diffusers' pipelines; training on it; sampling."""

import json

import av
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel, WanVACEPipeline
from PIL import Image
from retrofit_fixtures import write_config
from safetensors.torch import load_file
from small_models import build

from t3.retrofit.buckets import Bucket
from t3.retrofit.clips import read_clip
from t3.retrofit.command import main
from t3.retrofit.conditioning import Conditioning, known_frames, model_inputs
from t3.retrofit.shards import open_shards

FRAMES, HEIGHT, WIDTH = 5, 32, 64
# What is asked of the encode of each kind, and the shares that are trained with.
ASKED = {
    "i2v": ((), {}),
    "flf2v": ((), {}),
    "a14b-i2v": (("--condition", "first", "--condition", "ends"), {"first": 1, "ends": 1}),
    "ti2v-5b": ((), {"none": 1, "first": 1}),
    "vace": (("--condition", "first", "--condition", "ends"), {"none": 1, "first": 1, "ends": 1}),
}


def write_noise(path, seed):
    """A clip of pictures that have nothing in common, in blocks, so that they survive the video's compression."""
    source = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for _ in range(FRAMES):
            blocks = source.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(blocks.repeat(8, 0).repeat(8, 1))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate("ab"):
        write_noise(folder / f"{name}.mp4", seed)
        (folder / f"{name}.txt").write_text(f"a grey clip {name}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def encoded(videos, tmp_path_factory):
    """Of a kind: the model, and the folder that the command makes of the videos; made once."""
    made = {}

    def make(kind):
        if kind not in made:
            base = tmp_path_factory.mktemp(kind)
            model = build("i2v" if kind == "flf2v" else kind, base / "model")
            if kind == "flf2v":
                config = WanTransformer3DModel.load_config(model / "transformer")
                torch.manual_seed(7)
                positions = 2 * ((224 // 56) ** 2 + 1)
                transformer = WanTransformer3DModel.from_config({**config, "pos_embed_seq_len": positions})
                transformer.save_pretrained(model / "transformer")
            size = ["--size", f"{HEIGHT}x{WIDTH}", "--frames", str(FRAMES), "--device", "cpu"]
            arguments = [str(videos), "--out", str(base / "clips"), "--model", str(model), *size, *ASKED[kind][0]]
            assert main(["encode", *arguments]) == 0
            made[kind] = model, base / "clips"
        return made[kind]

    return make


def read(folder, config, chosen, shares):
    """The first clip's tensors as a batch of one, and what the model is given of it."""
    shards = open_shards(folder)
    clip = shards.load(0)
    tensors = {"latents": clip.latents, "text": clip.text, **clip.given}
    batch = {name: tensor[None].float() for name, tensor in tensors.items()}
    grey = shards.grey(clip.latents.shape)
    conditioning = Conditioning.of(config, {name: float(share) for name, share in shares.items()})
    conditioning.check(shards.clips[0], "the clip", 512)
    return batch, conditioning.given(batch, None if grey is None else grey.float(), [chosen])


def ends(videos):
    frames = read_clip(videos / "a.mp4", Bucket(HEIGHT, WIDTH, FRAMES), None)[0]
    return [Image.fromarray(frames[i].numpy()) for i in (0, -1)], frames


def close(found, wanted):
    """Stored in bfloat16, which keeps 8 bits."""
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2**-8, atol=2**-8 * float(wanted.std()))


@pytest.mark.parametrize(
    ("kind", "chosen"), [("i2v", "first"), ("flf2v", "ends"), ("a14b-i2v", "first"), ("a14b-i2v", "ends")]
)
def test_an_image_to_video_model_is_given_what_the_pipeline_gives_it(encoded, videos, kind, chosen):
    model, folder = encoded(kind)
    pipe = (
        WanImageToVideoPipeline.from_pretrained(model)
        if kind != "a14b-i2v"
        else WanImageToVideoPipeline.from_pretrained(model, image_encoder=None, image_processor=None)
    )
    pictures, _ = ends(videos)
    pixels = [pipe.video_processor.preprocess(p, height=HEIGHT, width=WIDTH) for p in pictures]
    with torch.no_grad():
        _, condition = pipe.prepare_latents(
            pixels[0], 1, 16, HEIGHT, WIDTH, FRAMES, torch.float32, torch.device("cpu"),
            last_image=pixels[1] if chosen == "ends" else None,
        )  # fmt: skip
    batch, given = read(folder, pipe.transformer.config, chosen, ASKED[kind][1])
    assert torch.equal(given.beside[:, :4], condition[:, :4])
    close(given.beside[:, 4:], condition[:, 4:])
    inputs = model_inputs(batch["latents"], batch["latents"], torch.tensor([500.0]), given, (1, 2, 2))
    assert inputs["hidden_states"].shape[1] == pipe.transformer.config.in_channels
    if kind == "a14b-i2v":
        assert given.images is None
        return
    with torch.no_grad():
        embeds = pipe.encode_image(pictures if chosen == "ends" else pictures[0], torch.device("cpu"))
    close(given.images, embeds)


def test_the_5b_is_given_the_first_latent_frame_clean(encoded, videos):
    model, folder = encoded("ti2v-5b")
    parts = {"image_encoder": None, "image_processor": None, "expand_timesteps": True}
    pipe = WanImageToVideoPipeline.from_pretrained(model, **parts)
    pictures, _ = ends(videos)
    pixels = pipe.video_processor.preprocess(pictures[0], height=HEIGHT, width=WIDTH)
    batch, given = read(folder, pipe.transformer.config, "first", ASKED["ti2v-5b"][1])
    noisy = torch.randn_like(batch["latents"])
    with torch.no_grad():
        _, condition, mask = pipe.prepare_latents(
            pixels, 1, 48, HEIGHT, WIDTH, FRAMES, torch.float32, torch.device("cpu"), latents=noisy
        )
    assert torch.equal(known_frames(given.clean, 2).expand_as(mask[:, :1]), mask[:, :1] == 0)
    close(batch["latents"][:, :, :1], condition)
    inputs = model_inputs(noisy, batch["latents"], torch.tensor([500.0]), given, (1, 2, 2))
    close(inputs["hidden_states"], (1 - mask) * condition + mask * noisy)
    assert torch.equal(inputs["timestep"], (mask[0][0][:, ::2, ::2] * 500).flatten()[None])


@pytest.mark.parametrize("chosen", ["none", "first", "ends"])
def test_a_vace_model_is_given_what_the_pipeline_makes_of_pixels(encoded, videos, chosen):
    model, folder = encoded("vace")
    pipe = WanVACEPipeline.from_pretrained(model)
    _, frames = ends(videos)
    video = torch.zeros(1, 3, FRAMES, HEIGHT, WIDTH)
    mask = torch.ones(1, 3, FRAMES, HEIGHT, WIDTH)
    for place in {"none": (), "first": (0,), "ends": (0, -1)}[chosen]:
        video[0, :, place] = frames[place].permute(2, 0, 1) / 127.5 - 1
        mask[0, :, place] = 0
    with torch.no_grad():
        latents = pipe.prepare_video_latents(video, mask, [[]], None, torch.device("cpu"))
        masks = pipe.prepare_masks(mask, [[]])
    _, given = read(folder, pipe.transformer.config, chosen, ASKED["vace"][1])
    close(given.control[:, :32], latents)
    assert torch.equal(given.control[:, 32:], masks)


def test_folders_hold_what_their_model_takes_and_no_more(encoded):
    names = {kind: set(open_shards(encoded(kind)[1]).clips[0].given) for kind in ASKED}
    assert names == {
        "i2v": {"first", "image"},
        "flf2v": {"ends", "image", "last_image"},
        "a14b-i2v": {"first", "ends"},
        "ti2v-5b": set(),
        "vace": {"first", "ends"},
    }
    greys = {kind for kind in ASKED if (encoded(kind)[1] / "grey.safetensors").exists()}
    assert greys == {"vace"}


def train(tmp_path, model, folder, kind, **tables):
    AcceleratorState._reset_state(reset_partial_state=True)
    data = {"conditions": ASKED[kind][1]} if ASKED[kind][1] else {}
    path = write_config(
        tmp_path,
        sets=(),
        model={"source": str(model), "plan": "wan2.2-4k" if kind == "ti2v-5b" else "wan2.1-4k", "text_tokens": 512},
        data=data,
        trainable={"what": "lora", "rank": 2, "targets": ["self-attention"]},
        schedule={"steps": 2, "velocity": 1.0},
        **tables,
    )
    with open(path, "a", encoding="utf-8") as file:
        file.write(f'[[data.sets]]\nname = "clips"\nfolder = "{folder}"\n')
    return main([path])


@pytest.mark.parametrize("kind", sorted(ASKED))
def test_encoded_clips_are_trained_on_and_sampled(encoded, videos, tmp_path, kind):
    samples = {"prompts": ["a dot"], "height": HEIGHT, "width": WIDTH, "frames": 5, "steps": 1, "cfg": 1.0}
    for name, picture in zip(("images", "last_images"), ends(videos)[0], strict=True):
        picture.save(tmp_path / f"{name}.png")
        if name == "images" or kind in ("flf2v", "vace"):
            samples[name] = [str(tmp_path / f"{name}.png")]
    model, folder = encoded(kind)
    tables = {} if kind.startswith("a14b") else {"samples": samples}
    assert train(tmp_path, model, folder, kind, **tables) == 0
    assert len(list((tmp_path / "run").rglob("*.mp4"))) == len(tables)
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "weights.safetensors")
    ups = [tensor for name, tensor in weights.items() if "lora_B" in name]
    assert ups and all(tensor.any() and tensor.isfinite().all() for tensor in ups)


def test_clips_encoded_for_a_text_to_video_model_get_their_grey_for_vace(encoded, videos, tmp_path, capsys):
    model, folder = encoded("vace")
    plain = build("t2v", tmp_path / "plain")  # its encoders are those of the VACE model
    size = ["--size", f"{HEIGHT}x{WIDTH}", "--frames", str(FRAMES), "--device", "cpu", "--out", str(tmp_path / "set")]
    for name in (plain, model):
        assert main(["encode", str(videos), *size, "--model", str(name)]) == 0
    assert "0 clips encoded, 2 were done before" in capsys.readouterr().err
    shards = open_shards(tmp_path / "set")
    shape = shards.clips[0].latents
    assert shards.clips[0].given == {} and torch.equal(shards.grey(shape), open_shards(folder).grey(shape))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("a14b-i2v", {}, "needs a whole model, and one of two experts is trained"),
        ("i2v", {}, "[samples] lacks images"),
        ("i2v", {"images": ["a.png"], "last_images": ["a.png"]}, "has last_images, which an image-to-video model does"),
        ("i2v", {"images": ["a.png"]}, "the image a.png does not exist"),
        ("vace", {"images": ["a.png", "b.png"]}, "images has 2 files for 1 prompts"),
    ],
)
def test_samples_that_a_model_does_not_make_are_refused_first(encoded, tmp_path, capsys, kind, changes, said):
    size = {"prompts": ["a dot"], "height": HEIGHT, "width": WIDTH, "frames": 5}
    assert train(tmp_path, *encoded(kind), kind, samples={**size, **changes}) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.csv").exists()


def own_samples(tmp_path, videos, model, kind):
    """The command that samples two prompts, one of them with the pictures that the first clip starts and ends with."""
    for name, picture in zip(("image", "last_image"), ends(videos)[0], strict=True):
        picture.save(tmp_path / f"{name}.png")
    taken = ["image"] if kind in ("i2v", "ti2v-5b") else ["image", "last_image"]
    images = {name: f"{name}.png" for name in taken}
    other = {} if kind == "ti2v-5b" else images
    entries = [{"prompt": "a grey clip a", **images}, {"prompt": "a red square", "negative_prompt": "blue", **other}]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    size = ["--size", f"{HEIGHT}x{WIDTH}", "--frames", str(FRAMES), "--steps", "1", "--cfg", "1", "--device", "cpu"]
    where = ["--out", str(tmp_path / "set"), "--model", str(model)]
    return ["encode", "--own-samples", str(tmp_path / "prompts.json"), *size, *where, *ASKED[kind][0]]


@pytest.mark.parametrize("kind", sorted(ASKED))
def test_own_samples_have_what_encoded_clips_have(encoded, videos, tmp_path, kind, capsys):
    """The pictures of the first prompt are the first and last frame of the clip `a`: what is given is the same."""
    model, folder = encoded(kind)
    command = own_samples(tmp_path, videos, model, kind)
    assert main(command) == 0
    made, real = open_shards(tmp_path / "set"), open_shards(folder)
    assert (made.grey(made.clips[0].latents) is not None) is (kind == "vace")
    assert [clip.latents for clip in made.clips] == 2 * [real.clips[0].latents]
    found, wanted = made.load(0), real.load(0)
    assert not torch.equal(found.latents, wanted.latents)
    for number in range(2):
        assert made.load(number).given.keys() == wanted.given.keys()
    for name, tensor in wanted.given.items():
        close(found.given[name], tensor)
    assert main(command) == 0 and "2 were done before" in capsys.readouterr().err
    assert train(tmp_path, model, tmp_path / "set", kind) == 0


@pytest.mark.parametrize(
    ("kind", "entry", "asked", "said"),
    [
        ("i2v", {}, [], "given (first), and the prompt 'one' has no \"image\". Name a file there"),
        ("flf2v", {"image": "a.png"}, [], "given (ends), and the prompt 'one' has no \"last_image\""),
        ("flf2v", {"last_image": "a.png"}, [], "'one' has a last image, and none to start from"),
        ("vace", {"image": "a.png"}, ["--condition", "ends"], "given (ends), and the prompt 'one' has no"),
        ("ti2v-5b", {"image": "a.png", "last_image": "a.png"}, [], "takes no last image. Use a first-and-last-frame"),
        ("i2v", {"image": "b.png"}, [], "cannot be read as an image"),
        ("i2v", {"image": "c.png"}, [], "c.png does not exist"),
    ],
)
def test_prompts_without_the_images_that_own_samples_need(encoded, tmp_path, capsys, kind, entry, asked, said):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "a dot", "name": "one", **entry}]))
    command = ["encode", "--own-samples", str(tmp_path / "prompts.json"), "--out", str(tmp_path / "set"), *asked]
    size = ["--size", f"{HEIGHT}x{WIDTH}", "--frames", str(FRAMES), "--device", "cpu"]
    assert main([*command, *size, "--model", str(encoded(kind)[0])]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
