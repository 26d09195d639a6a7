"""In-Context Brush: its formulas, and the insertion with a tiny FLUX Fill."""

import diffusers
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from diffusion_attn import InContextBrush, InContextBrushConfig, apply_in_context_brush, in_context_attention
from diffusion_attn.diffusers.subject_insertion import blended, compose_canvas
from diffusion_attn.in_context_brush import head_weights
from diffusion_attn.testing import DoorTests, inputs_of, output_of, tiny_model
from diffusion_attn.visual_attention import TextKeys

DEFAULT = InContextBrushConfig()
DEMO, TARGET = torch.arange(12), torch.arange(12, 24)


def parts(dtype=torch.float64):
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 24, 8, generator=make, dtype=dtype) for _ in range(3))
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    words = (torch.randn(2, 3, 5, 8, generator=make, dtype=dtype) for _ in range(2))
    return query, key, value, TextKeys(*words, valid)


def written_out(query, key, value, text, config):
    """Equations 5 to 8 on the whole map: text, subject, target."""
    scores = query @ torch.cat([text.key, key], 2).mT / query.shape[-1] ** 0.5
    seen = F.pad(text.valid, (0, 24), value=True)[:, None, None]
    map_ = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = map_ @ torch.cat([text.value, value], 2)
    read = map_[:, :, 12:]
    shifted = (
        out[:, :, 12:]
        + config.alpha_text * read[..., :5] @ text.value
        + config.alpha_demo * read[..., 5:17] @ value[:, :, :12]
    )
    activation = read[..., :5].sum((-1, -2))
    low, high = activation.amin(1, keepdim=True), activation.amax(1, keepdim=True)
    weights = (1 + config.beta * (activation - low) / (high - low))[..., None, None]
    upper = out[:, :, :12] * (weights if config.reweight_rows == "image" else 1)
    return torch.cat([upper, shifted * weights], 2)


@pytest.mark.parametrize("rows", ["target", "image"])
def test_the_formulas_written_out(rows):
    config = InContextBrushConfig(alpha_text=0.4, alpha_demo=0.2, beta=0.3, reweight_rows=rows)
    found = in_context_attention(*parts(), DEMO, TARGET, config)
    torch.testing.assert_close(found, written_out(*parts(), config), atol=1e-10, rtol=0)


def test_without_weights_it_is_attention():
    query, key, value, text = parts()
    config = InContextBrushConfig(alpha_text=0, alpha_demo=0, beta=0)
    found = in_context_attention(query, key, value, text, DEMO, TARGET, config)
    torch.testing.assert_close(found, written_out(query, key, value, text, config), atol=1e-12, rtol=0)


def test_shifting_is_linear_and_leaves_other_rows_alone():
    def at(alpha):
        return in_context_attention(
            *parts(), DEMO, TARGET, InContextBrushConfig(alpha_text=alpha, alpha_demo=alpha, beta=0)
        )

    torch.testing.assert_close(at(0.6) - at(0.0), 2 * (at(0.3) - at(0.0)), atol=1e-12, rtol=0)
    assert torch.equal(at(0.6)[:, :, DEMO], at(0.0)[:, :, DEMO])
    assert (at(0.6) - at(0.0))[:, :, TARGET].abs().amax(-1).min() > 0


def test_heads_weigh_between_one_and_one_plus_beta():
    weights = head_weights(torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]]), 0.2)
    torch.testing.assert_close(weights, torch.tensor([[1.2, 1.0, 1.1], [1.0, 1.0, 1.0]]))


def test_gradients_flow():
    query, key, value, text = parts()
    inputs = [t.requires_grad_() for t in (query, key, value, text.key, text.value)]

    def run(query, key, value, text_key, text_value):
        return in_context_attention(query, key, value, TextKeys(text_key, text_value, text.valid), DEMO, TARGET)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("wrong", [{"alpha_text": -1}, {"beta": float("nan")}, {"reweight_rows": "all"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        InContextBrushConfig(**wrong)


class TestDoor(DoorTests):
    families = ("sd3", "flux")

    def apply(self, model):
        return apply_in_context_brush(model, InContextBrushConfig(alpha_text=2, alpha_demo=2, beta=1))

    def neutral(self, model):
        return apply_in_context_brush(model, InContextBrushConfig(alpha_text=0, alpha_demo=0, beta=0))


def test_only_models_with_joint_attention_of_images():
    with pytest.raises(TypeError, match="In-Context Brush is for FluxTransformer2DModel and SD3"):
        apply_in_context_brush(tiny_model("wan"))


def test_an_odd_number_of_rows_is_refused():
    model = tiny_model("flux")
    with apply_in_context_brush(model), pytest.raises(ValueError, match="an even number of rows"):
        output_of(model, inputs_of("flux", rows=3))


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=20, out_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(4,), layers_per_block=1, latent_channels=2,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip
    return diffusers.FluxFillPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


def picture(seed):
    return Image.fromarray(
        torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(seed)).byte().numpy()
    )


def marked(box):
    mask = Image.new("L", (20, 20))
    mask.paste(255, box)
    return mask


def words():
    make = torch.Generator().manual_seed(3)
    return {
        "prompt_embeds": torch.randn(1, 6, 32, generator=make),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=make),
    }


def insert(pipe, config=DEFAULT, **options):
    steps = []
    pipe.set_progress_bar_config(disable=True)
    out = InContextBrush(pipe, config)(
        picture(1), picture(2), marked((4, 4, 16, 16)), size=16, steps=3, seed=5, max_sequence_length=6,
        on_step=lambda done, total: steps.append((done, total)), **words(), **options,
    )  # fmt: skip
    assert steps == [(1, 3), (2, 3), (3, 3)]
    return out


def test_the_insertion_is_seeded_steered_and_leaves_the_pipeline_alone(pipe):
    processors = dict(pipe.transformer.attn_processors)
    first = insert(pipe)
    assert first.size == (16, 16)
    assert first.tobytes() == insert(pipe).tobytes()
    assert dict(pipe.transformer.attn_processors) == processors
    host = insert(pipe, InContextBrushConfig(alpha_text=0, alpha_demo=0, beta=0))
    assert first.tobytes() != host.tobytes()


def test_blending_keeps_what_is_outside_the_mask(pipe):
    """Outside, latents end as those of the source; without blending they do not."""
    kept = {}

    def spy(blend):
        decode = pipe.vae.decode

        def caught(latents, **options):
            kept[blend] = latents
            return decode(latents, **options)

        pipe.vae.decode = caught
        try:
            insert(pipe, blend=blend)
        finally:
            del pipe.vae.decode

    spy(True)
    spy(False)
    brush = InContextBrush(pipe)
    canvas, repaint = compose_canvas(picture(1), picture(2), marked((4, 4, 16, 16)), size=16)
    source = pipe._unpack_latents(brush._source(canvas, 5), 32, 16, pipe.vae_scale_factor)
    source = source / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    outside = ~repaint.expand(1, 2, -1, -1)
    assert (kept[True] - source)[outside].abs().max() < 1e-5
    assert (kept[False] - source)[outside].abs().max() > 0.1
    assert (kept[True] - source)[~outside].abs().max() > 0.1


def test_blending_by_hand():
    latents, source, noise = torch.full((1, 2, 1), 8.0), torch.full((1, 2, 1), 1.0), torch.full((1, 2, 1), 5.0)
    inside = torch.tensor([[[1.0], [0.5]]])
    assert blended(latents, source, noise, inside, 0.25).flatten().tolist() == [8.0, 5.0]


def test_the_canvas_has_the_subject_on_white_above_the_target():
    subject, target = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (6, 6), "blue")
    canvas, repaint = compose_canvas(
        subject, target, marked((0, 0, 10, 20)), size=4, subject_mask=marked((0, 0, 20, 10))
    )
    assert [canvas.getpixel((1, y)) for y in (0, 3, 4, 7)] == [(255, 0, 0), (255, 255, 255), (0, 0, 255), (0, 0, 255)]
    assert repaint.int().tolist() == [[0, 0, 0, 0]] * 4 + [[1, 1, 0, 0]] * 4


def test_what_cannot_be_inserted_is_said(pipe):
    with pytest.raises(TypeError, match="must be a FluxFillPipeline"):
        InContextBrush(pipe.transformer)
    with pytest.raises(ValueError, match="mask marks nothing"):
        InContextBrush(pipe)(picture(1), picture(2), Image.new("L", (8, 8)), size=16, **words())
