"""Position codes: cosines are the Gaussian that was asked for, in every way to get them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gaze_oat import ScanpathProblem, closed_code, position_table, solved_code
from gaze_oat.position_code import code_loss, cosines, gaussian_gram, sinusoid_code, updated_code

TABLES = Path(__file__).resolve().parents[4] / "shared/data/amazon-covers-gaze"


def wanted(n: int, sigma: float = 2.0) -> torch.Tensor:
    return torch.tensor([[math.exp(-((i - j) ** 2) / (2 * sigma**2)) for j in range(n)] for i in range(n)]).double()


@pytest.mark.parametrize("n", [11, 14])
def test_the_closed_form_is_exact(n: int) -> None:
    table = closed_code(n)
    assert (cosines(table) - wanted(n)).abs().max() < 1e-5
    assert table.norm(dim=-1).numpy() == pytest.approx(86**0.5, abs=1e-9)
    assert table.shape == (n, 86)


def test_the_solver_reaches_the_same() -> None:
    table = solved_code(14, steps=5000)
    assert (cosines(table) - wanted(14)).abs().max() < 1e-3
    norms = table.norm(dim=-1)
    assert (norms - norms.mean()).abs().max() < 1e-3
    assert code_loss(table, wanted(14).float()) < 1e-6
    assert torch.equal(solved_code(5, steps=3), solved_code(5, steps=3))


def test_the_loss_is_the_published_sum() -> None:
    table, target = torch.tensor([[3.0, 0], [0, 1], [1, 1]]), wanted(3).float()
    total = 0.0
    for i in range(3):
        for j in range(3):
            cosine = float(table[i] @ table[j] / (table[i].norm() * table[j].norm()))
            total += (cosine - float(target[i, j])) ** 2
    norms = [3.0, 1.0, 2**0.5]
    total += sum((norm - sum(norms) / 3) ** 2 for norm in norms) / 3
    assert float(code_loss(table, target)) == pytest.approx(total / 6, rel=1e-6)


@pytest.mark.real
@pytest.mark.skipif(not TABLES.exists(), reason="the published tables are not beside the checkout")
@pytest.mark.parametrize(
    ("name", "n", "sigma"),
    [
        ("oat_amazon_learned_random_PE.npy", 14, 2.0),
        ("oat_learned_PE_random_2.npy", 11, 2.0),
        ("oat_learned_PE_random_2.5.npy", 11, 2.5),
    ],
)
def test_published_tables_have_our_cosines(name: str, n: int, sigma: float) -> None:
    published = torch.from_numpy(np.load(TABLES / name)).double()
    assert published.shape == (n, 86)
    assert (cosines(published) - cosines(closed_code(n, sigma=sigma))).abs().max() < 1e-3


def test_a_narrow_table_is_the_nearest_of_its_rank() -> None:
    exact, narrow = wanted(14), closed_code(14, 8)
    assert narrow.shape == (14, 8)
    assert (cosines(narrow) - exact).abs().max() < 0.02
    assert (cosines(closed_code(14, 11)) - exact).abs().max() < 1e-3
    assert (cosines(closed_code(14, 4)) - exact).abs().max() > 0.1


def test_ablation_codes() -> None:
    table = sinusoid_code(6, 8)
    assert table[3, :4].tolist() == pytest.approx([np.sin(3), np.cos(3), np.sin(0.3), np.cos(0.3)])
    assert sinusoid_code(6, 8, "linear")[3, 2:4].tolist() == pytest.approx([np.sin(1.5), np.cos(1.5)])
    assert sinusoid_code(6, 8, "exp1")[3, 2].item() == pytest.approx(np.sin(3 / (2**0.9 / 4 * 6)))
    assert sinusoid_code(6, 8, "exp2")[3, 2].item() == pytest.approx(np.sin(3 / (0.5**0.9 * 6)))
    old, new = cosines(sinusoid_code(9, 16))[4], cosines(updated_code(9, 16))[4]
    np.testing.assert_allclose(new, old**15, atol=1e-9)


def test_bad_input_is_explained() -> None:
    with pytest.raises(ScanpathProblem, match="position_code must be one of solved, closed"):
        position_table("gauss", 4, 8)  # type: ignore[arg-type]
    with pytest.raises(ScanpathProblem, match="sigma > 0, got n=4, sigma=0"):
        gaussian_gram(4, 0)
    with pytest.raises(ScanpathProblem, match="at least 2 columns, got 1"):
        closed_code(4, 1)
