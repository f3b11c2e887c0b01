"""The study: ways of tuning the small dense model to T3, compared at equal GPU seconds.

`python -m tools.small_model.study` has the commands; `study.toml` has every number and every row.
"""
