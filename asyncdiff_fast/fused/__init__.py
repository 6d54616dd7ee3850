"""Layers of one device made faster: forwards that call fused kernels, or packed weights on the CPU.

May import `kernels`, `tracing`, `exchange`, `calls` and `modules`. Begin with `fusion.py`, which lists the layers;
`ops.py` has the ops.
"""
