"""Losses, batches, changes of crops, and a run that is stopped and goes on; it learns."""

import dataclasses
import math

import pytest
import torch

from reid_robot.losses import batch_hard_triplet, identity_loss
from reid_robot.network import ReidConfig, ReidNet
from reid_robot.ranking import Labels, evaluate_features
from reid_robot.training import TrainingConfig, change_crops, extract, rate_factor, sample_batch, train
from reid_robot.walkers import CropSet, WalkerConfig, draw_walkers


def test_triplet_as_brute_force():
    torch.manual_seed(0)
    features, ids = torch.randn(12, 5, dtype=torch.float64), torch.arange(4).repeat_interleave(3)
    expected = 0.0
    for i in range(12):
        distance = [(features[i] - features[j]).norm() for j in range(12)]
        farthest = max(d for d, j in zip(distance, ids, strict=True) if j == ids[i])
        nearest = min(d for d, j in zip(distance, ids, strict=True) if j != ids[i])
        expected += max(0.0, float(farthest - nearest + 0.3)) / 12
    assert float(batch_hard_triplet(features, ids)) == pytest.approx(expected, abs=1e-9)
    apart = torch.eye(5, dtype=torch.float64)[ids] * 10 + 0.01 * features
    assert float(batch_hard_triplet(apart, ids)) == 0.0


def test_triplet_of_lone_images_and_its_gradient():
    features, ids = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2])
    assert torch.autograd.gradcheck(lambda f: batch_hard_triplet(f, ids, margin=9.0), features)
    assert batch_hard_triplet(features, ids, margin=9.0) > 0
    with pytest.raises(ValueError, match="3 images of one"):
        batch_hard_triplet(features, torch.zeros(3, dtype=torch.long))


def test_identity_loss_by_hand():
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    p = [math.exp(v) / sum(map(math.exp, (2.0, 0.0, -1.0))) for v in (2.0, 0.0, -1.0)]
    wanted = [0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]
    expected = -sum(w * math.log(q) for w, q in zip(wanted, p, strict=True))
    assert float(identity_loss(logits, torch.tensor([0]))) == pytest.approx(expected, abs=1e-6)


def test_rate():
    config = TrainingConfig(steps=120, warm_up=10, drops=(1 / 3, 3 / 4))
    assert [round(rate_factor(s, config), 6) for s in (0, 5, 10, 39, 40, 89, 90)] == [0.1, 0.55, 1, 1, 0.1, 0.1, 0.01]


def test_batches():
    ids = torch.tensor([5] * 9 + [7] + [9] * 4 + [2] * 3)
    index = sample_batch(ids, 3, 4, torch.Generator().manual_seed(1))
    people = ids[index].view(3, 4)
    assert (people == people[:, :1]).all()
    assert len(people[:, 0].unique()) == 3
    for row, person in zip(index.view(3, 4), people[:, 0], strict=True):
        own = int((ids == person).sum())
        assert len(row.unique()) == 4 if own >= 4 else len(row.unique()) == own
    assert torch.equal(index, sample_batch(ids, 3, 4, torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="the data has 4"):
        sample_batch(ids, 5, 4, torch.Generator())


def test_changed_crops():
    crops = torch.arange(3 * 64 * 32).remainder(251).to(torch.uint8).view(1, 3, 64, 32).repeat(40, 1, 1, 1)
    still = TrainingConfig(flip=0, pad=0, erase=0)
    assert torch.equal(change_crops(crops, still, torch.Generator()), crops)
    mirrored = change_crops(crops, dataclasses.replace(still, flip=1.0), torch.Generator())
    assert torch.equal(mirrored, crops.flip(-1))
    erased = change_crops(crops, dataclasses.replace(still, erase=1.0), torch.Generator().manual_seed(0))
    share = (erased != crops).any(1).float().mean((1, 2))
    assert share.min() > 0.005
    assert share.max() <= 0.45
    shifted = change_crops(crops, dataclasses.replace(still, pad=0.1), torch.Generator().manual_seed(0))
    assert len({tuple(c[0, 20, 10:14].tolist()) for c in shifted}) > 20


@pytest.fixture(scope="module")
def people():
    return draw_walkers(6, WalkerConfig(size=(32, 16), images_per_camera=2), seed=3)


def small(num_ids):
    torch.manual_seed(0)
    return ReidNet(ReidConfig(backbone="resnet18_reid_w16", input_size=(32, 16), num_ids=num_ids))


def test_a_stopped_run_ends_as_one_that_was_not(people, tmp_path):
    config = TrainingConfig(steps=4, people=3, images=2, warm_up=2)
    whole = small(6)
    losses = train(whole, people, config)

    class Stop(Exception):
        pass

    def stop(step, steps, loss):
        if step == 3:
            raise Stop

    first = small(6)
    with pytest.raises(Stop):
        train(first, people, config, folder=tmp_path, save_every=2, on_step=stop)
    second = small(6)
    assert train(second, people, config, folder=tmp_path) == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    with pytest.raises(ValueError, match="of another run"):
        train(small(6), people, dataclasses.replace(config, seed=1), folder=tmp_path)


def test_refused(people):
    with pytest.raises(ValueError, match="6 identities, the network's classifier 4"):
        train(small(4), people, TrainingConfig(steps=1, people=3))
    with pytest.raises(ValueError, match="people must be at least 2"):
        TrainingConfig(people=1)
    with pytest.raises(ValueError, match="erase must lie"):
        TrainingConfig(erase=2)
    with pytest.raises(ValueError, match="lower the rate"):
        train(small(6), people, TrainingConfig(steps=9, people=3, images=2, rate=1e18, warm_up=0))
    with pytest.raises(ValueError, match="images must be"):
        CropSet(torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.zeros(1))


@pytest.mark.slow
def test_learns_people_it_has_not_seen():
    """Check of the specification: cross-camera, 16 people who were not trained on, 200 steps of a small network."""
    easy = WalkerConfig(cast=0.03, occlusion=0.2, shift=0.04)
    training, test = draw_walkers(32, easy, seed=0), draw_walkers(16, easy, seed=1)
    net, labels = small(32), Labels(test.ids.numpy(), test.cameras.numpy())

    def scores():
        features = extract(net, test).numpy()
        return evaluate_features(features, features, labels, labels)

    before = scores()
    train(net, training, TrainingConfig(steps=300, rate=2e-3, warm_up=30, drops=(0.6, 0.85), erase=0.2))
    after = scores()
    assert before.rank1 < 0.6
    assert before.map < 0.45
    assert after.rank1 >= 0.9
    assert after.map >= 0.85
