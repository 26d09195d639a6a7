"""VTrans: shrink a transformer to a given size by gates that an information bottleneck trains.
"""

from llm_attn.vtrans.choosing import Scores, choose_structure, pick
from llm_attn.vtrans.door import VTransConfig, apply_vtrans
from llm_attn.vtrans.shrinking import load_shrunk, shrink
from llm_attn.vtrans.structure import SizeModel, Structure
from llm_attn.vtrans.training import VTransTrainer
