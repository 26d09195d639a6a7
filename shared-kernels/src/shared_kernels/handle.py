"""What every door of the packages returns: a method at work in a host model, and the way back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Handle:
    """A method at work in a model. `remove()` undoes it; as a context manager, leaving the block does.

    name: of the method. model: the host. config: the method's settings.
    layers_changed: indices of the host's layers in which it acts.
    """

    name: str
    model: nn.Module
    config: Any
    layers_changed: tuple[int, ...]
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def on_remove(self, undo: Callable[[], None]) -> None:
        """Has `undo` called by `remove`, before whatever was asked for earlier."""
        self._undo.append(undo)

    def remove(self) -> None:
        """The host as it was. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
