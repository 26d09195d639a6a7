"""The vision side of a prompt: attention of the tower and features before the projector, brought to the visual tokens.

Between tower and language model families pool, shuffle, unpad and reorder patches. What the tower says about patches
(attention, sensitivity) must go the same way to reach the token that carries them, so each family says how
(`vlm_prune.families`): values in the tower's order in, values of the visual tokens out.

Shapes: V views (images, tiles or frames that the tower sees), P patches of each without class token; families whose
tower sees one long sequence (Qwen-VL) have V = 1. N visual tokens of the prompt's images together, d channels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shared_kernels import attention_received
from vlm_prune.layer_attention import Caught, attach_probe

if TYPE_CHECKING:
    from vlm_prune.families import Family

Modality = Literal["image", "video"]


@dataclass
class VisionCall:
    """One run of tower and projector.

    base: the host's base model. family: how it is built. modality: what was encoded. arguments: of
    `get_image_features`, by name. caught: queries and keys of the tower's last used layer, one entry for each piece
    that the host attends within. projector: the module. projector_input: what went into it. activation_input: what
    went into its activation, where it has one. packing: the call of `pack_image_features`, where the family has it.
    counts: visual tokens of each image.
    """

    base: Any
    family: "Family"
    modality: Modality
    arguments: dict[str, Any]
    caught: list[Caught] = field(default_factory=list)
    projector: nn.Module | None = None
    projector_input: Tensor | None = None
    activation_input: Tensor | None = None
    packing: tuple[Callable[..., Any], dict[str, Any]] | None = None
    counts: list[int] = field(default_factory=list)

    @property
    def prefix(self) -> int:
        """Class tokens in front of the patches that the features leave out."""
        return self.family.prefix(self.base)

    def class_attention(self) -> Float[Tensor, "V P"] | None:
        """Attention of the class token to each patch, mean over heads; None where the tower has no class token."""
        if self.prefix == 0:
            return None
        rows, columns = slice(0, 1), slice(self.prefix, None)
        return torch.cat(
            [
                attention_received(c.query, c.key, rows=rows, columns=columns, scale=c.scale).mean(1)
                for c in self._caught()
            ]
        )

    def received_attention(self) -> Float[Tensor, "V P"]:
        """Attention that each patch receives: mean over heads and over the patches of its piece."""
        pieces = []
        for c in self._caught():
            rows = slice(self.prefix, None)
            found = attention_received(c.query, c.key, rows=rows, columns=rows, reduce="mean", scale=c.scale)
            pieces.append(found.mean(1))
        # one long sequence was attended to in pieces, views are pieces of equal length
        return torch.cat(pieces, 1) if self.family.one_sequence else torch.cat(pieces)

    def keys(self) -> Float[Tensor, "V P d"]:
        """Keys of the patches in the tower's layer, heads side by side."""
        pieces = [c.key[:, :, self.prefix :].transpose(1, 2).flatten(2) for c in self._caught()]
        return torch.cat(pieces, 1) if self.family.one_sequence else torch.cat(pieces)

    def _caught(self) -> list[Caught]:
        if not self.caught:
            raise RuntimeError("the vision tower's attention was not recorded: name 'tower_attention' among the needs")
        return self.caught

    def to_tokens(self, values: Float[Tensor, "V P *c"]) -> Float[Tensor, "N *c"]:
        """Values of patches, in the tower's order, as values of the visual tokens; NaN at newline tokens."""
        flat = values.unsqueeze(-1) if values.ndim == 2 else values
        tokens = self.family.to_tokens(self, flat.to(torch.promote_types(flat.dtype, torch.float32)))
        if len(tokens) != sum(self.counts):
            raise RuntimeError(
                f"{len(tokens)} values for {sum(self.counts)} visual tokens: this version of "
                f"{type(self.base).__name__} packs its tokens in a way that vlm-prune does not know"
            )
        return tokens.squeeze(-1) if values.ndim == 2 else tokens

    def projected_to_tokens(self, values: Float[Tensor, "V T"]) -> Float[Tensor, "N"]:
        """Values of what comes out of the projector, as values of the visual tokens; NaN at newline tokens."""
        return self.family.projected_to_tokens(self, values.unsqueeze(-1)).squeeze(-1)

    def views(self) -> Int[Tensor, "N"]:
        """Number of the image, tile or frame of each visual token; -1 at newline tokens."""
        found = self.to_tokens(self.family.views(self))
        return found.nan_to_num(-1).round().long()


@dataclass(frozen=True)
class Vision:
    """The calls of a prompt, and where their tokens are.

    calls: by modality. places: (B, S), for each modality, which tokens of the prompt are its placeholders.
    prompt_index: (B, n), where the tokens that are left were in the prompt. repeats: rows of the prompt that share one
    image, as beams do.
    """

    calls: dict[Modality, VisionCall]
    places: dict[Modality, Tensor]
    prompt_index: Int[Tensor, "B n"]
    repeats: dict[Modality, int]

    def gather(self, values: Callable[[VisionCall], Tensor], fill: float = 0.0) -> Float[Tensor, "B n *c"]:
        """What `values` says of the patches of each call, at the visual tokens that are left; `fill` elsewhere."""
        return self.gather_tokens(lambda call: call.to_tokens(values(call)), fill)

    def gather_tokens(self, values: Callable[[VisionCall], Tensor], fill: float = 0.0) -> Float[Tensor, "B n *c"]:
        """The same for values (N, ...) that are of the visual tokens already, image after image."""
        whole: Tensor | None = None
        for modality, call in self.calls.items():
            found = values(call).nan_to_num(fill)
            places, repeats = self.places[modality], self.repeats[modality]
            if whole is None:
                whole = found.new_full((*places.shape, *found.shape[1:]), fill)
            part = whole[::repeats].clone()
            part[places[::repeats]] = found.to(whole)
            whole = torch.where(
                places.reshape(*places.shape, *(1,) * (whole.ndim - 2)), part.repeat_interleave(repeats, 0), whole
            )
        if whole is None:
            raise RuntimeError(
                "the vision tower did not run inside the block, so its attention is not known: call generate() with "
                "pixel_values, not with features made before"
            )
        index = self.prompt_index.reshape(*self.prompt_index.shape, *(1,) * (whole.ndim - 2))
        return whole.gather(1, index.expand(*self.prompt_index.shape, *whole.shape[2:]))

    def attention(self) -> Float[Tensor, "B n"]:
        """The tower's attention to each visual token: of its class token, or, where it has none, of all patches."""
        return self.gather(_salience)

    def keys(self) -> Float[Tensor, "B n d"]:
        """The tower's keys of each visual token, mean over the patches that it carries."""
        return self.gather(VisionCall.keys)

    def projector_input(self) -> Float[Tensor, "B n d"]:
        """What went into the projector for each visual token, where that is one vector for each patch."""
        return self.gather(_features)


def _salience(call: VisionCall) -> Tensor:
    found = call.class_attention()
    return call.received_attention() if found is None else found


def _features(call: VisionCall) -> Tensor:
    if call.projector_input is None:
        raise RuntimeError("the projector's input was not recorded: name 'projector_input' among the needs")
    return call.family.patches(call)


@contextmanager
def recording(call: VisionCall, *, attention: bool) -> Iterator[VisionCall]:
    """Records into `call` what tower and projector do inside the block; `attention`: queries and keys too."""
    base, family = call.base, call.family
    undo: list[Callable[[], None]] = []
    try:
        if attention:
            undo.append(attach_probe(family.tower_attention(base), lambda c, more: _keep_caught(call, c, more)))
        projector = family.projector(base)
        hook = projector.register_forward_pre_hook(lambda module, args: _keep_input(call, module, args))
        undo.append(hook.remove)
        activation = getattr(projector, "act", None)
        if isinstance(activation, nn.Module):
            undo.append(activation.register_forward_pre_hook(lambda _, args: _keep_hidden(call, args)).remove)
        if hasattr(base, "pack_image_features"):
            undo.append(_watch_packing(call))
        yield call
    finally:
        while undo:
            undo.pop()()


def _keep_caught(call: VisionCall, caught: Caught, more: dict[str, Any]) -> None:
    lengths = more.get("cu_seq_lens_q")
    if lengths is None:
        call.caught.append(caught)
        return
    sizes = lengths.diff().tolist()  # flash attention takes all pieces at once
    for query, key in zip(caught.query.split(sizes, 2), caught.key.split(sizes, 2), strict=True):
        call.caught.append(Caught(query, key, None, caught.scale))


def _keep_input(call: VisionCall, module: nn.Module, args: tuple[Any, ...]) -> None:
    if call.projector_input is None:
        call.projector, call.projector_input = module, args[0].detach()


def _keep_hidden(call: VisionCall, args: tuple[Any, ...]) -> None:
    if call.activation_input is None:
        call.activation_input = args[0].detach()


def _watch_packing(call: VisionCall) -> Callable[[], None]:
    base, host = call.base, call.base.pack_image_features

    def pack(image_features: Any, image_sizes: Any, **options: Any) -> Any:
        call.packing = (host, {"image_features": image_features, "image_sizes": image_sizes, **options})
        return host(image_features, image_sizes, **options)

    base.pack_image_features = pack
    return lambda: delattr(base, "pack_image_features")
