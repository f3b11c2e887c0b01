"""Models named by hub id, with a cache that an interrupted download left half filled."""

from types import SimpleNamespace

import pytest

from t3 import jobs, sources
from t3.errors import T3Error
from t3.sources import find_sources

KNOWN, UNKNOWN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "someone/a-fine-tune"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The cache's folder, which holds the index and nothing else."""
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(sources, "_cached", lambda hub_id: tmp_path)
    return tmp_path


def test_a_download_that_was_interrupted_is_taken_up_again(cached):
    found = find_sources(model=KNOWN)
    assert found.folder is None and found.hub_id == KNOWN
    assert found.transformer["num_layers"] == 30


def test_of_an_unknown_model_it_is_said_how(cached):
    with pytest.raises(T3Error, match=f"If its download was interrupted: hf download {UNKNOWN}"):
        find_sources(model=UNKNOWN)


def test_the_run_that_downloaded_a_model_has_its_weights_marks(tiny_model, monkeypatch):
    """Or the same command again takes the latents that wait for their decode for those of other weights."""
    monkeypatch.setattr(sources, "_cached", lambda hub_id: None)
    first = find_sources(model=KNOWN)
    assert first.folder is None
    monkeypatch.setattr(sources, "_cached", lambda hub_id: tiny_model)  # once it is loaded
    again = find_sources(model=KNOWN)
    assert again.folder == tiny_model and again.fingerprint()
    assert first.fingerprint() == again.fingerprint()
    assert f'--vae "{tiny_model / "vae"}"' in jobs._how_to_decode(SimpleNamespace(sources=first), "a.latent")
