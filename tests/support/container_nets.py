"""Networks that take and give tensors in containers of all kinds, and some that put something into what they are given.

Each is called as `CALLS[name](net, x, t)`: x (2, 4, 12, 8), t a number; it gives a tensor like x.
"""

import dataclasses

import batch_nets
import torch
from torch.utils import _pytree


class Net(batch_nets.Net):
    """One layer more, so that there are stages."""

    def __init__(self):
        super().__init__()
        self.outer = batch_nets.Net().inner

    def mix(self, x, added):
        return self.outer(super().mix(x, added))


@dataclasses.dataclass(frozen=True)
class Condition:
    picture: torch.Tensor
    scale: float = 1.0


@dataclasses.dataclass
class Output:
    sample: torch.Tensor
    inner: Condition
    # Not an argument of its `__init__`.
    note: str = dataclasses.field(init=False, default="none")


class Registered:
    """Known to torch as a tree, though without keys, nor a name under which it could be stored."""

    def __init__(self, picture):
        self.picture = picture


_pytree.register_pytree_node(Registered, lambda x: ([x.picture], None), lambda values, _: Registered(*values))


class Store:
    """No container: what is in it is not seen."""

    def __init__(self):
        self.kept = 0.0


class Dataclasses(Net):
    def forward(self, x, t, conditions):
        result = self.mix(x, conditions[0].picture * conditions[0].scale)
        return Output(result, Condition(result * t))


class Iterates(Net):
    def forward(self, x, t, residuals):
        return self.mix(x, next(residuals) + sum(residuals))


class TakesRegistered(Net):
    def forward(self, x, t, condition):
        return self.mix(x, condition.picture)


class Complex(Net):
    def forward(self, x, t):
        return torch.complex(self.mix(x, 0), x * t / 1000)


class HiddenComplex(Net):
    """Rows are mixed in the imaginary part only, out of sight."""

    def forward(self, x, t):
        mean = torch.from_numpy(x.numpy().mean(2, keepdims=True))
        return torch.complex(self.mix(x, 0), x * mean)


class Puts(Net):
    """What it makes goes into a dict, from which it comes at the next call."""

    def forward(self, x, t, store):
        result = self.mix(x, store.get("kept", 0.0))
        store["kept"] = torch.tanh(self.inner(x))
        return result


class Keeps(Net):
    """As `Puts`, in an object."""

    def forward(self, x, t, store):
        result = self.mix(x, store.kept)
        store.kept = torch.tanh(self.inner(x))
        return result


class Remembers(Net):
    """What it made at the last call of a generation is an attribute."""

    kept = 0.0

    def forward(self, x, t):
        result = self.mix(x, self.kept if t < 900 else 0.0)
        self.kept = torch.tanh(self.inner(x))
        return result


class KnowsItsTimes(Net):
    """Takes what it adds out of a table of the sampler's timesteps."""

    def forward(self, x, t):
        return self.mix(x, {950.0: 0.1, 700.0: 0.2, 400.0: 0.3, 100.0: 0.4}[t])


def _random(x, seed):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def _kept(make):
    """A call that gives the network, in each generation, one store of its own."""

    def call(net, x, t):
        if t > 900:
            vars(net)["store"] = make()
        return net(x, t, net.store)

    return call


CALLS = {
    Dataclasses: lambda net, x, t: net(x, t, [Condition(_random(x, 1), t / 500)]).sample,
    Iterates: lambda net, x, t: net(x, t, (_random(x, i) * t / 1000 for i in range(3))),
    TakesRegistered: lambda net, x, t: net(x, t, condition=Registered(_random(x, 1))),
    Complex: lambda net, x, t: torch.view_as_real(net(x, t)).sum(-1),
    HiddenComplex: lambda net, x, t: torch.view_as_real(net(x, t)).sum(-1),
    Puts: _kept(dict),
    Keeps: _kept(Store),
    Remembers: lambda net, x, t: net(x, t),
    KnowsItsTimes: lambda net, x, t: net(x, t),
}  # fmt: skip


@torch.no_grad()
def generation(net, seed=0):
    """Results of four steps."""
    x, found = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(seed)), []
    for t in (950.0, 700.0, 400.0, 100.0):
        found.append(CALLS[type(net)](net, x, t))
        x = x - 0.2 * found[-1]
    return torch.stack(found)
