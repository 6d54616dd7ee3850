"""Calls of a denoiser in time: which generation, step and call within a step this one is, and what a rank does in it.

May import `modules`, `mesh`, `config` and `versions` of the package, and diffusers' schedulers. Begin with `clock.py`.
"""
