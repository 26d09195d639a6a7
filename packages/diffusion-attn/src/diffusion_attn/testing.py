"""What every method for diffusers transformers is put through: a test class inherits `DoorTests`.

Models are tiny, seeded and random, one for each family of `diffusers.families`, with the inputs they run on.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from shared_kernels.expectations import message_of, require
from shared_kernels.handle import Handle

Inputs = dict[str, Any]


def _wan() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip


def _hunyuan() -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip


def _flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip


def _sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip


def _cogvideox() -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=12, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=7,
    )  # fmt: skip


def _mochi() -> Any:
    return diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, out_channels=None, qk_norm="rms_norm", text_embed_dim=16, time_embed_dim=4,
        activation_fn="swiglu", max_sequence_length=7,
    )  # fmt: skip


def _ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=2, qk_norm="rms_norm_across_heads", caption_channels=16,
    )  # fmt: skip


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "wan": _wan,
    "hunyuan": _hunyuan,
    "flux": _flux,
    "sd3": _sd3,
    "cogvideox": _cogvideox,
    "mochi": _mochi,
    "ltx": _ltx,
}
"""Random tiny models, by family."""

TEXT = 7
"""Text tokens of `inputs_of`, where text is padded to a length: the second sample has four."""


def tiny_model(family: str, seed: int = 0) -> Any:
    """A random model of the family, seeded, with weights large enough for attention to be far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family]().eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=3 / parameter.shape[-1] ** 0.5 if "to_" in name else 0.15)
    return model


def inputs_of(
    family: str, *, batch: int = 2, frames: int = 3, rows: int = 4, columns: int = 6, seed: int = 1
) -> Inputs:
    """What a tiny model of the family is called with, for a grid of visual tokens; images have one frame."""
    make = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[1:, 4:] = False
    step, image = torch.full((batch,), 500.0), (batch, 4, rows, columns)
    video = (batch, 4, frames, 2 * rows, 2 * columns)
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float()
    given: dict[str, Callable[[], Inputs]] = {
        "wan": lambda: {"hidden_states": randn(*video), "encoder_hidden_states": randn(batch, TEXT, 16)},
        "hunyuan": lambda: {
            "hidden_states": randn(*video), "encoder_hidden_states": randn(batch, TEXT, 16),
            "encoder_attention_mask": mask.long(), "pooled_projections": randn(batch, 8),
            "guidance": torch.full((batch,), 4.0),
        },
        "flux": lambda: {
            "hidden_states": randn(batch, rows * columns, 4), "encoder_hidden_states": randn(batch, TEXT, 32),
            "pooled_projections": randn(batch, 32), "img_ids": ids, "txt_ids": torch.zeros(TEXT, 3),
        },
        "sd3": lambda: {
            "hidden_states": randn(*image), "encoder_hidden_states": randn(batch, TEXT, 32),
            "pooled_projections": randn(batch, 64),
        },
        "cogvideox": lambda: {
            "hidden_states": randn(batch, frames, 4, 2 * rows, 2 * columns),
            "encoder_hidden_states": randn(batch, TEXT, 8),
        },
        "mochi": lambda: {
            "hidden_states": randn(*video), "encoder_hidden_states": randn(batch, TEXT, 16),
            "encoder_attention_mask": mask,
        },
        "ltx": lambda: {
            "hidden_states": randn(batch, frames * rows * columns, 4), "encoder_hidden_states": randn(batch, TEXT, 16),
            "encoder_attention_mask": mask.long(), "num_frames": frames, "height": rows, "width": columns,
        },
    }  # fmt: skip
    return {"timestep": step, **given[family](), "return_dict": False}


def _row(name: str, value: Any, row: int) -> Any:
    of_batch = isinstance(value, Tensor) and name not in ("img_ids", "txt_ids")
    return value[row : row + 1] if of_batch else value


def output_of(model: Any, inputs: Inputs) -> Tensor:
    """What a model predicts."""
    with torch.no_grad():
        return model(**inputs)[0]


class DoorTests:
    """Inherit, and say how the method is applied; every test below then runs for it.

    families: whose models the method is for, the first one for what one model is enough for.
    apply: the method at a setting at which it changes the output. neutral: at a setting at which it must not, or None.
    """

    families: ClassVar[tuple[str, ...]] = tuple(FAMILIES)

    def apply(self, model: nn.Module) -> Handle:
        """The method at work."""
        raise NotImplementedError

    def neutral(self, model: nn.Module) -> Handle | None:  # noqa: ARG002
        """The method at work and doing nothing."""
        return None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Runs a test that asks for `family` on each of them."""
        if "family" in metafunc.fixturenames:
            metafunc.parametrize("family", self.families)

    def first(self) -> tuple[Any, Inputs, Tensor]:
        """A model of the first family, its inputs, and its output."""
        return _host(self.families[0])

    def test_neutral_is_the_host(self, family: str) -> None:
        """At the neutral setting, the pipeline's own output."""
        model, inputs, host = _host(family)
        if self.neutral(model) is not None:
            torch.testing.assert_close(output_of(model, inputs), host, atol=2e-5, rtol=1e-4)

    def test_acts_and_is_removed(self, family: str) -> None:
        """It changes the output, and `remove` gives the host back bit for bit, processors and state dict too."""
        model, inputs, host = _host(family)
        processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
        keys = list(model.state_dict())
        with self.apply(model):
            found = output_of(model, inputs)
            require(bool((found - host).norm() > 1e-3 * host.norm()), "the method changes nothing")
        require(torch.equal(output_of(model, inputs), host), "the host is not as it was")
        after = [module.processor for module in model.modules() if hasattr(module, "processor")]
        require(processors == after and keys == list(model.state_dict()), "something of the method stayed in the host")

    def test_samples_do_not_depend_on_their_batch(self, family: str) -> None:
        """Also where their texts have different lengths."""
        model, inputs, _ = _host(family)
        with self.apply(model):
            together = output_of(model, inputs)
            for row in range(2):
                alone = {name: _row(name, value, row) for name, value in inputs.items()}
                torch.testing.assert_close(output_of(model, alone)[0], together[row], atol=1e-5, rtol=1e-4)

    def test_gradient_checkpointing_changes_nothing(self) -> None:
        """The recomputation in the backward pass runs the method too."""
        model, inputs, _ = self.first()
        twin = copy.deepcopy(model)
        twin.enable_gradient_checkpointing()
        gradients = []
        for each in (model, twin):
            with self.apply(each):
                each.train()
                each(**inputs)[0].square().sum().backward()
            gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
        require(gradients[0].keys() == gradients[1].keys(), "other parameters have gradients")
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)

    def test_compiles_whole(self) -> None:
        """`torch.compile(fullgraph=True)` gives the eager output."""
        model, inputs, _ = self.first()
        with self.apply(model):
            eager = output_of(model, inputs)
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(output_of(compiled, inputs), eager, atol=1e-6, rtol=1e-5)

    def test_an_exception_restores(self) -> None:
        """A host that fails inside the context is as it was."""
        model, inputs, host = self.first()

        def fail() -> None:
            with self.apply(model):
                raise ZeroDivisionError

        message_of(ZeroDivisionError, fail)
        require(torch.equal(output_of(model, inputs), host), "the host is not as it was")

    def test_refusals(self) -> None:
        """Twice, on what is no transformer of diffusers, and when processors were replaced under it."""
        model, inputs, host = self.first()
        with self.apply(model):
            again = message_of(ValueError, lambda: self.apply(model))
            name, processor = next(iter(model.attn_processors.items()))
            model.set_attn_processor({**model.attn_processors, name: type(processor).__mro__[1]()})
            replaced = message_of(RuntimeError, lambda: output_of(model, inputs))
        require("is at work in this model already" in again, again)
        require("processors were replaced" in replaced, replaced)
        require(torch.equal(output_of(model, inputs), host), "the host is not as it was")
        unknown = message_of(TypeError, lambda: self.apply(nn.Linear(2, 2)))
        require("Linear is not supported" in unknown, unknown)

    def test_bfloat16_is_finite(self) -> None:
        """In the dtype that people run."""
        model, inputs, _ = self.first()
        inputs = {n: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
        with self.apply(model.bfloat16()):
            require(bool(output_of(model, inputs).isfinite().all()), "the output is not finite")


def _host(family: str) -> tuple[Any, Inputs, Tensor]:
    model, inputs = tiny_model(family), inputs_of(family)
    return model, inputs, output_of(model, inputs)
