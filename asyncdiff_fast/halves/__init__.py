"""Classifier-free guidance on two ranks: halves of a batch, or of the two calls between two steps.

May import `shared` and what lies beneath it. Begin with `calls.py`; `cuts` is pure but for tensors, `trials` runs a
denoiser to see which arguments have a row for each picture.
"""
