"""A batch as the texts in it: padding cut off, packed documents apart.

Selection counts tokens from the start of a text, so each text must be seen as it is. Where no row is padded, the whole
batch is one part; padded rows and packed documents are parts of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_attn.transformers.visibility import Visibility, dense_attention


class Part(NamedTuple):
    """A text in a batch, or a whole batch of texts without padding."""

    number: int
    rows: slice
    """Rows of the batch."""
    keys: slice | Tensor
    """Places of its keys among all keys."""
    num_keys: int
    """All keys, of every text in the rows."""


Run = Callable[[Part, Tensor, Tensor, Tensor, int | None], Tensor]
"""(part, its query, key and value, window) -> output."""


def by_sequence(
    query: Float[Tensor, "B H Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk E"],
    visible: Visibility,
    run: Run,
    *,
    scale: float | None,
    softcap: float | None,
) -> Float[Tensor, "B H Nq E"]:
    """`run` on every text of the batch; padding gives 0.

    What is no text, a mask of another shape than packed documents have it, runs dense; so do documents packed in a
    sliding-window layer, and texts with holes in such a layer.
    """
    if visible.mask is not None:
        documents = packed_documents(visible.mask) if query.shape[2] == key.shape[2] else None
        if documents is None:
            return dense_attention(query, key, value, visible, scale=scale, softcap=softcap)
        return _run_documents(query, key, value, documents, run)
    if visible.key_mask is None:
        return run(Part(0, slice(None), slice(None), key.shape[2]), query, key, value, visible.window)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    first_query = key.shape[2] - query.shape[2]
    for row in range(query.shape[0]):
        kept = visible.key_mask[row].nonzero()[:, 0]
        # the one query of a step stands at the last key there is, behind which a static cache has empty slots
        queries = kept[-1:] * 0 if query.shape[2] == 1 else kept[kept >= first_query] - first_query
        if not len(queries):
            continue
        q, k, v = (t[row : row + 1] for t in (query, key, value))
        keys, rows = _as_slice(kept), _as_slice(queries)
        if visible.window is not None and not isinstance(keys, slice):
            alone = Visibility(visible.window, visible.key_mask[row : row + 1])
            out[row] = dense_attention(q, k, v, alone, scale=scale, softcap=softcap)[0]
        else:
            part = Part(row, slice(row, row + 1), keys, key.shape[2])
            out[row, :, rows] = run(part, q[:, :, rows], k[:, :, keys], v[:, :, keys], visible.window)[0]
    return out


def _as_slice(places: Tensor) -> slice | Tensor:
    """Places as a slice, which copies nothing, if they are next to one another."""
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places


def packed_documents(mask: Bool[Tensor, "B 1 N N"]) -> list[list[tuple[int, int]]] | None:
    """Start and end of the documents in each row, or None if the mask is not that of documents end to end."""
    place = torch.arange(mask.shape[-1], device=mask.device)
    found = []
    for row in mask[:, 0]:
        first = row.int().argmax(-1)
        begins = first == place
        same = torch.cat([begins[:1], begins[1:] | (first[1:] == first[:-1])])
        if not (same.all() and torch.equal(row, (place >= first[:, None]) & (place <= place[:, None]))):
            return None
        starts = begins.nonzero()[:, 0].tolist()
        found.append(list(zip(starts, [*starts[1:], len(place)], strict=True)))
    return found


def _run_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: list[list[tuple[int, int]]], run: Run
) -> Tensor:
    rows, number = [], 0
    for row, spans in enumerate(documents * (query.shape[0] // len(documents))):
        outs = []
        for low, high in spans:
            part = Part(number, slice(row, row + 1), slice(low, high), key.shape[2])
            q, k, v = (t[part.rows, :, low:high] for t in (query, key, value))
            outs.append(run(part, q, k, v, None))
            number += 1
        rows.append(torch.cat(outs, 2))
    return torch.cat(rows)
