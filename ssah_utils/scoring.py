"""Score and partition the units of a model: the passes over the model, and the kernels on them.

What is scored are token ids; where these come from is not known here.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from ssah_utils import activations, fingerprints, scores, units, weights
from ssah_utils.activations import ChannelMoments
from ssah_utils.evaluation import Progress, _silent
from ssah_utils.per_unit import PerUnit
from ssah_utils.prompts import tokens
from ssah_utils.unit_files import ScoreInfo

Batches = Iterable[dict[str, Tensor]]
Z_SCORES = {  # the scores of a partition, by their names in a unit file
    f"z_{name}": ScoreInfo(
        "variance of the channel times squared norm of its column, standardised within its module,"
        f" on {requests}",
        "standard deviations",
    )
    for name, requests in (
        ("safety", "harmful requests that the model refuses"),
        ("utility", "harmless requests that it answers"),
    )
}


def standardised(moments: ChannelMoments, squared_norms: PerUnit) -> PerUnit:
    """Variance times squared column norm, standardised within every module (SSAH section 4.1)."""
    return scores.zscore_per_module(scores.variance_norm(moments.variance, squared_norms))


def moments_per_request(
    model: nn.Module,
    examples: Sequence[dict[str, list[int]]],
    positions: str = "response",
    progress: Progress = _silent,
) -> list[ChannelMoments]:
    """Moments of every unit over each request alone, in order.

    Moments merge exactly, so ``activations.pooled`` gives those of any set of the requests, without
    another pass. ``examples``: as ``tokens.encode`` makes them.
    """
    return [
        activations.channel_moments(model, tokens.token_batches([example], positions))
        for example in progress(list(examples), "scoring")
    ]


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
