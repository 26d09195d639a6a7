"""What is known of one prompt: which tokens are visual, which are left, and what the caches of its layers hold.

The engine keeps one `Prefill` for each cache. Two index maps run along: to the prompt (positions, reports, windows) and
to what went into the language model (the host's masks and rotary tables have that length).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from shared_kernels import kept_indices, select_tokens
from vlm_prune.criterion import Context, Prompt, Selection
from vlm_prune.families import Family
from vlm_prune.vision import Modality, Vision, VisionCall


@dataclass(frozen=True)
class Group:
    """Layers from `first_layer` on hold these tokens: prompt_index (B, n), valid (B, n)."""

    first_layer: int
    prompt_index: Int[Tensor, "B n"]
    valid: Bool[Tensor, "B n"]
    ragged: bool


@dataclass
class Prefill:
    """A prompt while it is read, and afterwards what decoding must know of it.

    length: S of the prompt. places: placeholders by modality, (B, S). visual: (B, n), tokens left that may be dropped.
    separators: (B, n), newline tokens. valid: (B, n). view: (B, n). prompt_index: (B, n) into the prompt.
    local_index: (B, n) into what the language model was given, None before the first stage inside it.
    groups: what layers hold, from stage to stage. kept: visual tokens after each stage, by `after_layer`.
    tail: (B, t), False on padding behind the prompt; None where there is none. done: prefill is over.
    """

    length: int
    places: dict[Modality, Bool[Tensor, "B S"]]
    visual: Bool[Tensor, "B n"]
    separators: Bool[Tensor, "B n"]
    valid: Bool[Tensor, "B n"]
    view: Int[Tensor, "B n"]
    prompt_index: Int[Tensor, "B n"]
    num_visual: Int[Tensor, "B"]
    padding: Bool[Tensor, "B n"] | None = None
    local_index: Int[Tensor, "B n"] | None = None
    calls: dict[Modality, VisionCall] = field(default_factory=dict)
    repeats: dict[Modality, int] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    kept: dict[int, list[Tensor]] = field(default_factory=dict)
    notes: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    tail: Bool[Tensor, "B t"] | None = None
    caught: dict[int, Any] = field(default_factory=dict)
    prompt: Prompt | None = None
    done: bool = False

    def context(self, after_layer: int, hidden: Tensor, num_kept: Tensor, **more: Any) -> Context:
        """What a criterion is shown at this stage."""
        vision = Vision(self.calls, self.places, self.prompt_index, self.repeats) if self.calls else None
        return Context(
            after_layer=after_layer, hidden=hidden, visual=self.visual, text=self.guidance(), valid=self.valid,
            prompt_index=self.prompt_index, view=self.view, num_visual=self.num_visual, num_kept=num_kept,
            prompt=self.prompt, vision=vision, padding=self.padding, **more,
        )  # fmt: skip

    def guidance(self) -> Bool[Tensor, "B n"]:
        """Tokens behind the last visual one; where there are none, the last token, if it is text."""
        visual = self.visual | self.separators
        later = visual.flip(1).cumsum(1).flip(1) == 0
        text = later & self.valid
        last = torch.zeros_like(text)
        last[:, -1] = self.valid[:, -1] & ~visual[:, -1]
        return torch.where(text.any(1, keepdim=True), text, last)

    def drop(self, selection: Selection, *, inside: bool, first_layer: int) -> tuple[Tensor, Tensor]:
        """Keeps text, separators and what was selected; returns indices (B, m) into the tokens so far, and valid.

        Samples that keep fewer are padded on the left, with tokens that they dropped: the last token stays last.
        """
        keep = (self.valid & ~self.visual) | selection.kept
        index, valid = kept_indices(keep, pad="left")
        moved = select_tokens(index, self.prompt_index, self.visual, self.separators, self.view)
        self.prompt_index, self.visual, self.separators, self.view = moved
        self.visual, self.separators = self.visual & valid, self.separators & valid
        if self.padding is not None:
            self.padding = self.padding.gather(1, index)
        if inside:
            self.local_index = index if self.local_index is None else self.local_index.gather(1, index)
        self.valid = valid
        self.groups.append(Group(first_layer, self.prompt_index, valid, not bool(valid.all())))
        self.kept[first_layer - 1] = [p[v] for p, v in zip(self.prompt_index, self.visual, strict=True)]
        return index, valid

    def group(self, layer: int) -> Group | None:
        """What the layer holds, None where nothing was dropped before it."""
        reached = [g for g in self.groups if g.first_layer <= layer]
        return reached[-1] if reached else None


def runs(visual: Bool[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    """Number of the run of adjacent visual tokens that each belongs to, in its row; -1 elsewhere."""
    before = torch.nn.functional.pad(visual[:, :-1], (1, 0), value=False)
    return torch.where(visual, (visual & ~before).cumsum(1) - 1, -1)


def new_prefill(
    ids: Int[Tensor, "B S"], valid: Bool[Tensor, "B S"], placeholders: dict[Modality, int]
) -> Prefill | None:
    """A prompt at its beginning; None where it has no visual token."""
    places = {modality: (ids == number) & valid for modality, number in placeholders.items()}
    places = {modality: found for modality, found in places.items() if bool(found.any())}
    if not places:
        return None
    visual = torch.stack(list(places.values())).any(0)
    everywhere = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return Prefill(
        length=ids.shape[1],
        places=places,
        visual=visual,
        separators=torch.zeros_like(visual),
        valid=valid,
        view=runs(visual),
        prompt_index=everywhere,
        num_visual=visual.sum(1),
    )


def adopt_vision(
    prefill: Prefill, family: Family, base: Any, calls: dict[Modality, VisionCall], embeds: Tensor
) -> None:
    """Takes what tower and projector did for this prompt, finds newline tokens and views.

    ValueError where a part of the images only is in these tokens, as when a prompt is read in chunks.
    """
    for modality, places in prefill.places.items():
        call = calls.get(modality)
        if call is None:
            continue
        there, encoded = int(places.sum()), sum(call.counts)
        if encoded == 0 or there % encoded:
            raise ValueError(
                f"{encoded} visual tokens were encoded, {there} are in this part of the prompt: prompts must be read "
                "at once while tokens are dropped; leave prefill_chunk_size out"
            )
        prefill.calls[modality] = call
        prefill.repeats[modality] = there // encoded
    newline = family.newline(base)
    if newline is not None:
        same = (embeds == newline.to(embeds)).all(-1)
        prefill.separators = prefill.visual & same
        prefill.visual = prefill.visual & ~same
        prefill.num_visual = prefill.visual.sum(1)
    prefill.prompt = Prompt(embeds.detach(), prefill.visual, prefill.guidance())
    if prefill.calls and set(prefill.calls) == set(prefill.places):
        prefill.view = _views(prefill)


def _views(prefill: Prefill) -> Tensor:
    vision = Vision(prefill.calls, prefill.places, prefill.prompt_index, prefill.repeats)
    view = torch.full_like(prefill.view, -1)
    offset = 0
    for modality, call in prefill.calls.items():
        numbers = call.views()
        part = Vision({modality: call}, vision.places, vision.prompt_index, vision.repeats)
        moved = part.gather_tokens(lambda _, n=numbers: n.double(), -1.0).long()  # type: ignore[misc]
        view = torch.where(prefill.places[modality] & (moved >= 0), moved + offset, view)
        offset += int(numbers.max()) + 1 if len(numbers) else 0
    return torch.where(prefill.visual, view, -1)
