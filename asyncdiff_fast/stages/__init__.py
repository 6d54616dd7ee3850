"""The denoiser's modules shared out between ranks (AsyncDiff): units, who reads whom, their division, what travels.

May import `exchange`, `tracing`, `prediction` and `calls`; no other way of sharing. Begin with `calls.py` for a call's
path and with `plan.py` for how it is planned.
"""
