"""The model as a torch layer with frozen heads and trained values, and the same function as ordinary attention."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llm_attn.random_feature_theory.features import HeadFeatures, Mean, head_features
from llm_attn.random_feature_theory.inputs import as_sets


class RandomHeadAttention(nn.Module):
    """RFA (mean="zero") or BRFA (mean="identity"): query and keys to `out_features` numbers.

    `query_key` (M, d+1, d+1) is a frozen buffer, `value` (M (d+1), out) the only parameter; it starts at zero, which
    is as good as anywhere, because the output is linear in it. Not linear-time attention: cost is M per pair.
    """

    query_key: Tensor

    def __init__(self, d: int, heads: int = 1000, mean: Mean = "zero", *, out_features: int = 1, seed: int = 0) -> None:
        super().__init__()
        if out_features < 1:
            raise ValueError(f"out_features must be at least 1, got {out_features}")
        features = HeadFeatures(d=d, heads=heads, mean=mean, seed=seed)
        weights = torch.from_numpy(features.weights(0, heads)).to(torch.get_default_dtype())
        self.register_buffer("query_key", weights)
        self.value = nn.Parameter(torch.zeros(heads * (d + 1), out_features))

    def forward(
        self,
        query: Float[Tensor, "*b d"],
        keys: Float[Tensor, "*b N d"],
        key_mask: Bool[Tensor, "*b N"] | None = None,
    ) -> Float[Tensor, "*b out"]:
        """key_mask: True where a key is real. ValueError on shapes that disagree."""
        lead, d = query.shape[:-1], self.query_key.shape[-1] - 1
        if query.shape[-1] != d or keys.shape[:-2] != lead or keys.shape[-1] != d:
            raise ValueError(
                f"query must be (..., {d}) and keys (..., N, {d}), got {tuple(query.shape)} and {tuple(keys.shape)}"
            )
        x = torch.cat((query.unsqueeze(-2), keys), -2).reshape(-1, keys.shape[-2] + 1, d)
        mask = None if key_mask is None else key_mask.reshape(-1, keys.shape[-2])
        phi = head_features(as_sets(x, mask), self.query_key).flatten(1) / len(self.query_key) ** 0.5
        return (phi @ self.value).reshape(*lead, -1)

    def as_attention_layer(self) -> "ReluAttention":
        """The same function with query, key and value weights: Q = W^T, K = I, V = the trained values."""
        heads, D, _ = self.query_key.shape
        layer = ReluAttention(D, heads, self.value.shape[1]).to(self.value)
        with torch.no_grad():
            layer.query.copy_(self.query_key.mT)
            layer.key.copy_(torch.eye(D).expand(heads, D, D))
            layer.value.copy_(self.value.view(heads, D, -1).mT / heads**0.5)
        return layer

    def extra_repr(self) -> str:
        """Heads, and width with the one."""
        heads, D, _ = self.query_key.shape
        return f"d={D - 1}, heads={heads}"


class ReluAttention(nn.Module):
    """Multi-head attention with relu scores over N in place of softmax; heads add up, everything is trained.

    sum_m 1/N sum_i relu(<Q_m x~_0, K_m x~_i>) V_m x~_i. Inputs are x~ already, that is, with the one appended.
    """

    def __init__(self, dim: int, heads: int, out_features: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(heads, dim, dim) / dim**0.5)
        self.key = nn.Parameter(torch.randn(heads, dim, dim) / dim**0.5)
        self.value = nn.Parameter(torch.randn(heads, out_features, dim) / dim**0.5)

    def forward(self, query: Float[Tensor, "*b D"], keys: Float[Tensor, "*b N D"]) -> Float[Tensor, "*b out"]:
        """Attention of one query over its keys."""
        q = torch.einsum("mab,...b->...ma", self.query, query)
        k = torch.einsum("mab,...nb->...mna", self.key, keys)
        v = torch.einsum("mob,...nb->...mno", self.value, keys)
        scores = torch.einsum("...ma,...mna->...mn", q, k).relu() / keys.shape[-2]
        return torch.einsum("...mn,...mno->...o", scores, v)
