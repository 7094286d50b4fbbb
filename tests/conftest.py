"""Nothing global may change: every test is checked to leave torch's state as it found it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_global_changes():
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    yield
    assert torch.get_default_dtype() is dtype
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled() is grad
