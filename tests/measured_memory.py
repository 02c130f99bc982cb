"""What a model and its work really take, in a process of its own: peak minus before, in bytes.

    python -m tests.measured_memory openings:16,60,64 steps:8,96,256         # a random model
    python -m tests.measured_memory openings:16,60,64 --model NAME           # or a real one

Prints a line for each, what was measured and what ``memory`` says. Linux alone resets a peak.
"""

import argparse
import ctypes
import functools
import gc
import json
import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from ssah_utils import activations, loading, models, prompt_cache, unit_training
from ssah_utils.pipeline import memory

MIDDLE = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def resident(what: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def rows(batch: int, length: int) -> list[list[int]]:
    return [[3 + row + place for place in range(length)] for row in range(batch)]


def batch_of(n: int, length: int, n_marked: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor(rows(n, length))
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, length - 1 - n_marked // n : length - 1] = True
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "positions": positions}


@torch.inference_mode()
def openings(model: nn.Module, batch: int, length: int, n_read: int) -> None:
    read = prompt_cache.read_prompts(model, rows(batch, length))
    read.log_probabilities([[5] * (n_read // 8 + 1)] * 8, read.next_logits)


@torch.inference_mode()
def answers(model: nn.Module, batch: int, length: int, n_new: int) -> None:
    prompt_cache.read_prompts(model, rows(batch, length)).answer(n_new, [])


def moments(model: nn.Module, batch: int, length: int, n_marked: int) -> None:
    activations.channel_moments(model, [batch_of(batch, length, n_marked)])


def gradients(model: nn.Module, batch: int, length: int, n_marked: int) -> None:
    activations.gradient_activation(model, [batch_of(batch, length, n_marked)])


@torch.inference_mode()
def choices(model: nn.Module, batch: int, length: int, _: int) -> None:
    logits = model(input_ids=torch.tensor(rows(batch, length))).logits
    nn.functional.log_softmax(logits, dim=-1, dtype=torch.float32)


def steps(model: nn.Module, batch: int, length: int, n_labels: int) -> None:
    """Two training steps in float32, the second with the optimizer's state there."""
    model.set_attn_implementation("eager")
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.tensor(rows(batch, length))
    for _ in range(2):
        hidden = models.backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        states = hidden.flatten(0, 1)[-n_labels:]
        logits = models.logits_of(model, states).float()
        targets = ids.flatten()[-n_labels:]
        nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()


def fifth(model: nn.Module, *sizes: int) -> None:
    """The same of a fifth of the units, drawn at random in every module."""
    writers = models.writers(model)
    chosen = [torch.rand(models.matrix_size(writer.module)[1]) < FIFTH for writer in writers]
    drawn = models.per_unit_of(zip(writers, chosen, strict=True))
    with unit_training.training_only(model, drawn):
        steps(model, *sizes)


def planned(kind: str, config: PretrainedConfig, sizes: tuple[int, int, int]) -> int:
    """What ``memory`` says of weights and work, from the configuration alone."""
    works = {
        "openings": memory.reading_openings,
        "answers": memory.reading_prompts,
        "moments": memory.taking_moments,
        "gradients": memory.taking_gradients,
        "choices": lambda batch, length, _: memory.choosing(batch, length),
        "steps": functools.partial(memory.training, trains_rest=True),
        "fifth": functools.partial(memory.training, trains_rest=False),
    }
    attention = "eager" if kind in TRAINED else ""
    work = memory.Shapes(config, torch.float32, attention).peak(works[kind](*sizes))
    if kind not in TRAINED:
        return memory.n_numbers(config) * 4 + work
    return TRAINED[kind](config).peak(work)


FIFTH = 0.2
TRAINED = {
    "steps": lambda config: memory.Trained.units_of(config, 1.0, True, torch.float32),
    "fifth": lambda config: memory.Trained.units_of(config, FIFTH, False, torch.float32),
}
WORK = {one.__name__: one for one in (openings, answers, moments, gradients, choices, steps, fifth)}


def measured(kind: str, sizes: tuple[int, int, int], name: str) -> dict[str, str | int]:
    """Of one kind of work, with a model of its own."""
    config = LlamaConfig(**MIDDLE)
    if name:
        config = loading.config_of(name)
        model, _ = loading.load(name)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # a file's pages would stay when it is cut in two
    WORK["moments"](model, 2, 16, 8)  # warm
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    before = resident("VmRSS") - weights
    Path("/proc/self/clear_refs").write_text("5")
    WORK[kind](model, *sizes)
    return {
        "kind": kind,
        "measured": resident("VmHWM") - before,
        "planned": planned(kind, config, sizes),
    }


def work_of(text: str) -> tuple[str, tuple[int, ...]]:
    """Kind and sizes; ``ArgumentTypeError`` where it is none."""
    kind, _, sizes = text.partition(":")
    if kind not in WORK or not re.fullmatch(r"\d+,\d+,\d+", sizes):
        known = ", ".join(WORK)
        raise argparse.ArgumentTypeError(f"'{text}' is not KIND:BATCH,LENGTH,POSITIONS of {known}")
    return kind, tuple(map(int, sizes.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("works", nargs="+", type=work_of)
    parser.add_argument("--model", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind, sizes in options.works:
        print(json.dumps(measured(kind, sizes, options.model)))


if __name__ == "__main__":
    main()
