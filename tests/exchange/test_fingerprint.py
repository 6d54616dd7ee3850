"""Digests by which ranks see that they hold and are given the same: of values, however they lie in memory."""

import pytest
import torch

from asyncdiff_fast.exchange.fingerprint import Weights, input_digests, model_digest


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_numbers_given_to_a_whole_batch_are_compared(shape):
    """Timesteps come as one number that stands for all."""
    found = [input_digests({"timestep": torch.tensor(t).expand(*shape)}) for t in (900.0, 880.0)]
    assert found[0] != found[1]
    assert found[0] == input_digests({"timestep": torch.full(shape, 900.0)})


def test_weights_that_are_elsewhere_are_not():
    models = [torch.nn.Linear(4, 4) for _ in range(2)]
    for value, model in enumerate(models):
        model.load_state_dict({"weight": torch.ones(4, 4), "bias": torch.zeros(4)})
        model.weight = torch.nn.Parameter(torch.tensor(float(value)).expand(4, 4), requires_grad=False)
    assert model_digest(models[0]) == model_digest(models[1])
    assert Weights(models[0]).digest() is None
