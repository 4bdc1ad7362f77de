import numpy as np
import pytest
import torch

from pyro_sparse.likelihoods import check_data, check_mask


@pytest.mark.parametrize(("shape", "dims"), [((4, 5), 1), ((4, 2, 5), 2), ((3, 4, 5), 2)])
def test_data_without_a_mask_come_back_as_they_are(shape, dims, dtype):
    y = torch.randn(shape, dtype=dtype)
    checked, mask = check_data(y, None, None, dims)
    assert checked is y
    assert mask is None


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, 7.0])
@pytest.mark.parametrize("mask_shape", [(4, 5), (5,), (4, 1), (1, 5)])
def test_what_was_not_observed_becomes_zero(fill, mask_shape):
    y = torch.randn(4, 5)
    mask = torch.rand(mask_shape) < 0.5
    spoiled = torch.where(mask, y, fill)
    before = spoiled.clone()
    checked, full = check_data(spoiled, mask, 100, 1)
    assert full.shape == y.shape
    np.testing.assert_array_equal(full, np.broadcast_to(mask, (4, 5)))
    np.testing.assert_array_equal(checked, np.where(mask, y, 0.0))
    torch.testing.assert_close(spoiled, before, equal_nan=True, rtol=0, atol=0)  # not in place


def test_nan_that_was_observed_is_left_for_fit_and_solve_to_find():
    assert check_data(torch.full((2, 3), torch.nan), None, None, 1)[0].isnan().all()


@pytest.mark.parametrize("y", [torch.ones(2, 3, dtype=torch.long), np.ones((2, 3)), [[1.0]]])
def test_data_of_another_kind_are_refused(y):
    with pytest.raises(TypeError, match="Expected y to be a floating tensor, got"):
        check_data(y, None, None, 1)


@pytest.mark.parametrize(
    ("shape", "dims", "message"),
    [
        ((5,), 1, r"\(n, features\).*minibatch of one"),
        ((0, 5), 1, r"n >= 1, got \(0, 5\)"),
        ((5, 5), 2, r"\(n, channels, \*lengths\)"),
        ((), 1, r"got \(\)"),
    ],
)
def test_data_of_another_shape_are_refused(shape, dims, message):
    with pytest.raises(ValueError, match=message):
        check_data(torch.zeros(shape), None, None, dims)


def test_a_data_set_smaller_than_its_minibatch_is_refused():
    assert check_data(torch.zeros(4, 5), None, 4, 1)[0].shape == (4, 5)
    with pytest.raises(ValueError, match=r"num_data >= 4 \(the minibatch\), got 3"):
        check_data(torch.zeros(4, 5), None, 3, 1)


@pytest.mark.parametrize("mask", [torch.ones(5), torch.ones(5, dtype=torch.long), [True] * 5])
def test_a_mask_that_is_not_boolean_is_refused(mask):
    with pytest.raises(TypeError, match="boolean tensor, True = observed; got"):
        check_mask(torch.zeros(4, 5), mask)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (1, 4, 5)])
def test_a_mask_that_does_not_broadcast_is_refused(shape):
    with pytest.raises(ValueError, match=r"broadcasts to the data, \(4, 5\), got"):
        check_mask(torch.zeros(4, 5), torch.ones(shape, dtype=torch.bool))
