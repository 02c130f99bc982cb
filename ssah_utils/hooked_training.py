"""The ordinary supervised trainer with hooks, through which a defence changes a training.

Everything that no hook touches is as without them. Knows examples, gradients and weights. Does not
know what any hook is for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from ssah_utils import training
from ssah_utils.sequences import Example

State = dict[str, Tensor]  # whole parameters by their ordinary names


@dataclass
class Hooks:
    """What a defence does in one training; None does nothing.

    * ``batch``: other examples in place of those of a batch, as many.
    * ``token_weights``: of every label's cross-entropy, (n_labels,), from the trainer, the inputs
      of the batch, and the cross-entropy as it is, (n_labels,).
    * ``gradient``: changes the gradients after the backward pass, before they are clipped.
    * ``step``: after the optimizer's step.
    * ``weights``: what is measured in place of some parameters, from the state of the model.
    """

    batch: Callable[[list[Example]], list[Example]] | None = None
    token_weights: Callable[["HookedTrainer", dict[str, Tensor], Tensor], Tensor] | None = None
    gradient: Callable[["HookedTrainer"], None] | None = None
    step: Callable[[], None] | None = None
    weights: Callable[[State], State] | None = None


class HookedTrainer(training.ResponseTrainer):
    """The ordinary trainer, asking the hooks of defences. ``ValueError`` where token weights are
    asked for and the model computes its own loss (with an adapter).
    """

    def __init__(self, hooks: Sequence[Hooks], **arguments) -> None:
        self.hooks = hooks
        if any(one.token_weights for one in hooks) and hasattr(arguments["model"], "peft_config"):
            raise ValueError("a defence in the loss of tokens does not go with an adapter")
        collate = arguments.pop("data_collator")

        def batch(examples: list[Example]) -> dict[str, Tensor]:
            for one in self._asked("batch"):
                examples = one(examples)
            return collate(examples)

        after = [AfterStep(one) for one in self._asked("step")]  # before anybody looks
        callbacks = [*after, *arguments.pop("callbacks", ())]
        super().__init__(data_collator=batch, callbacks=callbacks, **arguments)

    def _asked(self, name: str) -> list[Callable]:
        return [getattr(one, name) for one in self.hooks if getattr(one, name) is not None]

    def _response_loss(self, plain, inputs, num_items_in_batch) -> Tensor:
        asked = self._asked("token_weights")
        if not asked:
            return super()._response_loss(plain, inputs, num_items_in_batch)
        logits, labels = self.response_logits(plain, inputs)
        losses = cross_entropy(logits, labels, reduction="none")
        weights = torch.ones_like(losses)
        for weigh in asked:
            weights = weights * weigh(self, inputs, losses.detach())
        total = (weights * losses).sum()
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        for change in self._asked("gradient"):
            change(self)
        return loss

    def add_gradient(self, batch: dict[str, Tensor]) -> None:
        """Add the gradient of the mean loss over another batch."""
        loss = self.compute_loss(self.model_wrapped, self._prepare_inputs(batch))
        self.accelerator.backward(loss)


class AfterStep(TrainerCallback):
    """Call something after every step."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.call()


@contextmanager
def with_kept_weights(fast: nn.Module, model: nn.Module, hooks: Sequence[Hooks]) -> Iterator[None]:
    """Inside the block, ``fast``, a copy of ``model`` to measure on, has the weights that the hooks
    make of those of ``model``, in the precision of training.
    """
    asked = [one.weights for one in hooks if one.weights is not None]
    if not asked:
        yield
        return
    state, changed = dict(model.state_dict()), {}
    for change in asked:
        changed |= change(state | changed)
    there = fast.state_dict()
    before = {name: there[name].clone() for name in changed}
    fast.load_state_dict(changed, strict=False)
    try:
        yield
    finally:  # off the CPU, it may be the model itself
        fast.load_state_dict(before, strict=False)
