"""One of the processes that share a decode or encode. Started by `test_parallel_vae` with rank, size and a folder."""

import json
import os
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from vae_fixtures import NAMES, SCALE, Peak, random_latents, random_state

from t3.errors import T3Error
from t3.vae import WanDecoder, WanEncoder, decode_frames, encode_frames
from t3.vae.ranks import Ranks
from t3.vae.shared_decode import decode_shared
from t3.vae.shared_encode import encode_shared


def same(ranks: Ranks, name: str, shape: tuple[int, ...], dtype=torch.float32, out=None, batch=1, tile=None) -> dict:
    """Decode on all ranks and, with the same tiles, on rank 0 alone."""
    decoder = WanDecoder.from_state_dict(random_state(name), dtype=dtype)
    latents = random_latents(name, *shape, batch=batch, dtype=dtype)
    report: dict = {}
    calls: list[tuple[int, int]] = []
    frames = (batch, decoder.structure.frames(shape[0]), *(side * SCALE[name] for side in shape[1:]), 3)
    target = torch.empty(frames, dtype=out) if out and ranks.first else None
    found = decode_shared(
        decoder,
        latents if ranks.first else None,
        ranks,
        tile=tile,
        out=target,
        progress=lambda *call: calls.append(call),
        report=report,
    )
    if not ranks.first:
        assert found is None
        return report
    assert found is not None and (target is None or found is target)
    wanted = decode_frames(decoder, latents, tile=tuple(report["tile"]), out=out and torch.empty(frames, dtype=out))
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted), f"{name} {shape}: {(found != wanted).float().mean():.2%} of the numbers differ"
    assert calls[-1][0] == calls[-1][1] and all(a[0] <= b[0] for a, b in pairwise(calls))
    return report


def same_encode(ranks: Ranks, name: str, shape: tuple[int, ...], batch=1, sent=False) -> dict:
    encoder = WanEncoder.from_state_dict(random_state(name), dtype=torch.float32)
    frames, height, width = shape
    source = torch.Generator().manual_seed(3)
    size = (batch, frames, height * SCALE[name], width * SCALE[name], 3)
    pixels = torch.randint(256, size, generator=source, dtype=torch.uint8)
    report: dict = {}
    found = encode_shared(encoder, None if sent and not ranks.first else pixels, ranks, report=report)
    wanted = encode_frames(encoder, pixels, tile=tuple(report["tile"]))
    assert torch.equal(found, wanted), f"{name} {shape}"
    return report


def equal(ranks: Ranks) -> list[dict]:
    found = []
    for name in NAMES:
        found.append(same(ranks, name, (5, 5, 7)))
        found.append(same(ranks, name, (1, 3, 4), torch.float64, torch.float64))
        found.append(same(ranks, name, (2, 2, 5), out=torch.uint16, batch=2, tile=2 * SCALE[name]))
        found.append(same_encode(ranks, name, (5, 3, 4)))
        found.append(same_encode(ranks, name, (1, 2, 3), batch=2, sent=True))
    # Longer than the feature caches reach back, so that later ranks begin anew.
    found.append(same(ranks, NAMES[0], (13, 2, 3), out=torch.uint8))
    found.append(same_encode(ranks, NAMES[0], (49, 2, 2)))
    return found


def fallbacks(ranks: Ranks) -> list[str]:
    """Memory runs out on the last rank: it goes on with smaller tiles, and rank 0 says so."""
    name, last = NAMES[0], ranks.rank == ranks.size - 1
    plain = WanDecoder.pixels

    def pixels(self, x, past, core, windows):
        frames = plain(self, x, past, core, windows)
        yield next(frames)
        if last and core.area > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        yield from frames

    decoder = WanDecoder.from_state_dict(random_state(name))
    latents = random_latents(name, 2, 4, 6)
    told: list[str] = []
    WanDecoder.pixels = pixels
    found = decode_shared(decoder, latents, ranks, tile=(4 * 8, 3 * 8), say=told.append)
    WanDecoder.pixels = plain
    if found is not None:
        torch.testing.assert_close(found, decode_frames(decoder, latents), rtol=0, atol=1e-13)
    # NaN on another rank ends rank 0 with that rank's words.
    if last:
        decoder.head.bias.data.fill_(torch.nan)
    try:
        decode_shared(decoder, latents, ranks, tile=(4 * 8, 3 * 8))
    except T3Error as error:
        told.append(str(error))
    return told


def memory(ranks: Ranks) -> dict:
    """The most main memory of rank 0, alone and shared, with the same tiles."""
    name, shape, tile = NAMES[0], (9, 12, 20), 4 * SCALE[NAMES[0]]
    decoder = WanDecoder.from_state_dict(random_state(name), dtype=torch.float32)
    latents = random_latents(name, *shape, dtype=torch.float32)
    out = torch.empty(1, 33, 96, 160, 3, dtype=torch.uint8)
    found = {"piece": 33 * tile * tile * 3}
    if ranks.first:
        with Peak() as alone:
            decode_frames(decoder, latents, tile=tile, out=out)
        found["alone"] = alone.most
    with Peak() as shared:
        decode_shared(decoder, latents if ranks.first else None, ranks, tile=tile, out=out if ranks.first else None)
    found["shared"] = shared.most
    return found


def refused(ranks: Ranks) -> list[str]:
    """What cannot be done is refused by all ranks alike."""
    decoder = WanDecoder.from_state_dict(random_state(NAMES[0]), dtype=torch.float32)
    told = []
    for latents, options in (
        (random_latents(NAMES[1], 1, 2, 2), {}),
        (random_latents(NAMES[0], 1, 2, 2), {"memory": 1000 if ranks.rank else 10**9}),
        (random_latents(NAMES[0], 1, 2, 2), {"out": torch.empty(1, 2, 3)}),
    ):
        try:
            decode_shared(decoder, latents, ranks, **options)
        except T3Error as error:
            told.append(str(error))
    return told


def killed(ranks: Ranks, folder: Path) -> None:
    """The last rank dies in the middle of its tiles, as under kill -9."""
    decoder = WanDecoder.from_state_dict(random_state(NAMES[0]), dtype=torch.float32)
    plain, count = WanDecoder.pixels, 0

    def pixels(self, *args):
        nonlocal count
        for frame in plain(self, *args):
            count += 1
            if count == 3:
                (folder / f"reached-{ranks.rank}").touch()
                if ranks.rank == ranks.size - 1:
                    os.kill(os.getpid(), 9)
                time.sleep(0.2)
            yield frame

    WanDecoder.pixels = pixels
    threading.Timer(60, os._exit, (99,)).start()
    try:
        decode_shared(decoder, random_latents(NAMES[0], 6, 6, 6), ranks)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(7)


def main() -> None:
    work, rank, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    ranks = Ranks()
    if work == "killed":
        killed(ranks, folder)
        return
    found = {"equal": equal, "fallbacks": fallbacks, "memory": memory, "refused": refused}[work](ranks)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
