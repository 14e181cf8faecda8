"""A resumed run of adapters is told from one whose adapters were not loaded: by B."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from drift_merge.training.lora.layers import Adapted, Adapter, Factor, at_beginning


def adapted(**values):
    factors = tuple(Factor(role, role, nn.Parameter(value)) for role, value in values.items())
    return Adapted("w", (3, 2), False, (Adapter(SimpleNamespace(), "default", factors),))


@pytest.mark.parametrize(
    ("b", "expected"),
    [(torch.zeros(3, 1), True), (torch.tensor([[0.0], [1e-30], [0.0]]), False)],
)
def test_b_tells_whether_anything_was_trained(b, expected):
    untouched = adapted(a=torch.ones(1, 2), b=torch.zeros(3, 1))
    assert at_beginning([untouched, adapted(a=torch.ones(1, 2), b=b)]) is expected


def test_a_factor_that_another_process_holds_proves_nothing():
    assert not at_beginning([adapted(b=torch.zeros(0))])
