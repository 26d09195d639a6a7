"""`prune(model, "fastv", keep=0.2)`: every method by its name, on any supported model."""

from dataclasses import replace
from typing import Any

from torch import nn

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

METHODS: dict[str, type[Any]] = {
    config.name: config
    for config in (
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


def prune(model: nn.Module, method: str | Method, *, keep: float | int | None = None) -> PruneHandle:
    """Drops visual tokens of every prompt until the handle is removed: `with prune(model, "fastv", keep=0.2): ...`.

    method: a name out of `METHODS`, or a method's config. keep: share of the visual tokens in (0, 1], or their number
    as an int; over the layers behind the first stage where there are several (None: the config's own). 1.0 leaves the
    model's output as it is, bit for bit.

    Raises ValueError on an unknown name, a `keep` out of range, an unsupported family, and where a method is at work in
    the model already; TypeError on what is no vision-language model of transformers.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
        method = METHODS[method]()
    config: Any = method
    if keep is not None:
        if not hasattr(config, "keep"):
            raise ValueError(f"{config.name} has no keep; give it a config that says what stays")
        config = replace(config, keep=keep)
    return open_pruner(model, config)
