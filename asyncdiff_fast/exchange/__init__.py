"""What ranks tell and send each other: slots over `_C` or torch.distributed, and agreement through the store.

Knows buffers and ranks, never layers or steps. May import `config` and `_C`. Begin with `slots.py`, then `choice.py`.
"""
