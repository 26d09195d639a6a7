"""Multiple-choice questions made from facts that come with Python: cities, letters, functions.

Each task gives several hundred items with four options, one of them right, in a fixed order; draws are seeded. The
functions differ from one version of Python to the next, as their docstrings do.
"""

import importlib
import inspect
import random
import re
import unicodedata
import zoneinfo
from collections import Counter
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from llm_attn import Choice

NUM_OPTIONS = 4


def cities(seed: int = 0) -> list[Choice]:
    """Which country a city is in: the time zone database's table of places. Wrong options are other countries in it."""
    countries = dict(_table("iso3166.tab"))
    places: dict[str, str] = {}
    for code, _, zone, *_ in _table("zone.tab"):
        city, country = zone.split("/")[-1].replace("_", " "), countries[code].split(" (")[0]
        if city.lower() not in country.lower() and country.lower() not in city.lower():
            places[city] = country
    draw, names = random.Random(seed), sorted(set(places.values()))
    return [
        _choice(f"Question: In which country is {city}?\nAnswer:", country, names, draw)
        for city, country in sorted(places.items())
    ]


def letters(seed: int = 0, *, of_each: int = 40) -> list[Choice]:
    """Which script a letter belongs to, by its Unicode name."""
    scripts = ("Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari", "Georgian", "Greek", "Hangul", "Hebrew")
    scripts += ("Hiragana", "Katakana", "Tamil", "Thai")
    found: dict[str, list[str]] = {script: [] for script in scripts}
    for code in range(0x370, 0xD7A4):
        kind, *rest = unicodedata.name(chr(code), "").split(" ")
        if kind.title() in found and rest[:1] in (["LETTER"], ["SMALL"], ["SYLLABLE"], ["CHARACTER"]):
            found[kind.title()].append(chr(code))
    draw = random.Random(seed)
    return [
        _choice(f'Question: Which script is the letter "{letter}" from?\nAnswer:', script, scripts, draw)
        for script in scripts
        for letter in sorted(draw.sample(found[script], min(of_each, len(found[script]))))
    ]


MODULES = (
    "base64", "bisect", "calendar", "cmath", "copy", "csv", "fnmatch", "functools", "gc", "glob", "gzip", "heapq",
    "inspect", "itertools", "json", "locale", "math", "mimetypes", "operator", "os", "os.path", "pickle", "random",
    "re", "shutil", "signal", "socket", "statistics", "string", "struct", "subprocess", "sys", "tempfile",
    "textwrap", "threading", "time", "traceback", "unicodedata", "urllib.parse", "warnings", "weakref", "zlib",
)  # fmt: skip
TYPES = (bytes, dict, float, frozenset, int, list, set, str, tuple)


def functions(seed: int = 0) -> list[Choice]:
    """Which function a docstring describes; wrong options are of the same module or type."""
    draw, items = random.Random(seed), []
    homes = {name: importlib.import_module(name) for name in MODULES} | {kind.__name__: kind for kind in TYPES}
    for home, owner in homes.items():
        described = {f"{home}.{name}": _sentence(getattr(owner, name), name) for name in sorted(vars(owner))}
        names = [name for name, sentence in described.items() if sentence]
        if len(names) < NUM_OPTIONS:
            continue
        for name in names:
            prompt = f'Question: Which Python function does this: "{described[name]}"\nAnswer:'
            items.append(_choice(prompt, name, names, draw))
    times = Counter(item.prompt for item in items)
    return [item for item in items if times[item.prompt] == 1]  # what fits two functions is no question


TASKS: dict[str, Callable[[int], list[Choice]]] = {"cities": cities, "letters": letters, "functions": functions}


def _choice(prompt: str, right: str, names: "list[str] | tuple[str, ...]", draw: random.Random) -> Choice:
    options = [right, *draw.sample([name for name in names if name != right], NUM_OPTIONS - 1)]
    draw.shuffle(options)
    return Choice(prompt, tuple(f" {option}" for option in options), options.index(right))


def _sentence(function: object, name: str) -> str | None:
    """First sentence of what a public function says of itself, unless it gives its name away."""
    if name.startswith("_") or not callable(function) or inspect.isclass(function):
        return None
    sentence = re.split(r"(?<=[.])\s|\n\s*\n", inspect.getdoc(function) or "")[0].replace("\n", " ").strip()
    return sentence if 20 <= len(sentence) <= 160 and name.lower() not in sentence.lower() else None


def _table(name: str) -> list[list[str]]:
    """A table of the time zone database: of the system, or of the package tzdata."""
    places = [Path(folder) / name for folder in zoneinfo.TZPATH]
    if find_spec("tzdata"):
        places.append(resources.files("tzdata") / "zoneinfo" / name)  # type: ignore[arg-type]
    for place in places:
        if place.is_file():
            lines = place.read_text(encoding="utf-8").splitlines()
            return [line.split("\t") for line in lines if line and not line.startswith("#")]
    raise FileNotFoundError(f"no {name} of the time zone database on this system: uv add tzdata")
