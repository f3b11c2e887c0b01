"""A model and a data set as small as can be trained, and configs that train on them."""

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from t3.retrofit.shards import ShardWriter
from t3.weights.load import transformer_class

TINY = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "ffn_dim": 32,
    "num_layers": 2,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 8,
    "freq_dim": 16,
    "patch_size": (1, 2, 2),
    "rope_max_seq_len": 64,
}
# Tiny models of the other kinds, as changes of the above.
KINDS = {
    "t2v": {},
    "i2v": {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 128},
    "flf2v": {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 128, "pos_embed_seq_len": 10},
    "a14b-i2v": {"in_channels": 36},
    "ti2v": {"in_channels": 48, "out_channels": 48},
    "vace": {"num_layers": 4, "vace_layers": [0, 3]},
}
PLAN = '{"t3_plan": 1, "name": "tiny", "grid": [2, 3, 4], "layers": [["each", 1, 1], [1, 2, 2]]}'
SHAPE = (16, 2, 6, 8)


def make_transformer(kind: str = "t2v", seed: int = 3, **changes) -> WanTransformer3DModel:
    """A tiny transformer of a kind, with random weights."""
    torch.manual_seed(seed)
    config = {**TINY, **KINDS[kind], **changes}
    return transformer_class(config)(**config)


def write_model(folder: Path, kind: str = "t2v", **changes) -> Path:
    """A diffusers folder with a tiny transformer and the config of a VAE: what training on latents needs."""
    make_transformer(kind, **changes).save_pretrained(folder / "transformer")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"z_dim": 48}' if kind == "ti2v" else "{}")
    (folder / "model_index.json").write_text("{}")
    if kind.startswith("a14b"):
        make_transformer(kind, seed=4, **changes).save_pretrained(folder / "transformer_2")
        (folder / "model_index.json").write_text('{"boundary_ratio": 0.9}')
    (folder / "plan.json").write_text(PLAN)
    return folder


def write_clips(
    folder: Path, count: int = 6, shape=SHAPE, seed: int = 0, empty: bool = True, given=(), grey: bool = False
) -> Path:
    """A data set of random latents of one shape, with the tensors named in `given` and latents of a grey clip."""
    source = torch.Generator().manual_seed(seed)
    with ShardWriter(folder) as writer:
        if grey:
            writer.grey(torch.randn(shape, generator=source))
        for i in range(count):
            writer.add(
                torch.randn(shape, generator=source),
                torch.randn(3 + i % 2, 8, generator=source),
                given={
                    name: torch.randn((5, 8) if name.endswith("image") else shape, generator=source) for name in given
                },
                caption=f"clip {i}",
                source=f"{seed}-{i}.mp4",
                frames=4 * shape[1] - 3,
                height=8 * shape[2],
                width=8 * shape[3],
                fps=16,
            )
        if empty:
            writer.empty_text(torch.zeros(1, 8))
    return folder


def config_text(base: Path, run: str = "run", *, sets=("clips",), **tables) -> str:
    """TOML for a few steps of the tiny model in `base`; each keyword is a table whose keys are added or replaced."""
    content = {
        "model": {"source": str(base / "model"), "plan": str(base / "model" / "plan.json"), "text_tokens": 6},
        "train": {"batch": 2, "precision": "fp32", "device": "cpu", "ema": 0.9, "seed": 5},
        "schedule": {"steps": 4, "lr": 1e-3},
        "output": {
            "folder": str(base / run),
            "checkpoint_every": 2,
            "log_every": 2,
            "tensorboard": False,
            "png": False,
        },
        "data": {"caption_dropout": 0.3},
    }
    for name, keys in tables.items():
        if name != "stages":
            content.setdefault(name, {}).update(keys)
    lines = []
    for name, keys in content.items():
        lines += [f"[{name}]", *(f"{key} = {_value(value)}" for key, value in keys.items())]
    for name in sets:
        lines += ["[[data.sets]]", f'name = "{name}"', f'folder = "{base / name}"']
    for stage in tables.get("stages", ()):
        lines += ["[[stages]]", *(f"{key} = {_value(value)}" for key, value in stage.items())]
    return "\n".join(lines) + "\n"


def _value(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value)


def write_config(base: Path, name: str = "config", **arguments) -> str:
    """`config_text` as a file; its path, for the command line."""
    path = base / f"{name}.toml"
    path.write_text(config_text(base, **arguments))
    return str(path)
