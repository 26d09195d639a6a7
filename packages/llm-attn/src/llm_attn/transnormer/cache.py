"""The cache of a TransNormerLLM: per layer one state per head, as large after a million tokens as after one.

`generate` asks a cache how many tokens it has seen; the library's own layers for recurrent states do not count them, so
a model without any softmax layer needs these.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAME = "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What this version of transformers calls the cache, in arguments and outputs; it was renamed in 5.24."""


class StateLayer(CacheLayerMixin):
    """The state of one layer and the number of tokens in it."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Float[Tensor, "B H D E"] | None = None
        self.seen = 0

    def advance(self, state: Float[Tensor, "B H D E"], tokens: int) -> None:
        """Put the state after so many more tokens."""
        self.state, self.seen, self.is_initialized = state, self.seen + tokens, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        """Nothing to allocate: the first state is the first prompt's."""
        self.is_initialized = True

    def update(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: keys and values are not kept."""
        raise TypeError("a StateCache keeps no keys and values: it belongs to TransNormerLLM, not to softmax attention")

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if all keys were there, so that masks are as long as what was read."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refused for anything but 0."""
        if tokens_to_remove:
            raise ValueError(
                "a recurrent state cannot forget its last tokens: assisted decoding and other ways to take tokens back "
                "do not work with TransNormerLLM"
            )

    def reset(self) -> None:
        """As new."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Int[Tensor, "B"]) -> None:
        """Row i becomes what row beam_idx[i] was (beam search)."""
        self._replace(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._replace(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._replace(lambda state: state[indices])

    def offload(self) -> None:
        """To the CPU."""
        self._replace(lambda state: state.cpu())

    def prefetch(self) -> None:
        """States are read where they are; the model moves an offloaded one back when it reads it."""

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = change(self.state)


class StateCache(Cache):
    """One `StateLayer` for each layer of the model. Pass it back to go on where the last call ended."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(layers=[StateLayer() for _ in range(config.num_hidden_layers)])

    def nbytes(self) -> int:
        """Memory that the states take; it does not grow with the tokens seen."""
        states = [layer.state for layer in self.layers if isinstance(layer, StateLayer)]
        return sum(state.nbytes for state in states if state is not None)
