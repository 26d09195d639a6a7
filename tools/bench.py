"""Run the benchmark claims of the packages, and write their tables into the READMEs.

    uv run tools/bench.py                            every claim
    uv run tools/bench.py --only shared-kernels      those of one package, or one: --only zonal_histogram
    uv run tools/bench.py --smoke                    each once at its smallest size; keeps nothing
    uv run tools/bench.py tables                     README tables from benchmarks/results/*.json

A README says where a table goes by `<!-- bench:<file> -->` ... `<!-- /bench -->`; from outside the package the name is
`<package>/<file>`. What a claim file looks like, and how it is measured: claims.py beside this.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import claims
import typer
from rich.console import Console
from rich.markup import escape

stdout, stderr = Console(), Console(stderr=True)
_HELP = (__doc__ or "").replace("\n\n    uv", "\n\n\b\n    uv")  # \b keeps a paragraph's lines
app = typer.Typer(add_completion=False, help=_HELP, rich_markup_mode=None)

_MARKED = re.compile(r"(<!-- bench:([\w/-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    only: Annotated[str | None, typer.Option(help="A package, a benchmark file, or package/file.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Each once at its smallest size; keeps nothing.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda (ROCm too).")] = "cpu",
) -> None:
    """Measure, print, and keep the results in benchmarks/results/<device>.json, point by point."""
    if context.invoked_subcommand is not None:
        return
    try:
        chosen = [claims.load(file) for file in claims.find(only)]
    except claims.ClaimProblem as problem:
        stderr.print(escape(str(problem)), style="red")
        raise typer.Exit(code=2) from None
    failed = [claim.key for claim in chosen if device in claim.devices and not _measured(claim, device, smoke=smoke)]
    if failed:
        stderr.print(f"failed: {', '.join(failed)}", style="red")
        raise typer.Exit(code=1)


def _measured(claim: claims.Claim, device: str, *, smoke: bool) -> bool:
    """Measure a claim and say what came out; False if its check found the rivals to disagree."""
    stdout.print(f"\n[bold]{claim.key}[/bold]  {escape(claim.module.CLAIM)}")
    try:
        for result in _smoke(claim, device) if smoke else claims.run(claim, device=device):
            stdout.print(escape(claims.line(result)), highlight=False)
            for text, reached in result.get("targets", []):
                stdout.print(f"    {'[green]reached[/green]' if reached else '[red]not reached[/red]'}: {text}")
    except AssertionError as disagreement:
        stderr.print(f"{claim.key}: its check failed before the clock: {escape(str(disagreement))}", style="red")
        return False
    return True


def _smoke(claim: claims.Claim, device: str) -> Iterator[dict[str, Any]]:
    result = claims.measure(claim, claim.points()[0], device=device, rounds=1)
    yield {name: value for name, value in result.items() if name != "targets"}  # one turn decides nothing


@app.command()
def tables() -> None:
    """Fill the marked places of every README with what was measured."""
    devices = [json.loads(file.read_text()) for file in sorted(claims.RESULTS.glob("*.json"))]
    for readme in [claims.ROOT / "README.md", *(folder / "README.md" for folder in claims.packages().values())]:
        if readme.exists() and fill(readme, devices):
            stdout.print(f"wrote {readme.relative_to(claims.ROOT)}")


def fill(readme: Path, devices: list[dict[str, Any]]) -> bool:
    """Replace what stands between the marks of one README; True if that changed it.

    A place without a table says that nothing was measured yet; a table is not thrown away for want of its figures.
    """
    before = readme.read_text()

    def table(match: re.Match[str]) -> str:
        name = match[2] if "/" in match[2] else f"{readme.parent.name}/{match[2]}"
        found = [(d["device"], d["claims"][name]) for d in devices if name in d.get("claims", {})]
        if not found and "|" not in match[0]:
            return f"{match[1]}Not measured yet: `uv run tools/bench.py --only {name}`\n{match[3]}"
        if not found:
            stderr.print(f"{readme}: nothing was measured for '{name}'; run tools/bench.py --only {name}", style="red")
            raise typer.Exit(code=2)
        return match[1] + "\n".join(markdown(name, device, entry) for device, entry in found) + match[3]

    after = _MARKED.sub(table, before)
    if after != before:
        temporary = readme.with_suffix(".md.tmp")
        temporary.write_text(after)
        temporary.replace(readme)
    return after != before


def markdown(name: str, device: str, entry: Mapping[str, Any]) -> str:
    """One claim on one device as a table, and where, when and how it came about."""
    points, baseline = entry["points"], entry["baseline"]
    rivals = [*(name for name in entry["rivals"] if name != "ours"), "ours"]
    head = [*points[0]["point"], *rivals, f"ours against {baseline}" if len(rivals) > 2 else "ratio"]
    aimed = any("target" in point for point in points)
    if aimed:
        head.append("wanted")
    if "rate" in points[0]:
        head.append(f"{points[0]['rate']['unit']}/s")
    head += list(points[0].get("price", {}))
    rows = [head, ["---"] * len(head)]
    for point in points:
        row = [claims.shown(value) for value in point["point"].values()]
        row += [claims.duration(point["seconds"][rival]) for rival in rivals] + [f"{point['ratio']:.3g}x"]
        if aimed:
            row.append(f"{point['target']:.3g}x" if "target" in point else "")
        if "rate" in point:
            row.append(claims.rate_shown(point["rate"]["per second"]))
        rows.append(row + [f"{value:.3g}" for value in point.get("price", {}).values()])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    threads = f"{entry['threads']} thread{'s' if entry['threads'] > 1 else ''}, " if "core" in device else ""
    how = f"{device}, {threads}torch {entry['torch']}, {entry['date']}; `uv run tools/bench.py --only {name}`"
    return "\n".join([*lines, "", f"{how}", ""])


if __name__ == "__main__":
    app()
