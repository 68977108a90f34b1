"""Inception Score (Salimans et al. 2016) as ADM computes it."""

import numpy as np
import torch
from torch import Tensor

SPLIT = 5000  # images


def inception_score(probabilities: Tensor | np.ndarray, split: int = SPLIT) -> float:
    """exp of the mean KL(p(y|x) || p(y)), averaged over consecutive splits of the class probabilities [N, K].

    A short last split counts as much as a full one, as in ADM's evaluator. Between 1 and K.
    """
    scores = []
    for p in torch.as_tensor(probabilities).double().split(split):
        marginal = p.mean(0, keepdim=True)
        # Where p is 0 its term is 0; log of the ratio would be -inf there.
        divergence = torch.xlogy(p, p) - torch.xlogy(p, marginal)
        scores.append(divergence.sum(1).mean().exp())
    return float(torch.stack(scores).mean())
