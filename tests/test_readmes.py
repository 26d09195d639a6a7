"""The Python blocks of every README run, top to bottom, as a reader would paste them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READMES = sorted([ROOT / "README.md", ROOT / "shared-kernels/README.md", *ROOT.glob("packages/*/README.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(readme, tmp_path):
    blocks = BLOCK.findall(readme.read_text())
    if not blocks:
        assert readme == ROOT / "README.md", f"{readme} shows no use in Python"
        return
    script = tmp_path / "readme.py"
    # the guard is what worker processes of a spawned pool need in any script
    body = "\n".join("    " + line for line in "\n".join(blocks).splitlines())
    script.write_text(f"if __name__ == '__main__':\n{body}\n")
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "Agg"}
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(readme):
    targets = re.findall(r"\]\(([^)#\s]+)", readme.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (readme.parent / t).exists()]
    assert not missing


def test_first_screen_holds_the_two_commands():
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for command in ("uv run apps/yield_predict.py", "uv run pytest"):
        assert command in first_screen


def test_the_illinois_table_is_the_one_that_was_computed():
    package = ROOT / "packages/geo-yield"
    assert (package / "proofs/results/illinois.md").read_text() in (package / "README.md").read_text()
