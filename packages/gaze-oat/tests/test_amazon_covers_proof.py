"""The proof script runs, goes on where it was stopped, and writes what it says."""

import importlib.util
import json
from pathlib import Path

import pytest

PROOF = Path(__file__).resolve().parents[1] / "proofs" / "amazon_covers.py"
RESULT = PROOF.parent / "results" / "amazon_covers.json"
REAL = Path(__file__).resolve().parents[4] / "shared/data/amazon-covers-gaze/Amazon.json"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the book-cover scanpaths are not beside the checkout")
def test_a_short_proof_runs_and_repeats_nothing(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("amazon_covers", PROOF)
    assert spec is not None
    assert spec.loader is not None
    proof = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(proof)
    proof.main(data=REAL, out=tmp_path / "out", work=tmp_path / "work", seed=1, quick=True)
    report = json.loads((tmp_path / "out/amazon_covers.json").read_text())
    assert (report["collages"], report["quick"]) == (32, True)
    assert len((tmp_path / "out/amazon_covers.md").read_text().splitlines()) == 10
    for name in ("amazon_covers_metrics.png", "amazon_covers_paths.png"):
        assert (tmp_path / "out" / name).stat().st_size > 20_000
    folds = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").glob("fold_*.json")}
    assert len(folds) == 2
    proof.main(data=REAL, out=tmp_path / "out", work=tmp_path / "work", seed=1, quick=True)
    assert {file: file.stat().st_mtime_ns for file in folds} == folds
    assert json.loads((tmp_path / "out/amazon_covers.json").read_text()) == report


def test_the_readmes_table_is_the_one_that_was_computed() -> None:
    """OAT wins where it must, and the README shows the table that the script wrote."""
    report = json.loads(RESULT.read_text())
    assert not report["quick"]
    for metric, verdict in report["verdicts"].items():
        assert verdict["OAT is better"], metric
        assert verdict["OAT"] < verdict["its value"], metric
    readme = (PROOF.parents[1] / "README.md").read_text()
    assert RESULT.with_suffix(".md").read_text() in readme
