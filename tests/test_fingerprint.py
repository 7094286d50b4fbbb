"""Every kind of change to a model is noticed, and nothing else."""

import pytest
import torch
from torch import nn

from dropscope.operators.fingerprint import Fingerprint


def model():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 300), nn.Linear(300, 400))


CHANGES = {
    "in place": lambda m: m[0].weight.detach().add_(1.0),
    "through data": lambda m: m[0].weight.data.add_(1.0),
    "of odd size, through data": lambda m: m[0].bias.data[-1].mul_(2.0),
    "of a long tensor": lambda m: m[3].weight.data[0, 0].mul_(2.0),
    "by numpy": lambda m: m[2].weight.detach().numpy().__setitem__((0, 0), 7.0),
    "other data": lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone()),
    "a buffer": lambda m: m[1].running_var.data.mul_(2.0),
    "a count": lambda m: m[1].num_batches_tracked.data.add_(1),
    "another parameter": lambda m: setattr(m[0], "bias", None),
    "another module": lambda m: m.__setitem__(0, nn.Linear(3, 5)),
    "a module more": lambda m: m.append(nn.ReLU()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change):
    m = model()
    seen = Fingerprint(m)
    assert not seen.outdated()
    CHANGES[change](m)
    assert seen.outdated()
    assert not Fingerprint(m).outdated()


def test_use_is_no_change():
    m = model().eval()
    seen = Fingerprint(m)
    m(torch.randn(4, 3)).sum().backward()
    m.train().eval()
    assert not seen.outdated()


def test_not_a_number_is_equal_to_itself():
    m = model()
    m[0].weight.data[0, 0] = torch.nan
    assert not Fingerprint(m).outdated()
