"""All pairwise scanpath metrics over two sets of paths, against multimatch_gaze, which does MultiMatch alone."""

import multimatch_gaze
import numpy as np

from gaze_oat import all_pairs, edit_distance, multimatch, scanmatch, sequence_score

CLAIM = "Four pairwise metrics of 120 x 120 scanpaths together are at least 20 times as fast as multimatch_gaze alone."
SWEEP = {"paths": (30, 120)}
BASELINE = "multimatch_gaze"
TARGET = 20
TARGET_AT = {"paths": (120,)}
DEVICES = ("cpu",)
ROUNDS = 2
SCREEN = (2560.0, 1600.0)
ROWS, COLS = 6, 14


def make(**sizes):
    """Paths as long as people's on the book covers: 2 to 91 fixations, 14.5 on average."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(1.15, 12.6, sizes["paths"]), 3, 91).astype(int)
    points = [rng.random((length, 2)) * SCREEN for length in lengths]
    cells = [np.stack([p[:, 1] / SCREEN[1] * ROWS, p[:, 0] / SCREEN[0] * COLS], 1).astype(int) for p in points]
    return points, cells, [cell[:, 0] * COLS + cell[:, 1] for cell in cells]


def ours(inputs):
    """Every path with every path: seven figures a pair."""
    points, cells, ids = inputs
    pairs = all_pairs(len(ids), len(ids))
    sequence_score(ids, ids, pairs)
    edit_distance(ids, ids, pairs)
    scanmatch(cells, cells, pairs)
    return multimatch(points, points, pairs, screen=SCREEN)


def theirs(inputs):
    """The same pairs, MultiMatch's figures without the durations."""
    kind = [("start_x", "f8"), ("start_y", "f8"), ("duration", "f8")]
    tables = [np.array([(x, y, 0.2) for x, y in path], dtype=kind) for path in inputs[0]]
    return np.array([
        [float(np.asarray(v).squeeze()) for v in multimatch_gaze.docomparison(a, b, screensize=SCREEN)[:4]]
        for a in tables
        for b in tables
    ])  # fmt: skip


RIVALS = {"multimatch_gaze": theirs, "ours": ours}


def check(out):
    """The same similarities."""
    np.testing.assert_allclose(out["ours"], out["multimatch_gaze"], atol=1e-9)


def work(inputs):
    """Pairs a second."""
    return len(inputs[0]) ** 2, "pairs"
