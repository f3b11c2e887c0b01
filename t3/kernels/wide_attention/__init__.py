"""Attention with one head wider than libraries take."""
