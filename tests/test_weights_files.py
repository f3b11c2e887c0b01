"""Opening weights: single files, indexes, folders, damage of every kind, and scaled fp8."""

import itertools
import json
import random
import struct

import pytest
import torch

from t3.errors import T3Error
from t3.weights import open_weights
from tests.weights_fixtures import (
    one_thread,  # noqa: F401
    raw_file,
    save,
    write_header,
)


def entry(begin, end, shape, dtype="F32"):
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


def named(*entries):
    """A header whose entries are all named "a"."""
    return "{" + ",".join('"a":' + text for text in entries) + "}"


@pytest.fixture
def tensors():
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}


def test_one_file(tmp_path, tensors):
    file = open_weights(save(tmp_path / "w.safetensors", tensors, {"t3.plan": "{}"}))
    assert sorted(file.keys()) == ["a.weight", "b"] and sorted(file) == ["a.weight", "b"]
    assert file.shape("a.weight") == (2, 3) and file.dtype("a.weight") == "F32" and file.dtype("b") == "I64"
    assert file.metadata == {"t3.plan": "{}"} and file.nbytes == 6 * 4 + 2 * 8
    assert "b" in file and "c" not in file
    assert torch.equal(file.read("a.weight"), tensors["a.weight"]) and torch.equal(file.read("b"), tensors["b"])
    with pytest.raises(KeyError):
        file.read("c")


def shards(folder, tensors, stem="diffusion_pytorch_model"):
    names = [f"{stem}-{i + 1:05d}-of-{len(tensors):05d}.safetensors" for i in range(len(tensors))]
    for name, (key, tensor) in zip(names, tensors.items(), strict=True):
        save(folder / name, {key: tensor})
    return names, dict(zip(tensors, names, strict=True))


@pytest.mark.parametrize("give", ["index", "folder", "one shard", "folder without index"])
def test_shards(tmp_path, tensors, give):
    names, weight_map = shards(tmp_path, tensors)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    if give != "folder without index":
        index.write_text(json.dumps({"weight_map": weight_map}))
    path = {"index": index, "one shard": tmp_path / names[1]}.get(give, tmp_path)
    file = open_weights(path)
    assert {key: file.read(key).tolist() for key in file} == {key: t.tolist() for key, t in tensors.items()}
    (tmp_path / names[0]).unlink()
    with pytest.raises(T3Error, match=f"1 of 2 shards are missing: {names[0]}"):
        open_weights(path)


def test_index_that_lies(tmp_path, tensors):
    _, weight_map = shards(tmp_path, tensors)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**weight_map, "ghost": weight_map["b"]}}))
    with pytest.raises(T3Error, match="'ghost'"):
        open_weights(index)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(T3Error, match="outside of its own folder"):
        open_weights(index)
    index.write_text("[]")
    with pytest.raises(T3Error, match="weight_map"):
        open_weights(index)


def test_same_key_in_two_shards(tmp_path, tensors):
    for i in (1, 2):
        save(tmp_path / f"model-0000{i}-of-00002.safetensors", tensors)
    with pytest.raises(T3Error, match="is in both"):
        open_weights(tmp_path)


def test_folders(tmp_path, tensors):
    with pytest.raises(T3Error, match=r"holds no \.safetensors"):
        open_weights(tmp_path)
    save(tmp_path / "anything.safetensors", tensors)
    assert len(open_weights(tmp_path)) == 2
    save(tmp_path / "other.safetensors", {"x": torch.ones(1)})
    with pytest.raises(T3Error, match="holds 2 safetensors files"):
        open_weights(tmp_path)
    save(tmp_path / "diffusion_pytorch_model.safetensors", {"y": torch.ones(1)})
    assert open_weights(tmp_path).keys() == ["y"]
    with pytest.raises(T3Error, match="does not exist"):
        open_weights(tmp_path / "missing.safetensors")


DAMAGE = {
    "empty": (b"", "too short"),
    "short": (b"\x01\x02\x03", "too short"),
    "page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "page with space": (b"\n  <html>", "web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "text": (b"# Model card\nThis is a description of weights.\n", "begins like a text, b'# Model card"),
    "gguf": (b"GGUF\x03\0\0\0\0\0\0\0", "damaged GGUF"),
    "zip pickle": (b"PK\x03\x04" + bytes(40), "convert it to safetensors"),
    "old pickle": (b"\x80\x02" + bytes(40), "convert it to safetensors"),
    "ten gigabytes": (struct.pack("<Q", 10 * 10**9) + b"{}" * 10, "claims a header of 10,000,000,000 bytes"),
    "not json": (struct.pack("<Q", 8) + b"notjson!", "not JSON"),
    "not utf-8": (struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe", "not JSON"),
    "list": (struct.pack("<Q", 4) + b"[1] ", "not a JSON object"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_other_formats_and_broken_headers(tmp_path, name):
    content, message = DAMAGE[name]
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(T3Error, match=message) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)


def test_header_over_the_limit_of_a_large_file(tmp_path):
    path = tmp_path / "w.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(300_000_000)
    with pytest.raises(T3Error, match="the limit is 100,000,000"):
        open_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin"])
def test_a_real_pickle_is_never_loaded(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(T3Error, match="run code"):
        open_weights(path)
    path.rename(tmp_path / "renamed.safetensors")
    with pytest.raises(T3Error, match="run code"):
        open_weights(tmp_path / "renamed.safetensors")


ENTRIES = {
    "past the end": (named(entry(0, 16, [4])), bytes(8), "truncated"),
    "size differs from shape": (named(entry(0, 8, [4])), bytes(8), "needs 16 bytes"),
    "backwards": (named(entry(8, 4, [1])), bytes(8), "damaged"),
    "unknown type": (named(entry(0, 8, [4], "F13")), bytes(8), "'F13'"),
    "negative shape": (named(entry(0, 8, [-2])), bytes(8), "not a safetensors entry"),
    "no offsets": ('{"a":{"dtype":"F32","shape":[1]}}', bytes(4), "not a safetensors entry"),
    "twice": (named(entry(0, 4, [1]), entry(4, 8, [1])), bytes(8), "'a' twice"),
    "two on the same bytes": (
        '{"a":' + entry(0, 8, [2]) + ',"b":' + entry(4, 12, [2]) + "}",
        bytes(12),
        "'b' overlaps the tensor before it",
    ),
    "a gap": ('{"a":' + entry(0, 4, [1]) + ',"b":' + entry(8, 12, [1]) + "}", bytes(12), "'b' leaves 4 bytes unused"),
    "bytes after the end": (named(entry(0, 4, [1])), bytes(8), "4 bytes follow"),
    "no tensors": ('{"__metadata__":{"a":"b"}}', b"", "holds no tensors"),
    "metadata of numbers": ('{"__metadata__":{"a":1}}', b"", "metadata"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_broken_entries(tmp_path, name):
    header, data, message = ENTRIES[name]
    with pytest.raises(T3Error, match=message):
        open_weights(raw_file(tmp_path / "w.safetensors", header, data))


def test_truncated_download(tmp_path, tensors):
    path = save(tmp_path / "w.safetensors", tensors)
    whole = path.read_bytes()
    for cut in (1, 9, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        with pytest.raises(T3Error):
            open_weights(path)


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_length_that_looks_like_a_pickle_is_none(tmp_path, length):
    """Pickles start with 80 02 or 80 04, and so do safetensors files with such a header length."""
    header = named(entry(0, 4, [1])).ljust(length)
    assert open_weights(raw_file(tmp_path / "w.safetensors", header, bytes(4))).keys() == ["a"]


def test_damage_anywhere_in_the_header_is_an_error_for_people(tmp_path, tensors):
    """Whatever bytes are wrong: a T3Error, or a file that can be read."""
    path = save(tmp_path / "w.safetensors", tensors, {"note": "x"})
    whole = path.read_bytes()
    chance, refused = random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(whole) - 40)] = chance.choice(b'0129-{}[]",:.eE\x00\xff')
        path.write_bytes(damaged)
        try:
            file = open_weights(path)
            for key in file:
                file.read(key)
        except T3Error:
            refused += 1
    assert refused > 100


def test_large_headers_need_no_disk(tmp_path):
    file = open_weights(write_header(tmp_path / "w.safetensors", {"a": (100_000, 100_000)}))
    assert file.nbytes == 2 * 10**10


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
def test_scaled_fp8(tmp_path, spelling, rows):
    weight = torch.randn(4, 3).to(torch.float8_e4m3fn)
    scale = torch.rand(4) + 0.5 if rows else torch.tensor(0.37)
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    extra = (
        {"x.scale_input": torch.ones(1), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
        if spelling == "scale_weight"
        else {"x.input_scale": torch.ones(1), "x.comfy_quant": note}
    )
    stored = {"x.weight": weight, "x.bias": torch.ones(4), f"x.{spelling}": scale, "y.weight": weight, **extra}
    file = open_weights(save(tmp_path / "w.safetensors", stored))
    want = weight.float() * (scale[:, None] if rows else scale)
    assert file.read("x.weight").dtype == torch.float32 and torch.equal(file.read("x.weight"), want)
    assert torch.equal(file.read("x.bias"), torch.ones(4))
    assert file.read("y.weight").dtype == torch.float8_e4m3fn
    assert set(file.companions()) == {f"x.{spelling}", *extra}


@pytest.mark.parametrize("form", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_stored_as_plain_bytes(tmp_path, form):
    """As older writers did: what the bytes mean is in the note."""
    weight = torch.randn(4, 3).to(getattr(torch, form))
    note = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    stored = {"x.weight": weight.view(torch.uint8), "x.weight_scale": torch.tensor(0.37), "x.comfy_quant": note}
    file = open_weights(save(tmp_path / "w.safetensors", stored))
    assert torch.equal(file.read("x.weight"), weight.float() * 0.37)


def test_fp8_of_a_format_that_is_not_known(tmp_path):
    """Numbers that are rotated, say, are no less wrong for being stored as fp8 with one scale."""
    note = torch.tensor(list(b'{"format": "float8_rotated"}'), dtype=torch.uint8)
    stored = {"x.weight": torch.zeros(4, 3).to(torch.float8_e4m3fn), "x.weight_scale": torch.tensor(1.0)}
    file = open_weights(save(tmp_path / "w.safetensors", stored | {"x.comfy_quant": note}))
    with pytest.raises(T3Error, match="quantised as float8_rotated"):
        file.read("x.weight")


def test_a_file_that_becomes_shorter_is_no_endless_read(tmp_path):
    path = save(tmp_path / "w.safetensors", {"x": torch.zeros(1000)})
    file = open_weights(path)
    with path.open("r+b") as stream:
        stream.truncate(file.info("x").begin + 1500)
    with pytest.raises(T3Error, match="became shorter while it was read"):
        list(itertools.islice(file.pieces("x", 1024), 5))


@pytest.mark.parametrize("kind", ["nvfp4", "int8_tensorwise", "bad scale", "bad note"])
def test_quantised_otherwise(tmp_path, kind):
    note = {"format": "float8_e4m3fn" if kind == "bad scale" else kind}
    text = "{" if kind == "bad note" else json.dumps(note)
    stored = {
        "x.weight": torch.zeros(4, 3).to(torch.float8_e4m3fn if kind == "bad scale" else torch.uint8),
        "x.weight_scale": torch.ones(3) if kind == "bad scale" else torch.tensor(1.0),
        "x.comfy_quant": torch.tensor(list(text.encode()), dtype=torch.uint8),
    }
    file = open_weights(save(tmp_path / "w.safetensors", stored))
    with pytest.raises(T3Error, match={"bad scale": "one per output row", "bad note": "note"}.get(kind, kind)):
        file.read("x.weight")
