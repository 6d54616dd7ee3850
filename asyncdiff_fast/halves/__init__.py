"""Classifier-free guidance on two ranks: halves of a batch, or of the two calls between two steps.

May import `shared` and what lies beneath it. Begin with `calls.py`; `trials` runs a denoiser to see which arguments
have a row for each picture; `cuts` and `joins` say where those are cut and how results are put together.
"""
