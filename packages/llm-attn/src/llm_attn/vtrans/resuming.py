"""Trainings that go on where they were stopped: modules, optimisers and random state in one safetensors file.

The JSON record beside it is replaced last and names the file that belongs to it, so a run that is cut off at any moment
leaves a state that fits together.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer


class Checkpoint:
    """The state of one training in a folder. ValueError on a folder that holds one with other settings."""

    def __init__(
        self,
        folder: Path | str | None,
        settings: Mapping[str, Any],
        *,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        generators: Mapping[str, torch.Generator] | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.settings = json.loads(json.dumps(settings))
        self.modules, self.optimizers, self.generators = modules, optimizers, generators or {}

    def resume(self) -> dict[str, Any]:
        """Restores everything, and returns what `save` was given with it: {"done": 0} where there is nothing."""
        if self.folder is None or not (self.folder / "training.json").exists():
            return {"done": 0}
        record: dict[str, Any] = json.loads((self.folder / "training.json").read_text())
        if record["settings"] != self.settings:
            raise ValueError(
                f"{self.folder} holds a training with other settings; give another folder, or its settings"
            )
        state = load_file(self.folder / record["file"])
        for name, module in self.modules.items():
            module.load_state_dict(_under(state, f"module.{name}."))
        for name, optimizer in self.optimizers.items():
            _load_optimizer(optimizer, _under(state, f"optimizer.{name}."))
        for name, generator in self.generators.items():
            generator.set_state(state[f"generator.{name}"])
        found: dict[str, Any] = record["progress"]
        return found

    def save(self, progress: Mapping[str, Any]) -> None:
        """Writes everything; `progress` is JSON and says in "done" how many steps are behind."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            state |= {f"module.{name}.{key}": value for key, value in module.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, values in optimizer.state_dict()["state"].items():
                state |= {f"optimizer.{name}.{index}.{key}": torch.as_tensor(v) for key, v in values.items()}
        state |= {f"generator.{name}": generator.get_state() for name, generator in self.generators.items()}
        file = self.folder / f"training-{progress['done']}.safetensors"
        save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
        record = {"settings": self.settings, "progress": dict(progress), "file": file.name}
        write_json(self.folder / "training.json", record)
        for old in self.folder.glob("training-*.safetensors"):
            if old != file:
                old.unlink()


def write_json(path: Path, record: Any) -> Path:
    """Writes a temporary file and renames it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    return part.replace(path)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state = optimizer.state_dict()
    state["state"] = {}
    for name, value in tensors.items():
        index, entry = name.split(".")
        state["state"].setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict(state)
