"""Speed as ratios within one run on one machine: ``make bench``.

Writes data/reference/bench.json, a column for each kind of machine: ``bf16`` where bfloat16 is
native, ``float32`` elsewhere. ``GOALS`` has the goals.

* ``scoring_over_forward``: scoring pass over bare backbone forward, same batches.
* ``generation_speedup``: batched, length-sorted answers over one prompt at a time, same answers.
* ``forward_gemm_efficiency``: of a forward pass in float32, achieved over measured matrix-product
  peak; ``generation_gemm_share``: of answering, and ``train_gemm_efficiency``: of full training, in
  bfloat16 where it is native.
* ``ru_step_over_X``, ``ru_peak_memory_over_X``: a training step of a random 20% of the units over
  one of X, a way of ``bench_training``, and the same of a process's memory.
* ``freeze_step_over_full``: a step with a random 7.5% of the units frozen over a full one.
* ``step_shares``: where the time of a step goes, of all, of 20% trained and of 7.5% frozen.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

from ssah_utils import activations, embedded, evaluation, loading, models, precision
from ssah_utils.files import REFERENCE, ROOT, write_json
from ssah_utils.pipeline.runs import versions
from ssah_utils.prompts import chat, datasets, tokens
from tests import bench_training

GOALS = {
    "scoring_over_forward": ("at most", 1.03),
    "generation_speedup": ("at least", 10),
    "forward_gemm_efficiency": ("at least", 0.75),
    "generation_gemm_share": ("at least", 0.5),
    "ru_step_over_full": ("at most", 0.65),
    "ru_step_over_plain": ("at most", 0.50),
    "ru_step_over_lora": ("at most", 1.0),
    "ru_optimizer_state_over_full": ("at most", 0.22),
    "ru_peak_memory_over_full": ("at most", 0.65),
    "ru_peak_memory_over_lora": ("at most", 1.1),
    "freeze_step_over_full": ("at most", 1.01),
    "train_gemm_efficiency": ("at least", 0.55),
}
RIVALS = ("full", "lora", "masked", "contiguous")  # of bench_training, for step and memory
PROFILED = ("full", "redundant", "frozen")


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def scoring_over_forward(
    model: nn.Module, tokenizer, n_requests: int = 32, repeats: int = 15
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
    model: nn.Module, batch_size: int = 16, length: int = 64, repeats: int = 15
) -> float:
    shape = models.shape_of(model)
    backbone = models.backbone_of(model)
    ids = torch.randint(0, 1000, (batch_size, length))
    weights = sum(one.weight.numel() for one in bench_training.linear_maps(model))
    # causal attention: two products of length/2 by n_heads * head_dim for every token
    per_token = 2 * weights + 2 * shape.n_layers * length * shape.n_heads * shape.head_dim
    backbone(input_ids=ids, use_cache=False)
    achieved = (
        ids.numel()
        * per_token
        / min(seconds(lambda: backbone(input_ids=ids, use_cache=False)) for _ in range(repeats))
    )
    return achieved / gemm_peak(model.dtype)


@torch.inference_mode()
def generation_gemm_share(
    model: nn.Module, tokenizer, n_prompts: int = 64, new_tokens: int = 24
) -> float:
    """Two FLOPs a parameter for every token read or written, over time and peak; embeddings that
    are only looked up, and padding, are not counted.
    """
    table = datasets.load_dataset("helpful")["prompt"].tolist()[:n_prompts]
    rendered = chat.render(tokenizer, table)
    evaluation.generate(model, tokenizer, rendered[:4], 4)
    found: list[list[int]] = []
    taken = seconds(
        lambda: found.extend(evaluation.generate_ids(model, tokenizer, rendered, new_tokens))
    )
    weights = sum(one.weight.numel() for one in bench_training.linear_maps(model))
    n_read = sum(len(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"])
    n_written = sum(map(len, found))
    head = model.get_output_embeddings().weight.numel()
    flops = 2 * ((n_read + n_written) * weights + n_written * head)
    return flops / taken / gemm_peak(model.dtype)


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


# ------------------------------------------------------------------------------ training and memory


def in_own_process(*arguments: str) -> float:
    """The number that ``python -m tests.bench ARGUMENTS`` prints last."""
    command = [sys.executable, "-m", "tests.bench", *arguments]
    return float(
        subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()[-1]
    )


def training_figures() -> dict[str, float | dict]:
    seconds_of, entries = bench_training.step_seconds()
    ours, full = seconds_of["redundant"], seconds_of["full"]
    figures = {f"ru_step_over_{name}": ours / seconds_of[name] for name in RIVALS}
    figures["ru_step_over_plain"] = ours / in_own_process("--alone", "plain", "step")
    figures["freeze_step_over_full"] = seconds_of["frozen"] / full
    figures["ru_optimizer_state_over_full"] = entries["redundant"] / entries["full"]
    figures["lora_optimizer_state_over_ru"] = entries["lora"] / entries["redundant"]
    model, tokenizer = loading.load(embedded.DEFAULT)
    flops = bench_training.flops_per_step(bench_training.training_examples(tokenizer), model)
    peak = gemm_peak(precision.preferred_dtype("cpu"))
    shares = {name: bench_training.shares_of_step(name) for name in PROFILED}
    return figures | {"train_gemm_efficiency": flops / full / peak, "step_shares": shares}


def memory_figures() -> dict[str, float]:
    names = ("redundant", *RIVALS)
    memory = {name: in_own_process("--alone", name, "memory") for name in names}
    return {f"ru_peak_memory_over_{name}": memory["redundant"] / memory[name] for name in RIVALS}


def inference_figures() -> dict[str, float]:
    model, tokenizer = loading.load(embedded.DEFAULT, torch.float32)
    speedup, same = generation_speedup(model, tokenizer)
    print(f"answers identical to one-at-a-time: {same:.1%}")
    as_used, _ = loading.load(embedded.DEFAULT, precision.preferred_dtype("cpu"))
    return {
        "generation_gemm_share": generation_gemm_share(as_used, tokenizer),
        "scoring_over_forward": scoring_over_forward(model, tokenizer),
        "generation_speedup": speedup,
        "forward_gemm_efficiency": forward_gemm_efficiency(model),
        "identical_answers": same,
    }


PARTS = {"inference": inference_figures, "training": training_figures, "memory": memory_figures}


def kind_of_machine() -> str:
    return "bf16" if precision.preferred_dtype("cpu") == torch.bfloat16 else "float32"


def processor() -> str:
    """Its name, and which of the extensions for matrix products it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    said = dict(line.split(":", 1) for line in lines if ":" in line)
    said = {name.strip(): value.strip() for name, value in said.items()}
    flags = said.get("flags", "").split()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return " ".join([said.get("model name", ""), *(one for one in known if one in flags)])


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
        print(bench_training.alone(*options.alone))
        return
    figures: dict[str, float | dict] = {}
    for name, measure in PARTS.items():
        if options.only in (None, name):
            figures |= measure()
    for name, (word, goal) in GOALS.items():
        if name in figures:
            met = figures[name] <= goal if word == "at most" else figures[name] >= goal
            print(
                f"{name:28} {figures[name]:7.3f}   goal {word} {goal}: {'met' if met else 'missed'}"
            )
    path = REFERENCE / "bench.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    column = stored.get(kind_of_machine(), {}) if options.only else {}
    details = {
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processor": processor(),
        "versions": versions(),
    }
    rounded = {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in figures.items()
    }
    goals = {"goals": {name: list(goal) for name, goal in GOALS.items()}}
    write_json(path, stored | goals | {kind_of_machine(): column | rounded | details})


if __name__ == "__main__":
    main()
