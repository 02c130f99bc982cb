"""What each unit does to the next token, by derivatives: of gates on its activation, and of what a
unit owns.

A gate multiplies a unit's activation at every position of one request; at 1 the model is intact,
at 0 the unit is off. To first order, switching it off takes the derivative by its gate away. Does
not know prompts or scores.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ssah_utils import guards, models, placement, weights, wrappers
from ssah_utils.activations import Batch, inputs_of, next_token_nll
from ssah_utils.models import Writer
from ssah_utils.per_unit import PerUnit
from ssah_utils.prompts.tokens import IGNORED
from ssah_utils.settings import without_dropout
from ssah_utils.unit_training import is_partial

# From log-probabilities of the next token, (n_requests, vocabulary): outcomes to be derived, one a
# column, and the weight of each outcome's square.
Outcomes = Callable[[Tensor], Tensor]


def next_token_effect(
    model: nn.Module, batches: Iterable[Batch], likelier: Sequence[int], other: Sequence[int]
) -> PerUnit:
    """Log-odds of some next tokens against others that each unit makes, to first order.

    Mean over requests, in nats and float64: what log P(``likelier``) - log P(``other``) loses where
    the unit is switched off. These are token ids; with the first tokens of refusals and of
    compliance it is the refusal score by which Arditi et al. (arXiv 2406.11717) choose a direction,
    here derived by units. ``batches``: with one position marked in every row, after which the token
    comes; ``ValueError`` otherwise.
    """
    rows = [torch.tensor(ids) for ids in (likelier, other)]

    def log_odds(log_p: Tensor) -> Tensor:
        first, second = (log_p[:, ids.to(log_p.device)].logsumexp(1) for ids in rows)
        return (first - second)[:, None]

    def summed(outcomes: Tensor, column: int, gradient: Tensor) -> Tensor:
        return gradient.sum(0)

    return _mean_over_requests(model, batches, log_odds, summed)


def next_token_kl(model: nn.Module, batches: Iterable[Batch], n_likeliest: int = 3) -> PerUnit:
    """KL divergence of the next token that switching each unit off makes, to second order.

    Mean over requests of KL(intact || without the unit), in nats and float64. It is half of the
    Fisher information of the gate, the mean over outcomes of their squared derivative (no more than
    gradients is needed, as the mean of the derivative is zero). The first-token KL on harmless
    requests is what tools that take refusals out of a model keep low (Heretic; arXiv 2601.08489);
    they measure it after a change, here every unit has its own. Outcomes are the ``n_likeliest``
    tokens and, as one, all others: coarser outcomes never make the divergence larger. ``batches``:
    as those of ``next_token_effect``.
    """

    def outcomes(log_p: Tensor) -> Tensor:
        n_kept = min(n_likeliest, log_p.shape[1] - 1)
        kept = log_p.detach().topk(n_kept).indices
        rest = log_p.scatter(1, kept, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([log_p.gather(1, kept), rest], 1)

    def fisher(log_p: Tensor, column: int, gradient: Tensor) -> Tensor:
        share = log_p[:, column].detach().exp().to(gradient)
        return (share[:, None] * gradient.square()).sum(0) / 2

    return _mean_over_requests(model, batches, outcomes, fisher)


def _mean_over_requests(
    model: nn.Module,
    batches: Iterable[Batch],
    outcomes: Outcomes,
    reduce: Callable[[Tensor, int, Tensor], Tensor],
) -> PerUnit:
    """Mean over requests of ``reduce(outcomes, column, derivatives)``, summed over columns.

    ``outcomes``: (n_requests, n_outcomes) from the next token's log-probabilities; ``reduce`` gets
    the derivatives of one column by the gates of one module, (n_requests, n_channels) float64, and
    gives their sum over requests, (n_channels,).
    """
    plain = weights.gathered(model)
    writers = models.writers(plain)
    totals = [torch.zeros((), dtype=torch.float64)] * len(writers)
    count = 0
    with wrappers.evaluating(plain), wrappers.without_parameter_gradients(plain):
        for batch in batches:
            if not bool((batch["positions"].sum(1) == 1).all()):
                raise ValueError("every request needs one marked position, after which a token is")
            count += len(batch["positions"])
            log_p, gates = _gated_log_probabilities(plain, writers, batch)
            columns = outcomes(log_p)
            for column in range(columns.shape[1]):
                is_last = column + 1 == columns.shape[1]
                scalar = columns[:, column].sum()
                found = torch.autograd.grad(scalar, gates, retain_graph=not is_last)
                for number, gradient in enumerate(found):
                    own = reduce(columns, column, gradient.squeeze(1).double())
                    totals[number] = totals[number].to(own.device) + own
    if not count:
        raise ValueError("there is no request to take a gradient of")
    total = models.per_unit_of(zip(writers, totals, strict=True))
    return total.require_finite("gradients") / count


def _gated_log_probabilities(
    plain: nn.Module, writers: list[Writer], batch: Batch
) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of the next token at the marked positions, (n_requests, vocabulary), and
    the gates they hang on, (n_requests, 1, n_channels) of every writer.
    """
    backbone, device = models.backbone_of(plain), placement.input_device(plain)
    n_requests = len(batch["input_ids"])
    gates: dict[int, Tensor] = {}

    def gate(number: int):
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor, ...]:
            values = args[0]
            of_request = values.reshape(n_requests, -1, values.shape[-1])  # OPT's has no (B, T)
            shape = (n_requests, 1, values.shape[-1])
            gates[number] = torch.ones(shape, device=values.device, requires_grad=True)
            through = of_request * gates[number].to(values.dtype)
            return (through.reshape(values.shape), *args[1:])

        return hook

    with models.hooking() as handles, torch.enable_grad():
        for number, writer in enumerate(writers):
            handles.append(writer.module.register_forward_pre_hook(gate(number)))
        hidden = backbone(**inputs_of(backbone, batch, device)).last_hidden_state
        states = hidden[batch["positions"].to(hidden.device)]
        log_p = models.logits_of(plain, states).float().log_softmax(-1)
    return log_p, [gates[number] for number in range(len(writers))]


# ------------------------------------------------------------------------------ by what it owns


def unit_gradients(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> PerUnit:
    """Norm of the gradient of the mean loss over all entries a unit owns, in float64.

    It is what the first step of a fine-tuning would do to each unit. ``batches``: ``input_ids``,
    ``attention_mask``, ``labels``, padded on either side. Raises ``ValueError`` where no response
    token is, or while only some units are trained.
    """
    model = wrappers.unwrapped(model)
    guards.refuse_quantised(model)
    placement.refuse_dispatched(model, "gradients of weights are looked at")
    if is_partial(model):
        raise ValueError(
            "some units of this model are being trained:"
            " measure gradients before entering that block"
        )
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with without_dropout(model):
            return _norms_of_units(model.requires_grad_(True), batches)
    finally:
        model.zero_grad()
        for parameter, flag in required:
            parameter.requires_grad_(flag)


def _norms_of_units(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> PerUnit:
    model.zero_grad()
    n_labels = 0
    for batch in batches:
        labels = batch["labels"][:, 1:]
        marked = labels != IGNORED
        n_labels += int(marked.sum())
        if marked.any():
            next_token_nll(model, batch, marked, labels).backward()
    if n_labels == 0:
        raise ValueError("no gradient to measure: there is no response token in the batches")
    squared = weights.squared_gradients(model).require_finite("gradients")
    return squared.map(torch.sqrt) / n_labels
