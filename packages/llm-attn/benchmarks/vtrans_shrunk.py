"""A model that VTrans has shrunk to half of its parameters against the one it was made of."""

import torch
from transformers import BertConfig, BertModel

from llm_attn.vtrans import SizeModel, choose_structure, shrink
from llm_attn.vtrans.choosing import Scores

CLAIM = (
    "Shrunk to half of its parameters, embeddings included, an encoder of 6 layers and 384 channels (the size of "
    "all-MiniLM-L6-v2) runs at least 1.6 times as fast."
)
SWEEP = {"tokens": (128, 512), "batch": (1, 8)}
BASELINE = "original"
TARGET = 1.6
TARGET_AT = {"tokens": (128,), "batch": (1,)}
THREADS = 2
LAYERS, HIDDEN, HEADS, INTER = 6, 384, 12, 1_536


def make(tokens, batch):
    model = BertModel(
        BertConfig(
            vocab_size=30_522, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            intermediate_size=INTER,
        )
    ).eval()  # fmt: skip
    size = SizeModel(model, count_embeddings=True)
    scores = Scores(
        hidden=torch.randn(HIDDEN),
        heads=[torch.randn(HEADS) for _ in range(LAYERS)],
        inter=[torch.randn(INTER) for _ in range(LAYERS)],
    )
    structure = choose_structure(scores, size, 0.5, multiple_of=8)
    return model, shrink(model, structure), torch.randint(30_522, (batch, tokens))


@torch.inference_mode()
def run(model, ids):
    return model(ids).last_hidden_state


RIVALS = {"original": lambda inputs: run(inputs[0], inputs[2]), "ours": lambda inputs: run(inputs[1], inputs[2])}


def check(out):
    assert out["ours"].shape[:2] == out["original"].shape[:2]
    assert out["ours"].isfinite().all()


def price(out):
    return {"channels kept": out["ours"].shape[-1] / out["original"].shape[-1]}


def work(inputs):
    return inputs[2].numel(), "tokens"
