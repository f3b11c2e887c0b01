"""`.latent` files: what is saved comes back, what the host writes is read, and nothing broken gets through."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t3.errors import T3Error
from t3.latents import load_latents, save_latents

SHAPE = (1, 16, 3, 4, 6)


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "Latents ünd 影"
    folder.mkdir()
    return folder


def host_file(path, latents, metadata=None, version=True):
    """A file as the host's SaveLatent writes it."""
    tensors = {"latent_tensor": latents.contiguous()}
    if version:
        tensors["latent_format_version_0"] = torch.tensor([])
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize("shape", [SHAPE, (2, 48, 1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip(place, shape, dtype):
    latents = torch.randn(shape, dtype=dtype).transpose(3, 4)  # not contiguous
    metadata = {"t3": {"prompt": "Füchse 影", "seed": 2**63, "size": [64, 96], "fps": 24.0}, "workflow": '{"1": 2}'}
    path = save_latents(place / "a.latent", latents, metadata=metadata)
    assert path == place / "a.latent" and os.listdir(place) == ["a.latent"]
    loaded, read = load_latents(path)
    assert loaded.dtype == torch.float32 and torch.equal(loaded, latents.float())
    assert read == metadata


def test_half_a_character_is_kept(place):
    """As in a prompt of broken JSON, or in a path of bytes that are no UTF-8."""
    metadata = {"t3": {"prompt": "a \ud83d 影", "image": "caf\udce9.png"}}
    path = save_latents(place / "a.latent", torch.randn(SHAPE), metadata=metadata)
    assert load_latents(path)[1] == metadata
    save_latents(place / "b.latent", torch.randn(SHAPE), metadata={"prompt": "a \ud83d 影"})
    assert load_latents(place / "b.latent")[1] == {"prompt": r"a \ud83d 影"}


def test_layout_is_the_hosts(place):
    latents = torch.randn(SHAPE)
    save_latents(place / "a.latent", latents, metadata={"t3": {"seed": 1}})
    stored = load_file(place / "a.latent")
    assert set(stored) == {"latent_tensor", "latent_format_version_0"}
    assert torch.equal(stored["latent_tensor"], latents) and stored["latent_tensor"].dtype == torch.float32
    assert stored["latent_format_version_0"].numel() == 0
    with safe_open(place / "a.latent", framework="pt") as file:
        assert json.loads(file.metadata()["t3"]) == {"seed": 1}


def test_host_files(place, caplog):
    latents = torch.randn(SHAPE)
    loaded, metadata = load_latents(host_file(place / "a.latent", latents, {"prompt": '{"3": {}}'}))
    assert torch.equal(loaded, latents) and metadata == {"prompt": '{"3": {}}'}
    assert load_latents(host_file(place / "b.latent", latents.half()))[1] == {}
    assert not caplog.records
    loaded, _ = load_latents(host_file(place / "old.latent", latents, version=False))
    torch.testing.assert_close(loaded, latents / 0.18215)
    assert "LoadLatent" in caplog.text


def test_images_become_one_frame(place):
    latents = torch.randn(2, 16, 4, 6)
    assert torch.equal(load_latents(host_file(place / "a.latent", latents))[0], latents[:, :, None])


def test_loaded_latents_do_not_hold_the_file(place):
    path = save_latents(place / "a.latent", torch.ones(SHAPE))
    loaded, _ = load_latents(path)
    save_latents(path, torch.zeros(SHAPE), overwrite=True)
    loaded += 1
    assert (loaded == 2).all() and (load_latents(path)[0] == 0).all()


def test_foreign_t3_metadata_stay_a_string(place):
    assert load_latents(host_file(place / "a.latent", torch.zeros(SHAPE), {"t3": "{"}))[1] == {"t3": "{"}


def test_existing_file_is_refused_untouched(place):
    path = save_latents(place / "a.latent", torch.ones(SHAPE))
    with pytest.raises(T3Error, match="exists"):
        save_latents(path, torch.zeros(SHAPE))
    assert (load_latents(path)[0] == 1).all()


@pytest.mark.parametrize(
    ("latents", "metadata", "message"),
    [
        (torch.zeros(SHAPE).index_fill_(4, torch.tensor([1, 2]), torch.nan), None, "384 of 1152"),
        (torch.full(SHAPE, torch.inf), None, "1152 of 1152"),
        (torch.full(SHAPE, 1e300, dtype=torch.float64), None, "1152 of 1152"),  # infinite in float32
        (torch.zeros(1, 16, 4, 6), None, r"\[1, 16, 4, 6\]"),
        (torch.zeros(1, 16, 0, 4, 6), None, r"\[1, 16, 0, 4, 6\]"),
        (torch.zeros(1, 4, 3, 4, 6), None, r"4 channels.*16 \(the Wan 2.1 VAE.*48 \(the Wan 2.2 VAE"),
        (torch.zeros(SHAPE), {"seed": 1}, "'seed'"),
        (torch.zeros(SHAPE), {"t3": object()}, "JSON"),
    ],
)
def test_save_refuses(place, latents, metadata, message):
    with pytest.raises(T3Error, match=message):
        save_latents(place / "a.latent", latents, metadata=metadata)
    assert os.listdir(place) == []


def test_full_disk_leaves_nothing(place):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(T3Error, match="could not be written"):
            save_latents(place / "a.latent", torch.zeros(1, 16, 3, 40, 60))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.full(SHAPE, torch.nan), "1152 of 1152 values are NaN"),
        (torch.zeros(1, 4, 4, 6), r"4 channels.*Wan 2\.1.*Wan 2\.2"),
        (torch.zeros(1, 128, 3, 4, 6), "128 channels"),
        (torch.zeros(16, 4, 6), r"shape \[16, 4, 6\]"),
        (torch.zeros(1, 16, 3, 0, 6), r"shape \[1, 16, 3, 0, 6\]"),
        (torch.zeros(1, 16, 0, 6), r"shape \[1, 16, 0, 6\]"),
    ],
)
def test_load_refuses_values(place, latents, message):
    with pytest.raises(T3Error, match=message):
        load_latents(host_file(place / "a.latent", latents))


def test_load_refuses_what_is_no_latent_file(place):
    with pytest.raises(T3Error, match=r"none\.latent does not exist"):
        load_latents(place / "none.latent")
    with pytest.raises(T3Error, match="is a folder"):
        load_latents(place)
    file = place / "a.latent"
    for content in (b"", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(500), b"{}" * 50):
        file.write_bytes(content)
        with pytest.raises(T3Error, match="cannot be read as safetensors"):
            load_latents(file)
    save_file({f"blocks.{number}.weight": torch.zeros(1) for number in range(5)}, file)
    with pytest.raises(T3Error, match=r"no 'latent_tensor' \(it holds blocks.0.weight, .* and 2 more\)"):
        load_latents(file)


@pytest.mark.parametrize("keep", [4, 60, 0.5, 0.999])
def test_load_refuses_a_truncated_file(place, keep):
    path = save_latents(place / "a.latent", torch.zeros(SHAPE))
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(T3Error, match="cut short"):
        load_latents(path)
