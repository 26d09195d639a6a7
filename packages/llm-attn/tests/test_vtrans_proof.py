"""The proof of VTrans runs end to end on tiny models, goes on where it was stopped, and cuts texts as it says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from llm_attn.testing import tiny_model

SCRIPT = Path(__file__).resolve().parents[1] / "proofs" / "vtrans.py"


@pytest.fixture(scope="module")
def proof():
    spec = importlib.util.spec_from_file_location("proof_of_vtrans", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def save(folder, which):
    if which == "minilm":
        shape = {"vocab_size": 257, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4}
        shape |= {"num_attention_heads": 6, "max_position_embeddings": 64}
        AutoModel.from_config(AutoConfig.for_model("bert", **shape)).save_pretrained(folder)
    else:
        tiny_model("llama", vocab_size=257, max_position_embeddings=64).save_pretrained(folder)
    signs = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", pad_token="<s>").save_pretrained(folder)


@pytest.mark.parametrize("which", ["minilm", "smollm2"])
def test_three_methods_at_equal_size(proof, which, tmp_path):
    save(tmp_path / "model", which)
    work = tmp_path / "out" / "vtrans_work_quick" / which
    work.mkdir(parents=True)
    texts = [f"Paragraph {number} is about {number * number % 17} things." for number in range(90)]
    (work / "texts.json").write_text(json.dumps(texts))
    out = tmp_path / "out"
    proof.main(proof.Which(which), out=out, quick=True, model=tmp_path / "model")
    result = json.loads((out / f"vtrans_{which}.json").read_text())
    original = result["original"]["parameters"]
    assert [run["method"] for run in result["runs"]] == ["VTrans", "magnitude", "layers"]
    for run in result["runs"]:
        assert 0.2 * original < run["parameters"] <= 0.5 * original
        assert run["quality"] != run["before fine-tuning"]
        assert run["latency ms"] > 0
    first, second = result["runs"][:2]
    assert (first["hidden"], first["heads"], first["inter"]) == (second["hidden"], second["heads"], second["inter"])
    name = "perplexity" if which == "smollm2" else "rank correlation"
    table = (out / f"vtrans_{which}.md").read_text()
    assert f"| 50% magnitude | {second['parameters'] / 1e6:.1f} |" in table
    assert name in table
    for picture in (f"vtrans_{which}.png", f"vtrans_{which}_attention.png"):
        assert (out / picture).stat().st_size > 10_000
    weights = work / "0.50" / "layers" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    proof.main(proof.Which(which), out=out, quick=True, model=tmp_path / "model")
    assert weights.stat().st_mtime_ns == before


def test_paragraphs_that_read_like_prose(proof):
    prose = "This is a paragraph of plain English words that is long enough to be kept."
    text = f"{prose}\n\nshort\n\n" + "x = [1, 2, 3]; y = {'a': 0}; " * 4 + "\n\n   Two lines of prose, wrapped\n   "
    text += "and indented, which are joined into one paragraph."
    joined = "Two lines of prose, wrapped and indented, which are joined into one paragraph."
    assert list(proof._cut(text)) == [prose, joined]
