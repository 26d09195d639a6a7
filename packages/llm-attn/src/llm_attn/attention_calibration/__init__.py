"""ACT: scale down the hidden attention sinks of chosen heads, and hand their attention to the other tokens.

A few tokens of little meaning (the first one, but also later punctuation and newlines) draw a large share of attention.
In heads chosen once on calibration data, the keys of the current input that receive much more than their share are
scaled by beta, and what is freed goes to the other keys in proportion to the attention they have. No training.

Yu et al., "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration" (ACT), ICML 2024, arXiv:2406.15765.
Decided here: the first token of a text is never a sink (`protect="first_flagged"` does as the official code does). A
whole prompt is calibrated by what its keys receive from all of its rows, as in the paper, so that rows depend on later
ones; `causal=True` judges every row by the rows up to it. What comes after the prompt is always judged so: the official
code calibrates generated tokens by their own row alone, and its rows do not sum to 1 then. Padding neither counts nor
is counted. Keys are judged by the rows that can see them, in sliding windows too. A tie in the search keeps no head.
"""

from llm_attn.attention_calibration.calibrate import calibrate_known_sinks, calibrated_attention
from llm_attn.attention_calibration.config import ACTConfig
from llm_attn.attention_calibration.door import apply_act
from llm_attn.attention_calibration.running import SinkState, running_attention
from llm_attn.attention_calibration.scoring import Choice, choice_scores
from llm_attn.attention_calibration.search import HeadTable, HeadTrial, calibrate_heads
from llm_attn.attention_calibration.sink_map import SinkMap, plot_sinks, sink_map

__all__ = [
    "ACTConfig",
    "Choice",
    "HeadTable",
    "HeadTrial",
    "SinkMap",
    "SinkState",
    "apply_act",
    "calibrate_heads",
    "calibrate_known_sinks",
    "calibrated_attention",
    "choice_scores",
    "plot_sinks",
    "running_attention",
    "sink_map",
]
