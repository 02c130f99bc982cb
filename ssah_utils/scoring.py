"""Score and partition the units of a model: the passes over the model, and the kernels on them.

What is scored are batches of token ids; where these come from is not known here.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ssah_utils import activations, fingerprints, scores, units, weights
from ssah_utils.activations import ChannelMoments
from ssah_utils.per_unit import PerUnit

Batches = Iterable[dict[str, Tensor]]


def standardised(moments: ChannelMoments, squared_norms: PerUnit) -> PerUnit:
    """Variance times squared column norm, standardised within every module (SSAH section 4.1)."""
    return scores.zscore_per_module(scores.variance_norm(moments.variance, squared_norms))


def standardised_scores(model: nn.Module, data: Mapping[str, Batches]) -> dict[str, PerUnit]:
    """``standardised`` score of every unit on each data set: {name: (n_layers, n_channels)}."""
    norms = weights.squared_column_norms(model)
    found = {}
    for name, batches in data.items():
        found[name] = standardised(activations.channel_moments(model, batches), norms)
    return found


def partition_model(
    model: nn.Module, data: Mapping[str, Batches], **fractions: float
) -> tuple[units.UnitPartition, dict[str, PerUnit]]:
    """Partition of a model's units, and the standardised scores it was made from.

    ``data``: batches of ``harmful`` requests that the model refuses, and of ``helpful`` ones that
    it answers. ``fractions``: those of ``units.partition``.
    """
    z = standardised_scores(model, {name: data[name] for name in ("harmful", "helpful")})
    fingerprint = fingerprints.fingerprint(model)
    return units.partition(z["harmful"], z["helpful"], **fractions, fingerprint=fingerprint), z
