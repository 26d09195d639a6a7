"""Distillation: the loss against its formula, in pieces and whole, and inside a Trainer."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import llm_attn.distillation as distillation
from llm_attn.affine_attention import AffineConfig, apply_affine
from llm_attn.distillation import Distillation, DistillationConfig, distillation_loss
from llm_attn.testing import tiny_model, tokens
from llm_attn.transformers.training import param_groups

B, N, V = 2, 7, 11


def logits(seed):
    return 2 * torch.randn(B, N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels():
    found = torch.randint(V, (B, N), generator=torch.Generator().manual_seed(3))
    found[0, :3] = -100
    found[1, 5] = -100
    return found


def written_out(student, teacher, *, temperature, ce_weight):
    """Token by token."""
    total, count = 0.0, 0
    for row, (one, other) in enumerate(zip(student, teacher, strict=True)):
        for place in range(N - 1):
            target = int(labels()[row, place + 1])
            if target == -100:
                continue
            p = (other[place] / temperature).softmax(-1)
            q = (one[place] / temperature).softmax(-1)
            total = (
                total + temperature**2 * (p * (p / q).log()).sum() - ce_weight * one[place].softmax(-1)[target].log()
            )
            count += 1
    return total, count


@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.5, 0.0), (1.0, 0.3)])
def test_loss_and_gradient_are_those_of_the_formula(temperature, ce_weight):
    config = DistillationConfig(temperature=temperature, ce_weight=ce_weight)
    student, teacher = logits(1).requires_grad_(), logits(2).requires_grad_()
    found = distillation_loss(student, teacher, labels(), config=config)
    total, count = written_out(student, teacher.detach(), temperature=temperature, ce_weight=ce_weight)
    assert count == 9
    torch.testing.assert_close(found, total / count)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, total / count)]
    torch.testing.assert_close(*gradients)
    assert not distillation_loss(student.detach(), teacher, labels(), config=config).requires_grad
    torch.testing.assert_close(distillation_loss(student, teacher, labels(), config=config, num_items=40), total / 40)


def test_loss_of_the_teacher_itself_is_nothing():
    assert abs(float(distillation_loss(logits(1), logits(1), labels()))) < 1e-12


def test_pieces_are_the_whole(monkeypatch):
    whole = distillation_loss(logits(1), logits(2), labels())
    monkeypatch.setattr(distillation, "CHUNK", 2 * V)
    torch.testing.assert_close(distillation_loss(logits(1), logits(2), labels()), whole)


def test_no_token_that_counts():
    student = logits(1).requires_grad_()
    loss = distillation_loss(student, logits(2), torch.full((B, N), -100))
    loss.backward()
    assert float(loss.detach()) == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distillation_loss(logits(1), logits(1)[..., :9], labels()), r"one vocabulary, got .*11\) and .*9\)"),
        (lambda: distillation_loss(logits(1), logits(1), labels()[:, :5]), r"labels must be \(2, 7\) .* got \(2, 5\)"),
        (lambda: DistillationConfig(temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: DistillationConfig(ce_weight=-1.0), "ce_weight must be at least 0, got -1.0"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_student_comes_closer_to_its_teacher(tmp_path):
    """The lines of the README: a student with Affine-Scaled Attention, a Trainer, and the loss."""
    teacher, student = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    apply_affine(student, AffineConfig())
    ids = tokens(12, 14)
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def distance():
        with torch.no_grad():
            logits = student.eval()(ids).logits, teacher(ids).logits
            return float(distillation_loss(*logits, ids))

    before = distance()
    arguments = TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(param_groups(student, weight_decay=0.1), lr=1e-2)
    with Distillation(teacher, student) as loss:
        trainer = Trainer(
            student, arguments, train_dataset=rows, compute_loss_func=loss, optimizers=(optimizer, None)
        )  # fmt: skip
        trainer.train()
        student.eval()
        torch.testing.assert_close(float(loss(student(input_ids=ids), ids)), distance(), rtol=1e-4, atol=1e-5)
    assert distance() < 0.8 * before
    assert all(p.grad is None for p in teacher.parameters())
    assert not student._forward_pre_hooks


def test_loss_before_the_student_ran():
    loss = Distillation(tiny_model("llama"), tiny_model("llama"))
    with pytest.raises(ValueError, match="called with input_ids before"):
        loss(None, tokens(1, 4))


def test_padding_reaches_the_teacher():
    teacher, student, ids = tiny_model("llama", seed=1), tiny_model("llama", seed=2), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    targets = ids.masked_fill(mask == 0, -100)
    with Distillation(teacher, student) as loss, torch.no_grad():
        outputs = student(ids, attention_mask=mask)
        found = loss(outputs, targets)
        wanted = distillation_loss(outputs.logits, teacher(ids, attention_mask=mask).logits, targets)
        without = distillation_loss(outputs.logits, teacher(ids).logits, targets)
    torch.testing.assert_close(found, wanted)
    assert abs(float(found - without)) > 1e-3


def test_what_decays():
    """Weights of maps do; biases, norms, and sinks, whose name says nothing, do not."""
    model = tiny_model("phi")
    apply_affine(model, AffineConfig(scaling="sink", gate=True))
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    decayed, exempt = param_groups(model, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    exempt_names = {names[id(p)] for p in exempt["params"]}
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert "model.layers.0.self_attn.llm_attn_affine.gate_proj.weight" in decayed_names
    assert "model.layers.1.self_attn.q_proj.weight" in decayed_names
    assert "model.layers.0.self_attn.llm_attn_affine.sink" in exempt_names
    assert {"model.layers.0.self_attn.q_proj.bias", "model.final_layernorm.weight"} <= exempt_names
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert decayed_names | exempt_names == trained
    assert len(decayed["params"]) + len(exempt["params"]) == len(trained)
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        param_groups(model, weight_decay=-1)
