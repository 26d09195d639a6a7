"""A query and a set of keys: what every model of this folder reads (section 2.1 of the paper).

`X` has shape (n, N + 1, d): row 0 of each sample is the query x_0, rows 1 to N are its keys. The theory has them on the
unit sphere. Each vector gets a one appended, x~ = [x; 1].

Decided here: a mask of real keys makes the mean over N a mean over the real ones. Inputs off the sphere are computed
with general norms and warned about once, by `warn_off_sphere`, since the bounds are then not those of the paper.
"""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Sets:
    """Samples as the models read them; D = d + 1, the one included."""

    query: Float[Tensor, "n D"]
    keys: Float[Tensor, "n N D"]
    weight: Float[Tensor, "n N"]
    """1 / (number of real keys), 0 where there is none."""
    ragged: bool
    """True if some key is masked."""

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, rows: slice) -> "Sets":
        return Sets(self.query[rows], self.keys[rows], self.weight[rows], self.ragged)

    @property
    def d(self) -> int:
        """Width of a vector without the one."""
        return self.query.shape[-1] - 1


def as_sets(x: Float[Tensor, "n N+1 d"], key_mask: Bool[Tensor, "n N"] | None = None) -> Sets:
    """Checks samples and appends the ones. key_mask: True where a key is real; what stands at other keys is not read.

    Raises TypeError on integers, and ValueError on other shapes, samples without a real key, NaN and infinities.
    """
    if x.ndim != 3 or x.shape[1] < 2 or x.shape[2] < 1:
        raise ValueError(
            f"X must have shape (samples, 1 query + N keys, d) with N and d at least 1, got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"X must be of floating point, got {x.dtype}: convert it, for example X.astype('float32')")
    real = torch.ones(x.shape[0], x.shape[1] - 1, dtype=torch.bool, device=x.device)
    if key_mask is not None:
        real = _checked_mask(key_mask, real)
        x = torch.cat((x[:, :1], x[:, 1:].masked_fill(~real[..., None], 0)), 1)
    if not x.isfinite().all():
        raise ValueError("X holds NaN or infinite values: drop or fill them first")
    one = torch.cat((x, x.new_ones(*x.shape[:2], 1)), -1)
    weight = real.to(x.dtype) / real.sum(1, keepdim=True)
    return Sets(one[:, 0], one[:, 1:], weight, not bool(real.all()))


def _checked_mask(key_mask: Tensor, real: Tensor) -> Tensor:
    if key_mask.shape != real.shape or key_mask.dtype != torch.bool:
        raise ValueError(
            f"key_mask must be boolean of shape {tuple(real.shape)}, got {key_mask.dtype} of {tuple(key_mask.shape)}"
        )
    empty = (~key_mask.any(1)).nonzero()
    if len(empty):
        raise ValueError(f"sample {int(empty[0])} has no real key: a mean over no keys is not defined, drop the sample")
    return key_mask.to(real.device)


def warn_off_sphere(sets: Sets) -> None:
    """Warns if a query or a real key is not of unit norm (to 1e-3)."""
    norms = torch.cat((sets.query[:, None], sets.keys), 1)[..., :-1].norm(dim=-1)
    real = torch.cat((torch.ones_like(sets.weight[:, :1]), sets.weight), 1) > 0
    off = ((norms - 1).abs() > 1e-3) & real
    if off.any():
        warnings.warn(
            f"{int(off.sum())} of {int(real.sum())} vectors are not of unit norm: results are right, the paper's "
            "bounds and its scale of the frozen weights are for the unit sphere; X / norm(X, axis=-1) gets there",
            stacklevel=3,
        )


def sphere_samples(n: int, *, num_keys: int, d: int, generator: torch.Generator) -> Float[Tensor, "n N+1 d"]:
    """n samples of a query and `num_keys` keys, all uniform on the unit sphere and independent (float32)."""
    x = torch.randn(n, num_keys + 1, d, generator=generator)
    return torch.nn.functional.normalize(x, dim=-1)
