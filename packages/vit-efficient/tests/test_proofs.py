"""The proof scripts run end to end on a few canvases, write what they promise and go on where they stopped."""

import importlib
import json
from pathlib import Path

import pytest
import torch

PROOFS = Path(__file__).parents[1] / "proofs"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(PROOFS))
    return importlib.import_module


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_compare(script, tmp_path):
    compare = script("compare")
    given = {"out": tmp_path / "out", "work_folder": tmp_path / "work", "quick": True}
    compare.main(**given)
    report = json.loads((tmp_path / "out/compare.json").read_text())
    trained = {point["way"] for point in report["points"] if point["trained"]}
    assert trained == set(compare.WAYS)
    assert all(0 <= point["accuracy"] <= 1 and 0 < point["work"] <= 1.1 for point in report["points"])
    assert is_picture(tmp_path / "out/compare.png")
    assert "| AS-ViT | 0.5 of work |" in (tmp_path / "out/compare.md").read_text()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.json")}
    (tmp_path / "work/evit_0.5_0.json").unlink()
    compare.main(**given)
    again = {path: path.stat().st_mtime_ns for path in finished}
    assert {path.name for path in finished if again[path] != finished[path]} >= {"evit_0.5_0.json"}
    assert again[tmp_path / "work/as-vit_0.5_0.json"] == finished[tmp_path / "work/as-vit_0.5_0.json"]


def test_margin_over_the_front_is_read_off_the_rivals_lines(script):
    compare = script("compare")

    def point(way, work, accuracy):
        return compare.Point(
            way=way, share=work, trained=True, accuracy=accuracy, lowest=accuracy, highest=accuracy, work=work,
            speed=1 / work, seeds=1,
        )  # fmt: skip

    points = [point("EViT", 0.4, 0.8), point("EViT", 0.6, 0.9), point("AS-ViT", 0.5, 0.87), point("AS-ViT", 0.3, 0.7)]
    above, unknown = compare.above_front(points, "AS-ViT", lambda p: p.work)
    assert above == pytest.approx(0.02)
    assert torch.tensor(unknown).isnan()


def test_architectures(script, tmp_path):
    architectures = script("architectures")
    given = {"out": tmp_path / "out", "work_folder": tmp_path / "work", "quick": True}
    architectures.main(**given)
    report = json.loads((tmp_path / "out/architectures.json").read_text())
    assert [row["model"] for row in report["rows"]] == list(architectures.MODELS)
    assert all(1.8e6 < row["parameters"] < 2.4e6 for row in report["rows"])
    assert [entry["step"] for entry in report["logs"]["Swin"][0]] == [1, 2]
    assert is_picture(tmp_path / "out/architectures.png")
    log = report["logs"]
    architectures.main(**given)
    assert json.loads((tmp_path / "out/architectures.json").read_text())["logs"] == log, "trained again"


def test_the_table_in_the_readme_is_the_one_that_was_computed():
    assert (PROOFS / "results/compare.md").read_text() in (PROOFS.parent / "README.md").read_text()
