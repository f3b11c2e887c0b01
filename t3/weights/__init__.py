"""Weights in every dialect: open, recognise, load, apply. Importing this package imports no torch."""

from .adapters import ApplyReport, apply_weights
from .catalogue import known_config
from .files import WeightFile, open_weights
from .load import load_text_encoder, load_transformer, load_vae
from .models import Identity, identify

__all__ = [
    "ApplyReport",
    "Identity",
    "WeightFile",
    "apply_weights",
    "identify",
    "known_config",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "open_weights",
]
