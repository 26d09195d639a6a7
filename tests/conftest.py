"""Apps as these tests run them: as a process, like their users, or inside this one, for the speed of it."""

import importlib.util
import os
import shlex
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

APPS = Path(__file__).resolve().parents[1] / "apps"


class App:
    """The app that a test file names in `APP`."""

    def __init__(self, name: str) -> None:
        self.path = APPS / f"{name}.py"

    def start(self, *arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
        """A process of its own, with as many threads as here: sums depend on how they are divided."""
        command = [sys.executable, str(self.path), *map(str, arguments)]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, **pipes, text=True, cwd=cwd, env=os.environ | threads)

    def run(self, *arguments: object, cwd: Path | None = None) -> tuple[int, str, str]:
        """The same until its end: exit code, stdout and stderr."""
        process = self.start(*arguments, cwd=cwd)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    @cached_property
    def module(self) -> ModuleType:
        """The app, imported."""
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    def call(self, line: str, **places: object) -> str:
        """A command line run in this process; returns stdout. What the app raises is raised."""
        result = CliRunner().invoke(self.module.app, [word.format(**places) for word in shlex.split(line)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout


@pytest.fixture(scope="module")
def app(request: pytest.FixtureRequest) -> App:
    return App(request.module.APP)
