"""sparse_attention on a GPU, in bfloat16, against dense SDPA and compiled FlexAttention with the same blocks."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from shared_kernels import sparse_attention

CLAIM = "A tenth of the blocks of 128 x 128 costs at most a sixth of the fastest dense SDPA, on a GPU."
SWEEP = {"tokens": (4_096, 32_768), "backward": (False, True)}
BASELINE = "dense SDPA, fastest"
TARGET = 6.0
TARGET_AT = {"tokens": (32_768,), "backward": (False,)}
DEVICES = ("cuda",)
BLOCK = 128
_DENSE = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
_compiled = torch.compile(flex_attention, dynamic=False)


def make(tokens, backward):
    """16 heads of width 128; each query block has its own tenth of the key blocks, and the diagonal is not special."""
    query, key, value = (torch.randn(1, 16, tokens, 128, dtype=torch.bfloat16) for _ in range(3))
    blocks = tokens // BLOCK
    order = torch.rand(1, 16, blocks, blocks).argsort(-1).int()
    num_kept = max(1, blocks // 10)
    counts = torch.full((1, 16, blocks), num_kept, dtype=torch.int32)
    nothing = torch.zeros_like(counts), torch.zeros_like(order)
    mask = BlockMask.from_kv_blocks(*nothing, counts, order, BLOCK_SIZE=BLOCK)
    qkv = [t.requires_grad_(backward) for t in (query, key, value)]
    dense = min(_usable(qkv), key=lambda backend: _time(backend, qkv)) if query.is_cuda else SDPBackend.MATH
    return qkv, order[..., :num_kept].contiguous(), mask, dense


def _dense(backend, qkv):
    with sdpa_kernel(backend):
        return sdpa(*qkv)


def _usable(qkv):
    for backend in _DENSE:
        try:
            _dense(backend, qkv)
        except RuntimeError:  # torch was built without it, or this GPU is too old for it
            continue
        yield backend


def _time(backend, qkv):
    from triton.testing import do_bench

    return do_bench(lambda: _with_gradients(_dense(backend, qkv), qkv))


def _with_gradients(out, qkv):
    """The output, and the gradients of its sum where they are wanted."""
    return out, *(torch.autograd.grad(out.sum(), qkv) if qkv[0].requires_grad else ())


def ours(inputs):
    qkv, indices, _, _ = inputs
    return _with_gradients(sparse_attention(*qkv, indices, block_size=(BLOCK, BLOCK)), qkv)


def flex(inputs):
    qkv, _, mask, _ = inputs
    return _with_gradients(_compiled(*qkv, block_mask=mask), qkv)


RIVALS = {
    "dense SDPA, fastest": lambda inputs: _with_gradients(_dense(inputs[3], inputs[0]), inputs[0]),
    "FlexAttention, compiled": flex,
    "ours": ours,
}


def check(out):
    for mine, other in zip(out["ours"], out["FlexAttention, compiled"], strict=True):
        assert (mine - other).norm() <= 0.02 * other.norm()


def work(inputs):
    """Forward only, at 4 FLOPs for each pair and column; a backward pass adds two and a half times as much."""
    (query, *_), indices, *_ = inputs
    pairs = indices.numel() * BLOCK**2
    return pairs * 4 * query.shape[3] * (3.5 if query.requires_grad else 1) / 1e12, "TFLOP"
