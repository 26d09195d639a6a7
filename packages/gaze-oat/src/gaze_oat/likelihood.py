"""How probable a model holds what people did: negative log-likelihood, and SIM, step by step under teacher forcing.

A path of n fixations is n + 1 decisions: each object, given those before it, and then to stop. At the first decision
stopping is impossible, as in OAT's inference (Fang et al., ECCV 2024, arXiv:2407.13335).

    NLL   mean over decisions of -log p(what was done)        nats
    SIM   mean over decisions of sum_j min(p_j, onehot_j) = p(what was done)

Shapes: n fixations, P objects; column P stands for stopping.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from gaze_oat.errors import ScanpathProblem


def done_probabilities(probabilities: Float[np.ndarray, "n+1 P+1"], path: Sequence[int]) -> Float[np.ndarray, "n+1"]:
    """Probability of each decision that was taken. ScanpathProblem if rows are no distributions or lengths disagree."""
    probabilities, ids = np.asarray(probabilities, float), np.asarray(path, int)
    if probabilities.shape[0] != len(ids) + 1:
        raise ScanpathProblem(f"a path of {len(ids)} fixations needs {len(ids) + 1} rows, got {probabilities.shape[0]}")
    if not (probabilities >= 0).all() or np.abs(probabilities.sum(1) - 1).max() > 1e-4:
        raise ScanpathProblem("each row must be a distribution over the objects and stopping: non-negative, sum 1")
    if len(ids) == 0 or ids.min() < 0 or ids.max() >= probabilities.shape[1] - 1:
        raise ScanpathProblem(
            f"objects must lie in 0 to {probabilities.shape[1] - 2} and at least one, got {ids.tolist()}"
        )
    return probabilities[np.arange(len(ids) + 1), np.append(ids, probabilities.shape[1] - 1)]


def negative_log_likelihood(done: Sequence[Float[np.ndarray, "n+1"]]) -> float:
    """Mean of -log p over all decisions of all paths, nats; infinite if one was held impossible."""
    with np.errstate(divide="ignore"):
        return float(-np.log(np.concatenate(list(done))).mean())


def sim(done: Sequence[Float[np.ndarray, "n+1"]]) -> float:
    """SIM: mean probability of what was done."""
    return float(np.concatenate(list(done)).mean())
