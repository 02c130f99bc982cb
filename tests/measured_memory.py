"""What work really takes beside the weights, in a process of its own: peak minus before, in bytes.

    python -m tests.measured_memory openings 16 60 64                        # a random model
    python -m tests.measured_memory openings 16 60 64 --model NAME           # or a real one

Prints what was measured and what ``memory`` says. Linux alone resets a peak.
"""

import argparse
import ctypes
import gc
import json
import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ssah_utils import activations, loading, memory, models, prompt_cache

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


def steps(model: nn.Module, batch: int, length: int, n_labels: int) -> None:
    """Two training steps in float32, the second with the optimizer's state there."""
    model.set_attn_implementation("eager")
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.tensor(rows(batch, length))
    for _ in range(2):
        hidden = models.backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        states = hidden.flatten(0, 1)[-n_labels:]
        logits = models.logits_of(model, states).float()
        targets = ids.flatten()[-n_labels:]
        nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()


def planned(kind: str, config, sizes: tuple[int, int, int], n_parameters: int) -> int:
    """What ``memory`` says, from the configuration alone."""
    works = {
        "openings": memory.reading_openings,
        "answers": memory.reading_prompts,
        "moments": memory.taking_moments,
        "gradients": memory.taking_gradients,
        "steps": memory.training,
    }
    attention = "eager" if kind == "steps" else "sdpa"
    peak = memory.Shapes(config, torch.float32, attention).peak(works[kind](*sizes))
    return peak + (memory.optimizer_bytes(n_parameters) if kind == "steps" else 0)


WORK = {one.__name__: one for one in (openings, answers, moments, gradients, steps)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=WORK)
    parser.add_argument("sizes", nargs=3, type=int)
    parser.add_argument("--model", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig(**MIDDLE)
    if options.model:
        config = AutoConfig.from_pretrained(loading.resolve(options.model))
        model, _ = loading.load(options.model)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.sum()  # read from its file, if it is mapped
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    WORK[options.kind if options.kind != "steps" else "moments"](model, 2, 16, 8)  # warm
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    WORK[options.kind](model, *options.sizes)
    measured = resident("VmHWM") - before
    told = planned(options.kind, config, tuple(options.sizes), n_parameters)
    print(json.dumps({"kind": options.kind, "measured": measured, "planned": told}))


if __name__ == "__main__":
    main()
