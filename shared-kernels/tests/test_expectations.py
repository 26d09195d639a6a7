"""What inherited test suites assert with."""

import pytest
import torch

from shared_kernels.expectations import message_of, require, require_same


def test_what_does_not_hold_is_told():
    require(True, "unseen")
    with pytest.raises(AssertionError, match="it does not"):
        require(False, "it does not")


def test_errors_that_come_and_that_do_not():
    assert message_of(ValueError, lambda: int("x")) == "invalid literal for int() with base 10: 'x'"
    assert message_of((KeyError, ValueError), lambda: int("x"))
    with pytest.raises(AssertionError, match="was to be raised"):
        message_of(ValueError, lambda: 1)
    with pytest.raises(ZeroDivisionError):
        message_of(ValueError, lambda: 1 / 0)


def test_sameness_is_relative_to_the_largest():
    wanted = torch.tensor([100.0, 0.0])
    require_same(wanted + 0.9e-3, wanted, 1e-5)
    with pytest.raises(AssertionError):
        require_same(wanted + 1.1e-3, wanted, 1e-5)
    with pytest.raises(AssertionError):
        require_same(torch.tensor([100.0, torch.nan]), wanted, 1e-5)
    require_same(torch.empty(0, 3), torch.empty(0, 3), 1e-5)
    require_same(torch.tensor([0.9e-5]), torch.zeros(1), 1e-5)
