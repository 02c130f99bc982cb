"""A binary mask over units, learned by gradients: which units to switch off, so many of them.

Knows models and token ids. Where requests and openings come from is not known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssah_utils import interventions, models, weights, wrappers
from ssah_utils.activations import Batch, next_token_nll
from ssah_utils.evaluation import Progress, _silent
from ssah_utils.per_unit import KINDS, PerUnit

PRICE = 10.0  # nats of margin that one nat per token of harmless answers is worth


@dataclass(frozen=True)
class MaskStep:
    """What one step looks at: token batches whose marked positions predict what is asked about.

    * ``refusing``, ``complying``: the same harmful requests, with an opening of either side.
    * ``helpful``: harmless requests with the model's own answers.
    """

    refusing: Batch
    complying: Batch
    helpful: Batch


def straight_through(logits: Tensor, n_off: int) -> Tensor:
    """Gates of a mask: 0 for the ``n_off`` units with the highest logits, 1 for the others.

    Forward the mask is binary; backward a gate moves with its logit, one for one, as if it had not
    been rounded (straight-through estimator, Bengio et al., arXiv 1308.3432). (n,) -> (n,).
    """
    gates = torch.ones_like(logits)
    gates[logits.topk(n_off).indices] = 0
    return gates - (logits - logits.detach())  # what is taken off is exactly 0


def learn_mask(
    model: nn.Module,
    steps: Sequence[MaskStep],
    n_off: int,
    price: float = PRICE,
    progress: Progress = _silent,
) -> PerUnit:
    """Logits of a mask that takes the refusal margin and leaves harmless answers likely; float32.

    Gradient descent on margin + ``price`` * NLL of harmless answers, where the margin is log
    P(refusing) - log P(complying) in nats, and the NLL in nats per token. Every step switches off
    the units with the highest logits so far, none in the first and ``n_off`` in the last, and adds
    the loss's derivative by each gate to its logit. So what a unit does is asked while others are
    off already. Logits begin at 0, so no rate of learning matters: only their order counts.

    After SafeSeek (Yu et al., arXiv 2603.23268), which learns binary masks with a straight-through
    estimator, too. There, a penalty on every masked unit sets the size; here the size is given, and
    the price of a unit is what ``n_off`` of them are worth paying. There, every output channel of
    every matrix may be masked, and cross-entropy of both answers is the loss. ``ValueError`` for no
    step, and for a gradient that is not finite.
    """
    if not steps:
        raise ValueError("a mask needs at least one step to be learned")
    plain = weights.gathered(model)
    shape = models.shape_of(plain)
    like = PerUnit({kind: torch.zeros(shape.n_layers, shape.n_channels(kind)) for kind in KINDS})
    logits = like.flatten().requires_grad_()
    last = max(1, len(steps) - 1)
    with wrappers.evaluating(plain), wrappers.without_parameter_gradients(plain):
        for number, step in enumerate(progress(list(steps), "learning a mask")):
            gates = straight_through(logits, round(n_off * number / last))
            with torch.enable_grad(), interventions.gated(plain, like.unflatten(gates)):
                loss = masked_loss(plain, step, price)
                (gradient,) = torch.autograd.grad(loss, logits)
            like.unflatten(gradient).require_finite("gradients")
            logits.data -= gradient.to(logits.device)
    return like.unflatten(logits.detach())


def masked_loss(plain: nn.Module, step: MaskStep, price: float) -> Tensor:
    """What ``learn_mask`` descends: refusal margin of a step in nats, plus the priced NLL."""
    refusing, complying = (
        _log_probabilities(plain, batch)[0] for batch in (step.refusing, step.complying)
    )
    margin = (refusing - complying) / len(step.refusing["input_ids"])
    if not price:
        return margin
    log_p, n_tokens = _log_probabilities(plain, step.helpful)
    return margin - price * log_p.to(margin.device) / n_tokens


def _log_probabilities(plain: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum of the log-probabilities of the tokens that a batch's marked positions predict."""
    marked = batch["positions"][:, :-1]
    following = batch["input_ids"][:, 1:]
    return -next_token_nll(plain, batch, marked, following), int(marked.sum())
