"""What is measured is what was asked for; counts are exact elsewhere (test_timm_door.py)."""

import pytest
import torch

from reid_robot.costs import block_costs, compare_latency, take_turns
from reid_robot.network import ReidConfig, ReidNet


def net(attention, where="s1.last,s3.last"):
    return ReidNet(
        ReidConfig(backbone="resnet18_reid_w16", attention=attention, where=where, input_size=(64, 32))
    ).eval()


def test_turns_alternate():
    calls = []
    found = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warm_up=2, runs=3)
    assert calls == ["a", "b"] * 5
    assert found["a"].ratio == 1.0


def test_medians_and_ratios(monkeypatch):
    """On a clock that only the networks move: one slow call of the short one leaves its median alone."""
    now = [0.0]
    monkeypatch.setattr("reid_robot.costs.time.perf_counter", lambda: now[0])
    durations = iter([0.02, 0.06, 0.02, 0.06, 0.5, 0.06, 0.02, 0.06, 0.02, 0.06])

    def work():
        now[0] += next(durations)

    found = take_turns({"short": work, "long": work}, warm_up=0, runs=5)
    assert found["short"].median == pytest.approx(0.02)
    assert found["short"].p95 == pytest.approx(0.5)
    assert found["long"].median == pytest.approx(0.06)
    assert found["long"].ratio == pytest.approx(3.0)


def test_report_says_how():
    report = compare_latency({"plain": net(None), "light": net("light")}, batch=2, warm_up=1, runs=2)
    assert (report.engine, report.precision, report.batch) == ("torch, eager", "float32", 2)
    assert (report.input_size, report.runs, report.threads) == ((64, 32), 2, torch.get_num_threads())
    assert list(report.results) == ["plain", "light"]


def test_every_block_on_the_map_it_meets():
    costs = block_costs(net("rga-sc", "s1.last,s2.first"), runs=2)
    assert [(c.block, c.map_size) for c in costs] == [("RelationAware", (16, 16, 8)), ("RelationAware", (32, 8, 4))]
    assert all(c.seconds > 0 and c.macs > 0 for c in costs)


def test_refused():
    with pytest.raises(ValueError, match="at least one network and one run"):
        take_turns({})
