"""Small models and files in many layouts, for the tests of t3.weights.

Names come from the published models and from diffusers' own converter, never from the tables under test.
"""

import copy
import functools
import json
import struct

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file

LAYERS = 2
TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 320,
    "num_layers": LAYERS,
    "rope_max_seq_len": 1024,
}
TWO_HEADS = {**TINY, "num_attention_heads": 2}
TINY_I2V = {**TINY, "in_channels": 36, "image_dim": 40, "added_kv_proj_dim": 128}
TINY_FLF2V = {**TINY_I2V, "pos_embed_seq_len": 6}
BLOCK = [
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0",
    "ffn.2",
]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are slower on many threads. Imported by every test file of t3.weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def original_names(layers=LAYERS, image=False, positions=False):
    """Every parameter name of the published WanModel, written out by hand."""
    names = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    names += ["time_projection.1", "head.head"]
    block = [*BLOCK, "norm3"]
    norms = [f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in ("norm_q", "norm_k")]
    if image:
        names += ["img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3", "img_emb.proj.4"]
        block += ["cross_attn.k_img", "cross_attn.v_img"]
        norms += ["cross_attn.norm_k_img"]
    full = [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")] + ["head.modulation"]
    full += ["img_emb.emb_pos"] if positions else []
    for i in range(layers):
        full += [f"blocks.{i}.{name}.{leaf}" for name in block for leaf in ("weight", "bias")]
        full += [f"blocks.{i}.{name}.weight" for name in norms] + [f"blocks.{i}.modulation"]
    return full


def diffusers_names(originals):
    """Original name -> diffusers name, by diffusers' own converter (which misses emb_pos)."""
    numbered = {name: torch.tensor(i) for i, name in enumerate(originals)}
    converted = convert_wan_transformer_to_diffusers(dict(numbered))
    by_number = {int(value): name for name, value in converted.items()}
    out = {name: by_number[i] for i, name in enumerate(originals)}
    if "img_emb.emb_pos" in out:
        out["img_emb.emb_pos"] = "condition_embedder.image_embedder.pos_embed"
    return out


def names_for(config):
    """Original name -> diffusers name for a config above."""
    return _names(config["num_layers"], "image_dim" in config, config.get("pos_embed_seq_len") is not None)


@functools.cache
def _names(layers, image, positions):
    return diffusers_names(original_names(layers, image, positions))


def randomise(model, seed=0, scale=0.05):
    """Fill every parameter with seeded noise (norm scales around one), so that no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + 1 if "norm" in name and name.endswith(("weight", "gamma")) else noise)
    return model.eval()


@functools.cache
def _tiny_model(key, seed):
    return randomise(WanTransformer3DModel(**json.loads(key)), seed)


def tiny_transformer(config=None, seed=0, dtype=torch.float32):
    """A random two-layer Wan transformer; equal arguments give equal weights."""
    model = copy.deepcopy(_tiny_model(json.dumps(config or TINY), seed))
    return model if dtype == torch.float32 else model.to(dtype)


def original_state(model, config=None):
    """A diffusers transformer's weights under original names."""
    state = model.state_dict()
    return {name: state[theirs].clone() for name, theirs in names_for(config or TINY).items()}


def inputs(config, seed=3):
    """Keyword arguments for one small forward pass."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    out = {
        "hidden_states": noise(1, config["in_channels"], 2, 4, 6),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, 512, config["text_dim"]),
    }
    if config.get("pos_embed_seq_len"):
        out["encoder_hidden_states_image"] = noise(2, config["pos_embed_seq_len"] // 2, config["image_dim"])
    elif config.get("image_dim"):
        out["encoder_hidden_states_image"] = noise(1, 5, config["image_dim"])
    return out


def save(path, tensors, metadata=None):
    """Write a safetensors file of contiguous copies; returns the path."""
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def write_header(path, shapes, dtype="BF16", metadata=None):
    """A safetensors file with a real header and a hole where its data would be: any size, no disk."""
    size = {"BF16": 2, "F32": 4}[dtype]
    entries, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape in shapes.items():
        end = at + size * int(torch.Size(shape).numel())
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(entries).encode()
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + at)
    return path


def raw_file(path, header, data=b""):
    """A file with exactly this header text and data."""
    raw = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path
