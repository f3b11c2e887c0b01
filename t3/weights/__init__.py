"""Weights in every dialect: open, recognise, load, apply. Importing this package imports no torch."""

from .adapters import ApplyReport, apply_weights
from .catalogue import known_config
from .files import WeightFile, open_weights
from .identity import Identity
from .load import load_text_encoder, load_transformer, load_vae
from .metadata import T3Metadata, read_metadata
from .models import identify

__all__ = [
    "ApplyReport",
    "Identity",
    "T3Metadata",
    "WeightFile",
    "apply_weights",
    "identify",
    "known_config",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "open_weights",
    "read_metadata",
]
