"""A training step of some units beside what people use instead, on the same examples.

All but ``plain`` go through one trainer, with the head at the answers only, and take turns in one
process. Entries are as many for every method that trains a part.

* ``full``: all parameters, float32 weights under autocast.
* ``redundant``, ``frozen``: ours, a random 20% trained and a random 7.5% frozen.
* ``lora``: PEFT's, on all linear maps, of the rank with as many entries; frozen weights in
  bfloat16 where that is native, products under autocast.
* ``masked``: the matrices of the units are trained whole, and hooks zero the gradient of all other
  entries, which is what most scripts do.
* ``contiguous``: S2FT (Yang et al. 2024, arXiv 2412.06289) as its paper describes it, on our
  matrices: the trained channels are the first ones of each matrix, as they are once it was
  permuted, so that nothing is gathered and only their slice is written back.
* ``plain``: transformers' Trainer as it comes, all parameters, in a process of its own.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import Trainer, TrainerCallback, TrainingArguments

from ssah_utils import (
    embedded,
    extras,
    loading,
    models,
    per_unit,
    precision,
    sequences,
    training,
    unit_training,
)
from ssah_utils.architectures import ModelShape
from ssah_utils.per_unit import PerUnit
from ssah_utils.pipeline.runs import peak_memory_gib
from ssah_utils.prompts import chat, datasets, tokens

TRAINED, FROZEN = 0.2, 0.075  # shares of all units
CONDITIONS = ("full", "redundant", "frozen", "lora", "masked", "contiguous")


class Watch(TrainerCallback):
    """The moment after every step, and the size of the optimizer's state at the end."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.state_entries = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.moments.append(time.perf_counter())

    def on_train_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        moments = [
            value
            for entry in optimizer.state.values()
            for value in entry.values()
            if torch.is_tensor(value)
        ]
        self.state_entries = sum(value.numel() for value in moments)


def training_examples(tokenizer, n: int = 160) -> list[dict[str, list[int]]]:
    """Requests of everyday length with responses of 16 tokens, as in 01_alignment."""
    table = datasets.load_dataset("refusal-labels")
    requests = datasets.load_dataset("helpful")["prompt"].tolist()[:n]
    responses = (table["response"].tolist() * 3)[:n]
    return tokens.encode(tokenizer, chat.render(tokenizer, requests), responses, 16)


def random_share(shape: ModelShape, share: float) -> PerUnit:
    generator = torch.Generator().manual_seed(0)
    sizes = {kind: (shape.n_layers, shape.n_channels(kind)) for kind in per_unit.KINDS}
    return (
        PerUnit({kind: torch.rand(size, generator=generator) for kind, size in sizes.items()})
        < share
    )


def linear_maps(model: nn.Module) -> list[nn.Linear]:
    """Those of the backbone: what its matrix products are."""
    return [one for one in models.backbone_of(model).modules() if isinstance(one, nn.Linear)]


# ------------------------------------------------------------------------------------- the rivals


class LoRATrainer(training.ResponseTrainer):
    """Ours, for PEFT's LoRA: the head at the answers only, products under autocast."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        plain = self.accelerator.unwrap_model(model).get_base_model()
        dtype = precision.preferred_dtype("cpu")
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return self._response_loss(plain, inputs, num_items_in_batch)

    def response_logits(self, plain, inputs) -> tuple[Tensor, Tensor]:
        # as ours, but for a model with an adapter, which the package does not look into
        labels = inputs["labels"][:, 1:]
        carries_loss = labels != tokens.IGNORED
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        hidden = plain.base_model(**read, use_cache=False).last_hidden_state
        logits = plain.get_output_embeddings()(hidden[:, :-1][carries_loss])
        return logits.float(), labels[carries_loss]


def with_lora(model: nn.Module, n_entries: int) -> nn.Module:
    """On all linear maps, of the rank whose number of entries comes nearest to ``n_entries``."""
    with extras.needed("train"):
        import peft

    maps = linear_maps(model)
    rank = max(1, round(n_entries / sum(one.in_features + one.out_features for one in maps)))
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=peft.TaskType.CAUSAL_LM
    )
    return peft.get_peft_model(model, config)


def owned(model: nn.Module, chosen: PerUnit) -> dict[nn.Parameter, tuple[int, Tensor]]:
    """What the chosen units own: by parameter, its dimension and the places in it, (n,) bool.

    As in ``training_only``, a place that several channels share is theirs only if all are chosen.
    """
    shape, found = models.shape_of(model), {}
    for writer in models.writers(model):
        is_chosen = chosen[writer.kind][writer.layer]
        for module, name, (dimension,), places in models.owned_entries(writer, shape):
            parameter = getattr(module, name)
            n_owners, n_chosen = torch.zeros(2, parameter.shape[dimension], dtype=torch.long)
            n_owners.index_add_(0, places, torch.ones_like(places))
            n_chosen.index_add_(0, places, is_chosen.long())
            mine = (n_owners > 0) & (n_chosen == n_owners)
            _, others = found.get(parameter, (dimension, torch.zeros_like(mine)))
            found[parameter] = dimension, mine | others
    return found


@contextlib.contextmanager
def masked(model: nn.Module, chosen: PerUnit) -> Iterator[None]:
    """Inside the block gradients are zeroed wherever no chosen unit is."""
    handles = []
    model.requires_grad_(False)
    for parameter, (dimension, places) in owned(model, chosen).items():
        mask = torch.zeros_like(parameter).index_fill_(dimension, places.nonzero().squeeze(1), 1)
        parameter.requires_grad_(True)
        handles.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(True)


class _SliceProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, block: Tensor, weight: Tensor, dimension: int) -> Tensor:
        n = block.shape[dimension]
        weight.narrow(dimension, 0, n).copy_(block)
        ctx.save_for_backward(values[..., :n].contiguous() if dimension else values)
        ctx.weight, ctx.n, ctx.dimension, ctx.dtype = weight, n, dimension, block.dtype
        return values @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        of_values = gradient @ ctx.weight if ctx.needs_input_grad[0] else None
        left = gradient if ctx.dimension else gradient[..., : ctx.n]
        of_block = left.flatten(0, -2).T @ kept.flatten(0, -2)
        return of_values, of_block.to(ctx.dtype), None, None


class SliceLinear(nn.Module):
    """A linear map of which the first rows or columns are trained."""

    def __init__(self, linear: nn.Linear, dimension: int, n: int) -> None:
        super().__init__()
        self.whole, self.dimension, self.bias = linear.weight.detach(), dimension, linear.bias
        # its own memory: torch's fused AdamW steps through that of a view as if nothing lay between
        own = self.whole.narrow(dimension, 0, n).to(torch.float32, copy=True)
        self.block = nn.Parameter(own.contiguous())

    @torch.no_grad()
    def write(self) -> None:
        """Bring the whole up to date with the last step."""
        self.whole.narrow(self.dimension, 0, self.block.shape[self.dimension]).copy_(self.block)

    def forward(self, values: Tensor) -> Tensor:
        result = _SliceProduct.apply(values, self.block, self.whole, self.dimension)
        return result if self.bias is None else result + self.bias


@contextlib.contextmanager
def contiguous(model: nn.Module, chosen: PerUnit) -> Iterator[None]:
    """Inside the block as many rows or columns of each matrix are trained, the first ones."""
    places = owned(model, chosen)
    numbers = {one: (dimension, int(mine.sum())) for one, (dimension, mine) in places.items()}
    model.requires_grad_(False)
    replaced = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.weight in numbers:
                replaced.append((parent, name, child))
                setattr(parent, name, SliceLinear(child, *numbers[child.weight]))
    try:
        yield
    finally:
        for parent, name, child in replaced:
            getattr(parent, name).write()
            setattr(parent, name, child)
        model.requires_grad_(True)


# --------------------------------------------------------------------------------------- measuring


def n_entries(model: nn.Module, chosen: PerUnit) -> int:
    """How many entries are trained with these units."""
    with unit_training.training_only(model, chosen):
        return sum(one.numel() for one in model.parameters() if one.requires_grad)


def dtype_of(condition: str) -> torch.dtype:
    of_a_part = condition in ("redundant", "lora", "contiguous")
    return precision.preferred_dtype("cpu") if of_a_part else torch.float32


def subject_of(condition: str, name: str = embedded.DEFAULT) -> nn.Module:
    model = loading.load(name, dtype_of(condition))[0]
    if condition != "lora":
        return model
    return with_lora(model, n_entries(model, random_share(models.shape_of(model), TRAINED)))


def trained(
    condition: str,
    subject: nn.Module,
    tokenizer,
    examples: list[dict],
    n_steps: int,
    callbacks: tuple[TrainerCallback, ...] = (),
    learning_rate: float = 1e-6,
) -> Watch:
    """Train under one of ``CONDITIONS``; what was seen."""
    watch = Watch()
    if condition == "lora":
        scope, made = contextlib.nullcontext(), LoRATrainer
    else:
        shape, made = models.shape_of(subject), training.ResponseTrainer
        some = random_share(shape, FROZEN if condition == "frozen" else TRAINED)
        scope = {
            "full": contextlib.nullcontext,
            "redundant": lambda: unit_training.training_only(subject, some),
            "frozen": lambda: unit_training.freezing(subject, some),
            "masked": lambda: masked(subject, some),
            "contiguous": lambda: contiguous(subject, some),
        }[condition]()
    with scope:
        config = training.SFTConfig(learning_rate, max_steps=n_steps)
        training.train_sft(subject, tokenizer, examples, config, (watch, *callbacks), made)
    return watch


def step_seconds(
    n_steps: int = 12, skipped: int = 4, rounds: int = 2
) -> tuple[dict[str, float], dict[str, int]]:
    """Of every condition, the median seconds of a step and the entries of the optimizer's state."""
    subjects = {name: subject_of(name) for name in CONDITIONS}
    tokenizer = loading.load_tokenizer(embedded.DEFAULT)
    examples = training_examples(tokenizer)
    steps: dict[str, list[float]] = {name: [] for name in CONDITIONS}
    entries = {}
    for _ in range(rounds):
        for name in CONDITIONS:
            watch = trained(name, subjects[name], tokenizer, examples, n_steps)
            steps[name] += np.diff(watch.moments)[skipped:].tolist()
            entries[name] = watch.state_entries
    return {name: statistics.median(values) for name, values in steps.items()}, entries


def plain(n_steps: int) -> Watch:
    """transformers' Trainer as a script has it that names batch size and precision only."""
    model, tokenizer = loading.load(embedded.DEFAULT, torch.float32)
    watch = Watch()
    settings = TrainingArguments(
        per_device_train_batch_size=8,
        max_steps=n_steps,
        learning_rate=1e-6,
        bf16=precision.preferred_dtype("cpu") == torch.bfloat16,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(
        model=model.train(),
        args=settings,
        train_dataset=training_examples(tokenizer),
        data_collator=sequences.batch_of_examples,
        callbacks=[watch],
    ).train()
    return watch


def alone(condition: str, what: str, n_steps: int = 12) -> float:
    """Peak memory (GiB) or median step (s) of one condition, in a process of its own."""
    if condition == "plain":
        watch = plain(n_steps)
    else:
        subject, tokenizer = subject_of(condition), loading.load_tokenizer(embedded.DEFAULT)
        watch = trained(condition, subject, tokenizer, training_examples(tokenizer), n_steps)
    return peak_memory_gib() if what == "memory" else statistics.median(np.diff(watch.moments)[4:])


# What the operations of a step are for; all others are its remainder.
PARTS_OF_STEP = {
    "products": ("mm", "bmm", "addmm"),
    "casts and copies": ("copy_", "_to_copy", "index_copy_", "index_select", "cat"),
    "gradients clipped": ("linalg_vector_norm", "mul_"),
    "optimizer": ("_fused_adamw_",),
}
REMAINDER = "everything else"


class Profiled(TrainerCallback):
    """Operations and wall clock of all steps but the first ones, which make kernels."""

    def __init__(self, skipped: int) -> None:
        self.skipped, self.seconds = skipped, 0.0
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.skipped:
            self.profiler.start()
            self.seconds = -time.perf_counter()
        elif state.global_step == state.max_steps:
            self.seconds += time.perf_counter()
            self.profiler.stop()


def shares_of_step(condition: str, n_steps: int = 8, skipped: int = 3) -> dict[str, float]:
    """Which share of a step each of ``PARTS_OF_STEP`` takes; together with the rest, 1."""
    subject, tokenizer = subject_of(condition), loading.load_tokenizer(embedded.DEFAULT)
    profiled = Profiled(skipped)
    trained(condition, subject, tokenizer, training_examples(tokenizer), n_steps, (profiled,))
    taken = {
        event.key.removeprefix("aten::"): event.self_cpu_time_total / 1e6
        for event in profiled.profiler.key_averages()
    }
    shares = {
        part: round(sum(taken.get(name, 0.0) for name in names) / profiled.seconds, 3)
        for part, names in PARTS_OF_STEP.items()
    }
    return shares | {REMAINDER: round(1 - sum(shares.values()), 3)}


def flops_per_step(examples: list[dict], model: nn.Module, batch_size: int = 8) -> float:
    """Three times the forward products of the tokens that are there (padding not counted)."""
    backbone = sum(one.weight.numel() for one in linear_maps(model))
    n_tokens = np.mean([len(example["input_ids"]) for example in examples])
    labels = np.mean([sum(label != -100 for label in example["labels"]) for example in examples])
    head = model.get_output_embeddings().weight.numel()
    return 6 * batch_size * (n_tokens * backbone + labels * head)
