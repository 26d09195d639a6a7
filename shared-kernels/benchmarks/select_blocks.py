"""select_blocks against the attention that its lists leave and the one they replace, and the usual way to choose."""

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from shared_kernels import select_blocks, sparse_attention

CLAIM = "Choosing a tenth of the blocks of 64 x 64 costs at most a tenth of sparse_attention over them."
SWEEP = {"tokens": (512, 2_048, 8_192), "choice": ("topk", "topk, topp")}
BASELINE = "sparse_attention"
TARGET = 10.0
TARGET_AT = {"tokens": (8_192,)}
THREADS = 2
BLOCK = 64


def make(tokens, choice):
    """Four heads of width 64; 0.05 of the mass is fewer blocks than a tenth, so both choices give the same lists."""
    query, key, value = (torch.randn(1, 4, tokens, 64) for _ in range(3))
    chosen = {"topk": 0.1, "topp": 0.05 if choice == "topk, topp" else None}
    lists = select_blocks(query, key, block_size=(BLOCK, BLOCK), **chosen)
    return query, key, value, chosen, lists


def attention(inputs):
    query, key, value, _, lists = inputs
    return sparse_attention(query, key, value, *lists, block_size=(BLOCK, BLOCK))


def sorted_mask(inputs):
    """Softmax, full sort and a boolean mask, as in the code of Rectified SpaAttn (arXiv:2511.19835)."""
    query, key, _, chosen, _ = inputs
    means = (t.unflatten(2, (-1, BLOCK)).mean(3) for t in (query, key))
    scores = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", *means) / 8, -1)
    ranked, order = scores.sort(-1, descending=True)
    num_kept = torch.full(scores.shape[:-1], max(1, int(chosen["topk"] * scores.shape[-1])))
    if chosen["topp"] is not None:
        num_kept = torch.maximum(num_kept, (ranked.cumsum(-1) <= chosen["topp"]).sum(-1) + 1)
    places = torch.arange(scores.shape[-1]) < num_kept[..., None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, places)


def ours(inputs):
    query, key, _, chosen, _ = inputs
    return select_blocks(query, key, block_size=(BLOCK, BLOCK), **chosen)


RIVALS = {
    "sdpa, all keys": lambda inputs: sdpa(*inputs[:3]),
    "sparse_attention": attention,
    "sort and mask": sorted_mask,
    "ours": ours,
}


def check(out):
    mask, (indices, counts) = out["sort and mask"], out["ours"]
    assert torch.equal(mask.sum(-1), counts)
    assert torch.equal(mask.nonzero()[:, -1], indices[indices >= 0])


def price(out):
    """What the choice leaves."""
    return {"share of the blocks": float(out["sort and mask"].float().mean())}
