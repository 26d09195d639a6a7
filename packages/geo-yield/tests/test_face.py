"""The package's face: every name is there, typed as it runs, and nothing heavy is loaded before it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import geo_yield


def test_every_name_leads_to_its_module():
    for name in geo_yield.__all__:
        assert getattr(geo_yield, name).__name__ == name
    assert dir(geo_yield) == geo_yield.__all__


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(geo_yield.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"geo_yield.{module}" for name, module in geo_yield._MODULE_OF.items()}


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, geo_yield, geo_yield.errors; print(sorted({'torch', 'pandas', 'rasterio'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
