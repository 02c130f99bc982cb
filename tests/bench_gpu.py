"""What partial training and scoring cost on a GPU: ``make bench-gpu`` writes bench_gpu.json.

* ``scoring_over_forward``: scoring pass over bare backbone forward, 128 x 512 tokens (goal: at
  most 1.05).
* ``ru_peak_memory_gib``: peak device memory of training steps of a random 20% of the units, frozen
  weights in bfloat16, trained entries and their AdamW state in float32 (goal: under 40; full AdamW
  needs about 100).
* ``ru_step_over_full``: step time against full training, at the largest of SHAPES where full
  training fits.

On a randomly initialised Llama-2-7B shape; ``--tiny`` runs a tiny shape on any device, to test the
script.
"""

import argparse
import contextlib
import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ssah_utils import activations, models, precision, unit_training
from ssah_utils.files import REFERENCE, write_json
from ssah_utils.pipeline.runs import versions
from tests.bench_growth import random_batch
from tests.bench_training import TRAINED, random_share


@dataclass(frozen=True)
class Size:
    """A Llama shape, and how many tokens it is measured on."""

    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    vocabulary: int = 32000
    sequences: int = 128
    length: int = 512
    batch_size: int = 8


SEVEN_B = Size(4096, 11008, 32, 32)
SHAPES = (SEVEN_B, Size(4096, 11008, 16, 32), Size(3072, 8192, 16, 24), Size(2048, 5632, 22, 32))
TINY = Size(32, 48, 2, 4, vocabulary=64, sequences=4, length=8, batch_size=2)


def random_llama(size: Size, device: str, dtype: torch.dtype) -> nn.Module:
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.d_model,
        intermediate_size=size.d_ff,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_heads,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def batches_of(size: Size, device: str) -> list[dict[str, torch.Tensor]]:
    whole = random_batch(size.vocabulary, size.sequences, size.length)
    cut = {name: rows.to(device).split(size.batch_size) for name, rows in whole.items()}
    return [dict(zip(cut, parts, strict=True)) for parts in zip(*cut.values(), strict=True)]


def seconds(work, device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def scoring_over_forward(
    model: nn.Module, batches: list[dict], device: str, repeats: int = 3
) -> float:
    backbone = models.backbone_of(model)

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            backbone(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )

    bare()
    activations.channel_moments(model, batches[:1])
    score = lambda: activations.channel_moments(model, batches)  # noqa: E731
    return statistics.median(seconds(score, device) / seconds(bare, device) for _ in range(repeats))


def training_step(
    model: nn.Module, size: Size, device: str, full: bool, n_steps: int = 4
) -> tuple[float, float]:
    """Median seconds of a step and peak device memory (GiB). Full training keeps float32 masters
    under autocast.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batch = batches_of(size, device)[0]
    taken = []
    with (
        contextlib.nullcontext()
        if full
        else unit_training.training_only(model, random_share(models.shape_of(model), TRAINED))
    ):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True
        )

        def step() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=full):
                loss = model(
                    input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False
                ).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        taken = [seconds(step, device) for _ in range(n_steps)]
        model.gradient_checkpointing_disable()
        model.eval()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    return statistics.median(taken[1:]), peak


def step_over_full(sizes: tuple[Size, ...], device: str) -> tuple[float, Size]:
    """Ratio of step times at the first of ``sizes`` where full training fits."""
    for size in sizes:
        try:
            full, _ = training_step(
                random_llama(size, device, torch.float32), size, device, full=True
            )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        if device == "cuda":
            torch.cuda.empty_cache()
        redundant, _ = training_step(
            random_llama(size, device, torch.bfloat16), size, device, full=False
        )
        return redundant / full, size
    raise MemoryError("full training fits at none of the shapes")


def measure(device: str, sizes: tuple[Size, ...]) -> dict:
    largest = sizes[0]
    model = random_llama(largest, device, torch.bfloat16)
    figures = {
        "scoring_over_forward": round(
            scoring_over_forward(model, batches_of(largest, device), device), 3
        )
    }
    _, peak = training_step(model, largest, device, full=False)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
        figures["ru_peak_memory_gib"] = round(peak, 2)
    ratio, size = step_over_full(sizes, device)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return figures | {
        "ru_step_over_full": round(ratio, 3),
        "step_shape": vars(size),
        "device": name,
        "versions": versions(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_gpu")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a tiny shape on any device, to test the script; writes nothing",
    )
    options = parser.parse_args(arguments)
    device = precision.preferred_device()
    if options.tiny:
        print(measure(device, (TINY,)))
        return 0
    if device != "cuda":
        print("error: no GPU here; python -m tests.bench_gpu --tiny tries the script on the CPU")
        return 2
    figures = measure(device, SHAPES)
    print(figures)
    write_json(REFERENCE / "bench_gpu.json", figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
