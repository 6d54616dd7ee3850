"""A denoiser of no library and its sampling loop, without a pipeline."""

import torch

DOWN = [900, 700, 500, 300, 100, 50]


class Bare(torch.nn.Module):
    """A denoiser of no library, for sampling loops without a pipeline; its timestep may be anything like a number."""

    def __init__(self, num_blocks=6, width=8):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = torch.nn.Conv2d(4, width, 3, padding=1)
            self.time = torch.nn.Linear(1, width)
            self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(num_blocks))
            self.last = torch.nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x, t, text=None):
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
        time = self.time(torch.sin(t / 100))[:, :, None, None]
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x + time))
        x = x if text is None else x + 0.1 * text.mean()
        return self.last(x)


class Detour(Bare):
    """Has a module that its forward does not call."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Linear(2, 2)


def noise(seed=0, size=8):
    """A latent."""
    return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def loop(model, times=DOWN, seed=0, size=8, calls=1, stop=None):
    """The last latent of a loop that calls the model `calls` times a step; `stop(step)` is called before each step."""
    x = noise(seed, size)
    for step, t in enumerate(times() if callable(times) else times):
        if stop is not None:
            stop(step)
        for call in range(calls):
            x = x - 0.1 * model(x, t, *([torch.ones(call)] if call else []))
    return x
