"""What training needs to know about the weights that methods add: which of them decay."""

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

_EXEMPT = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


def param_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Parameters that need gradients in two groups for an optimiser, with `weight_decay` and with none.

    transformers' own rule, which exempts biases and norms by name and type, and on top of it the parameters that a
    module of a method lists in its `no_weight_decay` (attention sinks, the queries of Attention Residuals): they are no
    weights of a map, and decay would pull them to a value that means something. For a Trainer:
    `optimizers=(torch.optim.AdamW(param_groups(model, weight_decay=0.1), lr=1e-3), None)`.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    exempt = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in getattr(module, "no_weight_decay", ())
    }
    decayed = set(get_parameter_names(model, [nn.LayerNorm], list(_EXEMPT)))
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decayed and id(parameter) not in exempt].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
