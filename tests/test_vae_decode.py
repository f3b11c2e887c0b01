"""`decode_frames`: tiles against the untiled decoder, outputs, memory, faults."""

import gc
import threading

import pytest
import torch
from vae_fixtures import (
    NAMES,
    SCALE,
    Peak,
    as_frames,
    fail_once_in_middle,
    off,
    out_of_memory,
    random_latents,
    small_decoder,
)
from vae_fixtures import one_thread as one_thread

from t3.errors import T3Error
from t3.kernels.conv_sum.naive import STRIP
from t3.vae import decode_frames
from t3.vae.decoder import WanDecoder
from t3.vae.memory import is_out_of_memory, kept_bytes, middle_bytes, tile_bytes, with_room
from t3.vae.output import Outlet
from t3.vae.plan import make_plan
from t3.vae.tiles import Window, cores

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def decoder(name):
    return small_decoder(name)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((2, 2, 31), (2, 3)),  # tiles with a whole halo on both sides
        ((1, 29, 3), (5, 1)),
        ((2, 5, 7), (2, 3)),  # tiles that do not divide the picture
        ((3, 3, 2), (1, 1)),
        ((1, 4, 5), (100, 2)),  # tiles larger than the picture
        ((2, 3, 4), None),
    ],
)
def test_tiles_are_exact(name, decoder, shape, tile):
    latents = random_latents(name, *shape, batch=2 if shape[0] == 3 else 1)
    tile = tile and (tile[0] * SCALE[name], tile[1] * SCALE[name])
    found = decode_frames(decoder, latents, tile=tile)
    assert found.dtype == torch.float64
    assert off(found, as_frames(decoder.untiled(latents))) < 1e-13


def test_float32_tiles_are_exact(name):
    decoder = small_decoder(name, torch.float32)
    latents = random_latents(name, 2, 2, 30, dtype=torch.float32)
    found = decode_frames(decoder, latents, tile=6 * SCALE[name])
    assert found.dtype == torch.float32
    assert off(found, as_frames(decoder.untiled(latents))) < 1e-5


def test_any_strides_and_dtype_of_latents(name, decoder):
    latents = random_latents(name, 2, 3, 4, dtype=torch.float16)
    wanted = decode_frames(decoder, latents.double())
    apart = torch.zeros(1, 2, 6, 4, latents.shape[1] * 2, dtype=torch.float16).movedim(-1, 1)[:, ::2, :, ::2]
    apart.copy_(latents)
    assert not apart.is_contiguous()
    assert off(decode_frames(decoder, apart), wanted) < 1e-13
    assert torch.equal(decode_frames(decoder, latents.double().expand(2, -1, -1, -1, -1))[1:], wanted)


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.uint8, 255), (torch.uint16, 65535), (torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 1)],
)
def test_outputs(decoder, name, dtype, most):
    latents = 3 * random_latents(name, 2, 3, 4)
    wanted = decode_frames(decoder, latents)
    assert (wanted == 0).any() and (wanted == 1).any()
    whole = torch.zeros(1, 5, 3, 3 * SCALE[name], 4 * SCALE[name], dtype=dtype)
    out = whole.movedim(2, -1)  # written through strides
    assert decode_frames(decoder, latents, tile=2 * SCALE[name], out=out) is out
    values = wanted.float() if dtype.is_floating_point else (wanted * most).round()
    assert torch.equal(out.to(torch.float64), values.to(dtype).to(torch.float64))


def test_progress_counts_up_to_the_total(decoder, name):
    calls = []
    latents = random_latents(name, 2, 3, 5, batch=2)
    decode_frames(decoder, latents, tile=2 * SCALE[name], progress=lambda *call: calls.append(call))
    assert {total for _, total in calls} == {2 * 15 * (2 + 5)}
    done = [done for done, _ in calls]
    assert done == sorted(set(done)) and done[-1] == calls[0][1]
    assert len(calls) == 2 * (2 + 6 * 5)


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("call", [1, 4, 20])
def test_cancel_at_any_time(decoder, name, call):
    """The exception comes through, nothing goes on, and nothing is held."""
    count = 0

    def progress(done, total):
        nonlocal count
        count += 1
        if count == call:
            raise Cancelled

    before = set(threading.enumerate())
    with Peak() as peak:
        with pytest.raises(Cancelled):
            decode_frames(decoder, random_latents(name, 2, 3, 5), tile=2 * SCALE[name], progress=progress)
        gc.collect()
    assert count == call and set(threading.enumerate()) <= before
    assert peak.left == 0


def fail(monkeypatch, when, error=out_of_memory):
    """Let memory run out while decoding tiles larger than `when` latents. Gives the cores that were begun."""
    begun, plain = [], WanDecoder.pixels

    def pixels(self, x, past, core, windows):
        if not begun or begun[-1] is not core:
            begun.append(core)
        frames = plain(self, x, past, core, windows)
        yield next(frames)
        if core.area > when:
            raise error()
        yield from frames

    monkeypatch.setattr(WanDecoder, "pixels", pixels)
    return begun


@pytest.mark.parametrize(
    "error",
    [
        out_of_memory,
        lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        lambda: RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        MemoryError,
    ],
)
def test_out_of_memory_goes_on_with_smaller_tiles(monkeypatch, decoder, name, error):
    latents = random_latents(name, 2, 4, 6, batch=2)
    wanted = decode_frames(decoder, latents)
    begun = fail(monkeypatch, 6, error)
    told, calls = [], []
    found = decode_frames(
        decoder, latents, tile=24 * SCALE[name], say=told.append, progress=lambda *call: calls.append(call)
    )
    assert off(found, wanted) < 1e-13
    assert len(told) == 2 and "memory ran out" in told[0] and f"with {3 * SCALE[name]} x" in told[1]
    assert calls[-1][0] == calls[-1][1], "the work that was lost is not counted"
    # 24, then 12 latents fail, and each of the two clips takes four tiles of 6.
    assert [core.area for core in begun] == [24, 12] + 8 * [6]


def test_finished_tiles_are_kept(monkeypatch, decoder, name):
    latents = random_latents(name, 2, 2, 8)
    wanted = decode_frames(decoder, latents)
    begun, plain, failed = [], WanDecoder.pixels, []

    def pixels(self, x, past, core, windows):
        begun.append(core.cols.start)
        if core.cols.start == 4 and not failed:
            failed.append(core)
            raise torch.OutOfMemoryError("out of memory")
        return plain(self, x, past, core, windows)

    monkeypatch.setattr(WanDecoder, "pixels", pixels)
    assert off(decode_frames(decoder, latents, tile=2 * SCALE[name], say=lambda text: None), wanted) < 1e-13
    # Two latent frames of each tile of 2 x 2; from the one that fails on, of its rows.
    assert begun == [0, 0, 2, 2, 4, 4, 4, 4, 4, 6, 6, 6, 6]


def test_out_of_memory_in_the_middle_stage(monkeypatch, decoder, name):
    latents = random_latents(name, 3, 2, 3)
    wanted = decode_frames(decoder, latents)
    scores, told, calls = fail_once_in_middle(monkeypatch, WanDecoder), [], []
    found = decode_frames(decoder, latents, say=told.append, progress=lambda *call: calls.append(call))
    assert off(found, wanted) < 1e-13
    assert len(told) == 1 and "in the middle stage" in told[0]
    assert scores == [scores[0]] * 2 + [scores[0] // 4] * 3 and calls[-1][0] == calls[-1][1]


def test_not_even_one_latent_fits(monkeypatch, decoder, name):
    fail(monkeypatch, 0)
    with pytest.raises(T3Error, match="not even memory to decode tiles of one latent"):
        decode_frames(decoder, random_latents(name, 2, 2, 3), say=lambda text: None)


def test_the_log_tells_when_nobody_listens(monkeypatch, caplog, decoder, name):
    fail(monkeypatch, 3)
    decode_frames(decoder, random_latents(name, 2, 2, 3))
    assert "memory ran out" in caplog.text


def test_other_errors_come_through(monkeypatch, decoder, name):
    fail(monkeypatch, 0, lambda: RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        decode_frames(decoder, random_latents(name, 2, 2, 3))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(2, 3), (2, 24)])
def test_the_memory_stated_is_the_memory_taken(monkeypatch, name, dtype, tile):
    # Three strips in float32 is what plain torch holds beside: short ones, so that it is little.
    monkeypatch.setitem(STRIP, "cpu", 2**12)
    decoder = small_decoder(name, dtype)
    latents = random_latents(name, 2, 2, 50, dtype=dtype)
    structure, size = decoder.structure, dtype.itemsize
    core = max(cores(2, 50, tile), key=lambda core: decoder.windows(core)[0][0].area)
    middle = middle_bytes(structure, 2, 50, size)
    kept = kept_bytes(structure, 2, 2, 50, size)
    stated = max(middle, tile_bytes(structure, decoder.windows(core), core, size)) + kept
    out = torch.empty(1, 5, 2 * SCALE[name], 50 * SCALE[name], 3, dtype=torch.uint8)
    with Peak() as peak:
        decode_frames(decoder, latents, tile=(tile[0] * SCALE[name], tile[1] * SCALE[name]), out=out)
    # On the CPU torch unfolds the input of a convolution in float32 if that is 20,480 numbers at most.
    unfolded = 9 * 20480 * size if dtype == torch.float32 else 0
    assert 0.88 * stated < peak.most < 1.02 * stated + unfolded + 3 * 4 * STRIP["cpu"]


def stated_least(refused) -> int:
    """The bytes that a refusal says would do."""
    return int(str(refused.value).split("takes ")[1].split(" or more")[0].replace(",", ""))


def test_the_tile_follows_from_the_memory(name, decoder):
    structure = decoder.structure
    tiles = []
    for memory in (5 * 10**6, 10**7, 2 * 10**7, 10**9):
        tile = make_plan(structure, (2, 30, 30), CPU, 4, memory, None).tile
        core = max(cores(30, 30, tile), key=lambda core: decoder.windows(core)[0][0].area)
        kept = kept_bytes(structure, 2, 30, 30, 4)
        assert tile_bytes(structure, decoder.windows(core), core, 4) + kept <= memory
        tiles.append(tile[0] * tile[1])
    assert tiles == sorted(tiles) and tiles[0] < tiles[-1] == 900


def test_the_middle_stage_waits_in_main_memory_when_the_device_is_small(decoder):
    structure, gpu = decoder.structure, torch.device("cuda")
    kept = kept_bytes(structure, 40, 30, 30, 4)
    assert make_plan(structure, (40, 30, 30), gpu, 4, 10**9, None).keep_on == gpu
    small = make_plan(structure, (40, 30, 30), gpu, 4, kept + 10**6 // 2, None)
    assert small.keep_on == CPU


def test_room_is_left_for_libraries_on_a_device(decoder):
    """What is stated as the least on a device is enough, and more than the tensors that are counted."""
    structure, gpu = decoder.structure, torch.device("cuda")
    with pytest.raises(T3Error, match="or decode a smaller picture") as refused:
        make_plan(structure, (2, 5, 5), gpu, 4, 1000, None)
    least = stated_least(refused)
    with pytest.raises(T3Error, match=f"memory is {least - 1:,} bytes"):
        make_plan(structure, (2, 5, 5), gpu, 4, least - 1, None)
    plan = make_plan(structure, (2, 5, 5), gpu, 4, least, None)
    core = max(cores(5, 5, plan.tile), key=lambda core: decoder.windows(core)[0][0].area)
    assert tile_bytes(structure, decoder.windows(core), core, 4) * 1.15 <= least


def test_a_picture_that_is_no_picture_is_not_written(name):
    decoder = small_decoder(name, torch.float16)
    decoder.head.weight[0] = torch.nan
    with pytest.raises(T3Error, match="decoding in torch.float16 gave NaN"):
        decode_frames(decoder, random_latents(name, 1, 2, 2), out=None)


GOOD = (1, 16, 2, 2, 3)


@pytest.mark.parametrize(
    ("latents", "options", "words"),
    [
        (torch.zeros(16, 2, 2, 3), {}, r"shape \(16, 2, 2, 3\); video latents are \[B, C, T, H, W\]"),
        (torch.zeros(1, 48, 2, 2, 3), {}, "have 48 channels and this Wan2.1 VAE decodes 16"),
        (torch.zeros(1, 16, 0, 2, 3), {}, "there is nothing in them"),
        (torch.zeros(GOOD, dtype=torch.int32), {}, "dtype torch.int32; give a float dtype"),
        (torch.full(GOOD, torch.nan), {}, "NaN or infinity in latent frame 0"),
        (torch.zeros(GOOD).index_fill(2, torch.tensor([1]), torch.inf), {}, r"latent frame 1 \(in 1 of 2 frames\)"),
        (torch.zeros(GOOD), {"tile": 7}, "tile is 7 pixels; one latent is 8 x 8 pixels"),
        (torch.zeros(GOOD), {"tile": (64, 0)}, r"tile is \(64, 0\) pixels"),
        (torch.zeros(GOOD), {"memory": 1000}, "memory is 1,000 bytes, but decoding 2 latent frames of 24 x 16 pixels"),
        (torch.zeros(GOOD), {"memory": 30000, "tile": 64}, "with tiles of 64 pixels takes .* or use smaller tiles"),
        (torch.zeros(GOOD), {"out": torch.zeros(1, 5, 16, 24)}, r"these latents decode to \(1, 5, 16, 24, 3\)"),
        (torch.zeros(GOOD), {"out": torch.zeros(1, 5, 16, 24, 3, dtype=torch.int32)}, "out has dtype torch.int32"),
    ],
)
def test_what_cannot_be_decoded_is_refused(latents, options, words):
    calls = []
    with pytest.raises(T3Error, match=words):
        decode_frames(small_decoder("wan2.1-vae"), latents, progress=lambda *call: calls.append(call), **options)
    assert not calls


def test_memory_that_is_stated_as_the_least_is_enough():
    decoder = small_decoder("wan2.1-vae", torch.float32)
    latents = random_latents("wan2.1-vae", 2, 6, 7)
    with pytest.raises(T3Error) as refused:
        decode_frames(decoder, latents, memory=1000)
    least = stated_least(refused)
    assert off(decode_frames(decoder, latents, memory=least), as_frames(decoder.untiled(latents))) < 1e-5
    with pytest.raises(T3Error):
        decode_frames(decoder, latents, memory=least - 1)


@pytest.mark.parametrize("place", [CPU, torch.device("cuda")], ids=str)
def test_the_middle_stage_has_to_fit_beside_its_results(decoder, place):
    """Of a large picture it takes more than the least tile."""
    structure, size, tile = decoder.structure, (1, 300, 300), 2 * decoder.structure.scale
    with pytest.raises(T3Error) as refused:
        make_plan(structure, size, place, 4, 1000, tile)
    least = stated_least(refused)
    middle, kept = middle_bytes(structure, 300, 300, 4), kept_bytes(structure, *size, 4)
    assert least == with_room(middle + 1 + (kept if place == CPU else 0), place)
    assert make_plan(structure, size, place, 4, least, tile).scores == 1
    with pytest.raises(T3Error):
        make_plan(structure, size, place, 4, least - 1, tile)


def test_not_a_number_in_any_frame_is_found():
    out = torch.zeros(3, 2, 2, 3)
    for bad in range(3):
        outlet = Outlet(out, CPU)
        for number in range(3):
            outlet.put(torch.full((3, 2, 2), torch.nan if number == bad else 0.5))
        with pytest.raises(T3Error, match="gave NaN"):
            outlet.finish()


def test_windows_of_a_whole_picture_are_the_picture(decoder):
    whole = Window.whole(3, 4)
    for level, windows in enumerate(decoder.windows(whole)):
        assert set(windows) == {whole.scaled(2**level)}
