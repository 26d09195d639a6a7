"""Training: labels, loss, resuming, and that it learns a reader it can be judged against."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gaze_oat import Layout, OATConfig, OATModel, OATTrainer, ScanpathProblem, TrainingConfig, Trial, crop_objects
from gaze_oat.synthetic import draw_shelf, row_reader
from gaze_oat.training import IGNORED, collate, decision_loss, next_labels, validation_score

TINY = OATConfig(
    width=16, feedforward=16, num_heads=2, encoder_layers=1, decoder_layers=1, grid_size=4, crop_encoder="features",
    feature_size=2,
)  # fmt: skip


def a_model(seed: int = 0) -> OATModel:
    torch.manual_seed(seed)
    return OATModel(TINY)


def some_trials(count: int = 12) -> list[Trial]:
    rng, layout = np.random.default_rng(0), Layout.grid(2, 3, width=3, height=2)
    objects = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    return [
        Trial(
            scene=f"s{n % 4}",
            objects=objects,
            layout=layout,
            target=n % 4,
            path=np.append(rng.integers(0, 6, 3), n % 4),
        )
        for n in range(count)
    ]


def test_labels_are_the_path_and_then_the_target_token() -> None:
    assert next_labels(torch.tensor([[4, 2, 2], [1, -1, -1]]), 6).tolist() == [[4, 2, 2, 6], [1, 6, IGNORED, IGNORED]]


def test_the_loss_is_the_mean_over_decisions_and_blind_to_padding() -> None:
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    paths = torch.tensor([[4, 2, 2], [1, -1, -1]])
    chosen = [(0, 0, 4), (0, 1, 2), (0, 2, 2), (0, 3, 6), (1, 0, 1), (1, 1, 6)]
    chances = logits.log_softmax(-1)
    expected = -sum(float(chances[place]) for place in chosen) / 6
    assert float(decision_loss(logits, paths)) == pytest.approx(expected, rel=1e-6)
    changed = logits.clone()
    changed[1, 2:] = 99.0
    assert torch.equal(decision_loss(changed, paths), decision_loss(logits, paths))
    without = logits[..., :-1].log_softmax(-1)
    expected = -sum(float(without[place]) for place in chosen) / 6
    assert float(decision_loss(logits, paths, pad_logit=False)) == pytest.approx(expected, rel=1e-6)


def test_padding_ids_change_nothing() -> None:
    model, (scenes, paths) = a_model().eval(), collate(some_trials(3))
    paths[0, 2:] = -1
    other = paths.clone()
    other[0, 2:] = -7
    assert torch.equal(decision_loss(model(scenes, paths), paths), decision_loss(model(scenes, other), other))


def test_mirrored_trials_change_sides() -> None:
    trials = some_trials(2)
    scenes, paths = collate(trials, [True, False])
    assert scenes.cells[0, :, 1].tolist() == [2, 1, 0, 2, 1, 0]
    assert scenes.cells[1, :, 1].tolist() == [0, 1, 2, 0, 1, 2]
    assert paths[0].tolist() == trials[0].path.tolist()


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    trials = some_trials()
    settings = TrainingConfig(epochs=4, lr=1e-2, batch_size=5, monitor="nll", mirror=True, seed=3)
    whole, seen = a_model(), []
    reports = OATTrainer(whole, trials, trials[:4], settings, folder=tmp_path / "a", on_epoch=seen.append).run()
    assert [report.epoch for report in reports] == [0, 1, 2, 3]
    assert seen == reports
    short = TrainingConfig(**{**settings.__dict__, "epochs": 2})
    OATTrainer(a_model(), trials, trials[:4], short, folder=tmp_path / "b").run()
    parts = a_model(seed=9)
    assert OATTrainer(parts, trials, trials[:4], settings, folder=tmp_path / "b").run() == reports
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    assert (tmp_path / "a/log.json").read_text() == (tmp_path / "b/log.json").read_text()
    other = TrainingConfig(**{**settings.__dict__, "lr": 0.5})
    with pytest.raises(ScanpathProblem, match="is a run with other settings"):
        OATTrainer(a_model(), trials, trials[:4], other, folder=tmp_path / "b").run()


def test_the_best_epoch_is_kept_and_patience_ends(tmp_path: Path) -> None:
    trials, model = some_trials(), a_model()
    settings = TrainingConfig(epochs=40, lr=0.3, batch_size=12, patience=3, monitor="nll")
    reports = OATTrainer(model, trials, trials[:3], settings).run()
    scores = [report.score for report in reports]
    assert len(scores) < 40
    assert len(scores) - 1 - int(np.argmin(scores)) == 3
    assert validation_score(model, trials[:3], "nll") == pytest.approx(min(scores), abs=1e-6)
    assert reports[-1].best == min(scores)


def test_delta_compares_greedy_paths_with_people() -> None:
    trials, model = some_trials(4), a_model().eval()
    greedy = [model.generate(t.objects, t.layout, t.target, greedy=True).paths[0] for t in trials]
    as_people = [Trial(**{**t.__dict__, "path": path}) for t, path in zip(trials, greedy, strict=True)]
    assert validation_score(model, as_people, "delta") == 0
    assert validation_score(model, trials, "delta") > 0


def test_training_leaves_torchs_randomness_alone() -> None:
    trials = some_trials(4)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    OATTrainer(a_model_kept(), trials, trials, TrainingConfig(epochs=1, monitor="nll")).run()
    assert torch.equal(torch.rand(3), expected)


def a_model_kept() -> OATModel:
    with torch.random.fork_rng():
        return a_model()


def test_bad_settings_are_explained() -> None:
    with pytest.raises(ScanpathProblem, match="must be positive"):
        TrainingConfig(lr=0)
    with pytest.raises(ScanpathProblem, match="monitor must be 'delta' or 'nll', got 'loss'"):
        TrainingConfig(monitor="loss")  # type: ignore[arg-type]
    with pytest.raises(ScanpathProblem, match="schedule must be"):
        TrainingConfig(schedule="step")  # type: ignore[arg-type]
    with pytest.raises(ScanpathProblem, match="needs trials on both sides, got 4 and 0"):
        OATTrainer(a_model(), some_trials(4), [])
    with pytest.raises(ScanpathProblem, match="a path on 's' must hold objects 0 to 5"):
        Trial(scene="s", objects=torch.rand(6, 2), layout=some_trials(1)[0].layout, target=0, path=np.array([6]))


def shelves(count: int, seed: int) -> list[Trial]:
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        shelf = draw_shelf(3, 5, rng=rng, cell=(34, 32))
        crops, target = crop_objects(shelf.image, shelf.layout, crop_size=(29, 29)), int(rng.integers(15))
        found.append(
            Trial(scene=str(number), objects=crops, layout=shelf.layout, target=target, path=row_reader(target))
        )
    return found


def test_it_learns_to_read_a_shelf_until_the_target() -> None:
    """Greedy paths on shelves never seen are the reader's, and another target moves the stop."""
    torch.manual_seed(0)
    model = OATModel(
        OATConfig(
            width=64, feedforward=64, encoder_layers=2, decoder_layers=2, grid_size=5, crop_size=(29, 29),
            max_length=15, dropout=0.0,
        )
    )  # fmt: skip
    training, test = shelves(160, 0), shelves(60, 1)
    settings = TrainingConfig(epochs=12, lr=2e-3, batch_size=16, patience=12, monitor="nll", schedule="cosine")
    OATTrainer(model, training, training[:20], settings).run()
    right, moved = [], []
    for trial in test:
        path = model.generate(trial.objects, trial.layout, trial.target, greedy=True).paths[0]
        right.append(np.array_equal(path, trial.path))
        other = (trial.target + 7) % 15
        moved.append(
            np.array_equal(model.generate(trial.objects, trial.layout, other, greedy=True).paths[0], trial.path)
        )
    assert np.mean(right) >= 0.95
    assert np.mean(moved) < 0.1
