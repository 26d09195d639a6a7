"""In-Context Brush in diffusers: the door into a transformer, and the whole insertion with FLUX Fill.

The canvas has the subject on top, on white, and the target below; only the target's masked part is repainted. After
every step of the denoising loop everything outside the mask is put back to the source, noised to that step's level
(paper, section 3.4), with one noise per picture; the published code's blend changes nothing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_attn.diffusers.door import Layout, Schedule, VisualCall, VisualHandle, open_door
from diffusion_attn.diffusers.families import attention_modules
from diffusion_attn.in_context_brush import InContextBrushConfig, in_context_attention

_HOSTS = ("FluxTransformer2DModel", "SD3Transformer2DModel")
_BRUSH = InContextBrushConfig()


def apply_in_context_brush(model: nn.Module, config: InContextBrushConfig = _BRUSH) -> VisualHandle:
    """In-Context Brush in the double-stream blocks of FLUX or SD3, until the handle's `remove()`.

    The subject is the upper half of the rows of tokens, the target the lower half. TypeError on other models;
    ValueError where a method is at work already, and when it runs, on a grid of an odd number of rows.
    """
    if type(model).__name__ not in _HOSTS:
        raise TypeError(f"{type(model).__name__} is not supported; In-Context Brush is for {' and '.join(_HOSTS)}")

    def method(call: VisualCall, layout: Layout) -> tuple[Tensor, Tensor]:
        parts = call.query, call.key, call.value
        everything = torch.ones(call.query.shape[0], 1, 1)
        if call.text is None:
            return F.scaled_dot_product_attention(*parts, scale=call.scale), everything
        frames, rows, columns = layout.grid
        if frames != 1 or rows % 2:
            raise ValueError(f"subject above target needs an image of an even number of rows, got {layout.grid}")
        tokens = torch.arange(rows * columns, device=call.query.device)
        demo, target = tokens.chunk(2)
        return in_context_attention(*parts, call.text, demo, target, config, scale=call.scale), everything

    single = len(getattr(model, "single_transformer_blocks", ()))
    count = len(attention_modules(model))
    return open_door(
        model, "in_context_brush", config, method, schedule=Schedule(dense_layers=tuple(range(count - single, count)))
    )


class InContextBrush:
    """Inserts a subject into a part of an image, with a FluxFillPipeline.

        brush = InContextBrush(pipe)
        picture = brush(subject, target, mask, "a photo of the toy on the table", seed=0)

    The pipeline is as it was between calls.
    """

    def __init__(self, pipe: Any, config: InContextBrushConfig = _BRUSH) -> None:
        if type(pipe).__name__ != "FluxFillPipeline":
            raise TypeError(f"pipe must be a FluxFillPipeline, got {type(pipe).__name__}")
        self.pipe, self.config = pipe, config

    def __call__(
        self,
        subject: Image.Image,
        target: Image.Image,
        mask: Image.Image,
        prompt: str | None = None,
        *,
        subject_mask: Image.Image | None = None,
        size: int = 768,
        steps: int = 50,
        guidance_scale: float = 30.0,
        max_sequence_length: int = 512,
        seed: int = 0,
        blend: bool = True,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Image.Image:
        """The target, `size` x `size`, with its masked part repainted.

        mask: white where the target is repainted. subject_mask: white on the subject; what is around it becomes white.
        blend: puts everything outside the mask back to the target after every step. on_step: told, after each step, how
        many are done, of how many. ValueError where the mask marks nothing.
        """
        canvas, repaint = compose_canvas(subject, target, mask, size=size, subject_mask=subject_mask)
        if not repaint.any():
            raise ValueError("mask marks nothing to repaint: it must be white where the subject is to come")
        pipe = self.pipe
        noise = self._noise(2 * size, size, seed)
        source = self._source(canvas, seed) if blend else noise
        inside = self._packed_mask(repaint).to(noise)

        def after(pipe: Any, step: int, _: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(step + 1, steps)
            if blend:
                level = float(pipe.scheduler.sigmas[step + 1])
                kept["latents"] = blended(kept["latents"], source, noise, inside, level)
            return kept

        with apply_in_context_brush(pipe.transformer, self.config):
            out = pipe(
                prompt=prompt, image=_as_tensor(canvas), mask_image=repaint[None, None].float(), height=2 * size,
                width=size, num_inference_steps=steps, guidance_scale=guidance_scale, latents=noise,
                generator=torch.Generator().manual_seed(seed), max_sequence_length=max_sequence_length,
                prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds, callback_on_step_end=after,
            )  # fmt: skip
        return out.images[0].crop((0, size, size, 2 * size))

    def _noise(self, height: int, width: int, seed: int) -> Float[Tensor, "1 S C"]:
        pipe, generator = self.pipe, torch.Generator().manual_seed(seed)
        factor, channels = pipe.vae_scale_factor, pipe.vae.config.latent_channels
        rows, columns = 2 * (height // (2 * factor)), 2 * (width // (2 * factor))
        noise = torch.randn(1, channels, rows, columns, generator=generator)
        packed: Tensor = pipe._pack_latents(noise, 1, channels, rows, columns)
        return packed.to(pipe.transformer.device, pipe.transformer.dtype)

    def _source(self, canvas: Image.Image, seed: int) -> Float[Tensor, "1 S C"]:
        pipe = self.pipe
        pixels = (2 * _as_tensor(canvas) - 1).to(pipe.vae.device, pipe.vae.dtype)
        with torch.no_grad():
            latents = pipe._encode_vae_image(pixels, generator=torch.Generator().manual_seed(seed))
        _, channels, rows, columns = latents.shape
        packed: Tensor = pipe._pack_latents(latents, 1, channels, rows, columns)
        return packed.to(pipe.transformer.device, pipe.transformer.dtype)

    def _packed_mask(self, repaint: Bool[Tensor, "H W"]) -> Float[Tensor, "1 S C"]:
        """For every number of a packed latent, the share of its pixel that is repainted."""
        pipe = self.pipe
        channels = pipe.vae.config.latent_channels
        shares = F.avg_pool2d(repaint[None, None].float(), pipe.vae_scale_factor)
        rows, columns = shares.shape[2:]
        packed: Tensor = pipe._pack_latents(shares.expand(1, channels, rows, columns), 1, channels, rows, columns)
        return packed


def blended(
    latents: Float[Tensor, "B S C"],
    source: Float[Tensor, "B S C"],
    noise: Float[Tensor, "B S C"],
    inside: Float[Tensor, "B S C"],
    sigma: float,
) -> Float[Tensor, "B S C"]:
    """The latents inside the mask, the source noised to level `sigma` outside."""
    return inside * latents + (1 - inside) * ((1 - sigma) * source + sigma * noise)


def compose_canvas(
    subject: Image.Image,
    target: Image.Image,
    mask: Image.Image,
    *,
    size: int,
    subject_mask: Image.Image | None = None,
) -> tuple[Image.Image, Bool[Tensor, "H W"]]:
    """Subject above target, `size` wide and twice as high, and which pixels are repainted."""
    if subject_mask is not None:
        white = Image.new("RGB", subject.size, "white")
        subject = Image.composite(subject.convert("RGB"), white, subject_mask.convert("L").resize(subject.size))
    canvas = Image.new("RGB", (size, 2 * size), "white")
    canvas.paste(subject.convert("RGB").resize((size, size)), (0, 0))
    canvas.paste(target.convert("RGB").resize((size, size)), (0, size))
    marked = np.asarray(mask.convert("L").resize((size, size), Image.Resampling.NEAREST)) > 127
    return canvas, torch.from_numpy(np.concatenate([np.zeros_like(marked), marked]))


def _as_tensor(picture: Image.Image) -> Float[Tensor, "1 3 H W"]:
    """In [0, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 255
