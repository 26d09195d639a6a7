"""A model and its method come back from disk, weights of the method included."""

import json

import pytest
import torch

from diffusion_attn import (
    BlockSparseConfig,
    RectifiedSparseConfig,
    Schedule,
    SLAConfig,
    SlidingTileConfig,
    apply_block_sparse,
    apply_rectified_sparse,
    apply_sla,
    apply_sliding_tile,
    load_transformer,
    save_transformer,
)
from diffusion_attn.testing import inputs_of, output_of, tiny_model

WAYS = {
    "rectified": (apply_rectified_sparse, RectifiedSparseConfig(density=0.2, topp=0, block_size=8, neighbors=False)),
    "sla": (apply_sla, SLAConfig(critical=0.2, negligible=0.2, block_size=(8, 8))),
    "block_sparse": (apply_block_sparse, BlockSparseConfig(density=0.2, block_size=(8, 8))),
    "sliding_tile": (apply_sliding_tile, SlidingTileConfig(tile=(1, 2, 2), window=(1, 1, 1))),
}


@pytest.mark.parametrize("way", WAYS)
def test_model_and_method_come_back(way, tmp_path):
    apply, config = WAYS[way]
    model, inputs = tiny_model("wan"), inputs_of("wan")
    handle = apply(model, config, schedule=Schedule(dense_layers=(0,)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "diffusion_attn" in name:
                parameter.fill_(0.3)
    save_transformer(handle, tmp_path / "model")
    loaded, again = load_transformer(tmp_path / "model")
    assert (again.config, again.schedule, again.layers_changed) == (config, handle.schedule, (1,))
    assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))
    again.remove()
    handle.remove()
    assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))


def test_what_is_missing_is_said(tmp_path):
    model = tiny_model("wan")
    with pytest.raises(FileNotFoundError, match="save_transformer writes one"):
        load_transformer(tmp_path)
    save_transformer(apply_sla(model), tmp_path)
    settings = json.loads((tmp_path / "diffusion_attn.json").read_text())
    (tmp_path / "diffusion_attn.json").write_text(json.dumps(settings | {"method": "magic"}))
    with pytest.raises(ValueError, match="known: rectified_sparse, sla"):
        load_transformer(tmp_path)
    (tmp_path / "diffusion_attn.json").write_text(json.dumps(settings))
    tiny_model("wan").save_pretrained(tmp_path)  # without the method's weights
    with pytest.raises(ValueError, match=r"diffusion_attn_sla.proj.bias is missing"):
        load_transformer(tmp_path)
