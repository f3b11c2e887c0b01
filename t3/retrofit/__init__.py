"""Tune a Wan model to T3 attention, or train one: `python -m t3.retrofit`. Importing this package imports no torch."""
