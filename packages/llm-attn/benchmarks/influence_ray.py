"""Scoring a corpus on Ray with two workers against a plain loop on the same two cores, beyond start-up.

Start-up (processes, imports, loading the model) does not grow with the corpus and is left out: the rate counts from the
first units that are finished, one of each worker, to the last. It is what `price` says; the times also hold start-up.
"""

import json
import shutil
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_attn.attention_influence import (
    ScoringConfig,
    ScoringJob,
    generated_sentences,
    score_corpus,
    select_corpus,
)

CLAIM = "Beyond start-up, Ray with two workers scores at least 0.9 times as many documents a second as a plain loop."
SWEEP = {"documents": (60, 1_000)}
BASELINE = "plain loop"
THREADS = 2
ROUNDS = 1
DEVICES = ("cpu",)
SLOW = True  # Ray and two more imports of torch
WORKERS = 2


def make(documents):
    folder = Path(tempfile.mkdtemp())
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257, hidden_size=256, intermediate_size=1_024, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=1_024,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    signs = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, []))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>").save_pretrained(folder / "model")
    sentences = generated_sentences(0)
    texts = (" ".join(islice(sentences, 1 + number % 9)) for number in range(documents))
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def scored(**how):
    def run(folder):
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        job = ScoringJob(
            model=str(folder / "model"), heads={3: (0,)}, scoring=ScoringConfig(batch_tokens=1_024), unit_bytes=4_096
        )
        finished = []
        score_corpus(
            [folder / "documents.jsonl"], out, job, **how, on_unit=lambda *told: finished.append((time.time(), told[2]))
        )
        first, last = finished[WORKERS - 1][0], finished[-1][0]
        rate = sum(documents for _, documents in finished[WORKERS:]) / (last - first)
        return pq.read_table(select_corpus(out).scores)["score"].to_numpy(), rate

    return run


RIVALS = {"plain loop": scored(), "ours": scored(engine="ray", workers=WORKERS)}


def check(out):
    np.testing.assert_allclose(out["ours"][0], out["plain loop"][0], rtol=1e-4, atol=1e-6)


def price(out):
    return {"rate of Ray over the plain loop, beyond start-up": out["ours"][1] / out["plain loop"][1]}
