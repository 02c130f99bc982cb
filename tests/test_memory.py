"""What memory says from shapes alone, held against what a process of its own really takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from ssah_utils import memory
from ssah_utils.files import ROOT
from ssah_utils.pipeline.memory_plan import GIB, Machine, Need, advice
from tests.measured_memory import MIDDLE

WORKS = {
    "openings": (16, 60, 64),
    "answers": (32, 60, 16),
    "gradients": (8, 96, 256),
    "steps": (8, 96, 256),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells a peak")
@pytest.mark.parametrize("kind", WORKS)
def test_what_is_planned_is_what_a_process_takes(kind):
    """Of weights and work together, within 15%."""
    arguments = [sys.executable, "-m", "tests.measured_memory", kind, *map(str, WORKS[kind])]
    outcome = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(outcome.stdout.splitlines()[-1])
    weights = 4 * sum(p.numel() for p in shallow().parameters())
    assert weights + found["planned"] == pytest.approx(weights + found["measured"], rel=0.15)


def shallow() -> torch.nn.Module:
    from ssah_utils.loading import without_weights

    return without_weights(LlamaConfig(**MIDDLE))


def test_logits_are_counted_to_the_byte():
    config = LlamaConfig(**MIDDLE)
    peak = memory.Shapes(config, torch.float32).peak(memory.choosing(4, 10))
    both = 2 * 4 * 10 * MIDDLE["vocab_size"] * 4  # logits, and their logarithms of probabilities
    assert both <= peak < 1.05 * both


@pytest.mark.parametrize("asked", ["24", "0x24", "1x", "axb"])
def test_machines_that_are_none_are_refused(asked):
    with pytest.raises(ValueError, match="--gpus takes NUMBERxGIB, such as 1x24"):
        Machine.named(asked, None)


@pytest.mark.parametrize(
    ("gpus", "weights", "is_training", "said"),
    [
        ("1x24", 14, False, "fits one GPU"),
        ("4x80", 140, False, "device_map=auto, over 4 GPUs"),
        ("1x24", 60, False, "device_map=auto, the rest in memory"),
        ("1x24", 60, True, "too large: one GPU of 62 GiB"),
        ("4x80", 140, True, "shard it over all of them"),
    ],
)
def test_what_to_change_where_a_step_does_not_fit(gpus, weights, is_training, said):
    need = Need("04_ablation", "step", weights * GIB, 0, GIB, is_training)
    assert said in advice(need, Machine.named(gpus, 64), GIB)
