"""Generation with caches is the full computation, step by step; rules of stopping and sampling hold."""

import numpy as np
import pytest
import torch

from gaze_oat import Layout, OATConfig, OATModel, ScanpathProblem, SceneBatch
from gaze_oat.generation import StepDecoder


@pytest.fixture(scope="module")
def model() -> OATModel:
    torch.manual_seed(0)
    made = OATModel(
        OATConfig(
            width=32, feedforward=48, encoder_layers=2, decoder_layers=3, crop_encoder="features", feature_size=5,
            offset_bias=True,
        )
    )  # fmt: skip
    with torch.no_grad():
        made.offset_scores.normal_()  # type: ignore[union-attr]
        for parameter in made.pointer.parameters():
            parameter.mul_(3)  # far from even chances
    return made.eval()


@pytest.fixture(scope="module")
def scene() -> tuple[torch.Tensor, Layout]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(15, 5, generator=generator), Layout.grid(3, 5, width=50, height=30)


@torch.no_grad()
def test_cached_steps_are_the_full_forward(model: OATModel, scene: tuple[torch.Tensor, Layout]) -> None:
    paths = torch.randint(0, 15, (4, 9), generator=torch.Generator().manual_seed(1))
    scenes = SceneBatch.of([scene[0]] * 4, [scene[1]] * 4, [6] * 4)
    full = model(scenes, paths)
    encoded = model.encode(SceneBatch.of([scene[0]], [scene[1]], [6]))
    decoder = StepDecoder(model, encoded, 4, 10)
    for step in range(10):
        logits = decoder.step(None if step == 0 else paths[:, step - 1], 4)
        torch.testing.assert_close(logits, full[:, step], atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_is_the_argmax_of_the_full_computation(model: OATModel, scene: tuple[torch.Tensor, Layout]) -> None:
    path: list[int] = []
    for _ in range(30):
        logits = model(SceneBatch.of([scene[0]], [scene[1]], [6]), torch.tensor([path], dtype=torch.long))[0, -1, :16]
        if not path:
            logits[15] = -torch.inf
        if int(logits.argmax()) == 15:
            break
        path.append(int(logits.argmax()))
    found = model.generate(*scene, 6, greedy=True, max_length=30)
    assert [own.tolist() for own in found.paths] == [path]
    assert found.ended.tolist() == [len(path) < 30]


def test_samples_follow_the_probabilities(model: OATModel, scene: tuple[torch.Tensor, Layout]) -> None:
    count = 3000
    found = model.generate(*scene, 6, num_samples=count, generator=torch.Generator().manual_seed(2), max_length=12)
    first = np.bincount([path[0] for path in found.paths], minlength=15) / count
    chances = model.probabilities(*scene, 6, [[0]])[0][0]
    assert np.abs(first - chances[:15]).max() < 4 * (0.25 / count) ** 0.5
    common = int(first.argmax())
    after = [path for path in found.paths if path[0] == common]
    second = np.bincount([path[1] if len(path) > 1 else 15 for path in after], minlength=16) / len(after)
    expected = model.probabilities(*scene, 6, [[common]])[0][1]
    assert np.abs(second - expected).max() < 4 * (0.25 / len(after)) ** 0.5
    # a later step too: rows that ended were dropped from the batch in between
    assert len({len(path) for path in found.paths}) > 5
    long = [path for path in found.paths if len(path) > 4]
    done = [model.probabilities(*scene, 6, [path[:4]])[0][4] for path in long[:150]]
    picked = np.mean([chance[path[4]] for chance, path in zip(done, long, strict=False)])
    assert picked == pytest.approx(np.mean([(c[:15] ** 2).sum() / c[:15].sum() for c in done]), abs=0.08)


def test_paths_begin_and_end_by_the_rules(model: OATModel, scene: tuple[torch.Tensor, Layout]) -> None:
    found = model.generate(*scene, 6, num_samples=500, generator=torch.Generator().manual_seed(3), max_length=5)
    assert len(found.paths) == 500
    for path, ended in zip(found.paths, found.ended, strict=True):
        assert 1 <= len(path) <= 5
        assert ended == (len(path) < 5)
        assert path.min() >= 0
        assert path.max() < 15
    again = model.generate(*scene, 6, num_samples=500, generator=torch.Generator().manual_seed(3), max_length=5)
    assert all(np.array_equal(a, b) for a, b in zip(found.paths, again.paths, strict=True))
    cold = model.generate(*scene, 6, num_samples=40, temperature=1e-4, max_length=5)
    greedy = model.generate(*scene, 6, greedy=True, max_length=5).paths[0]
    assert all(np.array_equal(path, greedy) for path in cold.paths)


def test_generation_leaves_the_model_as_it_was(model: OATModel, scene: tuple[torch.Tensor, Layout]) -> None:
    model.train()
    try:
        one = model.generate(*scene, 6, greedy=True).paths[0]
        assert model.training
    finally:
        model.eval()
    assert np.array_equal(one, model.generate(*scene, 6, greedy=True).paths[0])


def test_bad_input_is_explained(model: OATModel, scene: tuple[torch.Tensor, Layout]) -> None:
    for settings in ({"num_samples": 0}, {"temperature": 0.0}):
        with pytest.raises(ScanpathProblem, match="num_samples and temperature must be positive"):
            model.generate(*scene, 6, **settings)  # type: ignore[arg-type]
    with pytest.raises(ScanpathProblem, match="max_length must be at least 1"):
        model.generate(*scene, 6, max_length=0)
    with pytest.raises(ScanpathProblem, match="target 15 is no object"):
        model.generate(*scene, 15)
