"""All pairwise metrics of 600 x 600 paths as long as people's: under a minute."""

import importlib.util
from pathlib import Path

from gaze_oat import all_pairs, multimatch

_file = Path(__file__).with_name("pairwise_metrics.py")
_spec = importlib.util.spec_from_file_location("pairwise_metrics", _file)
_small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_small)

CLAIM = "All pairwise metrics of 600 x 600 scanpaths take less than a minute."
SWEEP = {"paths": (200, 600)}
BASELINE = "multimatch alone"
TARGET_RATE = 6000
TARGET_AT = {"paths": (600,)}
DEVICES = ("cpu",)
ROUNDS = 3
make, work = _small.make, _small.work


def multimatch_alone(inputs):
    """What MultiMatch takes of it."""
    points = inputs[0]
    return multimatch(points, points, all_pairs(len(points), len(points)), screen=_small.SCREEN)


RIVALS = {"multimatch alone": multimatch_alone, "ours": _small.ours}


def check(out):
    """The same similarities."""
    assert (out["ours"] == out["multimatch alone"]).all()
