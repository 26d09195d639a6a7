"""The pointer head: its formula, its gradients, its constant column."""

import pytest
import torch

from gaze_oat import PointerHead


@torch.no_grad()
def test_the_formula_with_loops() -> None:
    torch.manual_seed(0)
    head = PointerHead(6, 2).double()
    hidden, memory = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    logits = head(hidden, memory)
    assert logits.shape == (2, 3, 6)
    assert head.readout is not None
    for b in range(2):
        for step in range(3):
            for column in range(6):
                scores = []
                for k in range(2):
                    asked = head.decoder_side[k](hidden[b, step])
                    score = asked @ head.encoder_side[k](memory[b, column]) if column < 5 else torch.tensor(0.0)
                    scores.append(score / 6**0.5)
                expected = (
                    sum(w * s for w, s in zip(head.readout.weight[0], scores, strict=True)) + head.readout.bias[0]
                )
                assert float(logits[b, step, column]) == pytest.approx(float(expected), abs=1e-12)


def test_one_head_is_a_scaled_dot_product() -> None:
    torch.manual_seed(1)
    head, hidden, memory = PointerHead(8, 1), torch.randn(1, 4, 8), torch.randn(1, 7, 8)
    asked, keys = head.decoder_side[0](hidden), head.encoder_side[0](memory)
    assert torch.equal(head(hidden, memory)[..., :-1], (asked @ keys.transpose(1, 2)) / 8**0.5)
    assert head.readout is None
    assert (head(hidden, memory)[..., -1] == 0).all()


def test_pad_is_the_readouts_bias() -> None:
    head = PointerHead(8, 2)
    assert head.readout is not None
    pads = head(torch.randn(2, 4, 8), torch.randn(2, 7, 8))[..., -1]
    assert (pads == head.readout.bias).all()


def test_gradients() -> None:
    torch.manual_seed(2)
    head = PointerHead(4, 2).double()
    inputs = [torch.randn(1, size, 4, dtype=torch.float64, requires_grad=True) for size in (3, 5)]
    names = list(dict(head.named_parameters()))

    def call(hidden: torch.Tensor, memory: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(head, dict(zip(names, weights, strict=True)), (hidden, memory))

    assert torch.autograd.gradcheck(call, (*inputs, *head.parameters()))
