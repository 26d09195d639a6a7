"""Retrieval tasks: a JSON object of random keys and sentences, three worked questions, and one more (section 3.1).

Every sample is text that no model has seen, and its answer can only be copied from the context, by whoever finds the
key there. The span of the answer in the context is known, which tells a head that copies from one that guesses.

Decided here: pieces are tokenised one by one and joined, so that a value has the same tokens in the context and in the
answer, and its place is known without searching; sentences begin with a blank in both places for that reason. They come
from a small grammar, or from the caller's own text.
"""

import json
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_INSTRUCTION = (
    "Please extract the value corresponding to the specified key from the following JSON object. "
    "Output only the value of the corresponding key and nothing else. The JSON data is as follows:\n"
)
_ALPHABET = string.ascii_letters + string.digits

_WORDS = """
who: carpenter teacher pilot gardener sailor painter doctor baker farmer librarian engineer tailor nurse miner
manner: old young quiet cheerful tired clever patient famous careful stubborn
did: carried repaired painted counted measured forgot collected sold borrowed cleaned hid described
number: two three four five six seven eight nine ten twelve twenty thirty
look: green wooden broken silver heavy empty yellow striped rusty paper golden tiny
what: lanterns ladders bottles letters clocks baskets chairs coins kites violins helmets ropes maps bells
where: harbor market river station museum bakery bridge orchard tower library valley lighthouse
when: dawn noon midnight winter breakfast Sunday sunset Christmas lunch spring
"""
_GRAMMAR = {kind: words.split() for kind, words in (line.split(": ") for line in _WORDS.strip().splitlines())}
_SENTENCE = "The {manner} {who} {did} {number} {look} {what} near the {where} before {when}."


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """The generated set; the defaults are the paper's."""

    num_samples: int = 800
    """Samples."""
    demonstrations: int = 3
    """Questions with their answers before the one that counts."""
    max_tokens: int = 4096
    """Length of a sample with its answer: as many pairs as fit."""
    max_value_tokens: int = 30
    """Values are cut to so many tokens."""
    seed: int = 0
    """Same seed, same samples."""

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("demonstrations", 0), ("max_value_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class RetrievalSample:
    """Token ids of prompt and answer, and where the answer stands.

    ids: all tokens, the answer last. answer: its length. context: where the same tokens begin in the JSON object.
    """

    ids: tuple[int, ...]
    answer: int
    context: int

    @property
    def prompt(self) -> int:
        """Length of the prompt: the place of the answer's first token."""
        return len(self.ids) - self.answer


def generated_sentences(seed: int) -> Iterator[str]:
    """Plain English sentences without end, seldom the same one twice."""
    draw = random.Random(seed)
    while True:
        yield _SENTENCE.format(**{kind: draw.choice(words) for kind, words in _GRAMMAR.items()})


def retrieval_samples(
    tokenizer: PreTrainedTokenizerBase, config: RetrievalConfig | None = None, *, sentences: Sequence[str] | None = None
) -> Iterator[RetrievalSample]:
    """Yields `config.num_samples` samples of at most `config.max_tokens` tokens.

    sentences: values to draw from, one line of text each; those with quotes or backslashes are left out. By default
    generated. ValueError if `max_tokens` has no room for the questions, or the sentences are too few.
    """
    config = RetrievalConfig() if config is None else config
    drawn = _Drawn(tokenizer, config, sentences)
    for _ in range(config.num_samples):
        yield _sample(tokenizer, config, drawn)


class _Drawn:
    """Keys and values, drawn one after another."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: RetrievalConfig, sentences: Sequence[str] | None
    ) -> None:
        self.tokenizer, self.longest = tokenizer, config.max_value_tokens
        self.random = random.Random(config.seed)
        self.generated = generated_sentences(config.seed)
        self.sentences = None if sentences is None else [s for s in map(str.strip, sentences) if _is_plain(s)]

    def key(self) -> str:
        return "".join(self.random.choices(_ALPHABET, k=32))

    def values(self) -> Iterator[tuple[int, ...]]:
        """Tokens of values that differ, for one sample."""
        used: set[tuple[int, ...]] = set()
        source = self.generated if self.sentences is None else self._shuffled(self.sentences)
        for sentence in source:
            value = _encode(self.tokenizer, " " + sentence)[: self.longest]
            if value not in used:
                used.add(value)
                yield value

    def _shuffled(self, sentences: list[str]) -> Iterator[str]:
        yield from self.random.sample(sentences, len(sentences))


def _is_plain(sentence: str) -> bool:
    return bool(sentence) and json.dumps(sentence, ensure_ascii=False) == f'"{sentence}"'


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def first_token(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token that this tokenizer begins every text with, if it does so."""
    first = tokenizer.encode("a", add_special_tokens=True)[:1]
    return tuple(first) if first == [tokenizer.bos_token_id] else ()


def _sample(tokenizer: PreTrainedTokenizerBase, config: RetrievalConfig, drawn: _Drawn) -> RetrievalSample:
    asked = config.demonstrations + 1
    start = first_token(tokenizer) + _encode(tokenizer, _INSTRUCTION) + _encode(tokenizer, "{")
    end, ask, quote, comma = (_encode(tokenizer, text) for text in ("}\n", "\nAnswer:", '"', ", "))
    pairs: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []  # key, tokens before the value, tokens of it
    room = config.max_tokens - len(start) - len(end)
    for value in drawn.values():
        key = drawn.key()
        before = _encode(tokenizer, f'"{key}":') + quote
        room -= len(before) + len(value) + len(quote) + len(comma)
        if len(pairs) < asked:  # any of the first few may be asked for: shuffled below
            room -= len(_question(tokenizer, key)) + len(ask) + len(value)
        if room < 0:
            break
        pairs.append((key, before, value))
    if len(pairs) < max(asked, 2):
        why = "sentences are too few" if room >= 0 else f"max_tokens={config.max_tokens} is too small"
        raise ValueError(f"{why} for {max(asked, 2)} pairs of a key and a value and {asked} questions")
    draw = drawn.random
    questions = draw.sample(range(asked), asked)
    ids, places = list(start), dict[int, int]()
    for number in draw.sample(range(len(pairs)), len(pairs)):  # what is asked for stands anywhere in the object
        _, before, value = pairs[number]
        ids += [*(comma if places else ()), *before]
        places[number] = len(ids)
        ids += [*value, *quote]
    ids += end
    for number in questions:
        ids += [*_question(tokenizer, pairs[number][0]), *ask, *pairs[number][2]]
    return RetrievalSample(tuple(ids), len(pairs[questions[-1]][2]), places[questions[-1]])


def _question(tokenizer: PreTrainedTokenizerBase, key: str) -> tuple[int, ...]:
    return _encode(tokenizer, f"\nHash Question: {key}")
