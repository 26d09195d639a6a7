"""DFYP's operator layer, routed, against computing all three operators for every row and choosing afterwards."""

import torch

from geo_yield.dfyp import OPERATORS, PUBLISHED_OPERATORS, DFYPConfig, OperatorLayer

CLAIM = "Computing only the operators that a batch needs is at least twice as fast as computing all three."
SWEEP = {"rows": (64, 256), "years": ("mixed", "one")}
BASELINE = "all three, then choose"
TARGET = 2.0


def make(rows, years):
    """MODIS histograms of 2003-2015, as in training, or of one year, as in a forecast."""
    layer = OperatorLayer(DFYPConfig(operator_by_year=PUBLISHED_OPERATORS))
    year = torch.arange(rows) % 13 + 2003 if years == "mixed" else torch.full((rows,), 2011)
    return layer, torch.randn(rows, 9, 32, 32), year.cpu()


@torch.no_grad()
def all_three(inputs):
    layer, x, year = inputs
    every = torch.stack([layer.apply_operator(name, x) for name in OPERATORS])
    chosen = torch.tensor([OPERATORS.index(layer.config.operator_of(value)) for value in year.tolist()])
    return every[chosen.to(x.device), torch.arange(len(x), device=x.device)]


@torch.no_grad()
def ours(inputs):
    layer, x, year = inputs
    return layer(x, year)


RIVALS = {"all three, then choose": all_three, "ours": ours}


def check(out):
    torch.testing.assert_close(out["ours"], out["all three, then choose"], rtol=1e-5, atol=1e-6)
