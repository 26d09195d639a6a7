"""The model that the methods of this package are judged on: a small LLaVA for the scenes of `vlm_prune.scenes`.

A CLIP tower with a class token (160 x 160 pixels, 256 visual tokens, read before its last layer) and a Llama of 6
layers, in transformers' own classes, 2.4 M parameters together. `train_vlm.py` makes the checkpoint, `load_trained`
gives it back, `answer` asks it questions, as everybody asks a LLaVA: one picture and one question at a time.

For training and for long evaluations many questions share one picture in one packed sequence: a prefix that all of
them see, then segments that see the prefix and themselves, each at the positions it has alone. The answers are those to
each question alone (tested), at a tenth of the cost.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_prune.scenes import KINDS, Question, Scene, build_processor, patches_of, prompt

CHECKPOINT = Path(__file__).parent / "checkpoints" / "shapes_vlm"
SIZE, PATCH = 160, 10
TOKENS = (SIZE // PATCH) ** 2
SEGMENT = 10  # tokens of the longest question, "ASSISTANT:" and the answer
IGNORED = -100
Look = Literal["own", "none", "other"]
Example = tuple[Scene, list[Question]]


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """The untrained model."""
    torch.manual_seed(seed)
    tokenizer = build_processor(size=SIZE, patch=PATCH).tokenizer
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH, projection_dim=128, initializer_factor=1.0,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS, vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    _start_local(model.model.vision_tower)
    _start_copying(model)
    return model


@torch.no_grad()
def _start_local(tower: nn.Module) -> None:
    """Positions start as 2-D waves and queries as keys, so that a patch at first looks at patches like and near it.

    A tower that has to find out from scratch which positions are neighbours needs several times as many pictures
    (mimetic initialisation: Trockman and Kolter, ICML 2023, arXiv 2305.09828). Everything stays trainable.
    """
    table = tower.embeddings.position_embedding.weight
    side, waves = SIZE // PATCH, table.shape[1] // 4
    angles = torch.arange(side)[:, None] * (1.0 / 10.0 ** (torch.arange(waves) / waves))
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    table[1:] = 0.25 * torch.cat([rows, columns], -1).reshape(side * side, -1)
    for layer in tower.encoder.layers:
        query = layer.self_attn.q_proj.weight.normal_(std=table.shape[1] ** -0.5)
        layer.self_attn.k_proj.weight.copy_(query)


@torch.no_grad()
def _start_copying(model: LlavaForConditionalGeneration) -> None:
    """Queries start as keys, outputs as values turned back: a token at first looks at tokens like it and copies them.

    Looking up (find the tokens that a word fits, read off what else they say) is what all questions need, and from
    scratch a language model takes long to come upon it.
    """
    for layer in model.model.language_model.layers:
        attention, width = layer.self_attn, layer.self_attn.q_proj.weight.shape[1]
        query = attention.q_proj.weight.normal_(std=0.8 * width**-0.5)
        attention.k_proj.weight.copy_(query)
        value = nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(0.03 * value.T)
    model.lm_head.weight.copy_(2 * model.get_input_embeddings().weight)


def load_trained(path: Path = CHECKPOINT) -> tuple[LlavaForConditionalGeneration, transformers.LlavaProcessor]:
    """The trained model (float32, eval mode, SDPA) and its processor: `model, processor = load_trained()`.

    The weights are stored in half precision; `path` is an ordinary checkpoint, so `from_pretrained` reads it as well.
    FileNotFoundError where it was not trained yet.
    """
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"no checkpoint at {path}: run train_vlm.py")
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    return model.eval(), transformers.AutoProcessor.from_pretrained(path)


def pixels(scenes: Sequence[Scene]) -> Float[Tensor, "scenes 3 height width"]:
    """The pictures as the processor gives them, from -1 to 1."""
    stack = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    return stack.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


# -- many questions to a picture in one sequence --------------------------------------------------------------------


def _float_attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **kwargs: object,  # noqa: ARG001
) -> tuple[Tensor, None]:
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask, scale=scaling)
    return out.transpose(1, 2), None


def _packed_attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    *,
    prefix: int,
    **kwargs: object,  # noqa: ARG001
) -> tuple[Tensor, None]:
    query, key, value = query.float(), key.float(), value.float()
    with torch.autocast("cpu", enabled=False):
        head = F.scaled_dot_product_attention(
            query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True, scale=scaling
        )
        tail = F.scaled_dot_product_attention(
            query[:, :, prefix:], key, value, attn_mask=mask[:, :, prefix:], scale=scaling
        )
    return torch.cat([head, tail], 2).transpose(1, 2), None


# Attention in float32 under autocast (on CPUs faster than in bfloat16), without scores that packed questions never use
AttentionInterface.register("scenes_float", _float_attention)
AttentionInterface.register("scenes_packed", _packed_attention)


def prepare_packed(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The same model with the attention that `packed_logits` needs; `model.set_attn_implementation` changes it back."""
    model.model.vision_tower.config._attn_implementation = "scenes_float"
    model.model.language_model.config._attn_implementation = "scenes_packed"
    return model


def segments(
    questions: Sequence[Sequence[Question]], tokenizer: transformers.PreTrainedTokenizerFast
) -> tuple[Int[Tensor, "pictures questions segment"], Int[Tensor, "pictures questions"], Int[Tensor, "..."], Tensor]:
    """Ids of questions with answers; the id of each answer; the place in the segment that predicts it; the place of the
    last word of each question that says what is asked about, behind which the answer is settled."""
    pictures, number = len(questions), len(questions[0])
    ids = np.full((pictures, number, SEGMENT), tokenizer.pad_token_id, np.int64)
    truth, at, settled = (np.zeros((pictures, number), np.int64) for _ in range(3))
    vocab = tokenizer.get_vocab()
    for i, row in enumerate(questions):
        for j, question in enumerate(row):
            words = [*question.text.split(), "ASSISTANT:", question.answer]
            ids[i, j, : len(words)] = [vocab[word] for word in words]
            truth[i, j], at[i, j] = vocab[words[-1]], len(words) - 2
            settled[i, j] = len(words) - (6 if question.kind == "count" else 4)
    return tuple(torch.from_numpy(array) for array in (ids, truth, at, settled))


def visible_tokens(scenes: Sequence[Scene], number: int, rng: np.random.Generator) -> Int[Tensor, "scenes number"]:
    """`number` visual tokens of each scene, rising: the middles of things first, then their rims, others by chance."""
    if number >= TOKENS:
        return torch.arange(TOKENS).expand(len(scenes), -1)
    rows = []
    for scene in scenes:
        boxes = [thing.box for thing in scene.things]
        middles = [(left + 5, top + 5, right - 5, bottom - 5) for left, top, right, bottom in boxes]
        order = rng.random(TOKENS)
        order -= 2.0 * patches_of(middles, size=SIZE, patch=PATCH) + patches_of(boxes, size=SIZE, patch=PATCH)
        rows.append(np.sort(np.argsort(order)[:number]))
    return torch.from_numpy(np.stack(rows))


def packed_mask(prefix: int, number: int) -> Bool[Tensor, "1 1 tokens tokens"]:
    """The prefix is causal; a segment sees the prefix and, causally, itself."""
    total = prefix + number * SEGMENT
    owner = torch.cat([torch.full((prefix,), -1), torch.arange(number).repeat_interleave(SEGMENT)])
    allowed = (owner[None] == -1) | (owner[None] == owner[:, None])
    return (allowed & torch.ones(total, total, dtype=torch.bool).tril())[None, None]


def packed_logits(
    model: LlavaForConditionalGeneration,
    features: Float[Tensor, "pictures tokens width"],
    ids: Int[Tensor, "pictures questions segment"],
    visible: Int[Tensor, "pictures visible"],
) -> Float[Tensor, "pictures questions segment vocabulary"]:
    """Logits of all segments; `features` come out of the projector, `visible` says which of them are seen."""
    pictures, number, _ = ids.shape
    embed, config = model.get_input_embeddings(), model.config.text_config
    opening = torch.tensor([[config.bos_token_id, _USER]]).expand(pictures, -1)
    shown = features.gather(1, visible[..., None].expand(-1, -1, features.shape[-1]))
    inputs = torch.cat([embed(opening), shown.to(embed.weight.dtype), embed(ids.reshape(pictures, -1))], 1)
    first = opening.shape[1] + features.shape[1]
    positions = torch.cat(
        [
            torch.arange(opening.shape[1]).expand(pictures, -1),
            opening.shape[1] + visible,
            (first + torch.arange(SEGMENT)).repeat(number).expand(pictures, -1),
        ],
        dim=1,
    )
    prefix = opening.shape[1] + visible.shape[1]
    out = model.model.language_model(
        inputs_embeds=inputs, position_ids=positions, attention_mask=packed_mask(prefix, number), use_cache=False,
        prefix=prefix,
    )  # fmt: skip
    return model.lm_head(out.last_hidden_state[:, prefix:]).view(pictures, number, SEGMENT, -1)


_USER = build_processor(size=SIZE, patch=PATCH).tokenizer.convert_tokens_to_ids("USER:")


# -- evaluation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Some questions, what the model was given, and what it said."""

    questions: list[Question]
    inputs: dict[str, Tensor]
    said: list[str]

    @property
    def hits(self) -> list[bool]:
        """Which answers are right."""
        return [said == question.answer for said, question in zip(self.said, self.questions, strict=True)]

    @property
    def pairs(self) -> list[tuple[Question, bool]]:
        """Each question with whether it was answered right."""
        return list(zip(self.questions, self.hits, strict=True))


def answer(
    model: LlavaForConditionalGeneration,
    processor: transformers.LlavaProcessor,
    examples: Sequence[Example],
    *,
    look: Look = "own",
    batch: int = 24,
) -> Iterator[Batch]:
    """Asks every question by itself, in one forward for `batch` of them; an answer is its first word.

    look: with its "own" picture, with "none" (text alone), or with the picture of the "other", next scene.
    """
    rows = [
        (question, (scene if look == "own" else examples[(i + 1) % len(examples)][0]).image)
        for i, (scene, questions) in enumerate(examples)
        for question in questions
    ]
    for start in range(0, len(rows), batch):
        questions, images = zip(*rows[start : start + batch], strict=True)
        inputs = encode(processor, questions, None if look == "none" else images)
        with torch.inference_mode():
            best = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
        yield Batch(list(questions), inputs, processor.tokenizer.convert_ids_to_tokens(best.tolist()))


@torch.inference_mode()
def answer_packed(
    model: LlavaForConditionalGeneration,
    tokenizer: transformers.PreTrainedTokenizerFast,
    examples: Sequence[Example],
    *,
    look: Look = "own",
    batch: int = 8,
) -> Iterator[tuple[list[Question], list[bool]]]:
    """As `answer`, all questions of a picture in one sequence, of a model that `prepare_packed` made ready."""
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        shift = int(look == "other")
        shown = [examples[(start + shift + i) % len(examples)][0] for i in range(len(part))]
        asked = [questions for _, questions in part]
        ids, truth, at, _ = segments(asked, tokenizer)
        tower = model.model.vision_tower(pixels(shown), output_hidden_states=True)
        features = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
        logits = packed_logits(model, features, ids, torch.arange(TOKENS).expand(len(part), -1))
        best = logits.gather(2, at[..., None, None].expand(-1, -1, 1, logits.shape[-1])).squeeze(2).argmax(-1)
        yield [question for row in asked for question in row], (best == truth).flatten().tolist()


def encode(
    processor: transformers.LlavaProcessor, questions: Sequence[Question], images: Sequence[np.ndarray] | None
) -> dict[str, Tensor]:
    """Inputs of the model for questions with a picture each, or with none."""
    texts = [prompt(question.text) for question in questions]
    if images is None:
        texts = [text.replace("<image> ", "") for text in texts]
        inputs = processor.tokenizer(texts, padding=True, return_tensors="pt")
    else:
        inputs = processor(images=list(images), text=texts, padding=True, return_tensors="pt")
    return {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask", "pixel_values")}


def guess_from_words(seen: Sequence[Example], asked: Sequence[Example]) -> list[tuple[Question, bool]]:
    """What the best model without eyes gets: to each question the most frequent answer that `seen` has to its words."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, questions in seen:
        for question in questions:
            answers[question.text][question.answer] += 1
    best = {text: counts.most_common(1)[0][0] for text, counts in answers.items()}
    return [(question, best.get(question.text) == question.answer) for _, questions in asked for question in questions]


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if total == 0:
        return 0.0, 1.0
    share, z = right / total, 1.96
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return middle - reach, middle + reach


def summary(results: Sequence[tuple[Question, bool]]) -> dict[str, dict[str, float | int | list[float]]]:
    """Accuracy of each kind and of all, with its interval and the number of questions."""
    table = {}
    for kind in (*KINDS, "all"):
        hits = [hit for question, hit in results if kind in (question.kind, "all")]
        low, high = interval(sum(hits), len(hits))
        table[kind] = {
            "accuracy": round(sum(hits) / max(1, len(hits)), 4), "interval": [round(low, 4), round(high, 4)],
            "questions": len(hits),
        }  # fmt: skip
    return table
