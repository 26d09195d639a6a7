"""What CPU and GPU code share: a map with room for what the offsets reach beyond it, and its gradient folded back."""

from torch import Tensor


def reach(offsets: list[int]) -> tuple[int, int]:
    """How many rows and columns beyond the map the offsets lead."""
    return max(map(abs, offsets[0::2])), max(map(abs, offsets[1::2]))


def folded(padded: Tensor, rows: int, columns: int, replicate: bool) -> Tensor:
    """The gradient of a map from that of the map with so many rows and columns more on every side, (B, h, w, C)."""
    for dim, extra in ((1, rows), (2, columns)):
        size = padded.shape[dim] - 2 * extra
        before, inside, after = padded.split([extra, size, extra], dim)
        if replicate and extra and size:
            inside = inside.clone()
            inside.narrow(dim, 0, 1).add_(before.sum(dim, keepdim=True))
            inside.narrow(dim, size - 1, 1).add_(after.sum(dim, keepdim=True))
        padded = inside
    return padded
