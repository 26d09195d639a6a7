"""Pictures of which patches a model kept: each image beside itself with what was dropped by then greyed out."""

from pathlib import Path

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from vit_efficient.token_reduction import TokenReduction, run_reduced


def kept_patches(model: nn.Module, images: Float[Tensor, "B c h w"]) -> dict[int, Bool[Tensor, "B gh gw"]]:
    """By block, which positions of the patch grid still have a token of their own or a merged one.

    TypeError on a model without a token method.
    """
    if not isinstance(model, TokenReduction):
        raise TypeError(f"kept_patches needs a model with a token method at work, got {type(model).__name__}")
    grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    with torch.inference_mode():
        kept = run_reduced(model, images).kept
    return {block: mask.unflatten(1, grid) for block, mask in kept.items()}


def draw_token_maps(model: nn.Module, images: Float[Tensor, "B c h w"], path: Path, *, limit: int = 6) -> None:
    """Writes a PNG: a row for each of the first `limit` images, a column for each block that dropped tokens.

    Images are shown scaled to their own range. Raises as `kept_patches` does.
    """
    images = images[:limit]
    kept = kept_patches(model, images)
    stages = [b for b in kept if b == 0 or not torch.equal(kept[b], kept[b - 1])]
    stages = stages[1:] if len(stages) > 1 and bool(kept[stages[0]].all()) else stages
    figure = Figure(figsize=(1.8 * (len(stages) + 1), 1.95 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(stages) + 1, squeeze=False)
    shown = [_as_picture(image) for image in images]
    for row, picture in zip(axes, shown, strict=True):
        row[0].imshow(picture.numpy())
    axes[0, 0].set_title("image", fontsize=9)
    for column, block in enumerate(stages, 1):
        for row, picture, mask in zip(axes, shown, kept[block].cpu(), strict=True):
            large = nn.functional.interpolate(mask[None, None].float(), picture.shape[:2], mode="nearest")[
                0, 0, ..., None
            ]
            row[column].imshow((picture * large + 0.85 * (1 - large)).numpy())
            row[column].set_xlabel(f"{int(mask.sum())} of {mask.numel()}", fontsize=8)
        axes[0, column].set_title(f"block {block}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)


def _as_picture(image: Tensor) -> Tensor:
    """(h, w, 3) in [0, 1]."""
    low, high = image.amin(), image.amax()
    picture = ((image - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0).cpu()
    return picture[..., :3] if picture.shape[2] >= 3 else picture[..., :1].expand(-1, -1, 3)
