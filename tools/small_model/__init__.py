"""A video model small enough to train from nothing on one GPU, and the world of clips it is trained on.

Stages are run one at a time as `python -m tools.small_model.STAGE`; the README in this folder lists them in order.
"""
