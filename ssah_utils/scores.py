"""Tensor kernels: from moments and weights to a score per unit, and distances between states.

torch only: no model, no file, no set of units. Another score is one more function here.
"""

import torch
from torch import Tensor

PerUnit = dict[str, Tensor]  # {kind: (n_layers, n_channels)}


def variance_norm(variance: PerUnit, squared_norm: PerUnit) -> PerUnit:
    """I_j = Var(X_j) * ||W_:j||^2, the expected squared change of the output when channel j is held at its mean.

    SSAH section 4.1; FLAP's WIFV (An et al., AAAI 2024). ``variance`` is unbiased, both are (n_layers, n_channels).
    """
    return {kind: variance[kind] * squared_norm[kind] for kind in variance}


def zscore_per_module(score: PerUnit) -> PerUnit:
    """Standardise scores within each module, so that modules of different scale can be ranked together.

    Ranks are no substitute: the few outstanding channels of a module are the ones that matter, and ranks flatten them.
    """
    return {
        kind: (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        for kind, values in score.items()
    }


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos(a, b) over the last dimension, in float64."""
    return 1 - torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
