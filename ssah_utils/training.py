"""Fine-tuning of all parameters or of some units: supervised (Hugging Face ``Trainer``) or by
preference (TRL).

Knows models, token sequences and sets of units. Does not know data sets, scores or notebooks.
"""

import contextlib
import copy
import ctypes
import gc
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from ssah_utils import extras, loading, models, precision, weights, wrappers
from ssah_utils.cache import cache_key
from ssah_utils.files import cache_dir, complete_only, require_space, write_json
from ssah_utils.locks import Lock, locked
from ssah_utils.per_unit import PerUnit
from ssah_utils.sequences import (
    batch_of_examples,
    batch_of_pairs,
    check_examples,
    tokens_of_pairs,
    with_prompt_length,
)
from ssah_utils.settings import (
    SFTConfig,
    own_settings,
    preference_arguments,
    training_arguments,
    without_dropout,
)
from ssah_utils.unit_training import is_partial, training_only

LOCK_TIMEOUT = 24 * 3600  # seconds to wait for another process that trains the same model


class ResponseTrainer(Trainer):
    """``Trainer`` whose language-model head runs only where a label is; the loss is the same
    cross-entropy.

    TRL's SFTTrainer has this on Triton devices; on a CPU it scores every position and leaves
    ``forward`` patched. A loss or gradient that is not finite stops the training before it reaches
    the parameters.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        plain = self.accelerator.unwrap_model(model)
        # a prefix enters through the forward of PEFT's wrapper alone; that of DDP is what sums
        # gradients over the processes
        if hasattr(plain, "peft_config") or isinstance(model, DistributedDataParallel):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        else:
            loss = self._response_loss(plain, inputs, num_items_in_batch)
        self._require_finite(loss, "loss")
        return loss

    def _response_loss(
        self, plain: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None
    ) -> Tensor:
        labels = inputs["labels"][:, 1:]
        carries_loss = labels != -100
        with (
            self.accelerator.autocast()
        ):  # the Trainer wraps model.forward only, which is bypassed here
            hidden = models.backbone_of(plain)(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            ).last_hidden_state[:, :-1]  # (B, T-1, d_model)
            logits = models.logits_of(plain, hidden[carries_loss])  # (n_labels, vocabulary)
        total = cross_entropy(logits.float(), labels[carries_loss], reduction="sum")
        return total / (carries_loss.sum() if num_items_in_batch is None else num_items_in_batch)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        self._require_finite(norm, "gradient")
        return norm

    def _require_finite(self, value: Tensor | float, what: str) -> None:
        if not torch.isfinite(torch.as_tensor(value)):
            done = self.state.global_step
            raise FloatingPointError(
                f"{what} is not finite at step {done + 1}: lower the learning rate (the model is as"
                f" after step {done})"
            )


def evaluation_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy to measure on while the original goes on training: in evaluation mode, in another
    precision.

    Where the precision is the same already, the model itself, so that a large one need not fit
    twice.
    """
    model = _inner(model)
    if model.dtype == dtype and model.device.type != "cpu":
        return model.eval()
    # deepcopy takes what it finds under the identity of a tensor: no copy in the first precision is
    # made on the way
    converted = {
        id(p): nn.Parameter(p.detach().to(dtype, copy=True), p.requires_grad)
        for p in model.parameters()
    }
    twin = precision.to_dtype(copy.deepcopy(model, converted), dtype).eval()
    twin.__dict__.pop("forward", None)  # a running Trainer has put autocast around it
    if twin._supports_sdpa:  # for training it was eager
        twin.set_attn_implementation("sdpa")
    return twin


def _inner(model: nn.Module) -> nn.Module:
    """The model without ``torch.compile`` or data-parallel wrappers; an adapter of PEFT stays on,
    as it is what is trained.
    """
    model = wrappers.without_wrappers(model)
    return model if hasattr(model, "peft_config") else wrappers.unwrapped(model)


class ReportSteps(TrainerCallback):
    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.report = report

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.report(state.global_step, state.max_steps)


class AtSteps(TrainerCallback):
    """Call ``measure(step)`` after the given numbers of steps, the model in evaluation mode; 0 is
    before the first.
    """

    def __init__(self, steps: Iterable[int], measure: Callable[[int], None]) -> None:
        self.steps, self.measure = set(steps), measure

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs) -> None:
        self._measure_at(state.global_step, model)

    def on_step_end(self, args, state, control, model: nn.Module, **kwargs) -> None:
        self._measure_at(state.global_step, model)

    def _measure_at(self, step: int, model: nn.Module) -> None:
        if step in self.steps:
            model.eval()
            wrapped = model.__dict__.pop(
                "forward", None
            )  # a running Trainer has put its autocast around it
            with torch.random.fork_rng(devices=[]):
                self.measure(step)
            if wrapped is not None:
                model.forward = wrapped
            model.train()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step; elsewhere do nothing.

    By default it hands large blocks back to the system, which gives them out again page by page,
    zeroed: a quarter of the time of a training step on a CPU.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    except (OSError, AttributeError):
        pass


@contextlib.contextmanager
def _fast_cpu_training(model: nn.Module) -> Iterator[None]:
    """How models are trained here; afterwards the model is as it was, also what trainers put around
    its forward.

    TRL writes the tokenizer's special tokens into the configurations of the model, too.
    """
    attention, forward = model.config._attn_implementation, model.__dict__.get("forward")
    configs = [
        (one, dict(vars(one)))
        for one in (model.config, getattr(model, "generation_config", None))
        if one is not None
    ]
    if model.device.type == "cpu":
        keep_freed_memory()
        model.set_attn_implementation(
            "eager"
        )  # the backward pass of the fused kernel is slower at these lengths
    try:
        with own_settings(), without_dropout(model):
            yield
    finally:
        model.set_attn_implementation(attention)
        for one, values in configs:
            vars(one).clear()
            vars(one).update(values)
        model.__dict__.pop("forward", None)
        if forward is not None:
            model.forward = forward
        # trainers refer to themselves: several trainings in a row would keep every model and its
        # optimizer
        gc.collect()


def train_sft(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, list[int]]],
    config: SFTConfig,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> list[float]:
    """Train what is trainable, in place; returns the loss of every step.

    A float32 model is trained under bfloat16 autocast where that is native, every model without
    dropout. A wrapper of ``torch.compile`` or of data parallelism is taken off. Raises
    ``ValueError`` for examples without a response token or beyond the model's positions, and
    ``FloatingPointError`` for a loss or gradient that is not finite.
    """
    model = _inner(model)
    check_examples(model, tokenizer, examples)
    with tempfile.TemporaryDirectory() as folder, _fast_cpu_training(model):
        return _losses(
            ResponseTrainer(
                model=model,
                args=training_arguments(folder, config, model),
                train_dataset=with_prompt_length(examples),
                data_collator=batch_of_examples,
                callbacks=list(callbacks),
            )
        )


def train_dpo(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[dict[str, str]],
    config: SFTConfig,
    beta: float = 0.1,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> list[float]:
    """Direct preference optimisation (Rafailov et al. 2023) with TRL, in place; returns the loss of
    every step.

    ``pairs`` have a rendered ``prompt``, a ``chosen`` and a ``rejected`` answer. The reference is
    the model as it comes in, read once before the first step. Token ids are those of
    ``prompts.encode``, none cut; nothing is dropped out. Raises ``ValueError`` for pairs that
    cannot be trained on (``sequences``) and for a model with an adapter.
    """
    with extras.needed("train"):
        from trl import DPOTrainer  # slow to import

    class OfTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            # TRL's would tokenize anew, with a second beginning-of-sequence token, and drop long
            # pairs
            return dataset

    model = wrappers.unwrapped(model)
    data = tokens_of_pairs(model, tokenizer, pairs)
    # five progress bars of its own come on stderr; the steps are reported by a callback
    with (
        tempfile.TemporaryDirectory() as folder,
        _fast_cpu_training(model),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        return _losses(
            OfTokens(
                model=model,
                args=preference_arguments(folder, config, model, beta),
                train_dataset=data,
                data_collator=batch_of_pairs,
                processing_class=copy.deepcopy(tokenizer),  # TRL gives it a padding token
                callbacks=[StopOnNaN(), *callbacks],
            )
        )


def _losses(trainer: Trainer) -> list[float]:
    """Train; the loss of every step."""
    trainer.remove_callback(PrinterCallback)  # prints every log as a bare dict
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class StopOnNaN(TrainerCallback):
    """For trainers that are not ours: stop at the first loss that is not finite."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not torch.isfinite(torch.tensor(float((logs or {}).get("loss", 0.0)))):
            raise FloatingPointError(
                f"loss is not finite at step {state.global_step}: lower the learning rate"
            )


# -------------------------------------------------------------------------------------------- cache


def load_or_train(
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    data: list[dict],
    config: SFTConfig,
    device: str = "cpu",
    report: Callable[[int, int], None] = lambda done, total: None,
    only: PerUnit | None = None,
    method: str = "sft",
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, Path, list[float]]:
    """Fine-tune a copy of model ``base``, or load it when the same base, data and settings were
    trained before.

    ``data``: token examples for ``method`` "sft", preference pairs for "dpo". ``only``: the units
    to train, everything else frozen; then ``dtype`` may be bfloat16, because the trained entries
    are kept in float32 during the training. ``report`` is called with the steps done and their
    number. Returns the model, its folder in the cache (a normal Hugging Face checkpoint) and the
    loss curve.
    """
    model, _ = loading.load(base, dtype, device)
    arguments = {
        "method": method,
        "model": model,
        "tokenizer": tokenizer,
        "data": data,
        "config": config,
        "only": only,
    }
    folder = cache_dir() / "trained" / cache_key(_trained, **arguments, report=report)
    with locked(
        Lock(cache_dir() / "locks" / folder.name), wait=LOCK_TIMEOUT
    ):  # another process may be training the same
        return _load_else_train(folder, model, arguments, report, dtype, device)


def _load_else_train(
    folder: Path,
    model: nn.Module,
    arguments: dict,
    report: Callable[[int, int], None],
    dtype: torch.dtype,
    device: str,
) -> tuple[nn.Module, Path, list[float]]:
    if folder.exists():
        return (
            loading.load(str(folder), dtype, device)[0],
            folder,
            json.loads((folder / "loss.json").read_text()),
        )
    require_space(folder.parent, 6 * sum(p.numel() for p in model.parameters()))
    losses = _trained(**arguments, report=report)
    model.eval()
    with complete_only(folder) as partial:
        model.save_pretrained(partial)
        arguments["tokenizer"].save_pretrained(partial)
        write_json(partial / "loss.json", losses)
    return model, folder, losses


def _trained(
    method: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: list[dict],
    config: SFTConfig,
    only: PerUnit | None,
    report: Callable[[int, int], None],
) -> list[float]:
    train = {"sft": train_sft, "dpo": train_dpo}[method]
    with training_only(model, only) if only is not None else contextlib.nullcontext():
        return train(model, tokenizer, data, config, callbacks=(ReportSteps(report),))


# ---------------------------------------------------------------------------------------- gradients


def unit_gradients(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> PerUnit:
    """Norm of the gradient of the mean loss over all entries a unit owns, in float64.

    What the first step of a fine-tuning would do to each unit. ``batches``: ``input_ids``,
    ``attention_mask``, ``labels``, padded on either side. Raises ``ValueError`` where no response
    token is, or while only some units are trained.
    """
    model = wrappers.unwrapped(model)
    if is_partial(model):
        raise ValueError(
            "some units of this model are being trained: measure gradients before entering that"
            " block"
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
        ids, mask, labels = (
            batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")
        )
        labels = labels[:, 1:]
        marked = labels != -100
        places = (mask.cumsum(1) - 1).clamp(
            min=0
        )  # learned positions would count padding on the left
        states = models.backbone_of(model)(
            input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False
        )
        n_labels += int(marked.sum())
        if marked.any():
            logits = models.logits_of(model, states.last_hidden_state[:, :-1][marked])
            cross_entropy(logits.float(), labels[marked], reduction="sum").backward()
    if n_labels == 0:
        raise ValueError("no gradient to measure: there is no response token in the batches")
    return weights.squared_gradients(model).map(torch.sqrt) / n_labels
