"""apps/compress_model.py as its users meet it: a process with arguments, files, two streams and an exit code."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from llm_attn.testing import tiny_model

APP = "compress_model"
pytestmark = pytest.mark.xdist_group("app")
SMALL = "--steps 60 --finetune-steps 3 --batch 4 --tokens 16 --multiple-of 1"


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    signs = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", pad_token="<s>")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny encoder and a tiny language model with their tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("models")
    shape = {"vocab_size": 257, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 6, "max_position_embeddings": 64}
    AutoModel.from_config(AutoConfig.for_model("bert", **shape)).save_pretrained(folder / "bert")
    tiny_model("llama", vocab_size=257, max_position_embeddings=64).save_pretrained(folder / "llama")
    tiny_model("phi3", vocab_size=257).save_pretrained(folder / "phi3")
    for name in ("bert", "llama", "phi3"):
        tokenizer().save_pretrained(folder / name)
    (folder / "bert" / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True}
    (folder / "bert" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "bert" / "modules.json").write_text("[]")
    text = [f"The {word} of day {day} was {day * 7 % 11}." for day in range(30) for word in ("sun", "rain", "wind")]
    (folder / "text.txt").write_text("\n\n".join(text))
    lines = [json.dumps({"body": each}) for each in text]
    lines[4:4] = ["{broken", json.dumps({"title": "none"}), ""]
    (folder / "text.jsonl").write_text("\n".join(lines))
    (folder / "few.txt").write_text("one\n\ntwo")
    (folder / "empty.txt").write_text("\n\n  \n")
    return {
        name: folder / name for name in ("bert", "llama", "phi3", "text.txt", "text.jsonl", "few.txt", "empty.txt")
    } | {
        "text": folder / "text.txt",
        "lines": folder / "text.jsonl",
        "few": folder / "few.txt",
        "empty": folder / "empty.txt",
    }


@pytest.fixture(scope="module")
def finished(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, app: Any) -> tuple[Path, str]:
    """The whole job, killed while it trains gates and started again; its folder and what it printed."""
    out = tmp_path_factory.mktemp("app") / "out"
    line = f"run {places['text']} --model {places['bert']} --out {out} --keep 0.6 {SMALL}"
    process = app.start(*shlex.split(line))
    deadline = time.monotonic() + 600
    while not (out / "pruning" / "training.json").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (out / "model").exists()
    return out, app.call(line)


def test_a_model_and_text_in_a_smaller_model_out(finished: tuple[Path, str], places: dict[str, Path]) -> None:
    out, printed = finished
    model = AutoModel.from_pretrained(out / "model")
    original = AutoModel.from_pretrained(places["bert"])
    kept = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in original.parameters())
    assert 0.5 < kept <= 0.6
    report = json.loads((out / "report.json").read_text())
    assert report["kept of counted parameters"] == pytest.approx(kept)
    assert report["original"]["rank correlation"] == pytest.approx(1)
    assert report["compressed"]["rank correlation"] < 1
    assert report["compressed"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["sizes"]["hidden"] == model.config.hidden_size
    assert f"{kept:.1%} of the counted parameters stay" in printed
    for name in ("model", "report.json", "structure.png"):
        assert str(out / name) in printed.replace("\n", "")
    assert (out / "structure.png").stat().st_size > 5_000
    pooling = json.loads((out / "model" / "1_Pooling" / "config.json").read_text())
    assert pooling == {"word_embedding_dimension": model.config.hidden_size, "pooling_mode_mean_tokens": True}
    assert (out / "model" / "modules.json").exists()
    assert (out / "model" / "tokenizer.json").exists()
    assert not (out / "pruning").exists()


def test_a_killed_run_ends_as_one_that_was_not(
    finished: tuple[Path, str], places: dict[str, Path], app: Any, tmp_path: Path
) -> None:
    line = "run {text} --model {bert} --keep 0.6 " + SMALL
    app.call(line + " --out {out}", out=tmp_path / "out", **places)
    weights = "model/model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (finished[0] / weights).read_bytes()
    before = (finished[0] / weights).stat().st_mtime_ns
    assert app.call(line + " --out {out}", out=finished[0], **places) == finished[1]
    assert (finished[0] / weights).stat().st_mtime_ns == before
    with pytest.raises(app.module.Problem, match="holds a job with other settings or texts"):
        app.call(line.replace("0.6", "0.7") + " --out {out}", out=finished[0], **places)


def test_a_language_model_from_json_lines(
    places: dict[str, Path], app: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Broken lines are counted, layers get sizes of their own, and the checkpoint brings the file that it needs."""
    line = "run {lines} --text body --model {llama} --out {out} --mode faster --layout ragged --keep 0.7 " + SMALL
    app.call(line, out=tmp_path / "out", **places)
    assert "2 lines of" in caplog.text
    assert "5, 6" in caplog.text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept of counted parameters"] <= 0.7
    assert report["original"]["perplexity"] != report["compressed"]["perplexity"]
    assert (tmp_path / "out" / "model" / "ragged_modeling.py").exists()
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "ragged_modeling.RaggedLlamaForCausalLM"
    assert config["ragged"]["inter"] == report["sizes"]["inter"]


def test_heads_are_drawn(finished: tuple[Path, str], places: dict[str, Path], app: Any, tmp_path: Path) -> None:
    line = "probe {text} --model {bert} --small {small} --tokens 16 --out {png}"
    printed = app.call(line, small=finished[0] / "model", png=tmp_path / "a.png", **places)
    assert printed.strip() == str(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 20_000


MISTAKES = {
    "no model": ("run {text} --model {tmp}/none --out {tmp}/out", "no model at"),
    "family": ("run {text} --model {phi3} --out {tmp}/out", "VTrans shrinks bert, .*'phi3' is not among them"),
    "no text": ("run {tmp}/none.txt --model {bert} --out {tmp}/out", "no text file at"),
    "empty text": ("run {empty} --model {bert} --out {tmp}/out", "there is no text in"),
    "little text": ("run {few} --model {bert} --out {tmp}/out --tokens 16", "at least 24 are needed: give more text"),
    "share": ("run {text} --model {bert} --keep 1.5 --out {tmp}/out", "--keep must lie between 0 and 1, got 1.5"),
    "too small": (
        "run {text} --model {bert} --keep 0.01 --tokens 16 --out {tmp}/out",
        "a sparsity of 0.99 cannot be met",
    ),
    "length": ("run {text} --model {bert} --tokens 900 --out {tmp}/out", r"tokens must lie in \[2, 64\]"),
    "probe": ("probe {text} --model {bert} --small {tmp}/none --out {tmp}/a.png", "no model in"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(places: dict[str, Path], app: Any, tmp_path: Path, mistake: str) -> None:
    line, sentence = MISTAKES[mistake]
    with pytest.raises(app.module.Problem, match=sentence) as caught:
        app.call(line, tmp=tmp_path, **places)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_mistake_is_one_red_line_and_exit_2(tmp_path: Path, app: Any) -> None:
    process = app.start("run", tmp_path / "none.txt", "--keep", "2")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert out == ""
    assert err.strip() == "--keep must lie between 0 and 1, got 2.0"


@pytest.mark.parametrize("command", ["run", "probe"])
def test_help_teaches_by_example(app: Any, command: str) -> None:
    text = " ".join(app.call(f"{command} --help").split())
    assert f"compress_model.py {command}" in text
    assert "Example:" in text


def test_help_imports_nothing_heavy(app: Any) -> None:
    code = (
        "import runpy, sys\nsys.argv = ['compress_model.py', 'run', '--help']\n"
        f"try: runpy.run_path({str(app.path)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_small_language_model_writes(places: dict[str, Path], app: Any, tmp_path: Path) -> None:
    """A stock checkpoint of a language model, read by transformers alone."""
    line = "run {text} --model {llama} --out {out} --mode fast --keep 0.7 " + SMALL
    app.call(line, out=tmp_path / "out", **places)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.hidden_size < 48
    inputs = tokenizer()("The sun", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3
