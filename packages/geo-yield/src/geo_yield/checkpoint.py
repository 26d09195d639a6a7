"""Trained models on disk: a folder of model.json and member-<k>.safetensors, read without executing anything in it.

model.json says in plain text what was learned from what: sensor, bands, bin edges, unit, crop, centring and scaling,
operators, history fit, conformal scores, training settings, package versions. The weights are safetensors.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from geo_yield.crossfit import CrossFit
from geo_yield.dfyp import DFYP, DFYPConfig
from geo_yield.errors import InputProblem
from geo_yield.histograms import HistogramLayout
from geo_yield.scaling import Scaling
from geo_yield.training import DFYPRegressor, TrainConfig

FORMAT = "geo-yield model, version 1"


def save_model(crossfit: CrossFit, folder: Path, *, metadata: Mapping[str, object] | None = None) -> Path:
    """Write a fitted ensemble of DFYP into `folder`, whole or not at all; an older model there is replaced.

    metadata: anything JSON can hold, e.g. where the training rows came from. Raises InputProblem if the ensemble is not
    fitted, is not of DFYP, or `folder` holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "model.json").exists() and (folder.is_file() or any(folder.iterdir())):
        raise InputProblem(f"'{folder}' exists and is not a model; choose another place for the model")
    members = _fitted_members(crossfit)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for k, member in enumerate(members):
            save_file(_network(member).state_dict(), partial / f"member-{k}.safetensors")
        (partial / "model.json").write_text(_readable(_describe(crossfit, members, dict(metadata or {}))))
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load_model(folder: Path) -> CrossFit:
    """The ensemble that `save_model` wrote; its predictions are the same, bit for bit.

    Raises InputProblem if there is no model, a file is damaged or missing, or another version wrote it.
    """
    folder = Path(folder)
    raw = _read_json(folder)
    try:
        layouts = [HistogramLayout.from_json(json.dumps(layout)) for layout in raw["layouts"]]
        model, train = DFYPConfig(**raw["network"]), _train_config(raw["training"])
        crossfit = CrossFit(lambda: DFYPRegressor(model, train), **raw["ensemble"])
        crossfit.scores = np.array(raw["scores"], np.float32)
        crossfit.members = [
            _load_member(
                folder / f"member-{k}.safetensors", member, layouts, DFYPRegressor(model, train, name=raw["method"])
            )
            for k, member in enumerate(raw["members"])
        ]
    except (KeyError, TypeError, IndexError, AttributeError, SafetensorError, OSError, RuntimeError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise InputProblem(f"the model in '{folder}' is damaged or of another version: {reason}") from None
    return crossfit


def layout_of(crossfit: CrossFit) -> HistogramLayout:
    """The histograms that the ensemble was trained on (for series: with the first member's limits)."""
    return _scaling(_fitted_members(crossfit)[0]).layout


def read_metadata(folder: Path) -> dict[str, object]:
    """What was given to `save_model` as metadata. Raises InputProblem if there is no model."""
    return dict(_read_json(Path(folder)).get("metadata", {}))


def _read_json(folder: Path) -> dict:
    try:
        raw = json.loads((folder / "model.json").read_text())
    except OSError:
        raise InputProblem(f"no model in '{folder}' (no model.json). Make one with: yield_predict.py train") from None
    except ValueError:
        raise InputProblem(f"'{folder / 'model.json'}' is not readable as JSON; train again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else None
        raise InputProblem(f"'{folder / 'model.json'}' has format {found!r}, this version reads {FORMAT!r}")
    return raw


def _fitted_members(crossfit: CrossFit) -> list[DFYPRegressor]:
    members = [member for member in crossfit.members if isinstance(member, DFYPRegressor)]
    if not members or len(members) < len(crossfit.members):
        names = sorted({type(member).__name__ for member in crossfit.members})
        raise InputProblem(f"only fitted ensembles of DFYP can be saved, got {', '.join(names) or 'no members'}")
    return members


def _network(member: DFYPRegressor) -> DFYP:
    if member.network is None:
        raise InputProblem("a member of the ensemble is not trained; fit it before saving")
    return member.network


def _scaling(member: DFYPRegressor) -> Scaling:
    if member.scaling is None:
        raise InputProblem("a member of the ensemble is not trained; fit it before saving")
    return member.scaling


def _describe(crossfit: CrossFit, members: list[DFYPRegressor], metadata: dict[str, object]) -> dict[str, object]:
    """Everything but the weights. Equal layouts are written once and referred to by number."""
    layouts: list[HistogramLayout] = []
    for member in members:
        if _scaling(member).layout not in layouts:
            layouts.append(_scaling(member).layout)
    return {
        "format": FORMAT,
        "method": members[0].name,
        "unit": _scaling(members[0]).unit,
        "crop": _scaling(members[0]).crop,
        "metadata": metadata,
        "versions": {name: version(name) for name in ("geo-yield", "shared-kernels", "torch", "numpy", "safetensors")},
        "network": asdict(members[0].model),
        "training": asdict(members[0].train),
        "ensemble": {"folds": crossfit.folds, "group": crossfit.group, "level": crossfit.level},
        "scores": crossfit.scores.tolist(),
        "members": [
            {
                "operator": member.model.operator,
                "operator_by_year": member.model.operator_by_year,
                "operator_after": member.model.operator_after,
                "validation_rmse": member.validation_rmse if np.isfinite(member.validation_rmse) else None,
                "scaling": _scaling(member).to_json() | {"layout": layouts.index(_scaling(member).layout)},
            }
            for member in members
        ],
        "layouts": [asdict(layout) for layout in layouts],
    }


def _load_member(weights: Path, raw: dict, layouts: list[HistogramLayout], member: DFYPRegressor) -> DFYPRegressor:
    """Fill an untrained member from its part of model.json and its weights."""
    member.scaling = Scaling.from_json({**raw["scaling"], "layout": asdict(layouts[raw["scaling"]["layout"]])})
    operators = {key: raw[key] for key in ("operator", "operator_by_year", "operator_after")}
    member.model = replace(member.model, **operators)
    with torch.random.fork_rng(devices=[]):
        member.network = DFYP(member.model).eval()
    member.network.load_state_dict(load_file(weights))
    if raw["validation_rmse"] is not None:
        member.validation_rmse = raw["validation_rmse"]
    return member


def _train_config(raw: dict) -> TrainConfig:
    return TrainConfig(**{**raw, "drops": tuple(raw["drops"])})


def _readable(description: dict[str, object]) -> str:
    """Indented JSON with lists of plain values on one line each."""
    text = json.dumps(description, indent=2, allow_nan=False)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: "[" + " ".join(match[1].split()) + "]", text) + "\n"
