"""What every door is put through: inherit `DoorTests` in a test file and say how the method is applied.

The models are tiny, random and seeded. Each test compares two ways to the same result (padded and not, with a cache and
without, saved and loaded), so it holds for any method; what a method computes is for its own tests to say.
"""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from llm_attn.transformers.door import Handle
from llm_attn.transformers.saving import open_doors
from shared_kernels.expectations import message_of, require, require_same

VOCABULARY = 97

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_WINDOWS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 12}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 9, "head_dim": 12},
    "gemma2": {
        **_WINDOWS,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma3_text": {**_WINDOWS, "query_pre_attn_scalar": 12},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {},
}
"""Families of the door tests, with what their tiny configuration has beyond the common shape."""


def tiny_config(family: str, **changes: Any) -> Any:
    """Configuration of a two-layer model of the family; `changes` are fields of its config."""
    return AutoConfig.for_model(family, **{**_SHAPE, **FAMILIES[family], **changes})


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of the family in float32 and eval mode, its weights large enough that attention is not flat."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, initializer_range=0.2, **changes))
    return model.float().eval()


def tokens(batch: int, length: int, *, seed: int = 1) -> Tensor:
    """Random token ids (batch, length), none of them padding."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


class DoorTests:
    """Inherit, define `apply` and, where the method has one, `neutral`; class attributes say what a method cannot do.

    attention: its name as attention implementation, None for a method that is none. by_name: whether that alone
    suffices (it does not where a method has weights). families: that it supports; the first runs the slower tests.
    cache: whether prefill and decode give what one pass gives. static, chunked, beams: whether it generates with a
    static cache, with the prompt in chunks, with beams. packed: whether rows may hold several sequences.
    compiled: whether torch.compile takes it. trained: whether it has weights of its own.
    tolerance: of two ways to one result in float32, relative to the largest logit. length: of the prompts.
    """

    attention: ClassVar[str | None] = None
    by_name: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = tuple(FAMILIES)
    cache: ClassVar[bool] = True
    static: ClassVar[bool] = True
    chunked: ClassVar[bool] = True
    beams: ClassVar[bool] = True
    packed: ClassVar[bool] = True
    compiled: ClassVar[bool] = True
    trained: ClassVar[bool] = False
    tolerance: ClassVar[float] = 2e-5
    length: ClassVar[int] = 23

    def apply(self, model: PreTrainedModel) -> Handle:
        """Opens the door with settings that change the output of a tiny model."""
        raise NotImplementedError

    def neutral(self, model: PreTrainedModel) -> Handle | None:  # noqa: ARG002 - for those who override it
        """Opens the door at the setting where the host's own output comes back; None where there is no such."""
        return None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Runs a test that asks for `family` on each, and one that asks for `model` on the first."""
        if "family" in metafunc.fixturenames:
            metafunc.parametrize("family", self.families)

    def changed(self, family: str | None = None) -> PreTrainedModel:
        """A tiny model of the family with the method at work."""
        model = tiny_model(family or self.families[0])
        self.apply(model)
        return model

    def same(self, given: Tensor, wanted: Tensor) -> None:
        """Raises AssertionError where the two differ by more than `tolerance`, or one is NaN."""
        require_same(given, wanted, self.tolerance)

    # ---- the door itself

    def test_changes_the_output_and_remove_restores_the_host(self, family: str) -> None:
        model, ids = tiny_model(family), tokens(2, self.length)
        before, kind, names = model(ids).logits, type(model), set(model.state_dict())
        handle = self.apply(model)
        require(not torch.equal(model(ids).logits, before), "the method changes nothing in this model")
        require(len(handle.layers_changed) > 0, "the handle says that no layer was changed")
        handle.remove()
        handle.remove()
        require(torch.equal(model(ids).logits, before), "the host does not come back bit for bit")
        require(type(model) is kind and set(model.state_dict()) == names, "remove() leaves something behind")
        require(not open_doors(model), "the model still lists the method")

    def test_neutral_setting_is_the_host(self, family: str) -> None:
        model, ids = tiny_model(family), tokens(2, self.length)
        before = model(ids).logits
        if self.neutral(model) is not None:
            self.same(model(ids).logits, before)

    def test_exception_in_the_block_restores_the_host(self) -> None:
        model = tiny_model(self.families[0])
        before = model(tokens(1, 9)).logits
        try:
            with self.apply(model):
                raise KeyError
        except KeyError:
            pass
        require(torch.equal(model(tokens(1, 9)).logits, before), "the host does not come back")

    def test_applying_twice_is_refused(self) -> None:
        model = self.changed()
        message = message_of(ValueError, lambda: self.apply(model))
        require("remove()" in message, f"the message does not say what to do: {message}")

    def test_chosen_by_name(self) -> None:
        if self.attention is None or not self.by_name:
            return
        family, ids = self.families[0], tokens(2, self.length)
        config = tiny_config(family, initializer_range=0.2)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=self.attention).eval()
        by_name = model(ids).logits
        model.set_attn_implementation("sdpa")
        host = model(ids).logits
        model.set_attn_implementation(self.attention)
        require(torch.equal(model(ids).logits, by_name), "set_attn_implementation differs from from_config")
        torch.manual_seed(0)
        built = type(model)(tiny_config(family, initializer_range=0.2, attn_implementation=self.attention)).eval()
        require(torch.equal(built(ids).logits, by_name), "a config with the name differs from from_config")
        require(host.shape == by_name.shape, "logits of another shape")

    def test_what_the_host_asks_beyond_is_refused(self) -> None:
        if self.attention is None:
            return
        model = self.changed()
        layer = model.get_decoder().layers[0].self_attn
        query = torch.ones(1, 4, 5, layer.head_dim)
        for name in ("s_aux", "position_bias"):
            attend = partial(AttentionInterface()[self.attention], layer, query, query, query, None, **{name: query})
            message_of(ValueError, attend)

    # ---- padding, packing, lengths

    def test_padding_leaves_real_tokens_alone(self, family: str) -> None:
        model, n = self.changed(family), self.length
        long, short = tokens(1, n), tokens(1, n - 6, seed=2)
        wanted = model(short).logits[0]
        for left in (True, False):
            real = slice(6, None) if left else slice(0, n - 6)
            ids, mask = torch.zeros(2, n, dtype=torch.long), torch.zeros(2, n, dtype=torch.long)
            ids[0], mask[0], ids[1, real], mask[1, real] = long[0], 1, short[0], 1
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions).logits
            self.same(logits[1, real], wanted)
            require(bool(logits.isfinite().all()), "padding makes NaN")

    def test_row_of_padding_alone_stays_finite(self) -> None:
        model, ids = self.changed(), tokens(2, self.length)
        mask = torch.tensor([[1], [0]]).expand(-1, self.length)
        logits = model(ids, attention_mask=mask).logits
        require(bool(logits.isfinite().all()), "a row of padding makes NaN")
        self.same(logits[:1], model(ids[:1]).logits)

    def test_one_token_and_none(self) -> None:
        model = self.changed()
        require(bool(model(tokens(3, 1)).logits.isfinite().all()), "one token makes NaN")
        if self.attention is not None and self.by_name:  # hosts themselves fail on no tokens at all
            layer = model.get_decoder().layers[0].self_attn
            query, key = torch.ones(2, 4, 0, layer.head_dim), torch.ones(2, 2, 0, layer.head_dim)
            out, _ = AttentionInterface()[self.attention](layer, query, key, key, None)
            require(out.shape == (2, 0, 4, layer.head_dim), "no tokens give something else than nothing")

    def test_packed_rows_are_as_separate_ones(self) -> None:
        if not self.packed:
            return
        model, parts = self.changed(), (tokens(1, self.length), tokens(1, 11, seed=2))
        positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
        packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
        self.same(packed, torch.cat([model(part).logits for part in parts], 1))

    def test_bfloat16(self) -> None:
        model = self.changed().to(torch.bfloat16)
        require(bool(model(tokens(2, self.length)).logits.isfinite().all()), "NaN or infinity in bfloat16")

    # ---- caches

    def test_prefill_and_decode_are_one_pass(self, family: str) -> None:
        if not self.cache:
            return
        model, ids = self.changed(family), tokens(2, self.length)
        start = self.length - 5
        out = model(ids[:, :start], use_cache=True)
        steps = [out.logits]
        for i in range(start, self.length):
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        self.same(torch.cat(steps, 1), model(ids, use_cache=False).logits)

    def test_generate_alike_with_every_cache(self) -> None:
        model, ids = self.changed(), tokens(2, self.length)
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        greedy = self._generate(model, ids, mask)
        require(greedy.shape == (2, self.length + 6), f"six new tokens were asked for, got {tuple(greedy.shape)}")
        ways: dict[str, tuple[bool, dict[str, Any]]] = {
            "without a cache": (self.cache, {"use_cache": False}),
            "with a static cache": (self.static, {"cache_implementation": "static"}),
            "with the prompt in chunks": (self.chunked, {"prefill_chunk_size": 7}),
        }
        for way, (possible, settings) in ways.items():
            if possible:
                given = self._generate(model, ids, mask, **settings)
                require(torch.equal(given, greedy), f"{way} other tokens are generated")

    def test_beams(self) -> None:
        if not self.beams:
            return
        model, ids = self.changed(), tokens(2, self.length)
        cached = self._generate(model, ids, torch.ones_like(ids), num_beams=3)
        require(cached.shape == (2, self.length + 6), "beam search gives another number of tokens")
        if self.cache:
            plain = self._generate(model, ids, torch.ones_like(ids), num_beams=3, use_cache=False)
            require(torch.equal(cached, plain), "beam search with a cache gives other tokens than without")

    def test_sampling_is_reproducible(self) -> None:
        model, ids = self.changed(), tokens(2, self.length)
        drawn = []
        for _ in range(2):
            torch.manual_seed(3)
            drawn.append(self._generate(model, ids, torch.ones_like(ids), do_sample=True))
        require(torch.equal(*drawn), "the same seed gives other samples")

    def _generate(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        settings = {"do_sample": False, "disable_compile": True, **settings}
        return model.generate(ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **settings)

    # ---- saving, training, compiling

    def test_save_and_load(self, tmp_path: Path) -> None:
        model, ids = self.changed(), tokens(2, self.length)
        if self.trained:
            _disturb(model)
        model.save_pretrained(tmp_path / "with")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "with").eval()
        require(open_doors(loaded) == open_doors(model), "the method is not at work in the loaded model")
        require(torch.equal(loaded(ids).logits, model(ids).logits), "the loaded model computes something else")
        for name, value in model.state_dict().items():
            require(torch.equal(loaded.state_dict()[name], value), f"{name} comes back changed")

    def test_gradient_checkpointing_changes_nothing(self) -> None:
        results = []
        for checkpointing in (False, True):
            model, ids = self.changed().train(), tokens(2, self.length)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            results.append((loss.detach(), gradients, dict(model.named_buffers())))
        (loss, gradients, buffers), (loss_again, gradients_again, buffers_again) = results
        self.same(loss_again, loss)
        require(gradients.keys() == gradients_again.keys(), "other parameters get a gradient")
        for name in gradients:
            self.same(gradients_again[name], gradients[name])
        for name in buffers:
            self.same(buffers_again[name], buffers[name])

    def test_trainer_moves_the_weights(self, tmp_path: Path) -> None:
        host_names = set(tiny_model(self.families[0]).state_dict())
        model = self.changed()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        rows = [{"input_ids": row, "labels": row} for row in tokens(4, self.length)]
        arguments = TrainingArguments(
            tmp_path, max_steps=2, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
        )
        Trainer(model, arguments, train_dataset=rows).train()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        own = before.keys() - host_names
        require(bool(own) == self.trained, f"weights of the method's own: {sorted(own)}, but trained = {self.trained}")
        require(own <= moved, f"training leaves {sorted(own - moved)} where it was")
        require(any("q_proj" in name or "qkv" in name for name in moved), "training does not reach the queries")

    def test_lora_on_top(self) -> None:
        from peft import LoraConfig, get_peft_model  # of the extra `test`

        model, ids = self.changed(), tokens(2, self.length)
        before = model(ids).logits
        linear = "qkv_proj" if self.families[0] == "phi3" else "q_proj"
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[linear]))
        self.same(adapted(ids).logits, before)
        adapted(ids, labels=ids).loss.backward()
        grads = [p.grad.abs().max().item() for name, p in adapted.named_parameters() if "lora_B" in name]
        require(min(grads) > 0, "no gradient reaches the adapters")

    def test_compiled_is_eager(self) -> None:
        if not self.compiled:
            return
        model, ids = self.changed(), tokens(2, self.length)
        compiled = torch.compile(model, backend="aot_eager")
        self.same(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def _disturb(model: PreTrainedModel) -> None:
    # fresh weights would come back without being saved
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
