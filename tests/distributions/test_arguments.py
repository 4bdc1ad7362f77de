"""Parameters become tensors, shapes broadcast as in numpy, and what does neither is named."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_sparse.distributions.arguments import as_numbers, common_shape

SHAPES = st.lists(st.integers(1, 3), max_size=3).map(torch.Size)


@given(SHAPES, SHAPES, SHAPES)
def test_shapes_broadcast_as_in_numpy_or_are_all_named(slab, probs, scale):
    try:
        expected = np.broadcast_shapes(slab, probs, scale)
    except ValueError:
        with pytest.raises(ValueError, match="shapes that broadcast") as caught:
            common_shape(slab=slab, probs=probs, scale=scale)
        for name, shape in {"slab": slab, "probs": probs, "scale": scale}.items():
            assert f"{name} of {tuple(shape)}" in str(caught.value)
    else:
        assert common_shape(slab=slab, probs=probs, scale=scale) == expected


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), [0.5], torch.tensor(0.5)], ids=repr)
def test_numbers_take_the_dtype_that_is_asked_for(value):
    found = as_numbers("probs", value, like=torch.zeros(1, dtype=torch.float64))
    assert found.dtype == torch.float64 and found.item() == 0.5


def test_a_gradient_passes():
    value = torch.tensor(0.5, requires_grad=True)
    found = as_numbers("probs", value, like=torch.zeros(1, dtype=torch.float64))
    assert torch.autograd.grad(found, value)[0] == 1


@pytest.mark.parametrize("value", [None, "a", object, [[1.0], [1.0, 2.0]]], ids=repr)
def test_anything_else_is_named(value):
    with pytest.raises(TypeError, match="Expected probs to be a number or a tensor"):
        as_numbers("probs", value, like=torch.zeros(1))
