"""The app for long documents as its users meet it, on a tiny model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from llm_attn.dhsa import BoundaryPredictor, PredictorConfig
from llm_attn.testing import VOCABULARY, tiny_model

APP = Path(__file__).resolve().parents[1] / "apps" / "long_context.py"
WORDS = ["<unk>", "</s>", "."] + [f"w{i}" for i in range(VOCABULARY - 3)]
pytestmark = pytest.mark.xdist_group("long_context")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its tokenizer and a document of 200 words."""
    place = tmp_path_factory.mktemp("long_context")
    tiny_model("llama").save_pretrained(place / "model")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(place / "model")
    text = " ".join(f"w{i * i % 90}" if i % 12 else "." for i in range(200))
    (place / "document.txt").write_text(text)
    (place / "long.txt").write_text(" ".join([text] * 2))
    (place / "empty.txt").write_text(" \n")
    BoundaryPredictor(PredictorConfig(channels=16)).save_pretrained(place / "other")
    return place


def run(place, *arguments):
    spec = importlib.util.spec_from_file_location("long_context", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = [str(a).format(place=place) for a in arguments]
    return CliRunner().invoke(module.app, given)


@pytest.mark.parametrize("boundary", ["keyshift", "punctuation"])
def test_both_answers_and_the_picture(place, tmp_path, boundary, monkeypatch):
    from llm_attn.dhsa.config import DHSAConfig

    defaults = {"local_tokens": 16, "global_tokens": 8, "instruction_tokens": 10, "min_distance": 2}
    for name, value in defaults.items():
        monkeypatch.setattr(DHSAConfig.__init__, "__kwdefaults__", {**DHSAConfig.__init__.__kwdefaults__, name: value})
    result = run(
        place, "{place}/model", "{place}/document.txt", "--budget", 64, "--block-size", 16, "--boundary", boundary,
        "--max-new-tokens", 3, "--out", tmp_path, "--question", "w1 w2 w3",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "comparison.json").read_text())
    dense, sparse = record["answers"]
    assert (dense["way"], sparse["way"]) == ("dense", "dhsa")
    assert dense["prompt_tokens"] == sparse["prompt_tokens"] == 203
    assert dense["keys_read"] == 102  # (203 + 1) / 2
    # the last ten of 203 read everything; blocks of 16 list up to 64 keys, of which a query sees those up to itself
    blocks = [min(16 * (i + 1), 64) for i in range(12)] + [64]
    rows = [16] * 12 + [1]
    pairs = sum(n * r - r * (r - 1) / 2 for n, r in zip(blocks, rows, strict=True)) + sum(range(194, 204))
    assert sparse["keys_read"] == pytest.approx(pairs / 203)
    assert record["config"]["boundary"] == boundary
    assert len(dense["text"].split()) <= 3
    assert imread(tmp_path / "chunks.png").std() > 0.05  # something is drawn
    assert str(tmp_path / "chunks.png") in result.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\nsys.argv = ['long_context.py', '--help']\n"
        f"try: runpy.run_path({str(APP)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Example: " in done.stdout


MISTAKES = {
    "no model": (("{place}/none", "{place}/document.txt"), "no model at"),
    "no text": (("{place}/model", "{place}/empty.txt"), "the document has no text"),
    "too long": (("{place}/model", "{place}/long.txt"), "tokens, the model reads 256"),
    "budget": (("{place}/model", "{place}/document.txt", "--budget", 9), "budget must hold what is always read"),
    "predictor alone": (("{place}/model", "{place}/document.txt", "--predictor", "{place}/other"), "go together"),
    "another model's": (
        ("{place}/model", "{place}/document.txt", "--boundary", "predictor", "--predictor", "{place}/other"),
        "this model's have 24",
    ),
    "no predictor": (
        ("{place}/model", "{place}/document.txt", "--boundary", "predictor", "--predictor", "{place}"),
        "no boundary predictor in",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained_and_leave_nothing(place, tmp_path, mistake):
    arguments, sentence = MISTAKES[mistake]
    result = run(place, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_short_documents_are_read_densely(place, tmp_path):
    result = run(place, "{place}/model", "{place}/document.txt", "--max-new-tokens", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    dense, sparse = json.loads((tmp_path / "comparison.json").read_text())["answers"]
    assert dense["text"] == sparse["text"]
    assert dense["keys_read"] == sparse["keys_read"] == 103  # the question has five words
    assert not (tmp_path / "chunks.png").exists()
