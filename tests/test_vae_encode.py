"""`encode_frames`: tiles against the untiled encoder and diffusers' own, inputs, memory, faults."""

import gc

import pytest
import torch
from diffusers import AutoencoderKLWan
from vae_fixtures import NAMES, SCALE, Peak, config, fail_once_in_middle, off, out_of_memory, random_state
from vae_fixtures import one_thread as one_thread

from t3.errors import T3Error
from t3.kernels.conv_sum.naive import STRIP
from t3.vae import WanEncoder, encode_frames
from t3.vae.down_layers import DownPast
from t3.vae.down_memory import down_middle_bytes, down_tile_bytes, features_bytes
from t3.vae.down_plan import make_down_plan
from t3.vae.down_tiles import down_halo
from t3.vae.memory import with_room
from t3.vae.tiles import Span, Window, cores
from t3.weights.layout_vae import vae_layout

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def encoder(name):
    return small_encoder(name)


def small_encoder(name, dtype=torch.float64):
    return WanEncoder.from_state_dict(random_state(name), dtype=dtype)


def library(name, state):
    """diffusers' VAE with these weights, under its names, in their dtype. Its encoder rounds float64 to nothing less:
    norms are made in float32 only from 16 bits, and only upsampling converts."""
    model = AutoencoderKLWan(**config(name)).to(next(iter(state.values())).dtype)
    model.load_state_dict({param.name: state[key] for key, param in vae_layout(config(name)).items()}, strict=True)
    return model.eval()


def theirs(model, frames):
    with torch.no_grad():
        return model.encode(as_video(frames)).latent_dist.mode()


def as_video(frames):
    """What the hosts' encoders take."""
    return (frames * 2 - 1).movedim(-1, 1)


def random_frames(name, *shape, batch=1, dtype=torch.float64, seed=1):
    """`[batch, frames, H, W, 3]` for a shape in frames and latents."""
    generator = torch.Generator().manual_seed(seed)
    size = shape[1] * SCALE[name], shape[2] * SCALE[name]
    return torch.rand(batch, shape[0], *size, 3, generator=generator, dtype=torch.float64).to(dtype)


def in_pixels(name, tile):
    return tile and (tile[0] * SCALE[name], tile[1] * SCALE[name])


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((1, 3, 5), None),
        ((1, 2, 21), (2, 1)),  # tiles with a whole halo on both sides
        ((5, 5, 3), (2, 2)),  # tiles that do not divide the picture
        ((9, 1, 1), (100, 100)),  # a tile larger than the picture
        ((13, 3, 2), (1, 1)),
    ],
)
def test_float64_is_diffusers_float64(name, encoder, shape, tile):
    frames = random_frames(name, *shape, batch=2 if shape[0] == 5 else 1)
    wanted = theirs(library(name, random_state(name)), frames)
    found = encode_frames(encoder, frames, tile=in_pixels(name, tile))
    assert (found.dtype, found.device.type, found.shape[2]) == (torch.float64, "cpu", 1 + shape[0] // 4)
    assert off(found, wanted) < 1e-12
    assert off(encoder.untiled(as_video(frames)), wanted) < 1e-12
    assert wanted.std() > 0.1


@pytest.mark.parametrize("tile", [None, (2, 3)])
def test_float32_is_as_near_to_float64_as_diffusers(name, tile):
    state = random_state(name, dtype=torch.float32)
    frames = random_frames(name, 5, 5, 7, dtype=torch.float32)
    exact = WanEncoder.from_state_dict(state, dtype=torch.float64).untiled(as_video(frames.double()))
    found = encode_frames(WanEncoder.from_state_dict(state), frames, tile=in_pixels(name, tile))
    assert found.dtype == torch.float32
    assert off(found, exact) <= 2 * off(theirs(library(name, state), frames), exact) + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_near_to_float64_as_diffusers(name, dtype):
    state = random_state(name, dtype=dtype)
    frames = random_frames(name, 5, 3, 5, dtype=torch.float32)
    exact = WanEncoder.from_state_dict(state, dtype=torch.float64).untiled(as_video(frames).to(dtype))
    with torch.no_grad():
        wanted = library(name, state).encode(as_video(frames).to(dtype)).latent_dist.mode().double()
    found = encode_frames(WanEncoder.from_state_dict(state), frames, tile=in_pixels(name, (2, 3)))
    assert found.dtype == torch.float32
    assert (found - exact).square().mean() <= 1.2**2 * (wanted - exact).square().mean()


def test_the_halo_is_enough_and_one_pixel_less_is_not(name, encoder):
    """A tile is right with what is around its window missing, and wrong with one more row of pixels missing."""
    structure = encoder.structure
    tile, whole = encoder.windows(Window(Span(0, 1, 1), Span(10, 12, 24))), encoder.windows(Window.whole(1, 24))
    need = tile.pixels.cols.scaled(structure.patch)
    before, after = (structure.patch * pixels for pixels in down_halo(structure.reach, structure.first_radius))
    assert (need.start, need.stop) == (10 * SCALE[name] - before, 12 * SCALE[name] + after)
    video = as_video(random_frames(name, 5, 1, 24))

    def features(video, windows):
        past, pixels = DownPast(), windows.pixels.scaled(structure.patch)
        with torch.no_grad():
            found = [encoder.features(frame[pixels.here], past, windows) for frame in video.unbind(2)]
        return torch.stack([x for x in found if x is not None], dim=2)

    wanted = features(video, whole)[..., 10:12]
    for less in ((0, 0), (1, 0), (0, 1)):
        shown = torch.zeros_like(video)
        kept = slice(need.start + less[0], need.stop - less[1])
        shown[..., kept] = video[..., kept]
        # Single pixels at the rim weigh little, but far more than rounding: 1e-12 and 1e-15 are usual.
        error = off(features(shown, tile), wanted)
        assert error < 1e-14 if less == (0, 0) else error > 1e-13


def test_any_strides_and_dtype_of_frames(name, encoder):
    frames = random_frames(name, 5, 2, 3, dtype=torch.float16)
    wanted = encode_frames(encoder, frames.double())
    apart = torch.zeros(1, 3, 2 * frames.shape[3], frames.shape[2], 10, dtype=torch.float16)
    apart = apart.permute(0, 4, 3, 2, 1)[:, ::2, :, ::2]
    apart.copy_(frames)
    assert not apart.is_contiguous()
    assert torch.equal(encode_frames(encoder, apart), wanted)
    assert torch.equal(encode_frames(encoder, frames.double().expand(2, -1, -1, -1, -1))[1:], wanted)


@pytest.mark.parametrize(("dtype", "most"), [(torch.uint8, 255), (torch.uint16, 65535)])
def test_whole_numbers(name, encoder, dtype, most):
    whole = (random_frames(name, 5, 2, 3) * most).round()
    whole[0, 0, 0, 0] = torch.tensor([0.0, most, most // 2 + 1])
    frames = whole.to(torch.int32).to(dtype).transpose(2, 3).contiguous().transpose(2, 3)
    before = frames.clone()
    found = encode_frames(encoder, frames, tile=SCALE[name])
    assert off(found, encode_frames(encoder, whole / most)) < 1e-14
    assert torch.equal(frames, before)


def test_weights_come_under_both_names_and_without_the_decoder(name):
    state = random_state(name)
    before = {key: value.clone() for key, value in state.items()}
    frames = random_frames(name, 5, 1, 2)
    wanted = encode_frames(WanEncoder.from_state_dict(state), frames)
    part = {key: value for key, value in state.items() if key.startswith(("encoder.", "conv1."))}
    for other in (library(name, state).state_dict(), part):
        assert torch.equal(encode_frames(WanEncoder.from_state_dict(other), frames), wanted)
    assert all(torch.equal(state[key], value) for key, value in before.items())


# --- Progress and faults ---------------------------------------------------------------------------------------------


def test_progress_counts_up_to_the_total(name, encoder):
    calls = []
    frames = random_frames(name, 5, 2, 3, batch=2)
    encode_frames(encoder, frames, tile=2 * SCALE[name], progress=lambda *call: calls.append(call))
    assert {total for _, total in calls} == {2 * 6 * (5 + 2)}
    done = [done for done, _ in calls]
    assert done == sorted(set(done)) and done[-1] == calls[0][1]
    assert len(calls) == 2 * (2 * 5 + 2)


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("call", [1, 8, 12])
def test_cancel_at_any_time(name, encoder, call):
    """The exception comes through, nothing goes on, and nothing is held."""
    count = 0

    def progress(done, total):
        nonlocal count
        count += 1
        if count == call:
            raise Cancelled

    frames = random_frames(name, 5, 2, 3)
    with Peak() as peak:
        with pytest.raises(Cancelled):
            encode_frames(encoder, frames, tile=2 * SCALE[name], progress=progress)
        gc.collect()
    assert count == call
    assert peak.left == 0


def fail(monkeypatch, when, error=out_of_memory):
    """Let memory run out half way through tiles larger than `when` latents. Gives the areas of those begun."""
    begun, plain = [], WanEncoder.features

    def features(self, frame, past, windows):
        area = windows.levels[-1][-1].area
        found = plain(self, frame, past, windows)
        if not hasattr(past, "seen"):
            past.seen = True
            begun.append(area)
        elif area > when:
            raise error()
        return found

    monkeypatch.setattr(WanEncoder, "features", features)
    return begun


def test_out_of_memory_goes_on_with_smaller_tiles(monkeypatch, name, encoder):
    frames = random_frames(name, 5, 2, 6, batch=2)
    wanted = encode_frames(encoder, frames)
    begun = fail(monkeypatch, 4)
    told, calls = [], []
    found = encode_frames(encoder, frames, say=told.append, progress=lambda *call: calls.append(call))
    assert off(found, wanted) < 1e-13
    assert len(told) == 2 and "memory ran out" in told[0] and f"with {2 * SCALE[name]} x" in told[1]
    assert calls[-1][0] == calls[-1][1], "the work that was lost is not counted"
    # 12, then 6 latents fail, and each of the two clips takes tiles of 4 and less.
    assert begun[:2] == [12, 6] and max(begun[2:]) <= 4 and sum(begun[2:]) == 24


def test_finished_tiles_are_kept(monkeypatch, name, encoder):
    frames = random_frames(name, 1, 2, 6)
    wanted = encode_frames(encoder, frames)
    begun, plain, failed = [], WanEncoder.features, []

    def features(self, frame, past, windows):
        start = windows.levels[-1][-1].cols.start
        begun.append(start)
        if start == 2 and not failed:
            failed.append(start)
            raise out_of_memory()
        return plain(self, frame, past, windows)

    monkeypatch.setattr(WanEncoder, "features", features)
    assert off(encode_frames(encoder, frames, tile=2 * SCALE[name], say=lambda text: None), wanted) < 1e-13
    assert begun == [0, 2, 2, 2, 4, 4]


def test_out_of_memory_in_the_middle_stage(monkeypatch, name, encoder):
    frames = random_frames(name, 5, 2, 3)
    wanted = encode_frames(encoder, frames)
    scores, told, calls = fail_once_in_middle(monkeypatch, WanEncoder), [], []
    found = encode_frames(encoder, frames, say=told.append, progress=lambda *call: calls.append(call))
    assert off(found, wanted) < 1e-13
    assert len(told) == 1 and "in the middle stage" in told[0]
    assert scores[2] == scores[0] // 4 and calls[-1][0] == calls[-1][1]


def test_not_even_one_latent_fits(monkeypatch, name, encoder, caplog):
    fail(monkeypatch, 0)
    with pytest.raises(T3Error, match="not even memory to encode tiles of one latent"):
        encode_frames(encoder, random_frames(name, 5, 1, 2))
    assert "memory ran out" in caplog.text, "the log tells when nobody listens"


def test_other_errors_come_through(monkeypatch, name, encoder):
    fail(monkeypatch, 0, lambda: RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        encode_frames(encoder, random_frames(name, 5, 1, 2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_latents_that_are_no_numbers_are_refused(name, bad):
    encoder = small_encoder(name, torch.float16)
    encoder.quant.bias[0] = bad
    with pytest.raises(T3Error, match="encoding in torch.float16 gave NaN"):
        encode_frames(encoder, random_frames(name, 1, 1, 2))


# --- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(2, 3), (2, 24)])
def test_the_memory_stated_is_the_memory_taken(monkeypatch, name, dtype, tile):
    # Three strips in float32 is what plain torch holds beside: short ones, so that it is little.
    monkeypatch.setitem(STRIP, "cpu", 2**12)
    # Wide enough that what torch's convolutions take for themselves on a CPU is little.
    encoder = WanEncoder.from_state_dict(random_state(name, base_dim=16), dtype=dtype)
    frames = random_frames(name, 5, 2, 50, dtype=torch.float32)
    structure, size = encoder.structure, dtype.itemsize
    core = max(cores(2, 50, tile), key=lambda core: encoder.windows(core).pixels.area)
    tile_most = down_tile_bytes(structure, encoder.windows(core), size)
    stated = max(down_middle_bytes(structure, 2, 50, size), tile_most) + features_bytes(structure, 2, 2, 50, size)
    with Peak() as peak:
        latents = encode_frames(encoder, frames, tile=in_pixels(name, tile))
    assert 0.95 * stated < peak.most - latents.nbytes < 1.08 * stated + 3 * 4 * STRIP["cpu"]


def test_the_tile_follows_from_the_memory(name, encoder):
    structure, tiles = encoder.structure, []
    for memory in (12 * 10**6, 2 * 10**7, 4 * 10**7, 10**9):
        tile = make_down_plan(structure, (2, 30, 30), CPU, 4, memory, None).tile
        core = max(cores(30, 30, tile), key=lambda core: encoder.windows(core).pixels.area)
        kept = features_bytes(structure, 2, 30, 30, 4)
        assert down_tile_bytes(structure, encoder.windows(core), 4) + kept <= memory
        tiles.append(tile[0] * tile[1])
    assert tiles == sorted(tiles) and tiles[0] < tiles[-1] == 900


def test_the_middle_stages_input_waits_in_main_memory_when_the_device_is_small(encoder):
    structure, gpu = encoder.structure, torch.device("cuda")
    kept = features_bytes(structure, 400, 30, 30, 4)
    assert make_down_plan(structure, (400, 30, 30), gpu, 4, 10**9, None).keep_on == gpu
    assert make_down_plan(structure, (400, 30, 30), gpu, 4, kept + 10**6 // 2, None).keep_on == CPU


def test_of_an_input_in_main_memory_one_frame_is_on_the_device(encoder):
    structure, gpu, size = encoder.structure, torch.device("cuda"), (7, 300, 300)
    with pytest.raises(T3Error) as refused:
        make_down_plan(structure, size, gpu, 4, 1000, 2 * structure.scale)
    middle, frame = down_middle_bytes(structure, 300, 300, 4), features_bytes(structure, 1, 300, 300, 4)
    assert f"takes {with_room(middle + 1 + frame, gpu):,} or more" in str(refused.value)


def test_memory_that_is_stated_as_the_least_is_enough(name):
    encoder = small_encoder(name, torch.float32)
    frames = random_frames(name, 5, 3, 4, dtype=torch.float32)
    with pytest.raises(T3Error, match="memory is 1,000 bytes, but encoding 2 latent frames") as refused:
        encode_frames(encoder, frames, memory=1000)
    least = int(str(refused.value).split("takes ")[1].split(" or more")[0].replace(",", ""))
    assert off(encode_frames(encoder, frames, memory=least), encoder.untiled(as_video(frames))) < 1e-5
    with pytest.raises(T3Error):
        encode_frames(encoder, frames, memory=least - 1)


# --- What is refused -------------------------------------------------------------------------------------------------

GOOD = (1, 5, 16, 24, 3)


@pytest.mark.parametrize(
    ("frames", "options", "words"),
    [
        (torch.zeros(5, 16, 24, 3), {}, r"shape \(5, 16, 24, 3\); a clip is .* give frames\[None\]"),
        (torch.zeros(1, 5, 16, 24, 4), {}, r"so 4 channels. Give RGB without alpha: frames\[..., :3\]"),
        (torch.zeros(1, 3, 5, 16, 24), {}, r"so 24 channels. They look like \[B, 3, frames, H, W\]"),
        (torch.zeros(1, 5, 3, 16, 24), {}, r"They look like \[B, frames, 3, H, W\]"),
        (torch.zeros(1, 0, 16, 24, 3), {}, "there is nothing in them"),
        (torch.zeros(1, 5, 20, 23, 3), {}, "frames are 23 x 20 pixels; .* multiples of 8. Resize or crop to 24 x 24"),
        (torch.zeros(1, 5, 3, 24, 3), {}, "crop to 24 x 8"),
        (torch.zeros(1, 4, 16, 24, 3), {}, "there are 4 frames; this VAE encodes 4 n \\+ 1. Give 5 or 1 frames"),
        (torch.zeros(1, 6, 16, 24, 3), {}, "Give 5 or 9 frames"),
        (torch.zeros(1, 7, 16, 24, 3), {}, "Give 5 or 9 frames"),
        (torch.zeros(GOOD, dtype=torch.int32), {}, "dtype torch.int32; frames are read as uint8, uint16, float16"),
        (torch.full(GOOD, torch.nan), {}, "NaN or infinity in frame 0"),
        (torch.zeros(2, 5, 16, 24, 3).index_fill(1, torch.tensor([3]), torch.inf), {}, "infinity in frame 3 of clip 0"),
        (torch.full(GOOD, 200.0), {}, "reach from 200 to 200; .* If they are 0 to 255, give them as uint8"),
        (torch.full(GOOD, -1.0), {}, r"If they are in \[-1, 1\], give \(frames \+ 1\) / 2"),
        (torch.zeros(GOOD), {"tile": 7}, "tile is 7 pixels; one latent is 8 x 8 pixels"),
        (torch.zeros(GOOD), {"memory": 30000, "tile": 64}, "with tiles of 64 pixels takes .* or use smaller tiles"),
    ],
)
def test_what_cannot_be_encoded_is_refused(frames, options, words):
    calls = []
    with pytest.raises(T3Error, match=words):
        encode_frames(small_encoder("wan2.1-vae"), frames, progress=lambda *call: calls.append(call), **options)
    assert not calls


def test_wan22_needs_multiples_of_sixteen():
    with pytest.raises(T3Error, match="frames are 24 x 16 pixels; this Wan2.2 VAE encodes multiples of 16.* 32 x 16"):
        encode_frames(small_encoder("wan2.2-vae"), torch.zeros(GOOD))


def test_a_little_beyond_black_and_white_is_taken():
    encode_frames(small_encoder("wan2.1-vae"), torch.tensor([-0.1, 1.1]).repeat(192)[None, None].view(1, 1, 8, 16, 3))


def without(key):
    return lambda state: state.pop(key)


def alpha(state):
    state["encoder.conv1.weight"] = torch.zeros(4, 4, 3, 3, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("encoder.middle.0.residual.0.gamma"), "hold no Wan VAE encoder: encoder.middle.0.residual.0.gamma"),
        (without("encoder.downsamples.4.residual.2.weight"), "encoder.downsamples.4.residual.2.weight is missing"),
        (without("encoder.head.0.gamma"), "no whole Wan2.1 VAE: encoder.head.0.gamma is missing"),
        (without("conv1.bias"), "conv1.bias is missing"),
        (alpha, "encoder takes 4 channels; only RGB"),
    ],
)
def test_other_weights_are_refused(change, words):
    state = random_state("wan2.1-vae")
    change(state)
    with pytest.raises(T3Error, match=words):
        WanEncoder.from_state_dict(state)


def test_no_arithmetic_in_eight_bits():
    with pytest.raises(T3Error, match="dtype is torch.float8_e4m3fn; the encoder works in bfloat16"):
        WanEncoder.from_state_dict(random_state("wan2.1-vae"), dtype=torch.float8_e4m3fn)
