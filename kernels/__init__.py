"""Triton kernels, each with a plain PyTorch reference. Import full names: `asyncdiff_fast.kernels.group_norm`."""
