"""GGUF files: recognised from their headers, their plain tensors read, and refused where values are needed."""

import struct

import pytest
import torch
from weights_fixtures import one_thread, original_state, tiny_transformer  # noqa: F401

from t3.errors import T3Error
from t3.weights import apply_weights, identify, load_transformer, open_weights

F32, Q8_0 = 0, 8


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(path, tensors, notes=(), version=3):
    """Write tensors `name -> (type, tensor)`: plain float32, or Q8_0 with zeros for data."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), 1 + len(notes))
    head += text("general.architecture") + struct.pack("<I", 8) + text("wan")
    for key, sizes in notes:
        head += text(key) + struct.pack(f"<IIQ{len(sizes)}i", 9, 5, len(sizes), *sizes)
    data = b""
    for name, (kind, tensor) in tensors.items():
        sizes = list(tensor.shape)[::-1]
        head += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, len(data))
        raw = tensor.numpy().tobytes() if kind == F32 else bytes(-(-tensor.numel() // 32) * 34)
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def model_file(folder):
    state = original_state(tiny_transformer())
    tensors = {name: (Q8_0 if t.ndim == 2 and t.numel() % 32 == 0 else F32, t) for name, t in state.items()}
    # Formats without a fifth axis once kept the patch embedding flat, with a note of its shape.
    kernel = state["patch_embedding.weight"]
    tensors["patch_embedding.weight"] = (F32, kernel.reshape(128, -1))
    note = ("comfy.gguf.orig_shape.patch_embedding.weight", list(kernel.shape))
    return gguf(folder / "w.gguf", tensors, [note]), state


def test_recognised_and_not_loaded(tmp_path):
    path, state = model_file(tmp_path)
    file = open_weights(path)
    found = identify(file)
    assert (found.form, found.kind, found.problem) == ("full", "t2v", None) and len(found.matched) == len(state)
    assert file.container == "gguf" and file.dtype("blocks.0.ffn.0.weight") == "Q8_0"
    assert file.metadata == {"general.architecture": "wan"}
    for name in ("patch_embedding.weight", "blocks.1.modulation"):
        assert torch.equal(file.read(name), state[name])
    with pytest.raises(T3Error, match=r"'blocks\.0\.ffn\.0\.weight' is quantised as Q8_0"):
        file.read("blocks.0.ffn.0.weight")
    with pytest.raises(T3Error, match=r"w\.gguf is a GGUF file.*load it in ComfyUI"):
        load_transformer(path, dtype=torch.float32)
    with pytest.raises(T3Error, match="is quantised as Q8_0"):
        apply_weights(tiny_transformer(), file)


def test_damage(tmp_path):
    path, _ = model_file(tmp_path)
    whole = path.read_bytes()
    for cut in (3, 20, 100, 1000, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(T3Error, match="damaged GGUF|too short"):
            open_weights(path)
    damage = {
        "version 9": whole[:4] + struct.pack("<I", 9) + whole[8:],
        "a count of": whole[:8] + struct.pack("<Q", 10**12) + whole[16:],
        "unknown kind": whole[:24] + text("x") + struct.pack("<I", 77) + whole[64:],
    }
    for message, content in damage.items():
        path.write_bytes(content)
        with pytest.raises(T3Error, match=message):
            open_weights(path)
