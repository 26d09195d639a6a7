"""apps/select_data.py as its users meet it: a process with arguments, files, two streams and an exit code."""

import json
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_attn.attention_influence import HeadScores, generated_sentences
from llm_attn.testing import tiny_model

APP = "select_data"
pytestmark = pytest.mark.xdist_group("app")
DETECT = ("--samples", "3", "--tokens", "900", "--top-heads", "0.25")
SCORE = ("--unit-kib", "1", "--batch-tokens", "256", "--domain", "source")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a tokenizer of bytes, as files."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=257, max_position_embeddings=128).save_pretrained(folder)
    signs = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents of two domains; every 50th line is broken."""
    file = tmp_path_factory.mktemp("in") / "documents.jsonl"
    sentences = generated_sentences(1)
    lines = []
    for number in range(200):
        text = " ".join(islice(sentences, number % 5))
        lines.append(json.dumps({"id": number, "source": "web" if number % 4 else "code", "text": text}))
        if number % 50 == 49:
            lines.append('{"text": "no end')
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, documents: Path, app: Any) -> tuple[Path, str]:
    """The whole job, killed while it scores and started again; its folder and what it printed."""
    out = tmp_path_factory.mktemp("app") / "out"
    arguments = ("run", documents, "--model", model, "--out", out, *DETECT, *SCORE)
    process = app.start(*arguments)
    deadline = time.monotonic() + 600
    while len(list(out.glob("parts/*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (out / "scores.parquet").exists()
    code, printed, said = app.run(*arguments)
    assert code == 0, said
    return out, printed


def test_documents_in_scores_and_the_best_out(finished: tuple[Path, str], documents: Path) -> None:
    out, printed = finished
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    assert len(rows) == 200
    for domain, count in (("web", 150), ("code", 50)):
        own = [row for row in rows if row["domain"] == domain]
        scored = [row for row in own if row["tokens"] > 1]
        assert len(own) == count
        assert sum(row["selected"] for row in own) == round(0.2 * len(scored))
    kept = [json.loads(line)["id"] for line in (out / "selected" / "documents.jsonl").read_text().splitlines()]
    numbers = [json.loads(line)["id"] for line in documents.read_text().splitlines() if line.endswith("}")]
    by_line = [row["line"] - 1 - (row["line"] - 1) // 51 for row in rows if row["selected"]]
    assert kept == [numbers[place] for place in by_line]
    broken = [json.loads(line)["line"] for line in (out / "broken.jsonl").read_text().splitlines()]
    assert broken == [51, 102, 153, 204]
    assert "4 broken lines were left out" in printed
    for name in ("scores.parquet", "histogram.png", "documents.jsonl"):
        assert name in printed
    assert (out / "histogram.png").stat().st_size > 5_000


def test_a_killed_run_ends_as_one_that_was_not(
    finished: tuple[Path, str], model: Path, documents: Path, tmp_path: Path, app: Any
) -> None:
    """And 'score' and 'select' are what 'run' does."""
    heads, out = finished[0] / "heads.json", tmp_path / "out"
    arguments = ("score", documents, "--heads", heads, "--model", model, "--out", out, "--top-heads", "0.25", *SCORE)
    code, _, said = app.run(*arguments)
    assert code == 0, said
    code, printed, said = app.run("select", "--out", out)
    assert code == 0, said
    whole = {p.name: p.read_bytes() for p in (out / "parts").iterdir()}
    assert whole == {p.name: p.read_bytes() for p in (finished[0] / "parts").iterdir()}
    for name in ("scores.parquet", "selection.json", "broken.jsonl", "selected/documents.jsonl"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes()
    assert printed == finished[1].replace(str(finished[0]), str(out))


def test_heads_are_shown(model: Path, tmp_path: Path, app: Any) -> None:
    code, printed, said = app.run("detect", "--model", model, "--out", tmp_path / "heads.json", *DETECT)
    assert code == 0, said
    scores = HeadScores.load(tmp_path / "heads.json")
    best = scores.ranked()[0][2]
    assert f"{best:.3f}" in printed
    assert (tmp_path / "heads.png").stat().st_size > 5_000
    code, again, said = app.run("detect", "--model", model, "--out", tmp_path / "heads.json", *DETECT)
    assert (code, again) == (0, printed), said


MISTAKES = {
    "no model": ("run {documents} --model {tmp}/none --out {tmp}/out", "no model at"),
    "no input": ("run {tmp}/none.jsonl --model {model} --out {tmp}/out", "no file at"),
    "kind of input": ("run {model} --model {model} --out {tmp}/out", "holds none of *.jsonl"),
    "share": ("run {documents} --model {model} --top 2 --out {tmp}/out", "--top must lie in (0, 1], got 2.0"),
    "no heads": ("score {documents} --model {model} --heads {tmp}/none --out {tmp}/out", "no head scores at"),
    "tasks": ("detect --model {model} --tokens 50 --out {tmp}/out", "max_tokens=50 is too small"),
    "nothing scored": ("select --out {tmp}/out", "holds no scored corpus"),
}


def test_mistakes_are_explained(model: Path, documents: Path, tmp_path: Path, app: Any) -> None:
    """All in one process, as importing takes its time; one of them as a process for its exit code."""
    script = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('select_data', {str(app.path)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        module.app(line.split(), standalone_mode=False)\n"
        "        print('accepted')\n"
        "    except module.Problem as problem:\n"
        "        print(problem)\n"
    )
    places = {"model": model, "documents": documents, "tmp": tmp_path}
    lines = [line.format(**places) for line, _ in MISTAKES.values()]
    told = subprocess.run([sys.executable, "-c", script, json.dumps(lines)], capture_output=True, text=True)
    answers = told.stdout.splitlines()
    assert len(answers) == len(MISTAKES), told.stderr
    for answer, (name, (_, sentence)) in zip(answers, MISTAKES.items(), strict=True):
        assert sentence in answer, name
    assert not list(tmp_path.iterdir())
    code, printed, said = app.run("select", "--out", tmp_path)
    assert (code, printed) == (2, "")
    assert "holds no scored corpus: score one first" in said


def test_help_answers_without_loading_a_model(app: Any) -> None:
    status, printed, _ = app.run("--help")
    assert status == 0
    for command in ("run", "detect", "score", "select"):
        assert command in printed
    code = (
        "import runpy, sys\n"
        "sys.argv = ['select_data.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(app.path)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    assert 'torch' not in sys.modules\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
