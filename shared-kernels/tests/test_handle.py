"""The handle that doors return."""

import pytest
from torch import nn

from shared_kernels.handle import Handle


def handle_with_log():
    log = []
    handle = Handle("method", nn.Identity(), None, (0,))
    handle.on_remove(lambda: log.append("first"))
    handle.on_remove(lambda: log.append("second"))
    return handle, log


def test_what_was_asked_for_last_is_undone_first_and_once():
    handle, log = handle_with_log()
    handle.remove()
    handle.remove()
    assert log == ["second", "first"]


def test_an_exception_inside_the_block_undoes_it_and_goes_on():
    handle, log = handle_with_log()
    with pytest.raises(ZeroDivisionError), handle:
        raise ZeroDivisionError
    assert log == ["second", "first"]
