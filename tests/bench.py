"""Speed as ratios within one run on one machine: ``make bench``. Writes data/reference/bench.json.

scoring_over_forward     scoring pass over bare backbone forward, same batches (goal: at most 1.05)
generation_speedup       batched, length-sorted answers over one prompt at a time, same answers
(goal: at least 10) forward_gemm_efficiency  achieved over measured matrix-product peak, float32
(goal: at least 0.75) ru_step_over_full        a training step of a random 20% of the units over one
of all parameters (goal: at most 0.65) ru_step_over_plain       the same over full training as a
plain Trainer script has it, without ``keep_freed_memory`` ru_optimizer_state_over_full,
ru_peak_memory_over_full      (goals: at most 0.22 and 0.65) freeze_step_over_full    a step with a
random 7.5% of the units frozen over one of all parameters (goal: at most 1.02)
train_gemm_efficiency    full training, achieved over matrix-product peak, bfloat16 where native
(goal: at least 0.5)

Where training is compared, full training has float32 weights under autocast; budgets of 20% have
the frozen weights in bfloat16 and the trained entries in float32, which is what partial training is
for. Conditions take turns.
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, TrainerCallback

from ssah_utils import (
    activations,
    embedded,
    evaluation,
    loading,
    models,
    per_unit,
    precision,
    training,
    unit_training,
)
from ssah_utils.architectures import ModelShape
from ssah_utils.files import REFERENCE, ROOT, write_json
from ssah_utils.per_unit import PerUnit
from ssah_utils.pipeline.runs import peak_memory_gib, versions
from ssah_utils.prompts import chat, datasets, tokens

GOALS = {
    "scoring_over_forward": ("at most", 1.05),
    "generation_speedup": ("at least", 10),
    "forward_gemm_efficiency": ("at least", 0.75),
    "ru_step_over_full": ("at most", 0.65),
    "ru_step_over_plain": ("at most", 0.65),
    "ru_optimizer_state_over_full": ("at most", 0.22),
    "ru_peak_memory_over_full": ("at most", 0.65),
    "freeze_step_over_full": ("at most", 1.02),
    "train_gemm_efficiency": ("at least", 0.5),
}
CONDITIONS = ("full", "redundant", "frozen")


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def scoring_over_forward(
    model: nn.Module, tokenizer, n_requests: int = 32, repeats: int = 3
) -> float:
    """Median of pairwise ratios, the two passes taking turns."""
    # has real responses of everyday length
    table = datasets.load_dataset("refusal-labels")[:n_requests]
    rendered = chat.render(tokenizer, table["prompt"].tolist())
    batches = tokens.token_batches(
        tokens.encode(tokenizer, rendered, table["response"].tolist(), 48)
    )
    backbone = models.backbone_of(model)

    def bare() -> None:
        for batch in batches:
            backbone(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )

    bare()
    ratios = [
        seconds(lambda: activations.channel_moments(model, batches)) / seconds(bare)
        for _ in range(repeats)
    ]
    return statistics.median(ratios)


def generation_speedup(
    model: nn.Module, tokenizer, n_prompts: int = 64, new_tokens: int = 24
) -> tuple[float, float]:
    """Speed-up, and the share of answers that are the same to the letter."""
    rendered = chat.render(
        tokenizer, datasets.load_dataset("helpful")["prompt"].tolist()[:n_prompts]
    )
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )

    def one_by_one() -> list[str]:
        answers = []
        for text in rendered:
            batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            tokens = model.generate(**batch, generation_config=config)[
                0, batch["input_ids"].shape[1] :
            ]
            answers.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
        return answers

    evaluation.generate(model, tokenizer, rendered[:4], 4)
    results: dict[str, list[str]] = {}
    single = seconds(lambda: results.update(single=one_by_one()))
    batched = seconds(
        lambda: results.update(
            batched=evaluation.generate(model, tokenizer, rendered, new_tokens, batch_size=64)
        )
    )
    same = (
        sum(a == b for a, b in zip(results["single"], results["batched"], strict=True)) / n_prompts
    )
    return single / batched, same


@torch.inference_mode()
def forward_gemm_efficiency(
    model: nn.Module, batch_size: int = 16, length: int = 64, repeats: int = 5
) -> float:
    shape = models.shape_of(model)
    backbone = models.backbone_of(model)
    ids = torch.randint(0, 1000, (batch_size, length))
    weights = sum(
        module.weight.numel() for module in backbone.modules() if isinstance(module, nn.Linear)
    )
    # causal attention: two products of length/2 by n_heads * head_dim for every token
    per_token = 2 * weights + 2 * shape.n_layers * length * shape.n_heads * shape.head_dim
    backbone(input_ids=ids, use_cache=False)
    achieved = (
        ids.numel()
        * per_token
        / min(seconds(lambda: backbone(input_ids=ids, use_cache=False)) for _ in range(repeats))
    )
    return achieved / gemm_peak(model.dtype)


def gemm_peak(dtype: torch.dtype, repeats: int = 8) -> float:
    """Best FLOP/s of a matrix product over a few shapes."""
    peak = 0.0
    for m, k, n in ((1024, 576, 1536), (1024, 1536, 1536), (2048, 2048, 2048)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        a @ b
        peak = max(
            peak, 2 * m * k * n / min(seconds(lambda a=a, b=b: a @ b) for _ in range(repeats))
        )
    return peak


# ----------------------------------------------------------------------------------------- training


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


def trained(
    condition: str, subject: nn.Module, tokenizer, examples: list[dict], n_steps: int
) -> Watch:
    watch = Watch()
    shape = models.shape_of(subject)
    scope = {
        "full": lambda: contextlib.nullcontext(),
        "redundant": lambda: unit_training.training_only(subject, random_share(shape, 0.2)),
        "frozen": lambda: unit_training.freezing(subject, random_share(shape, 0.075)),
    }[condition]
    with scope():
        training.train_sft(
            subject,
            tokenizer,
            examples,
            training.SFTConfig(learning_rate=1e-6, max_steps=n_steps),
            (watch,),
        )
    return watch


def step_ratios(
    n_steps: int = 16, skipped: int = 5, rounds: int = 3
) -> tuple[dict[str, float], float]:
    """Median step time of every condition over full training's, optimizer entries, and full
    training's seconds per step.
    """
    subjects = {name: loading.load(embedded.DEFAULT, dtype_of(name))[0] for name in CONDITIONS}
    tokenizer = loading.load_tokenizer(embedded.DEFAULT)
    examples = training_examples(tokenizer)
    steps: dict[str, list[float]] = {name: [] for name in CONDITIONS}
    entries = {}
    for _ in range(rounds):
        for name in CONDITIONS:
            watch = trained(name, subjects[name], tokenizer, examples, n_steps)
            steps[name] += np.diff(watch.moments)[skipped:].tolist()
            entries[name] = watch.state_entries
    median = {name: statistics.median(values) for name, values in steps.items()}
    figures = {
        "ru_step_over_full": median["redundant"] / median["full"],
        "freeze_step_over_full": median["frozen"] / median["full"],
        "ru_optimizer_state_over_full": entries["redundant"] / entries["full"],
        "ru_step_seconds": median["redundant"],
    }
    return figures, median["full"]


def dtype_of(condition: str) -> torch.dtype:
    return precision.preferred_dtype("cpu") if condition == "redundant" else torch.float32


def train_flops_per_step(examples: list[dict], model: nn.Module, batch_size: int = 8) -> float:
    """Three times the forward products of the tokens that are there (padding not counted)."""
    backbone = sum(
        m.weight.numel() for m in models.backbone_of(model).modules() if isinstance(m, nn.Linear)
    )
    tokens = np.mean([len(example["input_ids"]) for example in examples])
    labels = np.mean([sum(label != -100 for label in example["labels"]) for example in examples])
    head = model.get_output_embeddings().weight.numel()
    return 6 * batch_size * (tokens * backbone + labels * head)


def in_own_process(*arguments: str) -> float:
    """The number that ``python -m tests.bench ARGUMENTS`` prints last."""
    command = [sys.executable, "-m", "tests.bench", *arguments]
    return float(
        subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()[-1]
    )


def alone(condition: str, what: str, n_steps: int = 12) -> float:
    """Peak memory (GiB) or median step (s) of one condition, in a process of its own; "plain"
    leaves the allocator alone.
    """
    if what == "plain":
        training.keep_freed_memory = lambda: None
    subject, tokenizer = loading.load(embedded.DEFAULT, dtype_of(condition))
    watch = trained(condition, subject, tokenizer, training_examples(tokenizer), n_steps)
    return peak_memory_gib() if what == "memory" else statistics.median(np.diff(watch.moments)[4:])


def training_figures() -> dict[str, float]:
    figures, full_seconds = step_ratios()
    model, tokenizer = loading.load(embedded.DEFAULT)
    flops = train_flops_per_step(training_examples(tokenizer), model)
    figures["train_gemm_efficiency"] = (
        flops / full_seconds / gemm_peak(precision.preferred_dtype("cpu"))
    )
    figures["ru_step_over_plain"] = figures.pop("ru_step_seconds") / in_own_process(
        "--alone", "full", "plain"
    )
    return figures


def memory_figures() -> dict[str, float]:
    memory = {name: in_own_process("--alone", name, "memory") for name in ("full", "redundant")}
    return {"ru_peak_memory_over_full": memory["redundant"] / memory["full"]}


def inference_figures() -> dict[str, float]:
    model, tokenizer = loading.load(embedded.DEFAULT, torch.float32)
    speedup, same = generation_speedup(model, tokenizer)
    print(f"answers identical to one-at-a-time: {same:.1%}")
    return {
        "scoring_over_forward": scoring_over_forward(model, tokenizer),
        "generation_speedup": speedup,
        "forward_gemm_efficiency": forward_gemm_efficiency(model),
        "identical_answers": same,
    }


PARTS = {"inference": inference_figures, "training": training_figures, "memory": memory_figures}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument(
        "--only", choices=PARTS, help="measure one part again and keep the other stored figures"
    )
    parser.add_argument(
        "--alone",
        nargs=2,
        metavar=("CONDITION", "WHAT"),
        help="one training in this process (used by itself)",
    )
    options = parser.parse_args()
    if options.alone:
        print(alone(*options.alone))
        return
    figures: dict[str, float] = {}
    for name, measure in PARTS.items():
        if options.only in (None, name):
            figures |= measure()
    for name, (word, goal) in GOALS.items():
        if name in figures:
            met = figures[name] <= goal if word == "at most" else figures[name] >= goal
            print(
                f"{name:28} {figures[name]:7.3f}   goal {word} {goal}: {'met' if met else 'missed'}"
            )
    native = precision.preferred_dtype("cpu") == torch.bfloat16
    print(f"bfloat16 is native here: {native}")
    path = REFERENCE / "bench.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if options.only else {}
    details = {
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    rounded = {name: round(value, 3) for name, value in figures.items()}
    write_json(path, stored | rounded | details | {"versions": versions()})


if __name__ == "__main__":
    main()
