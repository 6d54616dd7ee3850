"""Steps side by side: N ranks evaluate N successive steps at predicted latents, then replay the sampler.

May import `exchange`, `calls` and `config`; no other way of sharing, and nothing inside the denoiser. Begin with
`calls.py` for a generation's path and `sampling.py` for its steps, then with `lengths.py` for how far ahead ranks go.
`fixed_point.py` is another way, for sampling loops of users: a window of steps, evaluated again and again until it
solves the sampler's equations.
"""
