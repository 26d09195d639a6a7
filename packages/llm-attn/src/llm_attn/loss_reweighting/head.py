"""Losses of single tokens out of a transformers model's own forward pass, without its logits in memory.

For the time of one call the output layer computes, in place of the logits (B, N, V), the losses of given targets
(B, N, 1). That happens inside the model, and so inside whatever wraps it (DistributedDataParallel, FSDP, autocast,
PEFT), which a loss computed from hidden states outside would go round.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from llm_attn.loss_reweighting.samples import token_losses
from llm_attn.transformers.door import base_model

_CHANGES_LOGITS = ("final_logit_softcapping", "logits_soft_cap", "logits_scaling", "logit_scale")


def plain_head(model: nn.Module) -> nn.Linear:
    """The output layer of a language model whose logits are what this layer gives.

    ValueError where it is no plain linear layer (quantised, with adapters of its own, spread over devices) or where the
    model changes logits behind it; the sentence says what to do.
    """
    host: Any = base_model(model)
    head, instead = host.get_output_embeddings(), "get losses from the logits with LossReweightingConfig(head='logits')"
    name = type(host).__name__
    if head is None:
        raise ValueError(f"{name} has no output layer to get losses from: load a causal language model")
    config = host.config.get_text_config(decoder=True)
    changed = [field for field in _CHANGES_LOGITS if getattr(config, field, None) not in (None, 1, 1.0)]
    if changed:
        raise ValueError(f"{name} changes its logits behind the output layer ({changed[0]}): {instead}")
    if type(head) is not nn.Linear or "forward" in vars(head):
        raise ValueError(f"the output layer of {name} is no plain linear layer but {type(head).__name__}: {instead}")
    return head


@contextmanager
def losses_for_logits(model: nn.Module, targets: Int[Tensor, "B N"]) -> Iterator[None]:
    """Within the block, `model(...).logits` are the losses (B, N, 1) of `targets`, 0 where these are -100.

    ValueError as `plain_head`, and where the model does not give its output layer every place.
    """
    head = plain_head(model)

    def losses(hidden: Tensor) -> Tensor:
        if hidden.shape[:-1] != targets.shape:
            raise ValueError(
                f"the output layer was given places {tuple(hidden.shape[:-1])} for labels {tuple(targets.shape)}: call "
                "the model without logits_to_keep"
            )
        flat, wanted = hidden.flatten(0, 1), targets.flatten()
        of_tokens = token_losses(flat, head.weight, wanted, bias=head.bias)
        return of_tokens.view(*targets.shape, 1)

    head.forward = losses  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
