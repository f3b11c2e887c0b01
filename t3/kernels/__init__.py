"""Kernels: in each folder `naive.py`, the readable truth, beside the fast version that must agree with it."""
