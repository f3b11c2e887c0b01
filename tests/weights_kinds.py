"""Small random weights of every model kind, and adapter files of every form and dialect with their arithmetic by hand.

Names and shapes are written out from the published models (`wan/modules`, VideoX-Fun, ComfyUI), diffusers names come
from diffusers' own converter; the arithmetic is numpy in float64. Nothing here uses the code under test.
"""

import functools

import numpy as np
import torch
from weights_fixtures import TINY, TINY_FLF2V, TINY_I2V, diffusers_names, original_state, tiny_transformer

WIDTH, RANK = 128, 4
PLAIN = {
    "t2v": TINY,
    "i2v": TINY_I2V,
    "flf2v": TINY_FLF2V,
    "ti2v": {**TINY, "in_channels": 48, "out_channels": 48},
}
RELATIVES = {
    "vace": TINY,
    "fun-control": {**TINY_I2V, "in_channels": 48},
    "fun-camera": {**TINY_I2V, "in_channels": 32},
}
KINDS = {**PLAIN, **RELATIVES}
STRENGTHS = (0.0, 1.0, -0.5, 1.5)
HEADLESS = [*PLAIN, "vace"]  # kinds that diffusers has a class for
# Modules that adapters of each kind change, beside those that every kind has.
OWN_MODULES = {
    "i2v": ["blocks.0.cross_attn.k_img", "img_emb.proj.1"],
    "flf2v": ["blocks.1.cross_attn.v_img"],
    "vace": ["vace_blocks.0.before_proj", "vace_blocks.1.after_proj", "vace_blocks.1.self_attn.q"],
    "fun-control": ["ref_conv"],
    "fun-camera": ["control_adapter.conv", "control_adapter.residual_blocks.0.conv1"],
}
MODULES = ["blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.0.ffn.2", "patch_embedding"]


def noise(*shape, seed, scale=0.3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def _own_shapes(kind, base):
    """Original name -> shape of what a kind adds to a plain model."""
    w, shapes = WIDTH, {}
    if kind == "vace":
        shapes["vace_patch_embedding.weight"] = (w, 96, 1, 2, 2)
        for i in range(2):
            block = {name: t.shape for name, t in base.items() if name.startswith("blocks.0.")}
            shapes |= {name.replace("blocks.0.", f"vace_blocks.{i}."): tuple(shape) for name, shape in block.items()}
            shapes[f"vace_blocks.{i}.after_proj.weight"] = (w, w)
        shapes["vace_blocks.0.before_proj.weight"] = (w, w)
    elif kind == "fun-control":
        shapes["ref_conv.weight"] = (w, 16, 2, 2)
    elif kind == "fun-camera":
        shapes["control_adapter.conv.weight"] = (w, 24 * 64, 2, 2)
        for conv in ("conv1", "conv2"):
            shapes[f"control_adapter.residual_blocks.0.{conv}.weight"] = (w, w, 3, 3)
    for name in [name for name in shapes if name.endswith(".weight") and len(shapes[name]) > 1]:
        shapes[name.removesuffix("weight") + "bias"] = (w,)
    if kind == "vace":
        shapes |= {f"vace_blocks.{i}.ffn.0.bias": (TINY["ffn_dim"],) for i in range(2)}
    return shapes


@functools.cache
def _state(kind):
    base = original_state(tiny_transformer(KINDS[kind]), KINDS[kind])
    own = _own_shapes(kind, base)
    return base | {name: noise(*shape, seed=700 + i, scale=0.05) for i, (name, shape) in enumerate(own.items())}


def kind_state(kind):
    """Original name -> random tensor of a whole model."""
    return dict(_state(kind))


@functools.cache
def kind_names(kind):
    """Original name -> diffusers name; parts that diffusers has no class for keep theirs."""
    return diffusers_names(list(_state(kind)))


def loaded_state(kind, model):
    """Original name -> tensor of a library's model of a kind."""
    state = model.state_dict()
    return {name: state[theirs].clone() for name, theirs in kind_names(kind).items()}


def modules_of(kind):
    return MODULES + OWN_MODULES.get(kind, [])


def dotted(prefix):
    return lambda kind: lambda module: prefix + module


def _theirs(kind):
    names = kind_names(kind)
    return lambda module: names[module] if module in names else names[f"{module}.weight"].removesuffix(".weight")


def _with_diffusers_names(prefix):
    return lambda kind: lambda module: prefix + _theirs(kind)(module)


# How each dialect writes a module or a bare parameter; and a whole model, where it has them.
DIALECTS = {
    "original": dotted(""),
    "comfyui": dotted("diffusion_model."),
    "diffusers": _with_diffusers_names("transformer."),
    "peft": dotted("base_model.model."),
    "diffsynth": dotted("pipe.dit."),
    "kohya": lambda kind: lambda module: "lora_unet_" + module.replace(".", "_"),
}
FULL_PREFIXES = {
    "original": "",
    "comfyui": "model.diffusion_model.",
    "comfyui short": "diffusion_model.",
    "diffsynth": "pipe.dit.",
}


def full_tensors(kind, dialect, state):
    """A whole model's tensors as a dialect writes them."""
    if dialect == "diffusers":
        return {kind_names(kind)[name]: tensor for name, tensor in state.items()}
    return {FULL_PREFIXES[dialect] + name: tensor for name, tensor in state.items()}


def _f64(tensor):
    return tensor.double().numpy()


def _lora(shape, seed, alpha, names):
    down, up = noise(RANK, *shape[1:], seed=seed), noise(shape[0], RANK, seed=seed + 1)
    tensors = {names[0]: down, names[1]: up}
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    scale = 1 if alpha is None else alpha / RANK
    return tensors, lambda base: scale * (_f64(up) @ _f64(down.flatten(1))).reshape(shape)


def _dora(shape, seed):
    tensors, plain = _lora(shape, seed, 3.0, ("lora_down.weight", "lora_up.weight"))
    lengths = noise(shape[0], seed=seed + 2).abs() + 0.5
    tensors["dora_scale"] = lengths.reshape(shape[0], *[1] * (len(shape) - 1))

    def delta(base):
        merged = (base + plain(base)).reshape(shape[0], -1)
        rows = merged / np.linalg.norm(merged, axis=1, keepdims=True) * _f64(lengths)[:, None]
        return rows.reshape(shape) - base

    return tensors, delta


def _loha(shape, seed):
    columns = int(np.prod(shape[1:]))
    sizes = {"w1_a": (shape[0], RANK), "w1_b": (RANK, columns), "w2_a": (shape[0], RANK), "w2_b": (RANK, columns)}
    p = {role: noise(*size, seed=seed + i) for i, (role, size) in enumerate(sizes.items())}
    tensors = {f"hada_{role}": tensor for role, tensor in p.items()} | {"alpha": torch.tensor(2.0)}
    n = {role: _f64(tensor) for role, tensor in p.items()}
    return tensors, lambda base: 2 / RANK * ((n["w1_a"] @ n["w1_b"]) * (n["w2_a"] @ n["w2_b"])).reshape(shape)


def _lokr(shape, seed, factored):
    columns = int(np.prod(shape[1:]))
    first, second = noise(4, 2, seed=seed), noise(shape[0] // 4, columns // 2, seed=seed + 1)
    tensors = {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(7.0)}  # alpha means nothing without a rank
    scale = 1.0
    if factored:
        a, b = noise(shape[0] // 4, RANK, seed=seed + 2), noise(RANK, columns // 2, seed=seed + 3)
        tensors = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}
        second, scale = a.double() @ b.double(), 3 / RANK
    return tensors, lambda base: scale * np.kron(_f64(first), _f64(second)).reshape(shape)


def _plain(shape, seed, ending):
    tensor = noise(*shape, seed=seed)
    return {ending: tensor}, lambda base: _f64(tensor) - (base if ending == "set_weight" else 0)


PRODUCTS = {
    "lora": lambda shape, seed: _lora(shape, seed, None, ("lora_A.weight", "lora_B.weight")),
    "lora default": lambda shape, seed: _lora(shape, seed, None, ("lora_A.default.weight", "lora_B.default.weight")),
    "lora alpha": lambda shape, seed: _lora(shape, seed, 3.0, ("lora_down.weight", "lora_up.weight")),
    "dora": _dora,
    "loha": _loha,
    "lokr": lambda shape, seed: _lokr(shape, seed, False),
    "lokr factored": lambda shape, seed: _lokr(shape, seed, True),
    "set": lambda shape, seed: _plain(shape, seed, "set_weight"),
    "diff": lambda shape, seed: _plain(shape, seed, "diff"),
}
FORMS = [*PRODUCTS, "mixed"]


def adapter(kind, form, dialect, seed=10, state=None):
    """`(tensors, deltas)` of an adapter file; a delta takes the base in float64 and gives what strength 1 adds.

    `state`: the model it is for, where that has other sizes than `kind_state`.
    """
    state, spell = kind_state(kind) if state is None else state, DIALECTS[dialect](kind)
    tensors, deltas = {}, {}
    for i, module in enumerate(modules_of(kind)):
        shape = tuple(state[f"{module}.weight"].shape)
        made, delta = PRODUCTS["lora alpha" if form == "mixed" else form](shape, seed + 10 * i)
        tensors |= {f"{spell(module)}.{ending}": tensor for ending, tensor in made.items()}
        deltas[f"{module}.weight"] = delta
    if form in ("diff", "mixed"):
        bare = ["blocks.0.modulation", "head.modulation", *(["img_emb.emb_pos"] if kind == "flf2v" else [])]
        places = [(name, "diff", name) for name in bare]
        places += [("blocks.1.norm3", "diff_b", "blocks.1.norm3.bias"), ("head.head", "diff_b", "head.head.bias")]
        places += [("blocks.0.self_attn.norm_q", "diff", "blocks.0.self_attn.norm_q.weight")]
        for i, (module, ending, target) in enumerate(places):
            made, deltas[target] = _plain(tuple(state[target].shape), seed + 300 + i, ending)
            tensors[f"{spell(module)}.{ending}"] = made[ending]
    return tensors, deltas


def by_hand(state, deltas, strength):
    """Original name -> float64 result of applying an adapter to a model."""
    out = {}
    for name, tensor in state.items():
        base = _f64(tensor)
        out[name] = torch.from_numpy(base + strength * deltas[name](base) if name in deltas else base)
    return out


def close(have, want):
    """Equal to float32 rounding of a few sums, for numbers of about 1."""
    torch.testing.assert_close(have.double(), want, rtol=2e-6, atol=2e-6)


def same_bits(have, want):
    """The same names, and the same tensors under them."""
    return have.keys() == want.keys() and all(torch.equal(have[name], want[name]) for name in want)
