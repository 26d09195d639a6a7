"""mAP, CMC and mINP against hand-computed cases and the plain per-query loop; re-ranking, expansion, pooling."""

import itertools

import numpy as np
import pytest

from reid_robot.ranking import (
    Labels,
    evaluate_distances,
    evaluate_features,
    expand_queries,
    pool_queries,
    rerank,
    tie_averaged_ap,
)


def loop(distances, query, gallery, max_rank=50):
    """Query by query, rank by rank, as the protocol reads."""
    cmc, aps, inps = [], [], []
    for q in range(len(query.ids)):
        order = sorted(range(len(gallery.ids)), key=lambda g: (distances[q, g], g))
        m = []
        for g in order:
            if gallery.ids[g] == -1 or (gallery.ids[g] == query.ids[q] and gallery.cameras[g] == query.cameras[q]):
                continue
            m.append(int(gallery.ids[g] == query.ids[q]))
        if not any(m):
            continue
        cmc.append([float(any(m[: k + 1])) for k in range(max_rank)])
        aps.append(sum(hit * sum(m[: i + 1]) / (i + 1) for i, hit in enumerate(m)) / sum(m))
        inps.append(sum(m) / (max(i for i, hit in enumerate(m) if hit) + 1))
    return np.mean(aps), np.mean(inps), np.mean(cmc, 0), len(aps)


def labels(ids, cameras):
    return Labels(np.array(ids), np.array(cameras))


def test_by_hand():
    """Gallery by distance: junk (own camera), wrong, right, distractor, right. Matches at ranks 2 and 4 of four."""
    query, gallery = labels([7], [1]), labels([7, 3, 7, 0, 7, -1], [1, 1, 2, 2, 3, 2])
    found = evaluate_distances(np.array([[0.0, 0.1, 0.2, 0.3, 0.4, 0.05]]), query, gallery, max_rank=5)
    assert found.map == pytest.approx((1 / 2 + 2 / 4) / 2, abs=1e-15)
    assert found.minp == pytest.approx(2 / 4, abs=1e-15)
    assert found.cmc.tolist() == [0, 1, 1, 1, 1]
    assert (found.rank1, found.num_queries) == (0, 1)


@pytest.mark.parametrize("many", [False, True])
def test_as_the_loop_on_random_instances(many):
    """Missing matches, matches by the own camera alone, distractors, junk, ties; few and many matches a query."""
    rng = np.random.default_rng(0)
    for case in range(6 if many else 194):
        people = 2 if many else int(rng.integers(2, 9))
        query = labels(rng.integers(0, people, 7), rng.integers(0, 3, 7))
        count = 500 if many else int(rng.integers(1, 40))
        gallery = labels(rng.integers(-1, people, count), rng.integers(0, 3, count))
        distances = rng.random((7, count))
        if case % 2:
            distances = distances.round(1)  # ties
        if not ((query.ids[:, None] == gallery.ids) & (query.cameras[:, None] != gallery.cameras)).any():
            with pytest.raises(ValueError, match="no query has a match"):
                evaluate_distances(distances, query, gallery)
            continue
        found = evaluate_distances(distances, query, gallery)
        mean, inp, cmc, kept = loop(distances, query, gallery)
        assert found.num_queries == kept == np.isfinite(found.ap).sum()
        assert abs(found.map - mean) < 1e-12
        assert abs(found.minp - inp) < 1e-12
        assert np.abs(found.cmc - cmc).max() < 1e-12


def test_laws():
    """Perfect distances give 1, reversed ones the analytic value; monotone maps and permutations change nothing."""
    rng = np.random.default_rng(1)
    query, gallery = labels([1, 2], [0, 0]), labels(rng.permutation([1] * 4 + [2] * 6), [1] * 10)
    right = (query.ids[:, None] == gallery.ids).astype(float)
    assert evaluate_distances(1 - right, query, gallery).map == 1.0
    worst = evaluate_distances(right, query, gallery)
    analytic = [sum(i / (10 - r + i) for i in range(1, r + 1)) / r for r in (4, 6)]
    assert worst.map == pytest.approx(np.mean(analytic), abs=1e-12)
    distances = rng.random((2, 10))
    base, order = evaluate_distances(distances, query, gallery), rng.permutation(10)
    for other in (np.exp(3 * distances) - 7, distances[:, order]):
        own = gallery if other.max() > 1 else labels(gallery.ids[order], gallery.cameras[order])
        assert evaluate_distances(other, query, own).map == pytest.approx(base.map, abs=1e-12)


def test_features_in_chunks_are_the_matrix():
    rng = np.random.default_rng(2)
    q, g = rng.normal(size=(9, 5)), rng.normal(size=(30, 5))
    query, gallery = labels(rng.integers(0, 4, 9), [0] * 9), labels(rng.integers(0, 4, 30), [1] * 30)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, g)]
    whole = evaluate_distances(1 - unit[0] @ unit[1].T, query, gallery)
    for chunk in (1, 4, 100):
        assert evaluate_features(q * 3, g, query, gallery, chunk=chunk).map == pytest.approx(whole.map, abs=1e-12)


def test_ties_averaged_over_all_orders():
    distances, matches = np.array([0.1, 0.5, 0.5, 0.5, 0.9, 0.9]), np.array([0, 1, 0, 1, 1, 0])
    values = []
    for middle, last in itertools.product(itertools.permutations([1, 0, 1]), itertools.permutations([1, 0])):
        m = [0, *middle, *last]
        values.append(sum(hit * sum(m[: i + 1]) / (i + 1) for i, hit in enumerate(m)) / sum(m))
    assert tie_averaged_ap(distances, matches) == pytest.approx(np.mean(values), abs=1e-12)
    assert np.isnan(tie_averaged_ap(distances, 0 * matches))


def test_multi_query():
    features = np.array([[1.0, 0], [0, 1], [4, 4], [5, 1]])
    pooled, found = pool_queries(features, labels([2, 2, 2, 1], [1, 1, 3, 1]))
    assert found.ids.tolist() == [1, 2, 2]
    assert found.cameras.tolist() == [1, 1, 3]
    assert pooled.tolist() == [[5, 1], [0.5, 0.5], [4, 4]]
    assert pool_queries(features, labels([2, 2, 2, 1], [1, 1, 3, 1]), how="max")[0][1].tolist() == [1, 1]


def test_expansion_moves_queries_to_their_neighbours():
    query, gallery = np.array([[1.0, 0.0]]), np.array([[0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]])
    expected = np.array([2.4, 1.4]) / np.hypot(2.4, 1.4)
    assert np.allclose(expand_queries(query, gallery, topk=2)[0], expected)


def test_reranking_as_the_paper_writes_it():
    """With sets: mutual neighbours, widened by those of neighbours who share two thirds; Jaccard of fuzzy sets."""
    rng = np.random.default_rng(3)
    points, k1, k2 = rng.normal(size=(24, 3)) + np.repeat(rng.normal(size=(4, 3)), 6, axis=0), 6, 3
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    n = range(24)
    d = np.array([[2 - 2 * unit[i] @ unit[j] for j in n] for i in n])
    d = d / d.max(axis=0)
    near = [sorted(n, key=lambda j: (d[i, j], j)) for i in n]

    def mutual(i, k):
        return {j for j in near[i][: k + 1] if i in near[j][: k + 1]}

    fuzzy = np.zeros((24, 24))
    for i in n:
        own = mutual(i, k1)
        wide = set(own)
        for j in own:
            theirs = mutual(j, 3)
            if len(theirs & own) > 2 / 3 * len(theirs):
                wide |= theirs
        for j in wide:
            fuzzy[i, j] = np.exp(-d[i, j]) / sum(np.exp(-d[i, m]) for m in wide)
    fuzzy = np.array([np.mean([fuzzy[j] for j in near[i][:k2]], axis=0) for i in n])
    expected = np.array([
        [1 - np.minimum(fuzzy[i], fuzzy[j]).sum() / np.maximum(fuzzy[i], fuzzy[j]).sum() for j in range(5, 24)]
        for i in range(5)
    ])  # fmt: skip
    found = rerank(points[:5], points[5:], k1=k1, k2=k2, weight=0.3)
    assert np.abs(found - (0.7 * expected + 0.3 * d[:5, 5:])).max() < 1e-5
    assert np.abs(rerank(points[:5], points[5:], k1=k1, k2=k2, weight=1.0) - d[:5, 5:]).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, q, g: (d[:, 1:], q, g), "distances must be"),
        (lambda d, q, g: (d * np.nan, q, g), "hold NaN"),
        (lambda d, q, _: (d[:, :0], q, labels(np.array([], int), np.array([], int))), "gallery is empty"),
        (lambda d, q, g: (d, q, labels(g.ids + 50, g.cameras)), "no query has a match"),
    ],
)
def test_refused(change, message):
    query, gallery = labels([1, 2], [0, 0]), labels([1, 2, 3], [1, 1, 1])
    with pytest.raises(ValueError, match=message):
        evaluate_distances(*change(np.ones((2, 3)), query, gallery))


def test_refused_labels_and_features():
    with pytest.raises(ValueError, match="must be integers"):
        Labels(np.array([0.5]), np.array([1]))
    with pytest.raises(ValueError, match="as many"):
        Labels(np.array([1]), np.array([1, 2]))
    with pytest.raises(ValueError, match="positive, finite length"):
        evaluate_features(np.zeros((1, 3)), np.ones((1, 3)), labels([1], [0]), labels([1], [1]))
    with pytest.raises(ValueError, match="k1 must lie"):
        rerank(np.ones((1, 2)), np.ones((2, 2)))
