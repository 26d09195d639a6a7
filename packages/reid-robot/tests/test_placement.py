"""The grammar of placements and the spaces of the search."""

import numpy as np
import pytest

from reid_robot.placement import (
    Candidate,
    Site,
    density_candidates,
    format_placement,
    neighbours,
    parse_placement,
    stage_candidates,
)

DEPTHS = (3, 4, 6, 3)


def test_grammar():
    found = parse_placement("s4.last:in, s2.all,s3.2", DEPTHS)
    assert found == (Site(2, 1), Site(2, 2), Site(2, 3), Site(2, 4), Site(3, 2), Site(4, 3, "in"))
    assert format_placement(found) == "s2.1,s2.2,s2.3,s2.4,s3.2,s4.3:in"
    assert parse_placement(format_placement(found), DEPTHS) == found
    assert parse_placement("", DEPTHS) == ()
    assert parse_placement("s1.first:out", DEPTHS) == (Site(1, 1),)


def test_any_placement_survives_writing():
    rng = np.random.default_rng(0)
    every = [Site(s, b, p) for s, depth in enumerate(DEPTHS, 1) for b in range(1, depth + 1) for p in ("in", "out")]
    for _ in range(50):
        chosen = tuple(sorted(site for site in every if rng.random() < 0.3))
        assert parse_placement(format_placement(chosen), DEPTHS) == chosen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s2", "cannot read 's2'"),
        ("layer2.last", "cannot read"),
        ("s2.last:before", "cannot read"),
        ("s5.last", "stages 1 to 4"),
        ("s0.last", "stages 1 to 4"),
        ("s3.7", "stage 3 has blocks 1 to 6"),
        ("s3.0", "stage 3 has blocks 1 to 6"),
        ("s4.3,s4.last", "names a site twice"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_placement(text, DEPTHS)


def test_spaces():
    first = list(stage_candidates(DEPTHS))
    assert len(first) == len(set(first)) == 15 * 3 * 2
    assert Candidate("light-s", (Site(1, 3, "in"), Site(4, 3, "in"))) in first
    second = list(density_candidates(DEPTHS))
    assert len(second) == len(set(second)) == 256
    assert second[0].placement == ()
    assert max(len(c.placement) for c in second) == sum(DEPTHS)
    around = neighbours(Candidate("light", (Site(2, 4),)), DEPTHS)
    assert len(around) == sum(DEPTHS)
    assert sorted(len(c.placement) for c in around) == [0, *[2] * 15]
