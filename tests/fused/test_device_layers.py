"""What one device makes faster goes when the rest cannot be set up."""

import pytest
from torch import nn

import asyncdiff_fast
from asyncdiff_fast import runtime


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(1024, 1024)

    def forward(self, sample, timestep):
        return self.wide(sample)


def test_nothing_stays_replaced_where_the_exchanges_cannot_be_opened(monkeypatch):
    def refuse(*_):
        assert "forward" in vars(net.wide)
        raise RuntimeError("no exchange")

    net = Net()
    monkeypatch.setattr(runtime, "Parts", refuse)
    with pytest.raises(RuntimeError, match="no exchange"):
        asyncdiff_fast.patch(net)
    assert "forward" not in vars(net.wide)
