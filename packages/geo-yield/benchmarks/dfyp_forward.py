"""The whole DFYP network for MODIS, routed, at the rate that a national run needs."""

import torch

from geo_yield.dfyp import DFYP, OPERATORS, PUBLISHED_OPERATORS, DFYPConfig

CLAIM = "DFYP predicts 3,100 counties (more than grow soybean in the US) in less than 3 minutes, even on one core."
SWEEP = {"rows": (16, 64)}
BASELINE = "all three operators for every row"
TARGET_RATE = 3_100 / 180


def make(rows):
    """Centred MODIS histograms of one season and the published network (26.8 million parameters)."""
    model = DFYP(DFYPConfig(operator_by_year=PUBLISHED_OPERATORS)).eval()
    return model, torch.randn(rows, 9, 32, 32) * 0.05, torch.full((rows,), 2015, device="cpu")


@torch.no_grad()
def all_three(inputs):
    model, image, year = inputs
    gated = model.rca(image)
    layer = model.cnn.operators
    every = {name: layer.apply_operator(name, gated) for name in OPERATORS}
    x = torch.stack([every[layer.config.operator_of(value)][row] for row, value in enumerate(year.tolist())])
    for block in model.cnn.blocks:
        x = block(x)
    cnn = model.cnn.head(model.cnn.dense(x.flatten(1)))
    return (model.weight_cnn * cnn + model.weight_vit * model.vit(gated)).squeeze(-1)


@torch.no_grad()
def ours(inputs):
    model, image, year = inputs
    return model(image, year)


RIVALS = {"all three operators for every row": all_three, "ours": ours}


def check(out):
    torch.testing.assert_close(out["ours"], out["all three operators for every row"], rtol=1e-4, atol=1e-4)


def work(inputs):
    return len(inputs[1]), "counties"
