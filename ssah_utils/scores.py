"""Tensor kernels: a score per unit, the distance between states, and directions.

They see tensors and values per unit, no model and no file. Another score is one more function here.
"""

import torch
from torch import Tensor

from ssah_utils.per_unit import PerUnit


def variance_norm(variance: PerUnit, squared_norm: PerUnit) -> PerUnit:
    """I_j = Var(X_j) * ||W_:j||^2: what the output is expected to change when channel j is held.

    The expected squared change when it is held at its mean (SSAH, section 4.1; FLAP's WIFV, An et
    al., AAAI 2024). ``variance`` is unbiased.
    """
    return variance * squared_norm


def weighted_norm(mean_square: PerUnit, mean_absolute: PerUnit) -> PerUnit:
    """mean_i |W_ij| * sqrt(mean_n X_nj^2): the size of what channel j writes, constant or not.

    FLAP's WIFN as its code has it (An et al., AAAI 2024): Wanda's |W_ij| * ||X_j||_2 (Sun et al.,
    ICLR 2024) averaged over a column. The constant factor sqrt(N) is left out.
    """
    return mean_square.map(torch.sqrt) * mean_absolute


def zscore_per_module(score: PerUnit) -> PerUnit:
    """Standardise scores within each module, to rank units of modules of different scale together.

    A module whose scores are equal up to rounding gets zeros: nothing in it stands out. Ranks are
    no substitute: they flatten the few outstanding channels of a module, which are the ones that
    matter. ``ValueError`` where a score is nan or infinite: it would take all others of its module
    with it.
    """

    def standardised(values: Tensor) -> Tensor:
        spread = values.std(1, keepdim=True)
        differs = spread > 4 * torch.finfo(values.dtype).eps * values.abs().amax(1, keepdim=True)
        z = (values - values.mean(1, keepdim=True)) / spread
        return torch.where(differs, z, torch.zeros_like(z))

    return score.require_finite("scores").map(standardised)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos(a, b) over the last dimension, in float64: 0 for one direction, 2 for opposite ones.

    >>> cosine_distance(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])).tolist()
    [0.0, 1.0]
    """
    return 1 - torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


def mean_difference_direction(positive: Tensor, negative: Tensor) -> Tensor:
    """Direction from one class mean to the other, scaled to the spread within the classes.

    ``positive``: (n, ..., d_model), ``negative``: (m, ..., d_model); returns (..., d_model)
    float64. Along it a class has standard deviation 1 (pooled), so the distance of the two means is
    the separation d'. Where nothing deviates, the separation is unknown and the direction is 0.
    Difference in means: Marks & Tegmark 2024; Arditi et al. 2024.
    """
    positive, negative = positive.double(), negative.double()
    difference = positive.mean(0) - negative.mean(0)
    along = [projection(group - group.mean(0), difference) for group in (positive, negative)]
    n_free = max(1, len(positive) + len(negative) - 2)
    deviation = (torch.stack([values.square().sum(0) for values in along]).sum(0) / n_free).sqrt()
    return torch.where(deviation[..., None] > 0, difference / deviation[..., None], 0.0)


def widest_separation(positive: Tensor, negative: Tensor, depth: float = 0.8) -> tuple[int, Tensor]:
    """The block whose states tell two classes apart best, and the direction there, of length 1.

    ``positive``: (n, n_layers, d_model), ``negative``: (m, n_layers, d_model); returns the block
    and the difference of the means, (d_model,) float64. Only blocks up to ``depth`` of the model
    count, as behind it states are next to words already (Arditi et al. 2024 look at the first 80%,
    too). Best is the largest separation d' along the difference; where no block has one, the
    largest difference.
    """
    n_blocks = max(1, int(depth * positive.shape[1]))
    positive, negative = positive[:, :n_blocks].double(), negative[:, :n_blocks].double()
    difference = positive.mean(0) - negative.mean(0)  # (n_blocks, d_model)
    separation = (difference * mean_difference_direction(positive, negative)).sum(-1)
    if not separation.any():
        separation = difference.norm(dim=-1)
    block = int(separation.argmax())
    length = difference[block].norm()
    return block, difference[block] / length if length > 0 else difference[block]


def projection(states: Tensor, direction: Tensor) -> Tensor:
    """Scalar product with a direction: (n, ..., d_model), (..., d_model) -> (n, ...) float64."""
    return (states.double() * direction.double()).sum(-1)
