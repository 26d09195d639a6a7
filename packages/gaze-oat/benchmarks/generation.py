"""Cached, batched generation of scanpaths against the published way: all encoded anew at each step of each sample."""

import numpy as np
import torch

from gaze_oat import Layout, OATConfig, OATModel, SceneBatch
from gaze_oat.generation import StepDecoder

CLAIM = "Sampling scanpaths of one scene is at least 50 times as fast as encoding everything anew at each step."
SWEEP = {"samples": (2, 20)}
BASELINE = "encode each step"
TARGET = 50
TARGET_AT = {"samples": (20,)}
DEVICES = ("cpu",)
ROUNDS = 2
STEPS, TARGET_OBJECT = 8, 30


def make(**sizes):
    """The book-cover size of the paper with smaller crops: 84 objects, width 512; every path is made STEPS long."""
    torch.manual_seed(0)
    model = OATModel(OATConfig(crop_size=(48, 40))).eval()
    with torch.no_grad():
        model.pointer.readout.weight.fill_(1.0)
    return model, torch.rand(84, 3, 48, 40), Layout.grid(6, 14, width=2560, height=1600), sizes["samples"]


def ours(inputs):
    """All samples in step; most probable objects, so that both ways give the same."""
    model, objects, layout, samples = inputs
    with torch.inference_mode():
        encoded = model.encode(SceneBatch.of([objects], [layout], [TARGET_OBJECT]))
        decoder, last, paths = StepDecoder(model, encoded, samples, STEPS), None, []
        for _ in range(STEPS):
            last = decoder.step(last, samples)[:, :84].argmax(-1)
            paths.append(last)
    return torch.stack(paths, 1).numpy()


def theirs(inputs):
    """One sample after the other, crops and encoder at each step, as the published loop does."""
    model, objects, layout, samples = inputs
    scenes, paths = SceneBatch.of([objects], [layout], [TARGET_OBJECT]), []
    with torch.inference_mode():
        for _ in range(samples):
            path = torch.zeros(1, 0, dtype=torch.long)
            for _ in range(STEPS):
                picked = model(scenes, path)[:, -1, :84].argmax(-1, keepdim=True)
                path = torch.cat([path, picked], 1)
            paths.append(path[0])
    return torch.stack(paths).numpy()


RIVALS = {"encode each step": theirs, "ours": ours}


def check(out):
    """The same paths."""
    np.testing.assert_array_equal(out["ours"], out["encode each step"])


def work(inputs):
    """Scanpaths a second."""
    return inputs[3], "scanpaths"
