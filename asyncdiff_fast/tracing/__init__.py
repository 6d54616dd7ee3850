"""One forward of a denoiser as a list of plain events, without leaving a trace in it.

May import `modules` and diffusers, and no wing. Begin with `trace.py`.
"""
