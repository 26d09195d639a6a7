"""The proof scripts run, on almost nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROOFS = Path(__file__).resolve().parents[1] / "proofs"
STREET = PROOFS.parents[3] / "shared" / "data" / "opencv-samples" / "vtest.avi"


def run(name, *arguments):
    command = [sys.executable, PROOFS / name, "--quick", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_compare_blocks(tmp_path):
    run("compare_blocks.py", "--out", tmp_path, "--seeds", 1)
    rows = json.loads((tmp_path / "compare_blocks.json").read_text())["rows"]
    assert [row["block"] for row in rows][:3] == ["plain", "light", "rga-sc"]
    assert rows[2]["mmacs"] > rows[1]["mmacs"] > rows[0]["mmacs"]
    before = (tmp_path / "compare_blocks" / "se-0.json").stat().st_mtime_ns
    run("compare_blocks.py", "--out", tmp_path, "--seeds", 1)
    assert (tmp_path / "compare_blocks" / "se-0.json").stat().st_mtime_ns == before, "what is done is not done again"
    assert (tmp_path / "compare_blocks.png").read_bytes().startswith(b"\x89PNG")


def test_train_small(tmp_path):
    run("train_small.py", "--out", tmp_path / "net.safetensors", "--work", tmp_path / "work")
    assert json.loads((tmp_path / "net.json").read_text())["people"] == 20


@pytest.mark.real
@pytest.mark.skipif(not STREET.exists(), reason="OpenCV's vtest.avi lies in shared data beside the checkout")
def test_follow_vtest(tmp_path):
    run("follow_vtest.py", "--video", STREET, "--out", tmp_path)
    assert set(json.loads((tmp_path / "follow_vtest.json").read_text())["rows"]) >= {
        "overlap alone",
        "overlap and looks",
    }
    assert (tmp_path / "follow_vtest.png").read_bytes().startswith(b"\x89PNG")
