"""The app that runs a ViT on fewer tokens, as its users meet it."""

import json
from pathlib import Path
from typing import Any

import pytest

APP = "accelerate_vit"
pytestmark = pytest.mark.xdist_group("app vit")


def test_methods_are_compared_and_drawn(tmp_path: Path, app: Any) -> None:
    chosen = ["--method", "adaptive", "--method", "tome", "--keep", "0.7", "--seconds", "0.01"]
    code, printed, said = app.run("--model", "test_vit", "--out", tmp_path, *chosen)
    assert code == 0, said
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "adaptive", "tome"]
    assert rows[1]["gmacs"] < 0.8 * rows[0]["gmacs"]
    assert rows[2]["gmacs"] < 0.9 * rows[0]["gmacs"]
    assert rows[1]["fewest_and_most"][0] < rows[1]["fewest_and_most"][1], "images keep different numbers"
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("adaptive", "tome"))
    assert "adaptive" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "1.5"], "--keep must be in (0, 1]"),
        (["--model", "no_such_vit"], "timm has no model"),
        (["--model", "test_vit", "--images", "nowhere"], "is no folder"),
        (["--model", "test_vit", "--checkpoint", "nowhere.pth"], "no checkpoint at"),
        (["--model", "test_convnext"], "VisionTransformer"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], message: str, app: Any) -> None:
    code, _, said = app.run(*arguments, "--seconds", "0.01")
    assert code == 2
    assert message in " ".join(said.split())
    assert "Traceback" not in said


def test_unreadable_images_are_left_out(tmp_path: Path, app: Any) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    code, _, said = app.run("--model", "test_vit", "--images", tmp_path, "--out", tmp_path / "out")
    assert code == 2
    assert "left out broken.png" in said
    assert "no image in" in said
