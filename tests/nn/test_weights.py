from __future__ import annotations

import pytest
import torch
from torch import nn

from polypatch.errors import PolypatchError
from polypatch.nn import load_exactly


def test_every_difference_is_named_six_at_most():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)])
    with pytest.raises(PolypatchError) as caught:
        load_exactly(model, {"0.weight": torch.zeros(3, 2), "x": torch.zeros(1)}, what="a stack")
    said = str(caught.value)
    assert "don't fit a stack" in said
    assert "missing keys 0.bias, 1.bias, 1.weight, 2.bias, 2.weight, 3.bias, …" in said
    assert "unexpected keys x" in said
    assert "0.weight: (3, 2) for (2, 2)" in said


def test_what_fits_is_loaded():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    load_exactly(model, other.state_dict(), what="a layer")
    assert torch.equal(model.weight, other.weight)
