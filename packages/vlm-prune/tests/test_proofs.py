"""The trained model's script: packed questions are questions asked alone, a cut run goes on bit for bit."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_prune.scenes import Question, build_processor, make_examples, prompt

PROOFS = Path(__file__).resolve().parents[1] / "proofs"
NAMES = ("shapes_vlm", "train_vlm", "sweep")


@pytest.fixture(scope="module")
def proofs():
    """Both modules, imported as they import each other when run as a script."""
    sys.path.insert(0, str(PROOFS))
    import shapes_vlm
    import train_vlm

    yield shapes_vlm, train_vlm
    sys.path.remove(str(PROOFS))
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def loud_model(proofs):
    """Untrained, its layers writing much into the stream, so that answers depend on what is seen."""
    model = proofs[0].build_model(0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(10)
            if "multi_modal_projector" in name and parameter.ndim == 2:
                parameter.mul_(10)
    return model


def nothing(_):
    """Hears a callback."""


@torch.no_grad()
def alone(model, processor, scene, questions):
    texts = [prompt(question.text) for question in questions]
    inputs = processor(images=[scene.image] * len(texts), text=texts, padding=True, return_tensors="pt")
    return model(**inputs, logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def packed(shapes, model, scenes, questions, number):
    tokenizer = build_processor().tokenizer
    ids, _, at, _ = shapes.segments(questions, tokenizer)
    tower = model.model.vision_tower(shapes.pixels(scenes), output_hidden_states=True)
    features = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
    visible = shapes.visible_tokens(scenes, number, np.random.default_rng(0))
    logits = shapes.packed_logits(model, features, ids, visible)
    return logits.gather(2, at[..., None, None].expand(-1, -1, 1, logits.shape[-1])).squeeze(2)


def test_questions_in_one_packed_sequence_are_the_questions_asked_alone(proofs, loud_model):
    shapes, processor = proofs[0], build_processor()
    examples = make_examples(2, seed=5)
    wanted = torch.stack([alone(loud_model, processor, scene, questions) for scene, questions in examples])
    before = [part.config._attn_implementation for part in (loud_model, loud_model.model.vision_tower)]
    shapes.prepare_packed(loud_model)
    scenes, questions = [scene for scene, _ in examples], [asked for _, asked in examples]
    got = packed(shapes, loud_model, scenes, questions, 256)
    few = packed(shapes, loud_model, scenes, questions, 32)
    loud_model.set_attn_implementation(before[0])
    assert torch.allclose(got, wanted, atol=1e-5)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1  # or the pictures would not matter
    assert (few - wanted).abs().max() > 1e-3  # nor the tokens


def test_few_visible_tokens_are_those_of_things(proofs):
    shapes = proofs[0]
    scenes = [scene for scene, _ in make_examples(3, seed=1)]
    visible = shapes.visible_tokens(scenes, 16, np.random.default_rng(0))
    for scene, row in zip(scenes, visible, strict=True):
        assert row.tolist() == sorted(set(row.tolist()))
        assert len(row) == 16
        covered = shapes.patches_of([thing.box for thing in scene.things])
        assert covered[row].all()
    assert shapes.visible_tokens(scenes, 300, np.random.default_rng(0)).shape == (3, 256)


def test_a_run_that_was_cut_goes_on_bit_for_bit(proofs, tmp_path):
    _, training = proofs
    quick = training._quick(training.STAGES)
    stages = tuple(replace(quick[i], steps=3) for i in (0, 2, 4))
    whole = training.Trainer(stages, tmp_path / "whole", seed=1)
    whole.run(nothing, nothing)

    class Cut(Exception):
        pass

    def cut_at(step):
        def listen(done):
            if done == step:
                raise Cut

        return listen

    for step in (2, 5, 7):  # in the middle of each stage; the state of the step before is on disk
        with pytest.raises(Cut):
            training.Trainer(stages, tmp_path / "cut", seed=1, save_every=1).run(nothing, cut_at(step))
    last = training.Trainer(stages, tmp_path / "cut", seed=1, save_every=1)
    assert 0 < last.steps_done < 9
    last.run(nothing, nothing)
    assert last.steps_done == whole.steps_done == 9
    for (name, a), b in zip(whole.model.state_dict().items(), last.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_only_the_parts_of_the_stage_change(proofs, tmp_path):
    _, training = proofs
    quick = training._quick(training.STAGES)
    for stage, moved in ((quick[0], ("vision_tower",)), (quick[3], training.LANGUAGE)):
        trainer = training.Trainer((stage,), tmp_path, seed=0)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.one_step()
        changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert all(any(part in name for part in moved) for name in changed)


def test_intervals_are_wilsons(proofs):
    low, high = proofs[0].interval(85, 100)
    assert (low, high) == pytest.approx((0.7672, 0.9069), abs=1e-4)  # statsmodels, proportion_confint(method="wilson")
    assert proofs[0].interval(0, 0) == (0.0, 1.0)


def test_the_blind_guess_takes_the_most_frequent_answer(proofs):
    def asked(*pairs):
        return [(None, [Question(kind="color", text=text, answer=answer, boxes=()) for text, answer in pairs])]

    seen = asked(("a", "red"), ("a", "red"), ("a", "blue"), ("b", "cyan"))
    results = proofs[0].guess_from_words(seen, asked(("a", "red"), ("a", "blue"), ("b", "cyan"), ("c", "red")))
    assert [hit for _, hit in results] == [True, False, True, False]
    assert proofs[0].summary(results)["all"]["accuracy"] == 0.5


def test_the_script_runs_and_its_checkpoint_loads(proofs, tmp_path):
    shapes, training = proofs
    out = tmp_path / "made" / "model"
    training.main(out=out, work=tmp_path / "work", seed=0, save_every=100, pictures=150, export_now=False, quick=True)
    record = json.loads((out.parent / "model.json").read_text())
    assert record["accuracy"]["own picture"]["all"]["questions"] == 24
    assert set(record["accuracy"]) == {
        "own picture", "no picture", "another scene's picture", "best guess from the words",
    }  # fmt: skip
    assert (out.parent / "model.png").stat().st_size > 10_000
    model, processor = shapes.load_trained(out)
    scene, questions = make_examples(1, seed=9)[0]
    inputs = processor(images=[scene.image], text=[prompt(questions[0].text)], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert next(model.parameters()).dtype == torch.float32
    with pytest.raises(FileNotFoundError, match="run train_vlm.py"):
        shapes.load_trained(tmp_path / "nowhere")


@pytest.mark.skipif(not (PROOFS / "checkpoints" / "shapes_vlm").exists(), reason="the model was not trained yet")
def test_the_committed_model_sees(proofs):
    shapes = proofs[0]
    model, processor = shapes.load_trained()
    examples = make_examples(12, seed=123, split="test")
    own = [hit for batch in shapes.answer(model, processor, examples) for hit in batch.hits]
    blind = [hit for batch in shapes.answer(model, processor, examples, look="none") for hit in batch.hits]
    assert len(own) == 72
    assert np.mean(own) > 0.7
    assert np.mean(blind) < 0.5
    size = sum(file.stat().st_size for file in shapes.CHECKPOINT.iterdir())
    assert size < 8e6


@pytest.mark.skipif(not (PROOFS / "checkpoints" / "shapes_vlm").exists(), reason="the model was not trained yet")
def test_the_sweep_runs_and_a_second_run_takes_what_is_there(proofs, tmp_path):
    import sweep

    sweep.main(out=tmp_path, checkpoint=proofs[0].CHECKPOINT, pictures=100, only="", quick=True)
    rows = {row["method"]: row for row in json.loads((tmp_path / "sweep.json").read_text())["rows"]}
    assert set(rows) == {"unpruned", "fastv", "fastv + debias", "random"}
    assert all(len(row["hits"]) == 24 for row in rows.values())
    assert rows["fastv"]["asked-about patches kept"] > 2 * rows["random"]["asked-about patches kept"]
    unit = tmp_path / "sweep_units" / "random-0.25.json"
    changed = json.loads(unit.read_text()) | {"hits": "0" * 24}
    unit.write_text(json.dumps(changed))
    sweep.main(out=tmp_path, checkpoint=proofs[0].CHECKPOINT, pictures=100, only="", quick=True)
    assert "| random | 0.0 (0.0 to 13.8) |" in (tmp_path / "sweep.md").read_text()
    unit.write_text(json.dumps(changed | {"hits": "0" * 12}))
    with pytest.raises(ValueError, match="another number of pictures"):
        sweep.main(out=tmp_path, checkpoint=proofs[0].CHECKPOINT, pictures=100, only="", quick=True)
