"""Corpus jobs: what is read, what is written, and that neither the engine nor a death changes it."""

import gzip
import importlib.util
import json
import os
import pickle
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.image import imread
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_attn.attention_influence import (
    Columns,
    CorpusProblem,
    HeadScores,
    InfluenceScorer,
    RetrievalConfig,
    ScoringConfig,
    ScoringJob,
    detect_heads,
    draw_heads,
    generated_sentences,
    retrieval_samples,
    retrieval_scores,
    score_corpus,
    select_corpus,
)
from llm_attn.attention_influence.corpus import Broken, Document, Unit, corpus_files, corpus_units, read_unit
from llm_attn.attention_influence.engine import _RayWorker, run_units
from llm_attn.attention_influence.job import UnitScorer
from llm_attn.testing import tiny_model
from llm_attn.transformers import load_model

COLUMNS = Columns(id="name", domain="source")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model and a tokenizer of bytes, as files."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=257, max_position_embeddings=64).save_pretrained(folder)
    signs = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>").save_pretrained(folder)
    return folder


def records(count, seed=0):
    sentences = generated_sentences(seed)
    draw = np.random.default_rng(seed)
    for number in range(count):
        text = " ".join(islice(sentences, int(draw.integers(0, 4))))
        yield {"name": f"d{seed}-{number}", "source": "code" if number % 3 else "web", "text": text, "extra": [number]}


LINES = [
    b'{"name": "first", "source": "web", "text": "One document that stands first."}',
    b'{"name": "cut", "source": "web", "text": "no end',
    b"",
    b'["a", "list"]',
    b'{"name": "silent", "source": "web"}',
    b'{"name": "number", "source": "web", "text": 7}',
    b'{"name": "latin", "source": "web", "text": "caf\xe9"}',
    b'{"name": "half", "source": "web", "text": "\\ud83d"}',
    b'{"name": "empty", "source": "web", "text": ""}',
    '{"name": "last", "source": "code", "text": "Straße, 東京"}'.encode(),
]
REASONS = {
    2: "no JSON: Unterminated string starting at",
    4: "list, not an object",
    5: "no field 'text'",
    6: "'text' is int, not text",
    7: "not UTF-8",
    8: "'text' holds half a surrogate pair",
}


@pytest.fixture
def corpus(tmp_path):
    """Two files of JSON lines; the second has what can go wrong, and no newline at its end."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(40)))
    (folder / "b.jsonl").write_bytes(b"\n".join(LINES))
    return folder


def job(model, **changes):
    settings = {"heads": {1: (0, 3)}, "scoring": ScoringConfig(batch_tokens=512), "unit_bytes": 900}
    return ScoringJob(model=str(model), columns=COLUMNS, **{**settings, **changes})


def parts_of(out):
    return {path.name: path.read_bytes() for path in sorted((out / "parts").iterdir())}


# ---- reading


@pytest.mark.parametrize("unit_bytes", [1, 7, 60, 61, 500, 10_000])
def test_units_hold_every_line_once(corpus, unit_bytes):
    file = corpus / "b.jsonl"
    units = corpus_units([file], unit_bytes)
    assert units[0].start == 0
    assert units[-1].stop == file.stat().st_size
    names, reasons, before = [], {}, 0
    for unit in units:
        content = read_unit(unit, COLUMNS)
        names += [document.id for document in content.documents]
        reasons |= {before + line: reason for line, reason in content.broken}
        before += content.lines
    assert names == ["first", "empty", "last"]
    assert reasons == REASONS
    assert before == len(LINES)


def test_records_are_read_by_their_fields(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"body": "With a mark.", "key": 7}\r\n{"body": "Second", "key": null}\n')
    (unit,) = corpus_units([file], 1000)
    found = read_unit(unit, Columns(text="body", id="key"))
    assert found.documents == [Document(1, "7", "all", "With a mark."), Document(2, None, "all", "Second")]
    assert read_unit(unit, Columns(text="body", domain="topic")).broken == [
        Broken(1, "no field 'topic'"),
        Broken(2, "no field 'topic'"),
    ]


def test_compressed_lines_are_one_unit(tmp_path):
    file = tmp_path / "x.jsonl.gz"
    file.write_bytes(gzip.compress(b"\n".join(LINES)))
    (unit,) = corpus_units([file], 10)
    content = read_unit(unit, COLUMNS)
    assert [document.line for document in content.documents] == [1, 9, 10]
    assert dict(content.broken) == REASONS
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CorpusProblem, match="cannot be decompressed"):
        read_unit(unit, COLUMNS)


def test_parquet_is_read_by_row_groups(tmp_path):
    rows = list(records(25))
    rows[3]["text"] = None
    file = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
    units = corpus_units([file], 700)
    assert 1 < len(units) < 7
    assert [(unit.start, unit.stop) for unit in units][-1][1] == 7
    contents = [read_unit(unit, COLUMNS) for unit in units]
    texts = [document.text for content in contents for document in content.documents]
    assert texts == [row["text"] for row in rows if row["text"] is not None]
    assert contents[0].broken == [Broken(4, "'text' is NoneType, not text")]
    with pytest.raises(CorpusProblem, match="has no column 'body'; its columns are name, source, text, extra"):
        read_unit(units[0], Columns(text="body"))


def test_wrong_inputs_are_refused(tmp_path, corpus):
    (tmp_path / "x.csv").write_text("a")
    (tmp_path / "x.parquet").write_text("no parquet")
    (tmp_path / "empty").mkdir()
    for inputs, sentence in (
        ([tmp_path / "none.jsonl"], "no file at"),
        ([tmp_path / "x.csv"], r"is none of \*.jsonl"),
        ([tmp_path / "empty"], r"holds none of \*.jsonl"),
        ([corpus, tmp_path / "x.parquet"], "not both"),
        ([corpus, corpus / "a.jsonl"], "is given twice"),
    ):
        with pytest.raises(CorpusProblem, match=sentence):
            corpus_files(inputs)
    with pytest.raises(CorpusProblem, match="cannot be read as Parquet"):
        corpus_units([tmp_path / "x.parquet"], 10)
    with pytest.raises(CorpusProblem, match="unit_bytes must be at least 1"):
        corpus_units([corpus / "a.jsonl"], 0)


# ---- the job


def test_scores_selection_and_what_was_left_out(model, corpus, tmp_path):
    out, seen = tmp_path / "out", []
    left = score_corpus([corpus], out, job(model), on_unit=lambda *told: seen.append(told))
    assert len(seen) == left == len(parts_of(out)) > 5
    assert [(done, total) for done, total, _ in seen] == [(n, left) for n in range(1, left + 1)]
    assert sum(documents for *_, documents in seen) == 43
    selection = select_corpus(out, share=0.25)
    table = pq.read_table(out / "scores.parquet").to_pylist()
    own = ("first", "web", "One document that stands first."), ("empty", "web", ""), ("last", "code", "Straße, 東京")
    rows = [*records(40), *({"name": name, "source": source, "text": text} for name, source, text in own)]
    network, tokenizer = load_model(model)
    right = InfluenceScorer(network, tokenizer, {1: (0, 3)}).score([row["text"] for row in rows])
    assert [row["id"] for row in table] == [row["name"] for row in rows]
    assert [row["tokens"] for row in table] == [len(row["text"].encode()) for row in rows]
    np.testing.assert_allclose([row["score"] for row in table], right.score, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose([row["loss"] for row in table], right.base, rtol=1e-5)
    np.testing.assert_allclose([row["masked_loss"] for row in table], right.masked, rtol=1e-5)
    assert [row["line"] for row in table] == [*range(1, 41), 1, 9, 10]
    assert [os.path.basename(row["file"]) for row in table] == ["a.jsonl"] * 40 + ["b.jsonl"] * 3
    assert max(row["tokens"] for row in table) > 64  # longer than the context
    kept = [row["id"] for row in table if row["selected"]]
    for domain, count in (("web", selection.domains[1]), ("code", selection.domains[0])):
        assert count.domain == domain
        own = sorted((r["score"] for r in table if r["domain"] == domain and not np.isnan(r["score"])), reverse=True)
        assert (count.scored, count.kept) == (len(own), round(0.25 * len(own)))
        assert (
            sorted((r["score"] for r in table if r["domain"] == domain and r["selected"]), reverse=True)
            == (own[: count.kept])
        )
        assert count.lowest_kept == own[count.kept - 1]
        assert count.tokens == sum(r["tokens"] for r in table if r["domain"] == domain)
    written = [line for file in selection.files for line in file.read_text().splitlines()]
    whole = (corpus / "a.jsonl").read_text().splitlines() + LINES[-1:][0].decode().splitlines() + [LINES[0].decode()]
    assert [json.loads(line)["name"] for line in written] == kept
    assert set(written) <= set(whole)
    broken = [json.loads(line) for line in (out / "broken.jsonl").read_text().splitlines()]
    assert {each["line"]: each["reason"] for each in broken} == REASONS
    assert {os.path.basename(each["file"]) for each in broken} == {"b.jsonl"}
    assert selection.broken == 6
    assert json.loads((out / "selection.json").read_text())["broken"] == 6
    assert imread(selection.histogram).std() > 0.05
    assert not list(out.rglob("*.part"))


def test_a_job_that_is_cut_off_ends_alike(model, corpus, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    score_corpus([corpus], whole, job(model))

    def stop(done, total, documents):
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_corpus([corpus], cut, job(model), on_unit=stop)
    before = parts_of(cut)
    assert 0 < len(before) < len(parts_of(whole))
    with pytest.raises(CorpusProblem, match=r"units are not scored yet: run 'score' to its end"):
        select_corpus(cut)
    assert score_corpus([corpus], cut, job(model)) == len(parts_of(whole)) - len(before)
    assert parts_of(cut) == parts_of(whole)
    for out in (whole, cut):
        select_corpus(out)
    for name in ("scores.parquet", "broken.jsonl", "selection.json", "selected/a.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert score_corpus([corpus], cut, job(model)) == 0


def test_two_processes_of_which_one_is_killed(model, corpus, tmp_path):
    alone, pair, killed = tmp_path / "alone", tmp_path / "pair", []
    score_corpus([corpus], alone, job(model))

    def kill(done, total, documents):
        if done == 2 and not killed:
            alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
            workers = [p for p in alive if "spawn_main" in " ".join(p.cmdline())]
            killed.append(workers[0].pid)
            workers[0].send_signal(signal.SIGKILL)

    score_corpus([corpus], pair, job(model), workers=2, on_unit=kill)
    assert killed
    same_scores(alone, pair)


def same_scores(one, other):
    assert parts_of(one).keys() == parts_of(other).keys()
    for out in (one, other):
        select_corpus(out)
    tables = [pq.read_table(out / "scores.parquet") for out in (one, other)]
    for name in ("file", "line", "id", "domain", "tokens", "selected"):
        assert tables[0][name].equals(tables[1][name])
    for name in ("loss", "masked_loss"):
        np.testing.assert_allclose(*(table[name].to_numpy() for table in tables), rtol=1e-6)


@pytest.mark.xdist_group("ray")
def test_ray_with_two_workers_of_which_one_is_killed(model, corpus, tmp_path):
    alone, on_ray, killed = tmp_path / "alone", tmp_path / "ray", []
    score_corpus([corpus], alone, job(model, unit_bytes=300))

    def kill(done, total, documents):
        if killed or done < 3:
            return
        below = psutil.Process().children(recursive=True)
        workers = [p for p in below if p.status() != "zombie" and "ray::" in (p.cmdline() or [""])[0]]
        actors = [p for p in workers if "MapWorker" in p.cmdline()[0]]
        assert len(actors) == 2
        killed.append(actors[0].pid)
        actors[0].send_signal(signal.SIGKILL)

    score_corpus([corpus], on_ray, job(model, unit_bytes=300), engine="ray", workers=2, on_unit=kill)
    assert killed
    same_scores(alone, on_ray)


def test_parquet_in_parquet_out(model, tmp_path):
    rows = list(records(30, seed=3))
    file, out = tmp_path / "x.parquet", tmp_path / "out"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
    score_corpus([file], out, job(model))
    selection = select_corpus(out, share=0.5)
    kept = pq.read_table(selection.files[0])
    assert kept.schema.equals(pq.read_schema(file))
    chosen = pq.read_table(out / "scores.parquet").to_pylist()
    names = [row["id"] for row in chosen if row["selected"]]
    assert kept.to_pylist() == [row for row in rows if row["name"] in names]
    assert 8 < len(names) < 16


def test_files_of_one_name_are_kept_apart(model, tmp_path):
    for number in (1, 2):
        folder = tmp_path / "in" / str(number)
        folder.mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in records(9, seed=number))
        (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    score_corpus([tmp_path / "in"], tmp_path / "out", job(model))
    files = select_corpus(tmp_path / "out", share=1.0).files
    assert [file.name for file in files] == ["00000-x.jsonl", "00001-x.jsonl"]
    for number, file in enumerate(files, 1):
        texts = [json.loads(line) for line in file.read_text().splitlines()]
        assert texts == [record for record in records(9, seed=number) if len(record["text"]) > 1]


def test_histogram_keeps_what_the_sort_keeps(model, corpus, tmp_path):
    out = tmp_path / "out"
    score_corpus([corpus], out, job(model))
    exact = select_corpus(out, share=0.3)
    table = pq.read_table(exact.scores)["selected"].to_pylist()
    binned = select_corpus(out, share=0.3, method="histogram")
    assert pq.read_table(binned.scores)["selected"].to_pylist() == table
    assert imread(binned.histogram).std() > 0.05


def test_nothing_to_score(model, tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    assert score_corpus([tmp_path / "x.jsonl"], tmp_path / "out", job(model)) == 0
    selection = select_corpus(tmp_path / "out")
    assert (selection.domains, selection.broken, selection.files) == ([], 0, [])
    assert pq.read_table(selection.scores).num_rows == 0
    (tmp_path / "y.jsonl").write_text('{"text": ""}\n\n{"text": "a"}\nnothing\n')
    score_corpus([tmp_path / "y.jsonl"], tmp_path / "other", replace(job(model), columns=Columns()))
    for method in ("exact", "histogram"):
        selection = select_corpus(tmp_path / "other", share=1.0, method=method)
        (domain,) = selection.domains
        assert (domain.domain, domain.documents, domain.scored, domain.kept, selection.broken) == ("all", 2, 0, 0, 1)


def test_mixed_up_jobs_are_refused(model, corpus, tmp_path):
    out = tmp_path / "out"
    score_corpus([corpus], out, job(model))
    for changes, sentence in (
        ({"heads": {1: (0,)}}, r"holds another run \(job.heads differ\)"),
        ({"scoring": ScoringConfig(context=9)}, r"\(job.scoring differ\)"),
        ({"unit_bytes": 77}, r"\(job.unit_bytes differ\)"),
    ):
        with pytest.raises(CorpusProblem, match=sentence):
            score_corpus([corpus], out, job(model, **changes))
    with pytest.raises(CorpusProblem, match=r"\(inputs differ\)"):
        score_corpus([corpus / "a.jsonl"], out, job(model))
    other = tmp_path / "model"
    shutil.copytree(model, other)
    score_corpus([corpus], out, job(other))  # the same model elsewhere
    tiny_model("llama", seed=4, vocab_size=257, max_position_embeddings=64).save_pretrained(other)
    with pytest.raises(CorpusProblem, match=r"\(job.model differ\)"):
        score_corpus([corpus], out, job(other))
    with (corpus / "a.jsonl").open("a") as file:
        file.write('{"text": "later"}\n')
    with pytest.raises(CorpusProblem, match=r"a.jsonl' is no longer what was scored"):
        select_corpus(out)
    with pytest.raises(CorpusProblem, match="holds something else"):
        score_corpus([corpus], tmp_path, job(model))
    with pytest.raises(CorpusProblem, match="holds no scored corpus"):
        select_corpus(tmp_path)
    (out / "run.json").write_text("{")
    with pytest.raises(CorpusProblem, match="is damaged"):
        select_corpus(out)


def test_wrong_options_are_refused(model, corpus, tmp_path):
    score = partial(score_corpus, [corpus], tmp_path / "out")
    with pytest.raises(CorpusProblem, match="engine must be one of local, ray, got 'dask'"):
        score(job(model), engine="dask")
    with pytest.raises(CorpusProblem, match="workers must be at least 1"):
        score(job(model), workers=0)
    with pytest.raises(CorpusProblem, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        job(model, dtype="int8")
    with pytest.raises(CorpusProblem, match="no model at"):
        score_corpus([corpus], tmp_path / "x", job(tmp_path / "none"))
    with pytest.raises(CorpusProblem, match=r"cannot be used: the model has 2 layers of 4 heads"):
        score_corpus([corpus], tmp_path / "y", job(model, heads={7: (0,)}))
    with pytest.raises(CorpusProblem, match=r"share to keep must lie in \(0, 1\]"):
        select_corpus(tmp_path / "out", share=0)
    with pytest.raises(CorpusProblem, match="method must be one of exact, histogram"):
        select_corpus(tmp_path / "out", method="sketch")


def test_a_problem_in_an_actor_comes_back_as_a_value(model, tmp_path):
    """Ray would wrap the exception."""
    actor = _RayWorker(partial(UnitScorer, job(model, heads={7: (0,)}), str(tmp_path)), torch.get_num_threads())
    found = actor({"unit": pickle.dumps(Unit(0, "x", "jsonl", 0, 1))})
    assert found["documents"] == 0
    assert "cannot be used: the model has 2 layers of 4 heads" in found["problem"]


def test_no_units_need_no_worker():
    def never():
        raise RuntimeError

    assert list(run_units(never, [])) == []
    with pytest.raises(RuntimeError):
        list(run_units(never, [Unit(0, "x", "jsonl", 0, 1)]))


# ---- detection as a job


def test_detection_goes_on_where_it_was(model, tmp_path):
    network, tokenizer = load_model(model)
    config = RetrievalConfig(num_samples=5, max_tokens=900, max_value_tokens=8)
    right = retrieval_scores(network, retrieval_samples(tokenizer, config))

    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    path = tmp_path / "heads.json"
    with pytest.raises(KeyboardInterrupt):
        detect_heads(network, tokenizer, path, config, on_sample=stop)
    assert not path.exists()
    with pytest.raises(CorpusProblem, match=r"of another detection \(seed differ\)"):
        detect_heads(network, tokenizer, path, replace(config, seed=1))
    seen = []
    found = detect_heads(network, tokenizer, path, config, on_sample=seen.append)
    assert seen == [4, 5]
    assert found.scores == right.scores
    assert HeadScores.load(path) == found
    assert detect_heads(network, tokenizer, path, config, on_sample=seen.append) == found
    assert seen == [4, 5]
    assert list(tmp_path.iterdir()) == [path]
    with torch.no_grad():
        next(network.parameters()).mul_(2)
    with pytest.raises(CorpusProblem, match=r"\(model differ\)"):
        detect_heads(network, tokenizer, path, config)


def test_picture_of_heads(tmp_path):
    scores = HeadScores(((0.1, 0.5, 0.0), (0.5, 0.2, 0.9)))
    plain = imread(draw_heads(scores, tmp_path / "plain.png"))
    framed = imread(draw_heads(scores, tmp_path / "framed.png", heads=scores.top(0.5)))
    assert plain.shape == framed.shape
    assert 0 < (plain != framed).any(-1).mean() < 0.1


# ---- the proof


def test_proof_runs_and_goes_on(model, tmp_path):
    """On a tiny model; a second run finds everything done."""
    path = Path(__file__).resolve().parents[1] / "proofs" / "attention_influence.py"
    spec = importlib.util.spec_from_file_location("proof_of_attention_influence", path)
    proof = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = proof  # where its dataclasses look for their annotations
    spec.loader.exec_module(proof)
    proof.main(tmp_path, seed=0, quick=True, model=model)
    result = json.loads((tmp_path / "attention_influence.json").read_text())
    assert set(result["masking"]["texts"]) == {"needles", "sums in words", "documents"}
    assert sum(result["selection"]["pool"].values()) == pytest.approx(1)
    for shares in result["selection"]["shares"].values():
        assert sum(shares.values()) == pytest.approx(1)
    text = (tmp_path / "attention_influence.md").read_text()
    assert "| retrieval heads: masked |" in text
    assert "| influence |" in text
    for name in ("attention_influence.png", "attention_influence_heads.png"):
        assert imread(tmp_path / name).std() > 0.05
    parts = list((tmp_path / "attention_influence_work_quick" / "scored" / "parts").iterdir())
    before = {part: part.stat().st_mtime_ns for part in parts}
    proof.main(tmp_path, seed=0, quick=True, model=model)
    assert {part: part.stat().st_mtime_ns for part in parts} == before
    assert (tmp_path / "attention_influence.md").read_text() == text
