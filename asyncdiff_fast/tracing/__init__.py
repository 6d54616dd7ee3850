"""One forward of a denoiser as a list of plain events, without leaving a trace in it.

May import `calls`, `modules` and diffusers. Begin with `trace.py`.
"""
