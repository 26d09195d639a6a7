"""Scenes: drawn as their labels say, the same for the same seed, and nothing to guess from the words of a question."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from vlm_prune.scenes import (
    ANSWERS,
    COLORS,
    KINDS,
    PLACES,
    SHAPES,
    SceneConfig,
    _digits,
    ask,
    build_processor,
    build_tokenizer,
    describe,
    make_examples,
    make_scenes,
    patches_of,
    prompt,
)


@pytest.fixture(scope="module")
def examples():
    return make_examples(120, seed=3, split="train", per_kind=6)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def matching(scene, **traits):
    return [thing for thing in scene.things if all(getattr(thing, key) == value for key, value in traits.items())]


def referred(scene, words):
    """The things that the last words of a question fit."""
    traits = {}
    for word in words:
        if word in COLORS:
            traits["color"] = word
        if word in SHAPES:
            traits["shape"] = word
    return matching(scene, **traits)


def test_every_answer_is_what_the_labels_say(examples):
    for scene, questions in examples:
        for question in questions:
            words = question.text.split()
            if question.kind == "count":
                singular = {f"{shape}{'es' if shape == 'cross' else 's'}": shape for shape in SHAPES}
                found = referred(scene, [singular.get(word, word) for word in words])
                expected = str(len(found))
            elif question.kind == "existence":
                found = referred(scene, words)
                expected = "yes" if found else "no"
            else:
                found = referred(scene, words)
                assert len(found) == 1, f"{question.text!r} fits {len(found)} things"
                trait = {"color": "color", "shape": "shape", "place": "place", "number": "digit"}[question.kind]
                expected = str(getattr(found[0], trait))
            assert question.answer == expected, question.text
            assert set(question.boxes) == {thing.box for thing in found}
            assert question.answer in ANSWERS[question.kind]


def test_adversarial_questions_name_a_color_and_a_shape_that_are_both_there(examples):
    absent = [(scene, q) for scene, asked in examples for q in asked if q.kind == "existence" and q.answer == "no"]
    for scene, question in absent:
        color, shape = question.text.split()[3:5]
        assert question.adversarial == bool(matching(scene, color=color) and matching(scene, shape=shape))
    assert 0.5 < np.mean([question.adversarial for _, question in absent]) < 0.95
    assert not any(q.adversarial for _, asked in examples for q in asked if q.answer == "yes")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_equally_frequent_within_a_kind(kind):
    asked = make_examples(100, seed=11, split="train", kinds=[kind], per_kind=10)
    counts = Counter(question.answer for _, questions in asked for question in questions)
    assert set(counts) == set(ANSWERS[kind])
    expected = 1000 / len(counts)
    # ten draws from one scene are not independent: up to three times the deviation of 1,000 that are, 4 sigma
    reach = 12 * np.sqrt(expected * (1 - 1 / len(counts)))
    assert all(abs(count - expected) < reach for count in counts.values()), counts


def test_the_words_of_a_question_do_not_tell_its_answer():
    """The most frequent answer to the same words on other scenes is no better than chance."""
    seen, asked = make_examples(250, seed=5, split="train", per_kind=4), make_examples(150, seed=6, per_kind=4)
    answers = defaultdict(Counter)
    for _, questions in seen:
        for question in questions:
            answers[question.text][question.answer] += 1
    for kind in KINDS:
        rows = [question for _, questions in asked for question in questions if question.kind == kind]
        right = [answers[q.text].most_common(1)[0][0] == q.answer if answers[q.text] else False for q in rows]
        assert abs(np.mean(right) - 1 / len(ANSWERS[kind])) < 0.08, kind


def test_one_color_and_one_shape_repeat_so_that_every_count_can_be_asked(examples):
    for scene, _ in examples:
        colors, shapes = (Counter(getattr(t, trait) for t in scene.things) for trait in ("color", "shape"))
        repeats = sorted([max(colors.values()), max(shapes.values())])
        assert repeats == [2, 3]
        assert len(colors) < len(COLORS)
        assert min(colors.values()) == min(shapes.values()) == 1


def test_things_are_where_and_what_their_labels_say():
    flat = SceneConfig(texture=0.0)
    for scene in make_scenes(12, seed=8, config=flat):
        image = scene.image.astype(float)
        background = np.median(image.reshape(-1, 3), 0)
        outside = np.ones(image.shape[:2], bool)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            x, y = int((left + right) / 2), int((top + bottom) / 2)
            assert PLACES[int(y // (160 / 3)) * 3 + int(x // (160 / 3))] == thing.place
            window = image[y - 18 : y + 19, x - 18 : x + 19].reshape(-1, 3)
            rgb = np.array(COLORS[thing.color], float)
            direction = window @ rgb / (np.linalg.norm(window, axis=1) * np.linalg.norm(rgb) + 1e-9)
            assert (direction > 0.99).mean() > 0.05, thing
            rows, columns = slice(max(0, int(top) - 1), int(bottom) + 3), slice(max(0, int(left) - 1), int(right) + 3)
            outside[rows, columns] = False
        rest = image[outside]
        assert np.abs(rest - background).max(1).mean() < 15  # pixel noise of sigma 4, and nothing else


def test_the_digit_is_the_one_of_the_label():
    """Cut out, brought back to 8 x 8 and compared with all test digits, the nearest one has the label's class."""
    images, labels = _digits("test")
    right = []
    for scene in make_scenes(20, seed=9, split="test", config=SceneConfig(play=0.0)):
        for thing in scene.things:
            left, top, right_edge, bottom = thing.box
            x, y = round((left + right_edge) / 2 - 10), round((top + bottom) / 2 - 10)
            grey = scene.image[y : y + 20, x : x + 20].mean(-1) / 255
            small = torch.nn.functional.interpolate(torch.tensor(grey)[None, None], size=8, mode="area")[0, 0].numpy()
            small = -small if thing.color in ("yellow", "cyan") else small  # on which the ink is black
            centred = images - images.mean((1, 2), keepdims=True)
            match = (centred * small).sum((1, 2)) / np.linalg.norm(centred, axis=(1, 2))
            right.append(labels[match.argmax()] == thing.digit)
    assert np.mean(right) > 0.7  # the colour of the thing shines through; chance is 0.1


def test_train_and_test_share_no_digit():
    train, test = _digits("train")[0], _digits("test")[0]
    assert len(train) + len(test) == 1797
    shared = {image.tobytes() for image in train} & {image.tobytes() for image in test}
    assert not shared


def test_a_scene_depends_on_seed_split_and_number_alone():
    few, later = make_scenes(5, seed=4), make_scenes(2, seed=4, start=3)
    assert np.array_equal(few[3].image, later[0].image)
    assert few[3].things == later[0].things
    assert few[3].things != few[4].things
    assert make_scenes(1, seed=5)[0].things != few[0].things
    assert make_scenes(1, seed=4, split="test")[0].things != few[0].things
    (_, first), (_, again) = make_examples(1, seed=4)[0], make_examples(3, seed=4)[0]
    assert first == again


def test_patches_of_a_box():
    grid = patches_of([(20, 30, 40, 40)], size=80, patch=10).reshape(8, 8)
    assert np.argwhere(grid).tolist() == [[3, 2], [3, 3]]
    # 4.9 x 4.9 of 10 x 10 pixels is less than a quarter, 5.1 x 5.1 more
    assert not patches_of([(5.1, 5.1, 10, 10)], size=80, patch=10).any()
    assert patches_of([(4.9, 4.9, 10, 10)], size=80, patch=10).sum() == 1
    assert not patches_of([], size=80, patch=10).any()


def test_captions_name_everything_row_by_row():
    scene = make_scenes(1, seed=2)[0]
    text = describe(scene)
    assert text.count(" at ") == len(scene.things)
    order = [PLACES.index(part.split(" at ")[1].split()[0]) for part in text.split(" , ")]
    assert order == sorted(order)
    assert build_tokenizer().unk_token_id not in build_tokenizer()(text)["input_ids"]


def test_every_word_that_is_asked_or_answered_is_one_token(examples):
    tokenizer = build_tokenizer()
    for _, questions in examples[:40]:
        for question in questions:
            ids = tokenizer(f"{prompt(question.text)} {question.answer}")["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert len(ids) == 1 + len(prompt(question.text).split()) + 1
            assert tokenizer.decode(ids[-1]) == question.answer
    assert tokenizer("zebra", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_the_processor_expands_the_picture_and_pads_left(processor, examples):
    scene, questions = examples[0]
    texts = [prompt(questions[0].text), prompt(questions[-1].text)]
    inputs = processor(images=[scene.image] * 2, text=texts, padding=True, return_tensors="pt")
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image_id).sum(1).tolist() == [256, 256]
    answer = processor.tokenizer.convert_tokens_to_ids("ASSISTANT:")
    assert inputs["input_ids"][:, -1].tolist() == [answer, answer]
    exact = torch.from_numpy(scene.image).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.allclose(inputs["pixel_values"][0], exact, atol=1e-5)


def test_the_chat_template_is_the_prompt(processor):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where is the star ?"}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == prompt("where is the star ?")
    chat.append({"role": "assistant", "content": "top"})
    assert processor.apply_chat_template(chat) == f"{prompt('where is the star ?')} top"


def test_processor_and_tokenizer_come_back_from_disk(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    scene, text = make_scenes(1, seed=1)[0], prompt("is there a red star ?")
    first = processor(images=[scene.image], text=[text], return_tensors="pt")
    again = AutoProcessor.from_pretrained(tmp_path)(images=[scene.image], text=[text], return_tensors="pt")
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(text)["input_ids"] == build_tokenizer()(text)["input_ids"]
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_things": (3, 6)}, "num_things must be within"),
        ({"num_things": (6, 4)}, "num_things must be within"),
        ({"radius": (15.5, 30.0)}, "radius must be rising within"),
        ({"texture": -1.0}, "texture and play must be 0 or more"),
        ({"play": -0.1}, "texture and play must be 0 or more"),
        ({"digit": 60}, "digit must be from 8"),
        ({"grid": 0}, "grid from 1"),
    ],
)
def test_bad_settings_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneConfig(**arguments)


def test_bad_requests_are_told():
    scene = make_scenes(1, seed=0)[0]
    with pytest.raises(ValueError, match="unknown kinds \\['taste'\\]; there are"):
        ask(scene, np.random.default_rng(0), kinds=["color", "taste"])
    with pytest.raises(ValueError, match="count, start and seed must be 0 or more"):
        make_scenes(-1, seed=0)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'all'"):
        make_scenes(1, seed=0, split="all")
    crowded = make_scenes(1, seed=0, config=SceneConfig(num_things=(9, 9)))[0]
    assert len(crowded.things) == 9
    with pytest.raises(ValueError, match="only scenes of 4 to 6 things can be asked about, this one has 9"):
        ask(crowded, np.random.default_rng(0))
