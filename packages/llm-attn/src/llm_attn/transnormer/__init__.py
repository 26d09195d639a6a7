"""TransNormerLLM as a model of transformers. Importing this lets AutoConfig and AutoModel find it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llm_attn.transnormer.cache import StateCache
from llm_attn.transnormer.configuration import TransNormerConfig
from llm_attn.transnormer.modeling import TransNormerForCausalLM, TransNormerModel

AutoConfig.register(TransNormerConfig.model_type, TransNormerConfig, exist_ok=True)
AutoModel.register(TransNormerConfig, TransNormerModel, exist_ok=True)
AutoModelForCausalLM.register(TransNormerConfig, TransNormerForCausalLM, exist_ok=True)

__all__ = ["StateCache", "TransNormerConfig", "TransNormerForCausalLM", "TransNormerModel"]
