"""Triton kernels: a file per operator, functions named as the torch operators that they serve."""
