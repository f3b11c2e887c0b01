"""Where the VAE nodes keep frames, and what memory they ask the host for."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import pytest
import torch
from host_clips import BUFFER, CLOSE, DECODE, MARKS, TO_VIDEO, Untouchable, frames_of, free_memory_of, latents
from host_nodes import run

pytest.importorskip("av")
pytest_plugins = ["host_node_fixtures", "host_clip_fixtures"]
pytestmark = MARKS


def test_frames_go_to_a_file_where_memory_is_short(nodes, vae, clip, folders, monkeypatch):
    expected = frames_of(run(nodes[TO_VIDEO], samples=clip[0], vae=vae, audio=None)[0]).clone()
    made = []
    mapping = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda *args: made.append(args) or mapping(*args))
    monkeypatch.setattr(f"{BUFFER}.free_main_memory", lambda: 2 * expected.numel() - 1)
    video, _ = run(nodes[TO_VIDEO], samples=clip[0], vae=vae, audio=None)
    assert len(made) == 1 and made[0][1] == expected.numel()
    assert torch.equal(frames_of(video), expected)
    trimmed = video.as_trimmed(0, 0.1)
    del video
    gc.collect()
    assert torch.equal(frames_of(trimmed), expected[:3]), "a view keeps the file alive"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
@pytest.mark.parametrize("depth", [8, 10])
def test_the_file_of_the_frames_goes_with_them(nodes, vae, clip, folders, monkeypatch, depth):
    monkeypatch.setattr(f"{BUFFER}.free_main_memory", lambda: 0)
    video, _ = run(nodes[TO_VIDEO], samples=clip[0], vae=vae, bit_depth=depth, audio=None)
    temp = str(folders["temp"])
    assert os.listdir(temp) == [] and temp in Path("/proc/self/maps").read_text()
    del video
    gc.collect()
    assert temp not in Path("/proc/self/maps").read_text()


def test_enough_memory_makes_no_file(pack, monkeypatch):
    monkeypatch.setattr(f"{BUFFER}.free_main_memory", lambda: 2 * 48)
    monkeypatch.setattr(f"{BUFFER}._mapped", None)
    assert pack.nodes.frame_buffer.new_frames((1, 4, 4, 3), torch.uint8).shape == (1, 4, 4, 3)


def test_a_full_disk_is_said_before_the_work(nodes, vae, clip, monkeypatch):
    import shutil

    monkeypatch.setattr(f"{BUFFER}.free_main_memory", lambda: 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100))
    monkeypatch.setattr(vae, "first_stage_model", Untouchable(vae.first_stage_model))
    with pytest.raises(ValueError, match="the disk is too full.*choose bit_depth 8, or decode fewer frames") as caught:
        run(nodes[TO_VIDEO], samples=clip[0], vae=vae, audio=None)
    assert "\n" not in str(caught.value)


def test_images_that_do_not_fit_are_refused_before_the_work(nodes, vae, clip, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "swap_memory", lambda: type("Swap", (), {"free": 0}))
    free_memory_of(monkeypatch, 9 * 48 * 64 * 3 * 4 - 1)
    monkeypatch.setattr(vae, "first_stage_model", Untouchable(vae.first_stage_model))
    with pytest.raises(ValueError, match="9 frames of 64 x 48 pixels as IMAGE.*Use T3 VAE Decode to Video"):
        run(nodes[DECODE], samples=clip[0], vae=vae)


def test_taking_a_video_apart_that_does_not_fit_is_refused(video, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "swap_memory", lambda: type("Swap", (), {"free": 0}))
    free_memory_of(monkeypatch, 9 * 48 * 64 * 3 * 4 - 1)
    with pytest.raises(ValueError, match="as IMAGE take 0.0 GB.*Save the video as it is, or trim it before"):
        video.get_components()


def test_too_little_memory_for_any_tile_is_said_in_words(nodes, vae, clip, monkeypatch):
    monkeypatch.setattr(f"{BUFFER}.free_main_memory", lambda: 10**9)
    free_memory_of(monkeypatch, 1000)
    with pytest.raises(ValueError, match="there is too little free memory on cpu for this decode: .* takes") as caught:
        run(nodes[TO_VIDEO], samples=clip[0], vae=vae)
    assert "\n" not in str(caught.value)


def test_less_memory_makes_smaller_tiles_and_the_same_pixels(nodes, vae, monkeypatch):
    samples = latents(1, 16, 1, 40, 44)
    whole, report = run(nodes[DECODE], samples=samples, vae=vae)
    assert "1 tile of at most 352 x 320 pixels" in report
    monkeypatch.setattr("comfyui_t3_pack.nodes.host_vae.free_bytes", lambda device: 6_000_000)
    tiled, report = run(nodes[DECODE], samples=samples, vae=vae)
    assert int(report.splitlines()[1].split()[0]) > 1
    assert (tiled - whole).abs().max() < CLOSE


@pytest.mark.parametrize("code", [95, 28])
def test_disks_that_cannot_keep_room_free(pack, folders, monkeypatch, code):
    """One that does not know how still has its files; one that is full is an error."""

    def refuse(file, start, size):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    monkeypatch.setattr(f"{BUFFER}.free_main_memory", lambda: 0)
    if code == 28:
        with pytest.raises(ValueError, match="No space left on device"):
            pack.nodes.frame_buffer.new_frames((2, 4, 4, 3), torch.uint8)
    else:
        assert pack.nodes.frame_buffer.new_frames((2, 4, 4, 3), torch.uint16).fill_(7).to(torch.int32).sum() == 96 * 7


@pytest.mark.parametrize("at", [2, 6])
def test_memory_that_runs_out_in_the_middle_is_told_and_nothing_is_lost(pack, nodes, vae, monkeypatch, caplog, at):
    samples = latents(1, 16, 2, 6, 8)
    expected, _ = run(nodes[DECODE], samples=samples, vae=vae)
    decoder = pack.nodes.host_decode.WanDecoder
    pixels, calls = decoder.pixels, []

    def runs_out(*args):
        calls.append(args)
        if len(calls) == at:
            raise torch.OutOfMemoryError("out of memory")
        return pixels(*args)

    monkeypatch.setattr(decoder, "pixels", runs_out)
    images, report = run(nodes[DECODE], samples=samples, vae=vae, tile_size=32)
    assert (images - expected).abs().max() < CLOSE
    for text in (report, caplog.text):
        assert "memory ran out with tiles of 32 x 24 pixels; going on with 16 x 24" in text


class Card:
    """A device the decoder is on in name: what the host is asked to free for it."""

    def __init__(self, monkeypatch, free):
        import comfy.model_management as management

        self.asked = []
        monkeypatch.setattr(management, "get_free_memory", lambda *args, **kwargs: free)
        monkeypatch.setattr(management, "free_memory", lambda size, device: self.asked.append((size, device)))


def make_room_for(monkeypatch, work, unused, tile):
    """What the host is asked for: at 4K some gigabytes, and nothing if they are free."""
    device = torch.device("cuda", 0)
    weights = {f"{part}.{i}": torch.empty(10**6, device="meta") for part in (unused, "x") for i in range(70)}
    weights[f"{unused}.y"] = torch.empty(10**12, device="meta")
    card = Card(monkeypatch, 0)
    work._make_room(device, weights, torch.bfloat16, tile)
    ((size, where),) = card.asked
    assert where == device
    for free, calls in ((size - 1, 1), (size, 0)):
        card = Card(monkeypatch, free)
        work._make_room(device, weights, torch.bfloat16, tile)
        assert len(card.asked) == calls
    return size


@pytest.mark.parametrize("tile", [0, 512])
def test_other_models_make_room_only_where_tiles_need_it(pack, vae, monkeypatch, tile):
    """The host's own estimate is 117 GB."""
    samples = {"samples": torch.zeros(1, 16, 1, 1, 1).expand(1, 16, 21, 272, 480)}
    decode = pack.nodes.host_decode.Decode.of(vae, samples)
    monkeypatch.setattr(decode, "structure", structure_of_full_width(pack.nodes.host_decode.read_structure))
    assert 3e9 < make_room_for(monkeypatch, decode, "encoder", tile) < 10e9


@pytest.mark.parametrize(("frames", "least", "most"), [(1, 1e9, 8e9), (81, 3e9, 11e9)])
@pytest.mark.parametrize("tile", [0, 512])
def test_an_encode_asks_for_no_more(pack, vae, monkeypatch, tile, frames, least, most):
    """The host's own estimate is 25 GB for one picture and 100 GB for a video."""
    images = torch.zeros(1, 1, 1, 3).expand(frames, 2176, 3840, 3)
    encode = pack.nodes.host_encode.Encode.of(vae, images)
    monkeypatch.setattr(encode, "structure", structure_of_full_width(pack.nodes.host_encode.read_down_structure))
    assert least < make_room_for(monkeypatch, encode, "decoder", tile) < most


def structure_of_full_width(read):
    from comfy.ldm.wan.vae import WanVAE

    with torch.device("meta"):
        model = WanVAE(
            dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
        )
    return read({name: tuple(value.shape) for name, value in model.state_dict().items()})


def test_on_the_cpu_the_frames_own_room_is_left_to_them(pack, monkeypatch):
    card = Card(monkeypatch, 10_000)
    assert pack.nodes.host_vae.Work._memory(torch.device("cpu"), 192) == (10_000 - 192) // 2
    assert not card.asked
