"""`prune(model, "fastv", keep=0.2)`: every method by its name, on any supported model."""

from dataclasses import replace
from typing import Any

from torch import nn

from vlm_prune.adaptinfer import AdaptInferConfig
from vlm_prune.agile_pruner import AdaptiveVisPrunerConfig, AgilePrunerConfig
from vlm_prune.attention_debiasing import AttentionDebiasingConfig
from vlm_prune.criteria import (
    DivPruneConfig,
    FasterVLMConfig,
    FastVConfig,
    HiMAPConfig,
    PyramidDropConfig,
    RandomConfig,
    SparseVLMConfig,
    UniformConfig,
    VisionZipConfig,
    VisPrunerConfig,
)
from vlm_prune.door import Method, PruneHandle, open_pruner
from vlm_prune.sink_guard import SinkGuardConfig
from vlm_prune.zoo_prune import ZooPruneConfig

METHODS: dict[str, type[Any]] = {
    config.name: config
    for config in (
        AdaptInferConfig,
        AgilePrunerConfig,
        ZooPruneConfig,
        AdaptiveVisPrunerConfig,
        FastVConfig,
        PyramidDropConfig,
        SparseVLMConfig,
        HiMAPConfig,
        FasterVLMConfig,
        VisionZipConfig,
        VisPrunerConfig,
        DivPruneConfig,
        RandomConfig,
        UniformConfig,
    )
}
"""Methods that go by a name; a config of your own goes without one."""


def prune(
    model: nn.Module, method: str | Method, *, keep: float | int | None = None, debias: bool | float = False
) -> PruneHandle:
    """Drops visual tokens of every prompt until the handle is removed: `with prune(model, "fastv", keep=0.2): ...`.

    method: a name out of `METHODS`, or a method's config. keep: share of the visual tokens in (0, 1], or their number
    as an int; over the layers behind the first stage where there are several (None: the config's own). 1.0 leaves the
    model's output as it is, bit for bit. debias: whether attention scores lose their positional trend and padding
    scores 0 (Attention Debiasing); a number is the bias strength sigma, True the one published for the method.

    Raises ValueError on an unknown name, a `keep` out of range, an unsupported family, and where a method is at work in
    the model already; TypeError on what is no vision-language model of transformers.
    """
    config: Any = _named(method) if isinstance(method, str) else method
    if keep is not None:
        config = _with_keep(config, keep)
    if debias is not False:
        config = AttentionDebiasingConfig(method=config, sigma=None if debias is True else float(debias))
    return open_pruner(model, config)


def _named(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]()


def _with_keep(config: Any, keep: float | int) -> Any:
    if isinstance(config, AttentionDebiasingConfig | SinkGuardConfig):
        return replace(config, method=_with_keep(config.method, keep))
    if not hasattr(config, "keep"):
        raise ValueError(f"{config.name} has no keep; say in its config what stays")
    return replace(config, keep=keep)
