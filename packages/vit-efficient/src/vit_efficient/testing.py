"""What every model and every door of this package is put through: inherit `ModelTests` or `DoorTests` in a test file.

`ModelTests` are for models registered with timm: the contract that timm's own tests hold its models to, written anew
for models from outside. `DoorTests` are for methods that change a timm ViT: each test compares two ways to one result
(alone and in a batch, copied, saved and loaded), so it holds for any method; what it computes is for its own tests.
"""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from timm.models._features_fx import GraphExtractNet, get_notrace_functions, get_notrace_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.feature_extraction import get_graph_node_names

from shared_kernels.expectations import message_of, require, require_same

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_scale": {"init_values": 0.4},
    "registers": {"init_values": 0.4, "reg_tokens": 4, "no_embed_class": True},
    "qk_norm": {"qk_norm": True},
    "pre_norm": {"pre_norm": True},
}
"""Kinds of plain ViT in timm, as constructor arguments: DeiT, DeiT-3, DINOv2 with registers, qk-norm, CLIP."""


def tiny_vit(kind: str = "plain", *, seed: int = 0, **changes: Any) -> VisionTransformer:
    """A random ViT of that kind (4 blocks, width 48, 6 x 6 patches, 5 classes) in eval mode, its attention not flat."""
    torch.manual_seed(seed)
    shape = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**{**shape, **KINDS[kind], **changes})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.25 if parameter.ndim == 2 else 0.5)
    return model.eval()


EVAS: dict[str, dict[str, Any]] = {
    "eva": {"init_values": 0.4},
    "eva02": {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "init_values": None},
    "half_turns": {"use_rot_pos_emb": True, "rope_rotate_half": True, "qk_norm": True, "num_reg_tokens": 4,
                   "no_embed_class": True, "swiglu_mlp": True, "scale_attn_inner": True, "init_values": 0.4},
}  # fmt: skip
"""Kinds of timm's Eva with a class token, as constructor arguments."""


def tiny_eva(kind: str, *, seed: int = 0, **changes: Any) -> Eva:
    """A random Eva of that kind, of the size of `tiny_vit`, in eval mode; pools by the average, as EVA-02 does."""
    torch.manual_seed(seed)
    shape = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
    model = Eva(**{**shape, **EVAS[kind], **changes})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.25 if parameter.ndim == 2 else 0.5)
    return model.eval()


def images(batch: int, size: int | tuple[int, int] = 48, *, channels: int = 3, seed: int = 1) -> Tensor:
    """Random images (batch, channels, height, width): smooth blobs of different contrast, so that patches differ."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, 6, 6, generator=generator)
    contrast = torch.linspace(0.5, 2, max(batch, 1))[:batch, None, None, None]
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic") * contrast


class ModelTests:
    """Inherit and set `names` to the registered models to try; `arguments` make them small.

    names: timm model names. arguments: keyword arguments of `create_model` for all tests. size: side of the images.
    sizes: other (height, width) that must work. traced: whether torch.fx must take it.
    compiled: whether torch.compile(fullgraph=True) must.
    """

    names: ClassVar[tuple[str, ...]] = ()
    arguments: ClassVar[dict[str, Any]] = {}
    size: ClassVar[int] = 64
    sizes: ClassVar[tuple[tuple[int, int], ...]] = ((64, 96), (75, 61))
    traced: ClassVar[bool] = True
    compiled: ClassVar[bool] = True

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Runs each test on each name."""
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.names)

    def create(self, name: str, **changes: Any) -> Any:
        """The model, seeded, in eval mode."""
        torch.manual_seed(0)
        return timm.create_model(name, **{**self.arguments, **changes}).eval()

    def test_forward_with_and_without_checkpointing(self, name: str) -> None:
        model, x = self.create(name), images(2, self.size)
        logits = model(x)
        require(logits.shape == (2, model.num_classes), f"logits of shape {tuple(logits.shape)}")
        require(bool(logits.isfinite().all()), "logits are not finite")
        model.set_grad_checkpointing()
        torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)

    def test_every_parameter_gets_a_gradient(self, name: str) -> None:
        model = self.create(name, num_classes=42).train()
        model(images(2, self.size)).mean().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
        require(not without, f"no finite gradient for {without}")

    def test_head_and_features_have_the_widths_they_claim(self, name: str) -> None:
        model, x = self.create(name), images(2, self.size)
        features = model.forward_features(x)
        require(features.shape[1] == model.num_features, f"features of shape {tuple(features.shape)}")
        pooled = model.forward_head(features, pre_logits=True)
        require(pooled.shape == (2, model.head_hidden_size), f"pre-logits of shape {tuple(pooled.shape)}")
        model.reset_classifier(0)
        require(model(x).shape == (2, model.head_hidden_size), "reset_classifier(0) does not give pooled features")
        model.reset_classifier(0, "")
        require(model(x).shape == features.shape, "reset_classifier(0, '') does not give the map")
        unpooled = self.create(name, num_classes=0, global_pool="")
        require(unpooled(x).shape == features.shape, "create_model(num_classes=0, global_pool='') gives no map")

    def test_names_in_the_configuration_exist(self, name: str) -> None:
        model = self.create(name)
        for key in ("first_conv", "classifier"):
            require(f"{model.pretrained_cfg[key]}.weight" in model.state_dict(), f"{key} names no weight")

    def test_feature_maps(self, name: str) -> None:
        model, x = self.create(name), images(2, self.size)
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x), rtol=1e-4, atol=1e-5)
        require(len(maps) >= 3, f"{len(maps)} feature maps")
        extractor = self.create(name, features_only=True)
        for given, info in zip(extractor(x), extractor.feature_info, strict=True):
            require(given.shape[1] == info["num_chs"], f"{info} has {given.shape[1]} channels")
            require(given.shape[2] <= -(-self.size // info["reduction"]) + 1, f"{info}: {tuple(given.shape)}")

    def test_other_sizes_and_channels(self, name: str) -> None:
        model = self.create(name)
        for size in self.sizes:
            require(bool(model(images(1, size)).isfinite().all()), f"not finite at {size}")
        for channels in (1, 8):
            logits = self.create(name, in_chans=channels)(images(1, self.size, channels=channels))
            require(bool(logits.isfinite().all()), f"not finite with {channels} channels")
        require(model(images(0, self.size)).shape == (0, model.num_classes), "an empty batch gives logits")

    def test_images_of_a_batch_are_independent(self, name: str) -> None:
        model, x = self.create(name), images(3, self.size)
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)

    def test_copies_and_state_dicts(self, name: str) -> None:
        model, x = self.create(name), images(1, self.size)
        logits = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            require(torch.equal(twin(x), logits), "a copy computes something else")
        torch.manual_seed(9)
        other = timm.create_model(name, **self.arguments).eval()
        other.load_state_dict(model.state_dict())
        require(torch.equal(other(x), logits), "the state dict does not hold the whole model")

    def test_bfloat16_autocast(self, name: str) -> None:
        model, x = self.create(name), images(2, self.size)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        require(bool(logits.isfinite().all()), "not finite under autocast")

    def test_compiled_is_eager(self, name: str) -> None:
        if not self.compiled:
            return
        model, x = self.create(name), images(2, self.size)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)

    def test_traced_by_fx(self, name: str) -> None:
        if not self.traced:
            return
        model, x = self.create(name), images(1, self.size)
        untraced = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
        nodes = get_graph_node_names(model, untraced)[1]
        graph = GraphExtractNet(model, [nodes[-1]])
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


class DoorTests:
    """Inherit, define `apply` and, where the method has one, `neutral`; class attributes say what a method cannot do.

    kinds: of plain ViT that it supports; the first runs the slower tests. trained: whether it brings weights.
    tolerance: of two ways to one result in float32, relative to the largest logit.
    compiled: whether torch.compile takes it (without fullgraph: the number of tokens depends on the image).
    any_size: whether images of any size go through one model.
    """

    kinds: ClassVar[tuple[str, ...]] = tuple(KINDS)
    trained: ClassVar[bool] = False
    compiled: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def apply(self, model: VisionTransformer) -> Any:
        """Opens the door with settings that change the output of `tiny_vit`; returns the handle."""
        raise NotImplementedError

    def neutral(self, model: VisionTransformer) -> Any | None:  # noqa: ARG002 - for those who override it
        """Opens the door at the setting where the host's own output comes back; None where there is no such."""
        return None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Runs a test that asks for `kind` on each."""
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", self.kinds)

    def changed(self, kind: str | None = None, **changes: Any) -> Any:
        """A tiny ViT of the kind with the method at work."""
        model = tiny_vit(kind or self.kinds[0], **changes)
        self.apply(model)
        return model

    def same(self, given: Tensor, wanted: Tensor) -> None:
        """Raises AssertionError where the two differ by more than `tolerance`, or one is NaN."""
        require_same(given, wanted, self.tolerance)

    def test_changes_the_output_and_remove_restores_the_host(self, kind: str) -> None:
        model, x = tiny_vit(kind), images(3)
        before, type_before, names = model(x), type(model), set(model.state_dict())
        handle = self.apply(model)
        require(not torch.equal(model(x), before), "the method changes nothing in this model")
        handle.remove()
        handle.remove()
        require(torch.equal(model(x), before), "the host does not come back bit for bit")
        require(type(model) is type_before and set(model.state_dict()) == names, "remove() leaves something behind")

    def test_neutral_setting_is_the_host(self, kind: str) -> None:
        model, x = tiny_vit(kind), images(3)
        before = model(x)
        if self.neutral(model) is not None:
            self.same(model(x), before)

    def test_exception_in_the_block_restores_the_host(self) -> None:
        model, x = tiny_vit(self.kinds[0]), images(2)
        before = model(x)
        try:
            with self.apply(model):
                raise KeyError
        except KeyError:
            pass
        require(torch.equal(model(x), before), "the host does not come back")

    def test_applying_twice_is_refused(self) -> None:
        model = self.changed()
        message = message_of(ValueError, lambda: self.apply(model))
        require("remove()" in message, f"the message does not say what to do: {message}")

    def test_other_models_are_refused(self) -> None:
        for name in ("test_convnext", "test_vit_relpos", "test_eva" if timm.is_model("test_eva") else "test_resnet"):
            model: Any = timm.create_model(name)
            message = message_of((TypeError, ValueError), partial(self.apply, model))
            require("VisionTransformer" in message, f"the message does not say what is supported: {message}")

    def test_images_of_a_batch_are_independent(self, kind: str) -> None:
        model, x = self.changed(kind), images(4)
        together = model(x)
        self.same(torch.cat([model(image[None]) for image in x]), together)
        self.same(model(x.flip(0)).flip(0), together)

    def test_one_image_and_none(self) -> None:
        model = self.changed()
        require(model(images(1)).shape == (1, 5), "one image")
        require(model(images(0)).shape == (0, 5), "no image gives logits")

    def test_other_sizes_and_channels(self) -> None:
        model = self.changed(dynamic_img_size=True)
        for size in ((48, 72), (40, 56), (16, 16)) if self.any_size else ():
            require(bool(model(images(2, size)).isfinite().all()), f"not finite at {size}")
        require(bool(self.changed(in_chans=1)(images(2, channels=1)).isfinite().all()), "one channel")

    def test_checkpointing_changes_nothing(self) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = self.changed().train()
            model.set_grad_checkpointing(checkpointing)
            model(images(2)).square().mean().backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        require(gradients[0].keys() == gradients[1].keys(), "other parameters get a gradient")
        for name in gradients[0]:
            self.same(gradients[1][name], gradients[0][name])

    def test_feature_maps_keep_their_grid(self, kind: str) -> None:
        model, x = self.changed(kind), images(2)
        final, maps = model.forward_intermediates(x)
        require(all(m.shape == (2, 48, 6, 6) for m in maps), f"maps of shapes {[tuple(m.shape) for m in maps]}")
        require(bool(torch.stack(maps).isfinite().all()), "maps are not finite")
        self.same(model.forward_head(final), model(x))

    def test_copies_and_state_dict(self) -> None:
        model, x = self.changed(), images(2)
        logits = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            require(torch.equal(twin(x), logits), "a copy computes something else")
        other = self.changed(seed=7)
        require(not torch.equal(other(x), logits), "another seed gives the same model")
        other.load_state_dict(model.state_dict())
        require(torch.equal(other(x), logits), "the state dict does not hold the whole model")

    def test_bfloat16(self) -> None:
        model, x = self.changed(), images(2)
        require(bool(model.to(torch.bfloat16)(x.to(torch.bfloat16)).isfinite().all()), "not finite in bfloat16")

    def test_training_reaches_the_weights(self) -> None:
        plain = set(tiny_vit(self.kinds[0]).state_dict())
        model = self.changed().train()
        model(images(4)).square().mean().backward()
        own = [n for n, p in model.named_parameters() if n not in plain and p.requires_grad]
        require(bool(own) == self.trained, f"weights of the method's own: {own}, but trained = {self.trained}")
        gradient = model.blocks[0].attn.qkv.weight.grad
        require(gradient is not None and gradient.abs().max().item() > 0, "no gradient reaches the first block")

    def test_compiled_is_eager(self) -> None:
        if not self.compiled:
            return
        model, x = self.changed(), images(2)
        self.same(torch.compile(model, backend="aot_eager")(x), model(x))

    def test_nothing_is_written_to_the_class(self, tmp_path: Path) -> None:
        untouched, x = tiny_vit(self.kinds[0]), images(2)
        before = untouched(x)
        self.changed()
        require(torch.equal(untouched(x), before), "a door into one model changes another")
        torch.save(untouched.state_dict(), tmp_path / "plain.pt")
        tiny_vit(self.kinds[0]).load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True))
