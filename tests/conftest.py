"""Nothing global may change: every test is checked to leave torch's state as it found it.

What files and tests draw without a seed of their own does not depend on what ran before them.
"""

from __future__ import annotations

import random

import pytest
import torch


def seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


def pytest_collectstart(collector: pytest.Collector) -> None:
    seeded()  # models in parameters of tests are made when their file is read


@pytest.fixture(autouse=True)
def nothing_global_changes():
    seeded()
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    yield
    assert torch.get_default_dtype() is dtype
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled() is grad
