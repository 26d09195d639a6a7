"""The app that runs a ViT on fewer tokens, as its users meet it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).resolve().parents[1] / "apps" / "accelerate_vit.py"
pytestmark = pytest.mark.xdist_group("app vit")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, APP, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_methods_are_compared_and_drawn(tmp_path: Path) -> None:
    chosen = ["--method", "adaptive", "--method", "tome", "--keep", "0.7", "--seconds", "0.01"]
    done = run("--model", "test_vit", "--out", tmp_path, *chosen)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "adaptive", "tome"]
    assert rows[1]["gmacs"] < 0.8 * rows[0]["gmacs"]
    assert rows[2]["gmacs"] < 0.9 * rows[0]["gmacs"]
    assert rows[1]["fewest_and_most"][0] < rows[1]["fewest_and_most"][1], "images keep different numbers"
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("adaptive", "tome"))
    assert "adaptive" in done.stdout


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
def test_mistakes_get_one_sentence(arguments: list[str], message: str) -> None:
    done = run(*arguments, "--seconds", "0.01")
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_unreadable_images_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    done = run("--model", "test_vit", "--images", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "left out broken.png" in done.stderr
    assert "no image in" in done.stderr
