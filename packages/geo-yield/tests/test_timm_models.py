"""DFYP in timm's registry and from there in torchgeo; importing changes nothing else."""

import importlib

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

import geo_yield.timm_models
from geo_yield.dfyp import DFYP, DFYPConfig
from geo_yield.errors import InputProblem

SMALL = {
    "cnn_width": 4,
    "cnn_dense": 8,
    "vit_dim": 16,
    "vit_depth": 1,
    "vit_heads": 2,
    "vit_head_dim": 8,
    "vit_mlp": 16,
}


def test_import_registers_two_names_and_leaves_every_other_entry_alone():
    ours = {"dfyp_modis", "dfyp_sentinel2"}
    before = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
    with pytest.warns(UserWarning, match="Overwriting dfyp_"):  # by itself: the import happens a second time
        importlib.reload(geo_yield.timm_models)
    after = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
    assert before.keys() == after.keys()
    assert {name for name in after if after[name] is not before[name]} == ours
    assert {name for name in after if after[name].__module__.startswith("geo_yield")} == ours
    public = geo_yield.timm_models.__all__  # to which older timm appends each name once more
    assert set(public) == {"TimmDFYP", "TimmDFYPSentinel2"} | ours


def test_created_models_are_the_published_ones_with_the_default_operator():
    model = timm.create_model("dfyp_modis")
    assert sum(p.numel() for p in model.parameters()) == 26_790_713
    small = timm.create_model("dfyp_modis", in_chans=3, num_classes=2, operator="scharr", **SMALL).eval()
    plain = DFYP(DFYPConfig(bands=3, outputs=2, operator="scharr", **SMALL)).eval()
    plain.load_state_dict(small.state_dict())
    image = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(small(image), plain(image))
    assert small(image).shape == (5, 2)
    one = timm.create_model("dfyp_modis", in_chans=3, **SMALL)
    assert one(image).shape == (5, 1)
    assert {p.shape for p in one.get_classifier().parameters()} == {(1, 8), (1, 16), (1,)}


def test_chips_are_taken_one_by_one():
    options = {k: v for k, v in SMALL.items() if k.startswith("vit")} | {"size": 32, "cnn_widths": (3, 4, 5, 6)}
    model = timm.create_model("dfyp_sentinel2", **options).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = model(images)
    assert both.shape == (4, 2)
    torch.testing.assert_close(both[2:3], model(images[2:3]))
    assert sum(p.numel() for p in timm.create_model("dfyp_sentinel2").parameters()) == 1_381_007


def test_what_cannot_be_is_refused():
    with pytest.raises(InputProblem, match="dfyp_modis has no pretrained weights"):
        geo_yield.timm_models.dfyp_modis(pretrained=True)
    with pytest.raises(TypeError, match="dfyp_modis has no option 'cnn_widht'"):
        timm.create_model("dfyp_modis", cnn_widht=8)
    with pytest.raises(InputProblem, match="3 channels .* got in_chans=4"):
        timm.create_model("dfyp_sentinel2", in_chans=4)


def test_torchgeo_regression_task_builds_and_trains_it(tmp_path):
    torchgeo = pytest.importorskip("torchgeo.trainers", reason="needs geo-yield[torchgeo]")
    torch.manual_seed(0)
    task = torchgeo.RegressionTask(model="dfyp_modis", in_channels=9, num_outputs=1, lr=1e-3)
    assert sum(p.numel() for p in task.model.parameters()) == 26_790_713
    rows = [{"image": torch.randn(9, 32, 32), "label": torch.tensor(float(i))} for i in range(4)]
    before = task.model.cnn.head.weight.detach().clone()
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, DataLoader(rows, batch_size=2))
    assert trainer.global_step == 1
    assert not torch.equal(task.model.cnn.head.weight, before)
