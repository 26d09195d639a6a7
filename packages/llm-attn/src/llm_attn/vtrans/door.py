"""The door: gates in a transformers model, by hooks, so that the host runs its own forward.

    hidden   one gate of d units for the whole model, at the embeddings and at the output of every sublayer
    heads    one of H units per layer, at the context before its projection
    inter    one of m units per layer, before the down-projection
    layer    one unit per layer, at the output of both its sublayers (optional)

Norms take their statistics from kept channels, or a masked model and its shrunk form would differ. With all units kept
and means of 1 the model is the host, bit for bit in its norms.

Dutta et al., arXiv:2406.05276. Decided here: gates are not part of the host's state dict; the handle holds them. In a
family whose sublayers end with a norm (BERT) a layer that goes takes its norms with it. Gates start nearer to noise and
size is counted more softly than published: with slope 10 the size constraint does not reach gates far from 0, and after
one large step Adam's long memory keeps them there (without a task, a target of 0.9 then ends at 0.25 to 0.45).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llm_attn.transformers.door import base_model
from llm_attn.vtrans.families import Anatomy
from llm_attn.vtrans.gates import Noise, VIBGate, masked_layer_norm, masked_rms_norm
from llm_attn.vtrans.structure import Counts, Layout, SizeModel, Structure, keep_masks
from shared_kernels.handle import Handle

NAME = "vtrans"


@dataclass(frozen=True, kw_only=True)
class VTransConfig:
    """Gates and what they are counted by."""

    layer_gates: bool | None = None
    """Whether whole layers may go; None: yes for BERT and GPT-2, no for Llama and its like, as published."""
    noise: Noise = "token"
    """Noise anew for each token, or once per row of the batch ("sample")."""
    log_variance: float = -3.0
    """Where log sigma^2 starts (published: -9, from where gates drift for thousands of steps)."""
    weighted: bool = True
    """Whether kept units are multiplied by their mean, or by 1, when no noise is drawn."""
    slope: float = 2.0
    """Steepness of the keep probability sigmoid(-slope * log alpha) by which size is counted (published: 10)."""
    layout: Layout = "stock"
    """"stock": what the host's own class can load (layers alike); "ragged": every layer has its own sizes."""
    count_embeddings: bool | None = None
    """Whether embeddings and output head count as parameters; None: for BERT and GPT-2, not for Llama and its like."""
    flops_of: int | None = None
    """Counts the operations of one pass over so many tokens in place of parameters."""
    seed: int = 0
    """Of the gates' start and of their noise."""

    def __post_init__(self) -> None:
        if not self.slope > 0:
            raise ValueError(f"slope must be positive, got {self.slope}")
        if self.flops_of is not None and self.flops_of < 1:
            raise ValueError(f"flops_of is a number of tokens, at least 1, got {self.flops_of}")


class Gates(nn.Module):
    """All gates of a model: `hidden`, `heads` and `inter` by layer, `layer` by layer or None."""

    def __init__(self, anatomy: Anatomy, config: VTransConfig, device: torch.device) -> None:
        super().__init__()
        a, layers = anatomy, len(anatomy.layers)
        generator = torch.Generator(device).manual_seed(config.seed)

        def gate(units: int, channels: int = 1) -> VIBGate:
            return VIBGate(
                units,
                channels=channels,
                log_variance=config.log_variance,
                noise=config.noise,
                weighted=config.weighted,
                generator=generator,
            )

        self.slope = config.slope
        self.hidden = gate(a.hidden)
        self.heads = nn.ModuleList([gate(a.heads, a.group * a.head_dim) for _ in range(layers)])
        self.inter = nn.ModuleList([gate(a.inter) for _ in range(layers)])
        wanted = a.family.layer_gates if config.layer_gates is None else config.layer_gates
        self.layer = nn.ModuleList([gate(1) for _ in range(layers)]) if wanted else None
        self.generator = generator

    def all(self) -> list[VIBGate]:
        """Every gate."""
        return [module for module in self.modules() if isinstance(module, VIBGate)]

    def counts(self) -> Counts:
        """Expected numbers of kept units, differentiable."""
        return Counts(
            hidden=self._kept(self.hidden),
            heads=[self._kept(gate) for gate in self.heads],
            inter=[self._kept(gate) for gate in self.inter],
            layers=[1.0] * len(self.heads) if self.layer is None else [self._kept(gate) for gate in self.layer],
        )

    def _kept(self, gate: Any) -> Tensor:
        total: Tensor = gate.keep_probability(self.slope).sum()
        return total

    def fix(self, structure: Structure | None) -> None:
        """From now on the structure's units stay and no noise is drawn; None lets the gates decide again."""
        if structure is None:
            for gate in self.all():
                gate.fix(None)
            return
        self.hidden.fix(keep_masks(structure.hidden, self.hidden.mu.numel()))
        for name in ("heads", "inter"):
            for gate, kept in zip(getattr(self, name), getattr(structure, name), strict=True):
                gate.fix(keep_masks(kept, gate.mu.numel()))
        if self.layer is not None:
            for index, whole in enumerate(self.layer):
                whole.fix(torch.tensor([index in structure.layers]))  # type: ignore[operator]
        elif len(structure.layers) < len(self.heads):
            raise ValueError("the structure lacks layers, and these gates have none for layers; use layer_gates=True")

    def kl(self, *, head_multiplier: float = 1.0, inter_multiplier: float = 1.0, hidden_weight: float = 1.0) -> Tensor:
        """Nats of all gates; the hidden gate counts once per sublayer and `hidden_weight` times more."""
        total = hidden_weight * self.hidden.kl()
        for index, (heads, inter) in enumerate(zip(self.heads, self.inter, strict=True)):
            of_layer = head_multiplier * heads.kl() + inter_multiplier * inter.kl()  # type: ignore[operator]
            total = total + of_layer + 2 * self.hidden.kl()
            if self.layer is not None:
                total = total + head_multiplier * self.layer[index].kl()  # type: ignore[operator]
        return total


@dataclass
class VTransHandle(Handle):
    """Gates at work in a model; `remove()` takes them out again."""

    gates: Gates = field(kw_only=True)
    size: SizeModel = field(kw_only=True)

    def sparsity(self) -> Tensor:
        """Expected share of parameters that go, differentiable."""
        sparsity: Tensor = self.size.sparsity(self.gates.counts())
        return sparsity

    def fix(self, structure: Structure | None) -> None:
        """The model computes what its shrunk form will (see `shrink`); None lets the gates decide again."""
        self.gates.fix(structure)


def apply_vtrans(model: nn.Module, config: VTransConfig | None = None) -> VTransHandle:
    """Puts gates into a BERT, RoBERTa, GPT-2, Llama, Mistral or Qwen model.

    Noise is drawn while `handle.gates` is in training mode, whatever the mode of the host. ValueError on other
    families, and where gates are in the model already.
    """
    config = VTransConfig() if config is None else config
    if not isinstance(config, VTransConfig):
        raise TypeError(f"config must be a VTransConfig, got {type(config).__name__}")
    host = base_model(model)
    anatomy = Anatomy(host)
    if any(getattr(hook, "vtrans", False) for hook in anatomy.embedded()._forward_hooks.values()) or any(
        getattr(hook, "vtrans", False) for hook in anatomy.embedded()._forward_pre_hooks.values()
    ):
        raise ValueError("this model has VTrans gates already; remove() the handle that put them there")
    weight = host.get_input_embeddings().weight
    gates = Gates(anatomy, config, weight.device)
    size = SizeModel(host, count_embeddings=config.count_embeddings, layout=config.layout, flops_of=config.flops_of)
    handle = VTransHandle(NAME, host, config, tuple(range(len(anatomy.layers))), gates=gates, size=size)
    for hook in _hooks(anatomy, gates):
        handle.on_remove(hook.remove)
    return handle


def _hooks(anatomy: Anatomy, gates: Gates) -> list[Any]:
    family, hooks = anatomy.family, []
    for layer in range(len(anatomy.layers)):
        out, down = anatomy.attention_out(layer), anatomy.ffn_out(layer)
        layer_gate = None if gates.layer is None else gates.layer[layer]
        hooks += [_before(out, gates.heads[layer]), _before(down, gates.inter[layer])]
        for module in (out, down):
            hooks.append(_after(module, gates.hidden))
            if layer_gate is not None:
                hooks.append(_after(module, _Broadcast(layer_gate)))
        for norm in anatomy.norms(layer):
            hooks.append(_norm(norm, gates.hidden, layer_gate if family.post_norm else None))
    for norm in anatomy.outer_norms():
        hooks.append(_norm(norm, gates.hidden, None))
    for neck in anatomy.necks():
        hooks.append(_after(neck, lambda x: x * gates.hidden.keep.to(x.dtype)))
    where = anatomy.embedded()
    hooks.append(_before(where, gates.hidden) if family.embedded_input else _after(where, gates.hidden))
    return hooks


class _Broadcast:
    """A gate of one unit on a whole sublayer: one draw for each token."""

    def __init__(self, gate: Any) -> None:
        self.gate = gate

    def __call__(self, x: Tensor) -> Tensor:
        factor: Tensor = self.gate(torch.ones_like(x[..., :1]))
        return x * factor


def _before(module: nn.Module, gate: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (gate(args[0]), *args[1:])

    return module.register_forward_pre_hook(_marked(hook))


def _after(module: nn.Module, gate: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return gate(out)

    return module.register_forward_hook(_marked(hook))


def _norm(module: nn.Module, hidden: VIBGate, layer_gate: Any) -> Any:
    def hook(norm: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if layer_gate is not None and not layer_gate.keep.item():
            return args[0]
        keep = hidden.keep
        if keep.all():
            return out
        if isinstance(norm, nn.LayerNorm):
            return masked_layer_norm(args[0], norm.weight, norm.bias, keep, eps=norm.eps)
        return masked_rms_norm(args[0], norm.weight, keep, eps=norm.variance_epsilon)

    return module.register_forward_hook(_marked(hook))


def _marked(hook: Any) -> Any:
    hook.vtrans = True
    return hook
