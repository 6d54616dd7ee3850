"""Layers of one device made faster: fused kernels, packed weights on the CPU, projections made once.

May import `kernels`, `tracing`, `exchange`, `calls` and `modules`. Begin with `device_layers.py`; `fusion.py`
lists the layers, `ops.py` has the ops.
"""
