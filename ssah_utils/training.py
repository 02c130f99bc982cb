"""Fine-tune all parameters or some units: supervised (``Trainer``) or by preference (TRL).

Knows models, token sequences and sets of units. Does not know data sets, scores or notebooks.
"""

import contextlib
import copy
import ctypes
import dataclasses
import gc
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from ssah_utils import (
    extras,
    guards,
    loading,
    models,
    partial_parameters,
    placement,
    precision,
    ranks,
    wrappers,
)
from ssah_utils.cache import cache_key
from ssah_utils.files import cache_dir, complete_only, require_space, write_json
from ssah_utils.locks import LOCK_TIMEOUT, Lock, locked
from ssah_utils.per_unit import PerUnit
from ssah_utils.prompts.tokens import IGNORED
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
from ssah_utils.unit_training import training_all, training_only


class ResponseTrainer(Trainer):
    """``Trainer`` whose language-model head runs only where a label is; the same cross-entropy.

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
        # A prefix enters through the forward of PEFT's wrapper only, and DDP's forward sums the
        # gradients over the processes.
        if hasattr(plain, "peft_config") or isinstance(model, DistributedDataParallel):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        else:
            loss = self._response_loss(plain, inputs, num_items_in_batch)
        self._require_finite(loss, "loss")
        return loss

    def _response_loss(
        self, plain: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None
    ) -> Tensor:
        logits, labels = self.response_logits(plain, inputs)
        total = cross_entropy(logits, labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def response_logits(self, plain: nn.Module, inputs: dict) -> tuple[Tensor, Tensor]:
        """Where a label is: logits, (n_labels, vocabulary) float32, and labels, (n_labels,)."""
        labels = inputs["labels"][:, 1:]
        carries_loss = labels != IGNORED
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():  # the Trainer puts it around model.forward only
            hidden = models.backbone_of(plain)(**read, use_cache=False).last_hidden_state
            logits = models.logits_of(plain, hidden[:, :-1][carries_loss])
        return logits.float(), labels[carries_loss]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        self._require_finite(norm, "gradient")
        return norm

    def _require_finite(self, value: Tensor | float, what: str) -> None:
        if not torch.isfinite(torch.as_tensor(value)):
            done = self.state.global_step
            raise FloatingPointError(
                f"{what} is not finite at step {done + 1}: lower the learning rate"
                f" (the model is as after step {done})"
            )


def evaluation_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy to measure on while the original goes on training: in evaluation mode and ``dtype``.

    Off the CPU, the model itself where it has that precision already: a large one need not fit
    twice.
    """
    model = _inner(model)
    if model.dtype == dtype and model.device.type != "cpu":
        return model.eval()
    # deepcopy's memo maps each parameter to its converted copy, so that no second copy is made in
    # the old precision
    memo = {
        id(one): nn.Parameter(one.detach().to(dtype, copy=True), one.requires_grad)
        for one in model.parameters()
    }
    twin = precision.to_dtype(copy.deepcopy(model, memo), dtype).eval()
    partial_parameters.merge_copy(twin, dtype)
    twin.__dict__.pop("forward", None)  # a running Trainer has put autocast around it
    if twin._supports_sdpa:  # for training it was eager
        twin.set_attn_implementation("sdpa")
    return twin


def _inner(model: nn.Module) -> nn.Module:
    """The model without wrappers of torch; PEFT's adapter stays on, as it is what is trained."""
    model = wrappers.without_wrappers(model)
    return model if hasattr(model, "peft_config") else wrappers.unwrapped(model)


def _refuse_codes(model: nn.Module) -> None:
    """``ValueError`` for a quantised model, unless what is trained is an adapter of PEFT.

    Also for one that a device map keeps in several places.
    """
    placement.refuse_dispatched(model, placement.TRAINING)
    if not hasattr(model, "peft_config"):
        guards.refuse_quantised(model)


class ReportSteps(TrainerCallback):
    """Call ``report(steps done, steps in all)`` after every step."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.report = report

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.report(state.global_step, state.max_steps)


class AtSteps(TrainerCallback):
    """Call ``measure(step)`` after given numbers of steps, the model in evaluation mode.

    Step 0 is before the first.
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
            wrapped = model.__dict__.pop("forward", None)  # the Trainer's autocast is around it
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
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def return_freed_memory() -> None:
    """Give back to the system what ``keep_freed_memory`` has kept; after a training, not a step.

    Otherwise what comes next, and every other program, has as little room as the training had: 9
    GiB less after one of half a billion parameters.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def _fast_cpu_training(model: nn.Module) -> Iterator[None]:
    """How models are trained here; afterwards the model is as it was.

    Undone is also what trainers put around its forward, and what TRL writes into its configurations
    (the tokenizer's special tokens).
    """
    attention, forward = model.config._attn_implementation, model.__dict__.get("forward")
    configs = [model.config, getattr(model, "generation_config", None)]
    saved = [(config, dict(vars(config))) for config in configs if config is not None]
    if model.device.type == "cpu":
        keep_freed_memory()
        # at these lengths, the backward pass of the fused kernel is slower
        model.set_attn_implementation("eager")
    try:
        with own_settings(), without_dropout(model):
            yield
    finally:
        model.set_attn_implementation(attention)
        for config, values in saved:
            vars(config).clear()
            vars(config).update(values)
        model.__dict__.pop("forward", None)
        if forward is not None:
            model.forward = forward
        # Trainers refer to themselves. Without this, several trainings in a row would keep every
        # model and its optimizer. So no variable may hold the trainer here.
        gc.collect()
        return_freed_memory()


@contextlib.contextmanager
def _head_at_answers() -> Iterator[None]:
    """Inside the block TRL's trainers run the language-model head at the answers only.

    They do so on devices of Triton. Elsewhere they score every position, padding too, which here is
    a quarter of a step, and then forget all but the answers'. The log-probabilities are the same.
    """
    from trl.trainer import utils

    usual = utils._use_triton  # read nowhere else in that module; TRL's kernels ask their own
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = usual


def train_sft(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, list[int]]],
    config: SFTConfig,
    callbacks: tuple[TrainerCallback, ...] = (),
    made: Callable[..., ResponseTrainer] = ResponseTrainer,
) -> list[float]:
    """Supervised fine-tuning of what is trainable, in place; returns the loss of every step.

    A float32 model is trained under bfloat16 autocast where that is native, every model without
    dropout. A wrapper of ``torch.compile`` or of data parallelism is taken off. ``made`` makes the
    trainer, where another kind is wanted (``defences``). Raises
    ``ValueError`` for examples without a response token or beyond the model's positions, and for a
    quantised model without an adapter; ``FloatingPointError`` for a loss or gradient that is not
    finite.

        examples = tokens.encode(tokenizer, rendered, responses, max_response_tokens=64)
        losses = train_sft(model, tokenizer, examples, SFTConfig(epochs=2))
    """
    model = _inner(model)
    _refuse_codes(model)
    check_examples(model, tokenizer, examples)
    _require_agreement(examples, config)
    with tempfile.TemporaryDirectory() as folder, _fast_cpu_training(model):
        return _losses(
            made(
                model=model,
                args=training_arguments(folder, config, model),
                train_dataset=with_prompt_length(examples),
                data_collator=batch_of_examples,
                callbacks=list(callbacks),
            )
        )


def _require_agreement(data: list[dict], config: SFTConfig) -> None:
    """``ValueError`` where the processes of one training were given different things to learn."""
    ranks.require_agreement({"the data": data, "the settings": dataclasses.asdict(config)})


def train_dpo(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[dict[str, str | int]],
    config: SFTConfig,
    beta: float = 0.1,
    sft_weight: float = 0.0,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> list[float]:
    """Direct preference optimisation with TRL, in place; returns the loss of every step.

    After Rafailov et al. (2023). ``pairs`` have a rendered ``prompt``, a ``chosen`` and a
    ``rejected`` answer. The reference is the model as it comes in, read once before the first step.
    ``sft_weight`` times the chosen answers' cross-entropy per token is added (Pang et al. 2024):
    else answers that the reference never gives need not be learned, only the rejected unlearned.
    Token ids are those of ``tokens.encode``, cut where a pair says so (``chosen_tokens``,
    ``rejected_tokens``); nothing is dropped out. Raises ``ValueError`` for pairs that cannot be
    trained on (``sequences``) and for a model with an adapter.
    """
    with extras.needed("train"):
        from trl import DPOTrainer  # slow to import

    class OfTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            # TRL's would tokenize anew, with a second beginning-of-sequence token, and drop long
            # pairs
            return dataset

    model = wrappers.unwrapped(model)
    _refuse_codes(model)
    data = tokens_of_pairs(model, tokenizer, pairs)
    _require_agreement(pairs, config)
    with (
        tempfile.TemporaryDirectory() as folder,
        _fast_cpu_training(model),
        _head_at_answers(),
        contextlib.redirect_stderr(io.StringIO()),  # five progress bars of TRL's own
    ):
        return _losses(
            OfTokens(
                model=model,
                args=preference_arguments(folder, config, model, beta, sft_weight),
                train_dataset=data,
                data_collator=batch_of_pairs,
                processing_class=copy.deepcopy(tokenizer),  # TRL gives it a padding token
                callbacks=[StopOnNaN(), *callbacks],
            )
        )


def _losses(trainer: Trainer) -> list[float]:
    """Train; the loss of every step. The trainer is the caller's no more: here it is freed."""
    trainer.remove_callback(PrinterCallback)  # prints every log as a bare dict
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class StopOnNaN(TrainerCallback):
    """For trainers that are not ours: stop at the first loss that is not finite."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        loss = float((logs or {}).get("loss", 0.0))
        if not math.isfinite(loss):
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
    **of_method: float,
) -> tuple[nn.Module, Path, list[float]]:
    """Fine-tune a copy of model ``base``; load it where the same was trained before.

    Returns the model, its folder in the cache (a normal Hugging Face checkpoint) and the loss of
    every step. The same is the same base, data and settings. ``data``: token examples for
    ``method`` "sft", preference pairs for "dpo". ``only``: the units to train, everything else
    frozen; None trains everything. ``dtype`` may be bfloat16, because what units own is kept in
    float32 during the training. ``of_method``: ``beta`` and ``sft_weight`` of "dpo". ``report``: of
    steps, in all.
    """
    model, _ = loading.load(base, dtype, device)
    _refuse_codes(model)
    arguments = {
        "method": method,
        "model": model,
        "tokenizer": tokenizer,
        "data": data,
        "config": config,
        "only": only,
        "of_method": of_method,
    }
    folder = cache_dir() / "trained" / cache_key(_trained, **arguments, report=report)
    lock = Lock(cache_dir() / "locks" / folder.name)  # another process may be training the same
    with locked(lock, wait=LOCK_TIMEOUT):
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
        losses = json.loads((folder / "loss.json").read_text())
        return loading.load(str(folder), dtype, device)[0], folder, losses
    require_space(folder.parent, 6 * sum(p.numel() for p in model.parameters()))
    losses = _trained(**arguments, report=report)
    model.eval()
    with complete_only(folder) as unfinished:
        model.save_pretrained(unfinished)
        arguments["tokenizer"].save_pretrained(unfinished)
        write_json(unfinished / "loss.json", losses)
    return model, folder, losses


def _trained(
    method: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: list[dict],
    config: SFTConfig,
    only: PerUnit | None,
    of_method: dict[str, float],
    report: Callable[[int, int], None],
) -> list[float]:
    train = {"sft": train_sft, "dpo": train_dpo}[method]
    with training_all(model) if only is None else training_only(model, only):
        return train(model, tokenizer, data, config, callbacks=(ReportSteps(report),), **of_method)
