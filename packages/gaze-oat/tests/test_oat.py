"""OAT against the published computation written out with torch's own modules, and by its laws."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gaze_oat import Layout, OATConfig, OATModel, ScanpathProblem, SceneBatch

SMALL = OATConfig(
    width=32, feedforward=48, encoder_layers=2, decoder_layers=2, grid_size=11, crop_encoder="features", feature_size=5,
)  # fmt: skip


def a_model(seed: int = 0, **changes: object) -> OATModel:
    torch.manual_seed(seed)
    model = OATModel(replace(SMALL, **changes)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        if model.offset_scores is not None:
            model.offset_scores.normal_()
        if model.pointer.readout is not None:
            model.pointer.readout.bias.fill_(0.25)
    return model


def a_scene(model: OATModel, rows: int = 3, cols: int = 4, seed: int = 0) -> tuple[Tensor, Layout]:
    layout = Layout.grid(rows, cols, width=cols * 10, height=rows * 20)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(layout), model.config.feature_size, generator=generator), layout


def test_parameters_are_as_many_as_published() -> None:
    """18,300,985 less the 45,142 of two layers that the published module never uses."""
    assert sum(p.numel() for p in OATModel().parameters()) == 18_300_985 - 45_142


def published(model: OATModel, objects: Tensor, layout: Layout, target: int, path: list[int]) -> Tensor:
    """Section 3 written out for one scene, with the weights of `model`."""
    c, half = model.config, model.config.width // 2
    table = model.row_table

    def code(row: int, col: int, flag: int) -> Tensor:
        return torch.cat([table[row], table[col], table[flag]])[:half]

    cells = layout.cells.tolist()
    look = model.object_encoder(objects)
    blank = torch.ones_like(objects[:1]) if c.crop_encoder == "cnn" else torch.zeros_like(objects[:1])
    source = [torch.cat([look[i], code(*cells[i], 0)]) for i in range(len(layout))]
    source.append(torch.cat([look[target], code(*cells[target], 1)]))
    given = [torch.cat([model.object_encoder(blank)[0], code(layout.rows // 2, layout.cols // 2, 0)])]
    given += [torch.cat([look[i], code(*cells[i], int(i == target))]) for i in path]
    tokens = torch.stack(given)
    for step in range(len(given)):
        for i in range(0, c.width, 2):
            angle = step / 10_000 ** (i / c.width)
            tokens[step, i] += math.sin(angle)
            tokens[step, i + 1] += math.cos(angle)

    def attend(module: nn.MultiheadAttention, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        weights, size = module.in_proj_weight.chunk(3), c.width // c.num_heads
        q, k, v = (
            (x @ w.T + b).view(-1, c.num_heads, size).transpose(0, 1)
            for x, w, b in zip((query, key, key), weights, module.in_proj_bias.chunk(3), strict=True)
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(size)
        if mask is not None:
            scores = scores.masked_fill(mask, -math.inf)
        return module.out_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(-1, c.width))

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        return layer.linear2(layer.linear1(x).relu())  # type: ignore[operator]

    memory = torch.stack(source)
    for layer in model.encoder.layers:
        memory = layer.norm1(memory + attend(layer.self_attn, memory, memory, None))
        memory = layer.norm2(memory + forward(layer, memory))
    hidden, later = tokens, torch.ones(len(given), len(given)).triu(1).bool()
    for layer in model.decoder.layers:
        hidden = layer.norm1(hidden + attend(layer.self_attn, hidden, hidden, later))
        hidden = layer.norm2(hidden + attend(layer.multihead_attn, hidden, memory, None))
        hidden = layer.norm3(hidden + forward(layer, hidden))
    heads = []
    for one, other in zip(model.pointer.encoder_side, model.pointer.decoder_side, strict=True):
        scores = other(hidden) @ one(memory).T
        heads.append(torch.cat([scores, torch.zeros(len(given), 1)], 1) / math.sqrt(c.width))
    return model.pointer.readout(torch.stack(heads, -1))[..., 0] if model.pointer.readout else heads[0]


@torch.no_grad()
def test_it_is_the_published_module() -> None:
    """The book-cover size: 84 objects, 20 decoder tokens; crops through the paper's CNN."""
    torch.manual_seed(0)
    model = OATModel(OATConfig(width=64, feedforward=64, crop_size=(40, 35))).eval()
    layout = Layout.grid(6, 14, width=140, height=120)
    objects = torch.rand(84, 3, 40, 35)
    path = np.random.default_rng(0).integers(0, 84, 19).tolist()
    path[7] = 30
    ours = model(SceneBatch.of([objects], [layout], [30]), torch.tensor([path]))
    assert ours.shape == (1, 20, 86)
    torch.testing.assert_close(ours[0], published(model, objects, layout, 30, path), atol=1e-4, rtol=0)
    features = a_model()
    objects, layout = a_scene(features)
    ours = features(SceneBatch.of([objects], [layout], [5]), torch.tensor([[3, 5, 5]]))
    torch.testing.assert_close(ours[0], published(features, objects, layout, 5, [3, 5, 5]), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"offset_bias": True}, {"anisotropic": True, "cell_aspect": 1.5}])
def test_objects_have_no_order(changes: dict[str, object]) -> None:
    model = a_model(**changes)
    objects, layout = a_scene(model)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    mixed = Layout(
        boxes=layout.boxes[order.numpy()], cells=layout.cells[order.numpy()], rows=3, cols=4, width=40, height=60
    )
    where = order.argsort()
    path = torch.tensor([[2, 7, 7, 1]])
    plain = model(SceneBatch.of([objects], [layout], [7]), path)
    shuffled = model(SceneBatch.of([objects[order]], [mixed], [int(where[7])]), where[path])
    torch.testing.assert_close(shuffled[..., where], plain[..., :12], atol=1e-5, rtol=0)
    torch.testing.assert_close(shuffled[..., 12:], plain[..., 12:], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "cols"), [(1, 5), (2, 11), (3, 9), (6, 14), (10, 20)])
def test_any_number_of_objects(rows: int, cols: int) -> None:
    model = a_model(grid_size=20)
    objects, layout = a_scene(model, rows, cols)
    logits = model(SceneBatch.of([objects], [layout], [2]), torch.tensor([[0, 4]]))
    assert logits.shape == (1, 3, rows * cols + 2)
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_scenes_of_a_batch_do_not_mix() -> None:
    """Three and twelve objects side by side give what each gives alone."""
    model = a_model(offset_bias=True)
    (one, first), (two, second) = a_scene(model, 1, 3, seed=1), a_scene(model, 3, 4, seed=2)
    paths = torch.tensor([[2, 0, -1], [11, 3, 3]])
    together = model(SceneBatch.of([one, two], [first, second], [1, 3]), paths)
    alone = model(SceneBatch.of([one], [first], [1]), paths[:1, :2])
    torch.testing.assert_close(together[0, :3, [0, 1, 2, 12, 13]], alone[0, :, :], atol=1e-5, rtol=0)
    assert (together[0, :, 3:12] == -torch.inf).all()
    alone = model(SceneBatch.of([two], [second], [3]), paths[1:])
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_later_tokens_change_nothing_before() -> None:
    model = a_model(offset_bias=True)
    objects, layout = a_scene(model)
    scenes = SceneBatch.of([objects], [layout], [6])
    before, after = model(scenes, torch.tensor([[1, 2, 3, 4]])), model(scenes, torch.tensor([[1, 2, 9, 4]]))
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-3


@torch.no_grad()
def test_target_and_layout_matter() -> None:
    model = a_model()
    objects, layout = a_scene(model)
    path = torch.tensor([[1, 6]])
    plain = model(SceneBatch.of([objects], [layout], [6]), path)
    assert (model(SceneBatch.of([objects], [layout], [2]), path) - plain).abs().max() > 1e-2
    assert (model(SceneBatch.of([objects], [layout.mirrored()], [6]), path) - plain).abs().max() > 1e-2


@torch.no_grad()
def test_anisotropic_rows_count_their_aspect() -> None:
    model = a_model(anisotropic=True, cell_aspect=1.5, sigma=2.0, width=66, num_heads=2)
    cosine = nn.functional.cosine_similarity(model.row_table[0], model.row_table[2], dim=0)
    assert float(cosine) == pytest.approx(math.exp(-((2 * 1.5) ** 2) / 8), abs=1e-4)
    assert float(model.flag_table[0] @ model.flag_table[1]) == 0
    shared = a_model()
    assert torch.equal(shared.flag_table, shared.row_table[:2])


@torch.no_grad()
def test_step_scores_can_start_from_a_markov_model() -> None:
    """With pointer and readout silenced, the next object follows the steps alone."""
    model = a_model(offset_bias=True, grid_size=6)
    for parameter in model.pointer.parameters():
        parameter.zero_()
    steps = np.random.default_rng(0).uniform(0.1, 1, (5, 7))
    model.start_from_steps(steps)
    objects, layout = a_scene(model)
    chances = model.probabilities(objects, layout, 3, [[6, 1]])[0][1][:12]
    expected = [steps[2 + row - 1, 3 + col - 2] for row, col in layout.cells]
    np.testing.assert_allclose(chances / chances.sum(), np.array(expected) / np.sum(expected), rtol=1e-5)
    with pytest.raises(ScanpathProblem, match="needs a model with offset_bias=True"):
        a_model().start_from_steps(steps)
    with pytest.raises(ScanpathProblem, match=r"positive and \(2R-1, 2C-1\), at most 11 a side, got \(5, 8\)"):
        model.start_from_steps(np.ones((5, 8)))


@torch.no_grad()
def test_probabilities_are_those_of_inference() -> None:
    model = a_model(offset_bias=True)
    objects, layout = a_scene(model)
    paths = [[3, 3, 7], [1]]
    long, short = model.probabilities(objects, layout, 7, paths)
    assert (long.shape, short.shape) == ((4, 13), (2, 13))
    np.testing.assert_allclose(long.sum(1), 1, atol=1e-12)
    assert long[0, 12] == 0 < long[1, 12]
    logits = model(SceneBatch.of([objects], [layout], [7]), torch.tensor([[3, 3, 7]]))[0, 1, :13]
    np.testing.assert_allclose(long[1], logits.softmax(-1).numpy(), atol=1e-6)
    np.testing.assert_allclose(short, model.probabilities(objects, layout, 7, [[1]])[0], atol=1e-6)


@torch.no_grad()
def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model = a_model(offset_bias=True, position_code="exp2", crop_size=(40, 41))
    model.save(tmp_path / "model")
    again = OATModel.load(tmp_path / "model")
    assert again.config == model.config
    objects, layout = a_scene(model)
    scenes, path = SceneBatch.of([objects], [layout], [6]), torch.tensor([[1, 2]])
    assert torch.equal(again(scenes, path), model(scenes, path))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "model" / "config.json").write_text('{"width": 64}')
    with pytest.raises(ScanpathProblem, match="does not fit its config.json"):
        OATModel.load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"depth": 64}')
    with pytest.raises(ScanpathProblem, match=r"unknown settings \['depth'\]"):
        OATModel.load(tmp_path / "model")
    with pytest.raises(ScanpathProblem, match="no file at"):
        OATModel.load(tmp_path / "none")


def test_half_precision_runs(tmp_path: Path) -> None:
    model = a_model().to(torch.bfloat16)
    objects, layout = a_scene(model)
    model.save(tmp_path)
    again = OATModel.load(tmp_path)
    assert again.row_table.dtype == torch.bfloat16
    paths = again.generate(objects.bfloat16(), layout, 3, num_samples=3, max_length=4).paths
    assert all(1 <= len(path) <= 4 for path in paths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 31}, "width must be even and divisible by 4 heads, got 31"),
        ({"encoder_layers": 0}, "encoder_layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"sigma": 0.0}, "sigma and cell_aspect must be positive"),
        ({"pyramid_levels": 5}, "pyramid_levels must be None, 2, 3 or 4"),
        ({"feature_size": 0}, "needs feature_size"),
    ],
)
def test_settings_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ScanpathProblem, match=message):
        replace(SMALL, **changes)  # type: ignore[arg-type]


def test_bad_scenes_are_explained() -> None:
    model = a_model()
    objects, layout = a_scene(model)
    with pytest.raises(ScanpathProblem, match="a scene has 12 boxes but 11 objects"):
        SceneBatch.of([objects[1:]], [layout], [0])
    with pytest.raises(ScanpathProblem, match="target 12 is no object of a scene with objects 0 to 11"):
        SceneBatch.of([objects], [layout], [12])
    wide = Layout.grid(1, 12, width=12, height=1)
    with pytest.raises(ScanpathProblem, match="12 rows or columns, the model knows 11"):
        model(SceneBatch.of([objects], [wide], [0]), torch.tensor([[0]]))
    with pytest.raises(ScanpathProblem, match=r"objects must be vectors \(B, P, F\)"):
        model(SceneBatch.of([torch.rand(12, 3, 30, 30)], [layout], [0]), torch.tensor([[0]]))
    with pytest.raises(ScanpathProblem, match="not finite"):
        model(SceneBatch.of([objects * float("nan")], [layout], [0]), torch.tensor([[0]]))
