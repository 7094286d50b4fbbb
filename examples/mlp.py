"""A problem for the command line: `dropscope spectrum examples/mlp.py`, `noise`, `relation`.

Any Python file that defines `problem()` will do. This one trains a small network with dropout for a few seconds.
"""

import torch
from torch import nn

import dropscope as ds


def problem() -> ds.Problem:
    """A network with dropout on points around four centres, trained for 300 steps."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    points = 2.0 * nn.functional.one_hot(labels, 8).float() + torch.randn(400, 8)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4)
    )
    loss = nn.CrossEntropyLoss()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        loss(model(points), labels).backward()
        optimiser.step()
    return ds.Problem(model, loss, (points, labels))
