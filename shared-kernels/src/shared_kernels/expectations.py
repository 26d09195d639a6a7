"""What test suites that are inherited by other packages need of a test framework, without one: they ship with `src`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def require(holds: bool, message: str) -> None:
    """AssertionError with that message unless it holds."""
    if not holds:
        raise AssertionError(message)


def message_of(error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any]) -> str:
    """What an error that must come says. AssertionError if none comes; other exceptions go through."""
    try:
        call()
    except error as problem:
        return str(problem)
    raise AssertionError(f"{error} was to be raised")


def require_same(given: Tensor, wanted: Tensor, tolerance: float) -> None:
    """AssertionError where two differ by more than that share of the largest of `wanted` (1 at least), or are NaN."""
    largest = max([1.0, *wanted.detach().abs().amax().flatten().tolist()]) if wanted.numel() else 1.0
    torch.testing.assert_close(given, wanted, atol=tolerance * largest, rtol=0)
