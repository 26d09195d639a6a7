"""The benchmark runner and the GPU check: every claim runs once, and what is written is what was measured."""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


claims = tool("claims")  # first: the others import it by this name
bench, gpu_check, tune_kernels = tool("bench"), tool("gpu_check"), tool("tune_kernels")

CLAIM_FILE = """
import torch
CLAIM = "Adding is faster than multiplying."
SWEEP = {"rows": (3, 2_000), "kind": ("plain",)}
RIVALS = {"product": lambda x: x * 2, "ours": lambda x: x + x + OFFSET}
BASELINE = "product"
OFFSET = 0
TARGET, TARGET_RATE, TARGET_AT = 1.5, 1e6, {"rows": (2_000,)}
def make(rows, kind): return torch.randn(rows, 7)
def check(out): assert torch.equal(out["ours"], out["product"]), "they differ"
def price(out): return {"largest": float(out["ours"].max())}
def work(x): return x.numel(), "numbers"
"""


@pytest.fixture
def claim_file(tmp_path):
    file = tmp_path / "a-package" / "benchmarks" / "adding.py"
    file.parent.mkdir(parents=True)
    file.write_text(CLAIM_FILE)
    return file


@pytest.fixture
def clocks(monkeypatch, tmp_path):
    """Results under tmp_path, and clocks that say what they are told: product 3 s, ours 2 s, the first turn slower."""
    turns = []

    def clock(rival, inputs, **_):
        seconds = iter([9.0, *[2.0 if float(rival(inputs)[0, 0]) == 2.0 else 3.0] * 20])

        def turn():
            turns.append(rival)
            return next(seconds)

        return turn

    monkeypatch.setattr(claims, "_clock", clock)
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    return turns


def claim_files():
    for file in claims.find():
        # read as text: importing them all would make every collection of tests slow
        marks = [pytest.mark.slow] if "\nSLOW = True" in file.read_text() else []
        yield pytest.param(file, marks=marks, id=f"{file.parents[1].name}/{file.stem}")


@pytest.mark.parametrize("file", list(claim_files()))
def test_claim_at_its_smallest_size(file):
    """The rivals agree where they must, each runs, and the targets are at points of the sweep."""
    claim = claims.load(file)
    if "cpu" not in claim.devices:
        pytest.skip(f"runs on {', '.join(claim.devices)} only")
    result = claims.measure(claim, claim.points()[0], device="cpu", rounds=1)
    assert set(result["seconds"]) == set(claim.module.RIVALS)
    assert result["ratio"] == result["seconds"][claim.module.BASELINE] / result["seconds"]["ours"]
    for _, where in claims.target_ratios(claim):
        for name, values in where.items():
            assert set(values) <= set(claim.module.SWEEP[name])


def test_names_of_tables_are_names_of_claims():
    known = {f"{file.parents[1].name}/{file.stem}" for file in claims.find()}
    for readme in [ROOT / "README.md", *(folder / "README.md" for folder in claims.packages().values())]:
        for name in re.findall(r"<!-- bench:(\S+) -->", readme.read_text()):
            assert (name if "/" in name else f"{readme.parent.name}/{name}") in known


def test_only_chooses_and_refuses():
    of_kernels = [file for file in claims.find() if file.parents[1].name == "shared-kernels"]
    assert claims.find("shared-kernels") == of_kernels
    assert {"stencil_blend", "zonal_histogram"} <= {file.stem for file in of_kernels}
    assert [file.stem for file in claims.find("zonal_histogram")] == ["zonal_histogram"]
    assert claims.find("shared-kernels/zonal_histogram") == claims.find("zonal_histogram")
    outcome = CliRunner().invoke(bench.app, ["--only", "zonal"])
    assert outcome.exit_code == 2
    assert "no benchmark is called 'zonal'" in outcome.output
    assert "shared-kernels/zonal_histogram" in outcome.output.replace("\n", "")


def test_a_wrong_result_gives_no_figure(claim_file, clocks, monkeypatch):
    claim = claims.load(claim_file)
    claim.module.OFFSET = 1
    with pytest.raises(AssertionError, match="they differ"):
        next(claims.run(claim, device="cpu"))
    assert not clocks
    assert not claims.RESULTS.exists()
    monkeypatch.setattr(claims, "find", lambda _: [claim_file])
    monkeypatch.setattr(claims, "load", lambda _: claim)
    outcome = CliRunner().invoke(bench.app, ["--smoke"])
    assert outcome.exit_code == 1
    assert "its check failed before the clock: they differ" in outcome.output


def test_rivals_take_turns_and_the_median_counts(claim_file, clocks):
    claim = claims.load(claim_file)
    claim.module.make = lambda rows, **_: torch.ones(rows, 7)
    claim.module.RIVALS = {"product": lambda x: x * 3, "ours": lambda x: x + 1}
    claim.module.check = lambda _: None
    small, large = claims.run(claim, device="cpu")
    assert large["seconds"] == {"product": 3.0, "ours": 2.0}
    assert large["ratio"] == 1.5
    assert large["rate"] == {"per second": 7_000.0, "unit": "numbers"}
    assert [reached for _, reached in large["targets"]] == [True, False]
    assert "targets" not in small
    turns = [clocks[i : i + 2] for i in range(0, len(clocks), 2)]
    assert turns == [list(claim.module.RIVALS.values())] * (2 * (claims.ROUNDS + 1))


def test_a_target_for_each_point(claim_file, clocks):
    claim = claims.load(claim_file)
    claim.module.TARGETS = ((1.2, {"rows": (2_000,)}), (3, {"rows": (3, 2_000)}))
    del claim.module.TARGET_RATE
    small, large = claims.run(claim, device="cpu")
    assert (small["target"], large["target"]) == (3, 1.2)
    assert small["targets"] == [(f"{small['ratio']:.3g}x, at least 3x wanted", False)]


def test_results_are_whole_after_every_point_and_name_no_machine(claim_file, monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(claims, "SECONDS_PER_TURN", 1e-4)
    running = claims.run(claims.load(claim_file), device="cpu")
    next(running)
    (file,) = claims.RESULTS.iterdir()
    assert len(json.loads(file.read_text())["claims"]["a-package/adding"]["points"]) == 1
    list(running)
    claims.keep("cpu", "tests", "a-package", {"failures": 0})
    (file,) = claims.RESULTS.iterdir()
    content = json.loads(file.read_text())
    points = content["claims"]["a-package/adding"]["points"]
    assert [point["point"] for point in points] == [{"rows": 3, "kind": "plain"}, {"rows": 2000, "kind": "plain"}]
    for point in points:
        low, high = point["spread"]["ours"]
        assert 0 < low <= point["seconds"]["ours"] <= high
    assert content["tests"] == {"a-package": {"failures": 0}}
    table = bench.markdown("a-package/adding", content["device"], content["claims"]["a-package/adding"]).splitlines()
    assert table[0] == "| rows | kind | product | ours | ratio | wanted | numbers/s | largest |"
    assert table[2].startswith("| 3 | plain | ")
    assert [line.split(" | ")[5] for line in table[2:4]] == ["", "1.5x"]
    assert content["device"].endswith("cores")
    assert platform.node() not in file.read_text() + file.name


def test_tables_say_what_was_measured(tmp_path):
    point = {"point": {"shape": [8, 3], "side": 2400}, "seconds": {"ours": 0.0105, "theirs": 0.25}, "ratio": 23.8}
    point |= {"rate": {"per second": 5.5e8, "unit": "pixels"}, "price": {"error": 0.00123}}
    entry = {"claim": "c", "baseline": "theirs", "rivals": ["ours", "theirs"], "threads": 1, "torch": "2.15.0"}
    entry |= {"date": "2026-11-24", "points": [point]}
    readme = tmp_path / "a-package" / "README.md"
    readme.parent.mkdir()
    readme.write_text("before\n<!-- bench:adding -->\nold\n<!-- /bench -->\nafter\n")
    devices = [{"device": "A processor, 2 cores", "claims": {"a-package/adding": entry}}, {"device": "unused"}]
    assert bench.fill(readme, devices)
    assert readme.read_text().splitlines() == [
        "before",
        "<!-- bench:adding -->",
        "| shape | side | theirs | ours | ratio | pixels/s | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 8 x 3 | 2,400 | 250 ms | 10.5 ms | 23.8x | 550 million | 0.00123 |",
        "",
        "A processor, 2 cores, 1 thread, torch 2.15.0, 2026-11-24; `uv run tools/bench.py --only a-package/adding`",
        "<!-- /bench -->",
        "after",
    ]
    assert not bench.fill(readme, devices)
    with pytest.raises(typer.Exit) as left:
        bench.fill(readme, devices[1:])
    assert left.value.exit_code == 2
    assert "23.8x" in readme.read_text()
    readme.write_text("<!-- bench:adding -->\n<!-- /bench -->\n")
    assert bench.fill(readme, devices[1:])
    assert readme.read_text().splitlines()[1] == "Not measured yet: `uv run tools/bench.py --only a-package/adding`"
    assert bench.fill(readme, devices)
    assert "23.8x" in readme.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("del make", "a-package/adding lacks make"),
        ("BASELINE = 'sdpa'", "a-package/adding has no rival 'sdpa', only product, ours"),
        ("RIVALS = {'product': None}", "a-package/adding has no rival 'ours', only product"),
    ],
)
def test_an_unfinished_claim_is_refused(claim_file, change, message):
    claim_file.write_text(CLAIM_FILE + change)
    with pytest.raises(claims.ClaimProblem, match=message):
        claims.load(claim_file)


def test_gpu_check_without_a_gpu_says_so():
    """As a process that has neither typer nor rich."""
    code = "import sys; sys.modules['typer'] = sys.modules['rich'] = None; import gpu_check; sys.exit(gpu_check.main())"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | hidden, cwd=ROOT / "tools")
    assert run.returncode == 2
    assert re.search("no GPU: torch .* finds no CUDA or ROCm device here", run.stderr)
    assert "Traceback" not in run.stderr


def test_gpu_check_refuses_an_unknown_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "geo-yeld"])
    assert gpu_check.main() == 2
    said = capsys.readouterr().err
    assert "nothing is called 'geo-yeld': give an op or one of shared-kernels, " in said
    assert " geo-yield," in said
    assert gpu_check._chosen("stencil_blend") == (["shared-kernels"], "stencil_blend")
    assert gpu_check._chosen("geo-yield") == (["geo-yield"], None)
    assert gpu_check._chosen(None)[0][0] == "shared-kernels"
    assert set(gpu_check._chosen(None)[0]) == set(claims.packages())


@pytest.mark.parametrize(
    ("tests", "outcome", "counts"),
    [
        (
            "def test_a(): pass\n@gpu\ndef test_b(): pass\n@gpu\ndef test_c(): pytest.skip('why')",
            "1 passed, 1 skipped",
            "201",
        ),
        ("@gpu\ndef test_a(): pass\n@gpu\ndef test_b(): assert 1 == 2", "FAILED: 1 of 2", "210"),
        ("def test_a(): pass", "has no tests for a GPU", None),
    ],
)
def test_gpu_check_counts_tests(tests, outcome, counts, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: needs a GPU\n")
    (tmp_path / "tests/test_it.py").write_text(f"import pytest\ngpu = pytest.mark.gpu\n{tests}\n")
    kept = []
    monkeypatch.setattr(claims, "packages", lambda: {"a-package": tmp_path})
    monkeypatch.setattr(claims, "keep", lambda _, *kept_as: kept.append(kept_as))
    assert gpu_check._test("a-package", None) == outcome
    if counts is None:
        assert not kept
    else:
        ((section, key, entry),) = kept
        assert (section, key) == ("tests", "a-package")
        assert f"{entry['tests']}{entry['failures']}{entry['skipped']}" == counts


def test_tuning_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", "--only", "sparse_attention"])
    assert tune_kernels.main() == 2
    assert re.search("no GPU: torch .* and tiles are timed on one. Run this where one is\n", capsys.readouterr().err)


def test_tuning_walks_to_the_fastest_tile():
    """A valley in rows and stages, a cliff where shared memory ends, and a row that no sample uses."""
    pytest.importorskip("triton")
    from shared_kernels._tiles import Tile

    start = Tile(rows=64, keys=32, warps=4, stages=1)
    table = {"forward": {64: start, 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 1, 1)}, "dq": {64: start}}
    before = {kernel: dict(rows) for kernel, rows in table.items()}
    run, used_by = lambda columns: table["forward"][columns], {}

    def clock(call):
        tiles = call()
        rows, keys, warps, stages = tiles[0]
        used_by.setdefault(len(tiles), set()).add(tiles[-1])
        return float("inf") if stages > 3 else abs(rows - 128) + abs(stages - 4) + abs(keys - 32) + abs(warps - 4) + 100

    found = {row.columns: row for row in tune_kernels.tuned_rows(table, run, {"a": 64, "b": 64, "c": 128}, clock)}
    assert found[64].after == Tile(rows=128, keys=32, warps=4, stages=1)  # a stage more would win less than 2 %
    assert (found[64].time_before, found[64].time_after) == (167.0, 103.0)
    assert found[128].after == Tile(rows=128, keys=32, warps=4, stages=1)
    assert {row.kernel for row in found.values()} == {"forward"}
    assert start in used_by[2]  # both samples at once
    assert Tile(16, 16, 4, 1) in used_by[1]
    assert table == before
