"""A cache that counts the tokens dropped before the language model as if they were there.

`generate` asks a cache how many tokens of the conversation it has seen, to know which of the ids it is given are new.
After pruning before the language model no layer holds them all, and a second turn with the same cache would be cut at
the wrong place, without an error. Masks need what is physically there, and keep getting it.
"""

from typing import Any


def count_dropped(cache: Any, dropped: int) -> None:
    """Has this cache count `dropped` tokens more once it holds any; of its class only this instance is changed."""

    def held(layer_idx: int = 0) -> Any:
        return cache.layers[layer_idx].get_seq_length() if layer_idx < len(cache.layers) else 0

    def seen(layer_idx: int = 0) -> Any:
        physical = held(layer_idx)
        return physical + dropped if physical else 0

    cache.get_query_offset = held
    cache.get_seq_length = seen
