"""T3 weights and adapters in a model of every kind: the sums by hand, those of the engine, the base's bits."""

import pytest
import torch
from weights_fixtures import one_thread, save  # noqa: F401
from weights_kinds import (
    DIALECTS,
    FORMS,
    FULL_PREFIXES,
    HEADLESS,
    KINDS,
    STRENGTHS,
    adapter,
    by_hand,
    close,
    full_tensors,
    kind_names,
    kind_state,
    same_bits,
)

from t3.weights import apply_weights, identify, load_transformer, open_weights
from t3.weights.merge import MergedFile

FULL_DIALECTS = [*FULL_PREFIXES, "diffusers"]


def merged(base, *files):
    """What `base` becomes: a file of weights, and canonical name -> tensor."""
    file = open_weights(base)
    found = identify(file)
    out = MergedFile(file, found, [(open_weights(path), strength) for path, strength in files])
    return out, {name: out.read_raw(key) for name, key in found.names.items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A function that gives the file of a kind's model in a dialect, written once."""
    folder = tmp_path_factory.mktemp("bases")

    def get(kind, dialect):
        path = folder / f"{kind} {dialect}.safetensors"
        return path if path.exists() else save(path, full_tensors(kind, dialect, kind_state(kind)))

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_adapters(tmp_path, bases, kind, form):
    """Every kind, form and dialect, the strengths in turn, on bases of every dialect."""
    state = kind_state(kind)
    for i, dialect in enumerate(DIALECTS):
        base = bases(kind, FULL_DIALECTS[(i + len(form)) % len(FULL_DIALECTS)])
        tensors, deltas = adapter(kind, form, dialect)
        strength = STRENGTHS[(i + len(form)) % len(STRENGTHS)]
        file, have = merged(base, (save(tmp_path / f"{dialect}.safetensors", tensors), strength))
        assert file.changed == (set(deltas) if strength else set()) and list(file) == list(open_weights(base))
        want = by_hand(state, deltas, strength)
        for name, tensor in state.items():
            close(have[name], want[name])
            assert name in file.changed or torch.equal(have[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_checkpoints(tmp_path, bases, kind):
    """Between base and checkpoint as far as the strength says; at 1 the checkpoint itself, at 0 the base."""
    state = kind_state(kind)
    tuned = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}
    base = bases(kind, "original")
    for dialect, strength in zip(FULL_DIALECTS, (*STRENGTHS, 0.25), strict=True):
        path = save(tmp_path / "tuned.safetensors", full_tensors(kind, dialect, tuned))
        _, have = merged(base, (path, strength))
        if strength in (0, 1):
            assert same_bits(have, tuned if strength else state)
        for name, tensor in state.items():
            close(have[name], tensor.double() + strength * (tuned[name].double() - tensor.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HEADLESS)
def test_equal_to_the_engine(tmp_path, kind, dtype):
    """Bit for bit what the loader makes of the same files, where it keeps a parameter in the file's format."""
    base = save(tmp_path / "base.safetensors", {name: t.to(dtype) for name, t in kind_state(kind).items()})
    model = load_transformer(base, dtype=dtype)
    files = []
    for i, (form, strength) in enumerate((("mixed", 1.0), ("dora", -0.5), ("lokr factored", 1.5))):
        tensors, _ = adapter(kind, form, "comfyui", seed=10 + 500 * i)
        files.append((save(tmp_path / f"{i}.safetensors", tensors), strength))
        apply_weights(model, open_weights(files[-1][0]), strength)
    _, have = merged(base, *files)
    want = {name: model.get_parameter(theirs) for name, theirs in kind_names(kind).items()}
    compared = [name for name in want if want[name].dtype == dtype]
    assert "blocks.0.self_attn.q.weight" in compared
    assert all(torch.equal(have[name], want[name]) for name in compared)


class Bare(torch.nn.Module):
    """Parameters under the names that a library's transformer gives them, and a config: what weights are applied to."""

    def __init__(self, tensors, config):
        super().__init__()
        self.config = config
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            place = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, torch.nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, torch.nn.Parameter(tensor.clone()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HEADLESS])
def test_the_engines_function_on_models_it_cannot_run(tmp_path, bases, kind, form):
    """The library has no class for Fun-Control and Camera; what puts weights on its models does so on theirs."""
    state = kind_state(kind)
    base = bases(kind, "original")
    model = Bare(full_tensors(kind, "diffusers", state), identify(open_weights(base)).config)
    for i, dialect in enumerate(DIALECTS):
        tensors, deltas = adapter(kind, form, dialect)
        strength = STRENGTHS[(i + len(form)) % len(STRENGTHS)]
        path = save(tmp_path / "a.safetensors", tensors)
        before = {name: model.get_parameter(theirs).detach().clone() for name, theirs in kind_names(kind).items()}
        apply_weights(model, open_weights(path), strength)
        want = by_hand(before, deltas, strength)
        for name, theirs in kind_names(kind).items():
            close(model.get_parameter(theirs).detach(), want[name])
