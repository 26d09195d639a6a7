"""Where attention goes, as data: sites of a network, a grammar for them, and the spaces that a search walks.

A site is stage, block and place: "out" after a block's last ReLU, "in" at the end of its residual branch, before the
addition. A placement is a set of sites, written `s2.last,s3.all:in`: stage; first, last, all or a number, counted from
1; place, "out" unless said. Eisenbach et al. (arXiv:2302.14574) find positions by an extensive search over
architectures; the three levels of it here are our reconstruction.

Level 1: any subset of stages, one block at the last place, each kind of block, inside or after. Level 2: none, last,
first or every block in each stage. Level 3: any set of sites, one added or removed at a time.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

Place = Literal["in", "out"]
DENSITIES = ("none", "last", "first", "every")
_PART = re.compile(r"s(\d+)\.(first|last|all|\d+)(?::(in|out))?")


@dataclass(frozen=True, order=True)
class Site:
    """stage and block count from 1."""

    stage: int
    block: int
    place: Place = "out"

    def __str__(self) -> str:
        return f"s{self.stage}.{self.block}" + ("" if self.place == "out" else ":in")


Placement = tuple[Site, ...]


def parse_placement(text: str, depths: Sequence[int]) -> Placement:
    """Sites in order. depths: blocks of each stage, ResNet-50's are (3, 4, 6, 3). "" is the empty placement.

    Raises ValueError on what does not follow `sS.{first|last|all|J}[:in|:out]` joined by commas, on stages or blocks
    that the network lacks, and on a site named twice.
    """
    sites: list[Site] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = _PART.fullmatch(part)
        if found is None:
            raise ValueError(
                f"cannot read '{part}': a placement is like 's2.last,s3.all:in' (first, last, all or 1, 2, ...)"
            )
        stage, which, place = int(found[1]), found[2], cast(Place, found[3] or "out")
        if not 1 <= stage <= len(depths):
            raise ValueError(f"'{part}' names stage {stage}; the network has stages 1 to {len(depths)}")
        depth = depths[stage - 1]
        blocks = {"first": [1], "last": [depth], "all": list(range(1, depth + 1))}.get(which)
        if blocks is None:
            blocks = [int(which)]
        if not all(1 <= block <= depth for block in blocks):
            raise ValueError(f"'{part}' names block {which}; stage {stage} has blocks 1 to {depth}")
        sites += [Site(stage, block, place) for block in blocks]
    if len(set(sites)) < len(sites):
        raise ValueError(f"'{text}' names a site twice")
    return tuple(sorted(sites))


def format_placement(placement: Placement) -> str:
    """The text that `parse_placement` reads back."""
    return ",".join(map(str, placement))


@dataclass(frozen=True, order=True)
class Candidate:
    """One architecture: which kind of block, where. No site: the plain network, whatever the kind."""

    kind: str
    placement: Placement

    def __str__(self) -> str:
        return f"{self.kind} at {format_placement(self.placement)}" if self.placement else "plain"


def stage_candidates(
    depths: Sequence[int], *, kinds: Sequence[str] = ("light-c", "light-s", "light")
) -> Iterator[Candidate]:
    """Level 1: every non-empty subset of stages x kind x place, one block at the last position of a stage."""
    stages = range(1, len(depths) + 1)
    subsets = [s for size in stages for s in itertools.combinations(stages, size)]
    for kind, place, subset in itertools.product(kinds, ("out", "in"), subsets):
        yield Candidate(kind, tuple(Site(stage, depths[stage - 1], cast(Place, place)) for stage in subset))


def density_candidates(depths: Sequence[int], *, kind: str = "light", place: Place = "out") -> Iterator[Candidate]:
    """Level 2: 4 ** stages placements (256 for four), the plain network first."""
    for densities in itertools.product(DENSITIES, repeat=len(depths)):
        yield Candidate(kind, placement_of_densities(densities, depths, place=place))


def placement_of_densities(densities: Sequence[str], depths: Sequence[int], *, place: Place = "out") -> Placement:
    """none, last, first or every block, for each stage."""
    sites = []
    for stage, (density, depth) in enumerate(zip(densities, depths, strict=True), 1):
        if density not in DENSITIES:
            raise ValueError(f"density must be one of {', '.join(DENSITIES)}, got {density!r}")
        blocks = {"none": [], "last": [depth], "first": [1], "every": list(range(1, depth + 1))}[density]
        sites += [Site(stage, block, place) for block in blocks]
    return tuple(sites)


def neighbours(candidate: Candidate, depths: Sequence[int], *, place: Place = "out") -> list[Candidate]:
    """Level 3: every placement with one site more or one less."""
    every = [Site(stage, block, place) for stage, depth in enumerate(depths, 1) for block in range(1, depth + 1)]
    chosen = set(candidate.placement)
    return [Candidate(candidate.kind, tuple(sorted(chosen ^ {site}))) for site in every]
