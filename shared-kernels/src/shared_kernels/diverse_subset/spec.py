"""What diverse_subset promises."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shared_kernels.diverse_subset import diverse_subset, flops, reference
from shared_kernels.testing import Make, OpSpec, Sample


def _weight(make: Make, *shape: int) -> Tensor:
    return make.normal(*shape, wide=True).abs()


def _indices(make: Make, *rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=make.device)


def _mask(make: Make, *lengths: int, tokens: int) -> Tensor:
    """Of set b the last lengths[b] elements are allowed."""
    short = tokens - torch.tensor(lengths, device=make.device)
    return torch.arange(tokens, device=make.device) >= short[:, None]


def _nothing_outside(features: Tensor, mask: Tensor) -> Tensor:
    """What is masked out is not a number."""
    return features.masked_fill(~mask[..., None], torch.nan)


def samples(make: Make, size: str) -> dict[str, Sample]:
    if size == "tiny":
        return {}
    if size == "real":
        return {
            "views": {"features": make.normal(5, 2880, 1024), "weight": _weight(make, 5, 2880), "num_kept": 320},
            "isolated": {"features": make.normal(3, 576, 1152), "num_kept": 64, "first": "isolated"},
            "volume": {"features": make.normal(3, 576, 1152), "num_kept": 64, "method": "dpp"},
            "threshold": {"features": make.normal(3, 576, 72), "num_kept": 64, "method": "threshold", "threshold": 0.7},
        }
    if size == "medium":
        weight = _weight(make, 1, 1511)
        return {
            "several rounds": {"features": make.normal(1, 1511, 11), "num_kept": 173, "weight": weight},
            "several rounds of volume": {"features": make.normal(1, 1511, 90), "num_kept": 71, "method": "dpp"},
            "several blocks": {
                "features": make.normal(1, 1511, 5),
                "num_kept": 300,
                "method": "threshold",
                "threshold": 0.1,
            },
            "isolated": {"features": make.normal(1, 1511, 7), "num_kept": 3, "first": "isolated"},
        }
    return _small_samples(make)


def _small_samples(make: Make) -> dict[str, Sample]:
    short, fewer = _mask(make, 19, 6, 0, tokens=29), _mask(make, 31, 9, tokens=31)
    return {
        "weighted": {"features": make.normal(3, 37, 24), "num_kept": 11, "weight": _weight(make, 3, 37)},
        "from the most isolated": {
            "features": make.normal(2, 41, 19), "num_kept": 13, "metric": "euclidean", "first": "isolated",
        },
        "from given ones, strided": {
            "features": make.strided(2, 23, 17), "num_kept": 9, "first": _indices(make, [5, 3], [22, 0]),
            "weight": make.strided(2, 23).abs(),
        },
        "volume": {"features": make.normal(3, 37, 24), "num_kept": 11, "method": "dpp", "weight": _weight(make, 3, 37)},
        "volume of lengths, transposed, from a given one": {
            "features": make.transposed(2, 27, 40), "num_kept": 10, "method": "dpp", "metric": "euclidean",
            "first": _indices(make, [4], [26]),
        },
        "volume is used up": {"features": make.normal(2, 21, 4), "num_kept": 9, "method": "dpp"},
        "threshold": {
            "features": make.normal(3, 43, 6), "num_kept": 7, "method": "threshold", "weight": _weight(make, 3, 43),
            "threshold": 0.3 * _weight(make, 3, 43),
        },
        "threshold leaves few": {
            "features": make.normal(2, 35, 18, scale=30.0), "num_kept": 17, "method": "threshold",
            "metric": "euclidean", "threshold": 150.0,
        },
        "masked": {"features": _nothing_outside(make.normal(3, 29, 16), short), "num_kept": 8, "mask": short},
        "masked, isolated": {
            "features": _nothing_outside(make.normal(2, 31, 16), fewer), "num_kept": 10, "mask": fewer,
            "first": "isolated",
        },
        "masked volume": {
            "features": _nothing_outside(make.normal(2, 31, 16), fewer), "num_kept": 10, "mask": fewer, "method": "dpp",
        },
        "all of them": {"features": make.normal(2, 9, 33), "num_kept": 12},
        "one": {"features": make.normal(2, 1, 16), "num_kept": 1, "method": "dpp"},
        "no sets": {"features": make.normal(0, 9, 16), "num_kept": 4},
        "no elements": {"features": make.normal(2, 0, 16), "num_kept": 4},
    }  # fmt: skip


def _grid(make: Make) -> Tensor:
    """Whole numbers, so that distances are exact and ties are ties; every point twice."""
    points = torch.cartesian_prod(*[torch.arange(3.0, dtype=make.dtype)] * 2)
    return torch.cat([points, points])[None]


def nearest_by_hand(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Every step tries every element."""
    x, weight = make.normal(1, 25, 7), _weight(make, 1, 25)
    chosen = [int(weight.argmax())]
    while len(chosen) < 9:
        rest = [i for i in range(25) if i not in chosen]
        nearest = [min(1 - torch.cosine_similarity(x[0, i], x[0, j], 0) for j in chosen) for i in rest]
        chosen.append(rest[int((weight[0, rest] * torch.stack(nearest)).argmax())])
    yield op(x, num_kept=9, weight=weight), torch.tensor([chosen])


def determinants_by_hand(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """Every step tries the determinant with every element."""
    x, weight = make.normal(1, 25, 14), _weight(make, 1, 25)
    unit = torch.nn.functional.normalize(x[0], dim=-1) * weight[0, :, None]
    chosen: list[int] = []
    while len(chosen) < 9:
        rest = [i for i in range(25) if i not in chosen]
        volumes = [torch.linalg.det(unit[[*chosen, i]] @ unit[[*chosen, i]].T) for i in rest]
        chosen.append(rest[int(torch.stack(volumes).argmax())])
    yield op(x, num_kept=9, weight=weight, method="dpp"), torch.tensor([chosen])


def suppressed_by_hand(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """In order of weight; each chosen one strikes out what is nearer than its own threshold."""
    x, weight, threshold = make.normal(1, 25, 7), _weight(make, 1, 25), _weight(make, 1, 25)
    chosen: list[int] = []
    for i in weight[0].argsort(descending=True).tolist():
        if all(1 - torch.cosine_similarity(x[0, i], x[0, j], 0) >= threshold[0, j] for j in chosen):
            chosen.append(i)
    expected = torch.full((1, 20), -1)
    expected[0, : len(chosen)] = torch.tensor(chosen)
    yield op(x, num_kept=20, weight=weight, method="threshold", threshold=threshold), expected


def ties_go_to_the_lower_index(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    """On a grid of 3 x 3 points that is there twice; what is a copy comes when all points are taken."""
    grid, rest = _grid(make), [9, 10, 11]
    far = op(grid, num_kept=12, metric="euclidean")
    yield far[:, :5], torch.tensor([[0, 8, 2, 6, 4]])
    yield far[:, 5:9].sort().values, torch.tensor([[1, 3, 5, 7]])
    yield far[:, 9:], torch.tensor([rest])
    yield op(grid, num_kept=5, metric="euclidean", method="dpp"), torch.tensor([[8, 2, 0, 1, 3]])
    apart = op(grid, num_kept=12, metric="euclidean", method="threshold", threshold=1.2)
    yield apart, torch.tensor([[0, 2, 4, 6, 8] + [-1] * 7])
    many = torch.eye(150, dtype=make.dtype)[None]
    yield op(many, num_kept=140), torch.arange(140)[None]


def going_on_from_the_first_ones(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    x, weight = make.normal(2, 31, 20), _weight(make, 2, 31)
    for method in ("max_min", "dpp"):
        whole = op(x, num_kept=12, weight=weight, method=method)
        yield op(x, num_kept=12, weight=weight, method=method, first=whole[:, :5]), whole


def lengths_do_not_count_for_the_cosine(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    x, length = make.normal(2, 31, 20), _weight(make, 2, 31, 1) + 0.1
    for method in ("max_min", "dpp"):
        yield op(length * x, num_kept=12, method=method), op(x, num_kept=12, method=method)


def renaming_renames(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    x, weight, mask = make.normal(2, 31, 20), _weight(make, 2, 31), _mask(make, 25, 30, tokens=31)
    order = make.normal(31).argsort()
    for options in ({"method": "max_min"}, {"method": "dpp"}, {"method": "threshold", "threshold": 0.8}):
        chosen = op(x, num_kept=12, weight=weight, mask=mask, **options)
        renamed = op(x[:, order], num_kept=12, weight=weight[:, order], mask=mask[:, order], **options)
        yield torch.where(renamed < 0, -1, order[renamed]), chosen


def threshold_of_zero_is_the_order_of_weights(op: Callable[..., Tensor], make: Make) -> Iterator[tuple[Tensor, Tensor]]:
    x, weight = make.normal(2, 31, 20), _weight(make, 2, 31)
    yield op(x, num_kept=7, weight=weight, method="threshold", threshold=0.0), weight.topk(7).indices
    alone = op(x, num_kept=3, weight=weight, method="threshold", threshold=2.1)
    yield alone, torch.cat([weight.argmax(1, keepdim=True), torch.full((2, 2), -1)], 1)


def launches(sample: Sample) -> None:
    from shared_kernels.diverse_subset import triton

    x, method = sample["features"], sample.get("method", "max_min")
    weight = sample.get("weight", x.new_ones(x.shape[:2], dtype=torch.float32))
    threshold = weight if method == "threshold" else None
    given = x.new_empty((x.shape[0], 0), dtype=torch.int64)
    mask = x.new_ones(x.shape[:2], dtype=torch.bool)
    triton.forward(
        x, weight, mask, given, threshold, sample["num_kept"], method, sample.get("metric", "cosine"),
        sample.get("first") == "isolated",
    )  # fmt: skip


def cost(sample: Sample) -> tuple[int, int]:
    x, first = sample["features"], sample.get("first", "weight")
    kept = min(sample["num_kept"], x.shape[1])
    count = flops(x.shape, kept, sample.get("method", "max_min"), isinstance(first, str) and first == "isolated")
    return count, x.numel() * x.element_size()


def largest(sample: Sample) -> int:
    """The features as given, those of one set in float32, 128 rows of distances, the factors of a DPP; never N x N."""
    (_, N, D), given = sample["features"].shape, sample["features"].untyped_storage()
    rows = min(N, max(128, sample["num_kept"]))
    return max(1, given.nbytes() // sample["features"].element_size(), N * D, rows * N)


_ONES = torch.ones(3, 37)
SPEC = OpSpec(
    op=diverse_subset,
    reference=reference.diverse_subset,
    samples=samples,
    laws=(
        nearest_by_hand,
        determinants_by_hand,
        suppressed_by_hand,
        ties_go_to_the_lower_index,
        going_on_from_the_first_ones,
        lengths_do_not_count_for_the_cosine,
        renaming_renames,
        threshold_of_zero_is_the_order_of_weights,
    ),
    refused={
        "no batch": ({"features": _ONES}, ValueError, r"features must have shape \(B, N, D\), got \(3, 37\)"),
        "list": ({"features": [[1.0]]}, TypeError, "features must be a tensor, got list"),
        "integers": ({"features": torch.ones(3, 37, 8, dtype=torch.int32)}, TypeError, "features must be of a float"),
        "nothing to keep": ({"num_kept": 0}, ValueError, "num_kept must be at least 1, got 0"),
        "another method": ({"method": "kmeans"}, ValueError, "method must be one of max_min, dpp, threshold, got"),
        "another metric": ({"metric": "l1"}, ValueError, "metric must be one of cosine, euclidean, got"),
        "weights of another size": ({"weight": torch.ones(3, 36)}, ValueError, r"weight must have shape \(3, 37\)"),
        "whole weights": ({"weight": _ONES.long()}, TypeError, "weight must be of a floating-point dtype"),
        "negative weights": ({"weight": -_ONES}, ValueError, "weight must not be negative, got -1.0"),
        "mask of numbers": ({"mask": _ONES}, TypeError, "mask must be of torch.bool, got torch.float32"),
        "another device": ({"weight": torch.ones(3, 37, device="meta")}, ValueError, "weight must be on cpu like the"),
        "another first": ({"first": "random"}, ValueError, "or indices, got .+random"),
        "short indices": ({"first": torch.ones(3, 1, dtype=torch.int32)}, TypeError, "first must be of torch.int64"),
        "too many first": ({"first": torch.ones(3, 38, dtype=torch.int64)}, ValueError, "first must name at most the"),
        "isolated volume": (
            {"first": "isolated", "method": "dpp"}, ValueError, "needs method .+max_min.+, got .+dpp",
        ),
        "first of a scan": (
            {"first": torch.ones(3, 1, dtype=torch.int64), "method": "threshold", "threshold": 0.5}, ValueError,
            "first must be .+weight.+ for method .+threshold.+, got indices",
        ),
        "threshold without use": ({"threshold": 0.5}, ValueError, "threshold must be given for method"),
        "threshold missing": ({"method": "threshold"}, ValueError, "threshold must be given for method"),
        "threshold of another size": (
            {"method": "threshold", "threshold": torch.ones(37)}, ValueError, r"threshold must have shape \(3, 37\)",
        ),
    },
    library_ops=(torch.ops.shared_kernels.diverse_subset.default,),
    launches=launches,
    cost=cost,
    largest=largest,
)  # fmt: skip
