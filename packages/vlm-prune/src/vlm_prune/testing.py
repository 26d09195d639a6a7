"""What every pruning method is put through: inherit `MethodTests` in a test file and say how it is configured.

The models are tiny, random and seeded (`vlm_prune.tiny_models`). The judge is the host itself: nothing dropped, but in
every layer behind a stage the keys of dropped tokens hidden. Dropping is right when all logits agree, in prefill and
while decoding, whatever a method chooses; what it should choose is for its own tests to say.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from shared_kernels.expectations import message_of, require, require_same
from vlm_prune.criterion import Criterion, Selection
from vlm_prune.door import Method, PruneHandle, open_pruner
from vlm_prune.tiny_models import FAMILIES, LONG, SHORT, prompt, tiny_model

FAST_FAMILIES = ("llava_next", "qwen3_vl", "gemma3")
"""Newlines and ragged counts; M-RoPE and DeepStack; sliding layers and bidirectional images."""
NEW_TOKENS = 4

Inputs = Mapping[str, Tensor]


@cache
def shared_model(family: str) -> Any:
    """A tiny model that tests share; whoever changes it changes it back."""
    return tiny_model(family)


@torch.no_grad()
def generate(model: Any, inputs: Inputs, **options: Any) -> Any:
    """Greedy decoding of a few tokens with all logits."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None} | options
    return model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)


def logits(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    """Logits (B, t, vocabulary) of the tokens that greedy decoding finds."""
    return torch.stack(generate(model, inputs, **options).logits, 1)


@contextmanager
def nothing_dropped(handle: PruneHandle) -> Iterator[Any]:
    """The handle's model without pruning, in which layers behind a stage do not see what the last prompt dropped.

    The handle is removed for good. Attention must be sdpa.
    """
    prefill, decoder, model = handle.pruner.current, handle.pruner.decoder, handle.model
    handle.remove()
    if prefill is None:
        raise ValueError("no prompt with images was read yet")
    hooks = [
        layer.register_forward_pre_hook(_hide(prefill.group(i), prefill.length, i), with_kwargs=True)
        for i, layer in enumerate(decoder.layers)
        if prefill.group(i) is not None
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _hide(group: Any, length: int, i: int) -> Callable[..., Any]:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        queries, cache = args[0].shape[1], kwargs.get("cache", kwargs.get("past_key_values"))
        past = 0 if cache is None or i >= len(cache.layers) else int(cache.layers[i].get_seq_length())
        mask = kwargs["attention_mask"]
        keys = past + queries if mask is None else mask.shape[-1]
        if mask is None:
            rows = torch.arange(past, past + queries)
            mask = (rows[:, None] >= torch.arange(keys))[None, None]
        alive = torch.zeros(len(group.valid), length, dtype=torch.bool)
        alive = alive.scatter(1, group.prompt_index, True) if not group.ragged else _scatter(alive, group)
        repeats = args[0].shape[0] // len(alive)
        alive = alive.repeat_interleave(repeats, 0)
        alive = torch.cat([alive, alive.new_ones(len(alive), past + queries - length)], 1)[:, -keys:]
        mask = mask & alive[:, None, None]
        if past == 0:  # what was dropped keeps a row that is not empty
            mask = mask | torch.eye(queries, dtype=torch.bool)
        return args, {**kwargs, "attention_mask": mask}

    return hook


def _scatter(alive: Tensor, group: Any) -> Tensor:
    for row, index, valid in zip(alive, group.prompt_index, group.valid, strict=True):
        row[index[valid]] = True
    return alive


class MethodTests:
    """Inherit and define `config`; class attributes say what a method cannot do.

    families: that run by default; those of `supported` beyond run as slow. keep: ratio of the tests. merges: whether
    tokens get other values when they are kept, which hiding keys cannot imitate. tolerance: of two ways to one result
    in float32.
    """

    families: ClassVar[tuple[str, ...]] = FAST_FAMILIES
    supported: ClassVar[tuple[str, ...]] = FAMILIES
    keep: ClassVar[float] = 0.4
    merges: ClassVar[bool] = False
    tolerance: ClassVar[float] = 2e-5

    def config(self, keep: float) -> Method:
        """The method's settings at that keep ratio."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Runs a test that asks for `family` on the fast ones, and as a slow test on all others."""
        import pytest  # by whom this is called

        if "family" in metafunc.fixturenames:
            others = [f for f in self.supported if f not in self.families]
            slow = [pytest.param(f, marks=pytest.mark.slow) for f in others]
            metafunc.parametrize("family", [*self.families, *slow])

    def open(self, family: str, keep: float | None = None) -> PruneHandle:
        """The method at work in the shared model of the family, until the test ends."""
        handle = open_pruner(shared_model(family), self.config(self.keep if keep is None else keep))
        self.opened = [*getattr(self, "opened", []), handle]
        return handle

    def teardown_method(self) -> None:
        """A test that failed leaves no method in a shared model."""
        for handle in getattr(self, "opened", []):
            handle.remove()

    def same(self, given: Tensor, wanted: Tensor) -> None:
        """Raises AssertionError where the two differ by more than `tolerance`, relative to the largest, or are NaN."""
        require_same(given, wanted, self.tolerance)

    def test_keep_all_is_the_host(self, family: str) -> None:
        model: Any = shared_model(family)
        inputs = prompt(family, LONG, SHORT)
        before, whole = logits(model, inputs), model(**inputs).logits
        with self.open(family, 1.0):
            require(torch.equal(logits(model, inputs), before), "keep 1.0 changes what is generated")
            require(torch.equal(model(**inputs).logits, whole), "keep 1.0 changes the logits of the prompt")

    def test_dropping_is_hiding(self, family: str) -> None:
        inputs = prompt(family, LONG, SHORT)
        handle = self.open(family)
        pruned = generate(handle.model, inputs)
        report = handle.report
        require(int(report.entering.min()) < int(report.num_tokens.min()), "the method drops nothing")
        if self.merges:
            handle.remove()
            return
        with nothing_dropped(handle) as model:
            hidden = generate(model, inputs)
        self.same(torch.stack(pruned.logits), torch.stack(hidden.logits))
        require(torch.equal(pruned.sequences, hidden.sequences), "other tokens are generated")
        host = generate(shared_model(family), inputs)
        distance = (torch.stack(host.logits) - torch.stack(pruned.logits)).abs().max().item()
        require(distance > 1e-3, "hiding what was dropped changes nothing, so this test shows nothing")

    def test_samples_do_not_depend_on_their_batch(self, family: str) -> None:
        with self.open(family) as handle:
            together = logits(handle.model, prompt(family, LONG, SHORT))
            kept = {layer: [k.clone() for k in found] for layer, found in handle.report.kept.items()}
            alone = logits(handle.model, prompt(family, SHORT))
            padding = prompt(family, LONG)["input_ids"].shape[1] - prompt(family, SHORT)["input_ids"].shape[1]
            for layer, found in handle.report.kept.items():
                require(torch.equal(found[0] + padding, kept[layer][1]), f"other tokens stay behind layer {layer}")
        self.same(together[1:], alone)

    def test_beams_and_a_static_cache(self) -> None:
        family = self.families[0]
        inputs = prompt(family, LONG, SHORT)
        handle = self.open(family)
        self.same(logits(handle.model, inputs, cache_implementation="static"), logits(handle.model, inputs))
        host: Any = handle.model
        beams = host.generate(**inputs, max_new_tokens=NEW_TOKENS, num_beams=3, eos_token_id=None)
        if self.merges:
            handle.remove()
            return
        with nothing_dropped(handle) as model:
            wanted = model.generate(**inputs, max_new_tokens=NEW_TOKENS, num_beams=3, eos_token_id=None)
        require(torch.equal(beams, wanted), "beam search finds other tokens")

    def test_second_turn(self) -> None:
        family = self.families[0]
        inputs = prompt(family, LONG, SHORT)
        handle = self.open(family)
        given = _two_turns(handle.model, inputs)
        if self.merges:
            handle.remove()
            return
        with nothing_dropped(handle) as model:
            wanted = _two_turns(model, inputs)
        self.same(given, wanted)

    def test_remove_and_exceptions_restore_the_host(self) -> None:
        family = self.families[0]
        model, inputs = shared_model(family), prompt(family, LONG, SHORT)
        before, names, state = logits(model, inputs), set(vars(model)), set(vars(model.base_model))
        hooks = _hooks(model)
        try:
            with self.open(family) as handle:
                require(len(handle.layers_changed) > 0, "the handle says that no layer was changed")
                require(not torch.equal(logits(model, inputs), before), "the method changes nothing")
                raise KeyError
        except KeyError:
            pass
        handle.remove()
        require(torch.equal(logits(model, inputs), before), "the host does not come back bit for bit")
        require(set(vars(model)) == names and set(vars(model.base_model)) == state, "something is left behind")
        require(_hooks(model) == hooks, "hooks are left in the model")
        left = [type(m).__name__ for m in model.modules() if hasattr(m, "vlm_prune_probe")]
        require(not left, f"probes are left in {left}")

    def test_bfloat16(self) -> None:
        family = self.families[0]
        model = tiny_model(family).to(torch.bfloat16)
        inputs = prompt(family, LONG, SHORT)
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        with open_pruner(model, self.config(self.keep)):
            require(bool(logits(model, inputs).isfinite().all()), "NaN or infinity in bfloat16")

    def test_eager_attention_is_sdpa(self) -> None:
        family = self.families[0]
        model, inputs = tiny_model(family), prompt(family, LONG, SHORT)
        with open_pruner(model, self.config(self.keep)):
            wanted = logits(model, inputs)
        model.set_attn_implementation("eager")
        with open_pruner(model, self.config(self.keep)):
            self.same(logits(model, inputs), wanted)

    def test_prompt_without_images_is_left_alone(self) -> None:
        family = self.families[0]
        model, ids = shared_model(family), torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        before = logits(model, inputs)
        with self.open(family) as handle:
            require(torch.equal(logits(model, inputs), before), "a prompt without images is changed")
            message = message_of(RuntimeError, lambda: handle.report)
            require("images" in message, f"the message does not say what is missing: {message}")

    def test_out_of_range_is_refused(self) -> None:
        for keep in (0.0, -0.1, 1.5, float("nan")):
            message = message_of(ValueError, lambda k=keep: self.config(k))  # type: ignore[misc]
            require(str(keep) in message and "(0, 1]" in message, f"the message does not help: {message}")


def _hooks(model: Any) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def _two_turns(model: Any, inputs: Inputs) -> Tensor:
    first = generate(model, inputs)
    more = torch.randint(3, 90, (len(first.sequences), 5), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1])], 1)
    second = {"input_ids": ids, "attention_mask": mask.long(), "past_key_values": first.past_key_values}
    if "mm_token_type_ids" in inputs:
        pad = torch.zeros(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int)
        second["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], pad], 1)
    return torch.stack(generate(model, second).logits, 1)


def fixed_choice(kept: Callable[[Any], Tensor], **options: Any) -> Criterion:
    """A criterion that keeps what a function of the context says, for tests of the engine."""
    return Criterion(
        name="fixed",
        score=lambda context: context.visual.float(),
        select=lambda context, _: Selection(kept(context) & context.visual),
        **options,
    )
