"""Speed as ratios within one run on one machine: ``make bench``. Writes data/reference/bench.json.

scoring_over_forward     scoring pass over bare backbone forward, same batches (goal: at most 1.05)
generation_speedup       batched, length-sorted answers over one prompt at a time, same answers (goal: at least 10)
forward_gemm_efficiency  achieved over measured matrix-product peak, float32 (goal: at least 0.75)
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import GenerationConfig

from ssah_utils import activations, evaluation, models, prompts
from ssah_utils.files import write_json
from ssah_utils.results import REFERENCE, versions

GOALS = {
    "scoring_over_forward": ("at most", 1.05),
    "generation_speedup": ("at least", 10),
    "forward_gemm_efficiency": ("at least", 0.75),
}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def scoring_over_forward(model: nn.Module, tokenizer, n_requests: int = 32, repeats: int = 3) -> float:
    """Median of pairwise ratios, the two passes taking turns."""
    table = prompts.load_dataset("refusal-labels")[:n_requests]  # has real responses of everyday length
    rendered = prompts.render(tokenizer, table["prompt"].tolist())
    batches = prompts.token_batches(prompts.encode(tokenizer, rendered, table["response"].tolist(), 48))
    backbone = models.backbone_of(model)

    def bare() -> None:
        for batch in batches:
            backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    bare()
    ratios = [seconds(lambda: activations.channel_moments(model, batches)) / seconds(bare) for _ in range(repeats)]
    return statistics.median(ratios)


def generation_speedup(model: nn.Module, tokenizer, n_prompts: int = 64, new_tokens: int = 24) -> tuple[float, float]:
    """Speed-up, and the share of answers that are the same to the letter."""
    rendered = prompts.render(tokenizer, prompts.load_dataset("helpful")["prompt"].tolist()[:n_prompts])
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                              eos_token_id=tokenizer.eos_token_id)  # fmt: skip

    def one_by_one() -> list[str]:
        answers = []
        for text in rendered:
            batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            tokens = model.generate(**batch, generation_config=config)[0, batch["input_ids"].shape[1] :]
            answers.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
        return answers

    evaluation.generate(model, tokenizer, rendered[:4], 4)
    results: dict[str, list[str]] = {}
    single = seconds(lambda: results.update(single=one_by_one()))
    batched = seconds(
        lambda: results.update(batched=evaluation.generate(model, tokenizer, rendered, new_tokens, batch_size=64))
    )
    same = sum(a == b for a, b in zip(results["single"], results["batched"], strict=True)) / n_prompts
    return single / batched, same


@torch.inference_mode()
def forward_gemm_efficiency(model: nn.Module, batch_size: int = 16, length: int = 64, repeats: int = 5) -> float:
    shape = models.shape_of(model)
    backbone = models.backbone_of(model)
    ids = torch.randint(0, 1000, (batch_size, length))
    weights = sum(module.weight.numel() for module in backbone.modules() if isinstance(module, nn.Linear))
    # causal attention: two products of length/2 by n_heads * head_dim for every token
    per_token = 2 * weights + 2 * shape.n_layers * length * shape.n_heads * shape.head_dim
    backbone(input_ids=ids, use_cache=False)
    achieved = ids.numel() * per_token / min(seconds(lambda: backbone(input_ids=ids, use_cache=False)) for _ in range(repeats))
    return achieved / gemm_peak(model.dtype)


def gemm_peak(dtype: torch.dtype, repeats: int = 8) -> float:
    """Best FLOP/s of a matrix product over a few shapes."""
    peak = 0.0
    for m, k, n in ((1024, 576, 1536), (1024, 1536, 1536), (2048, 2048, 2048)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        a @ b
        peak = max(peak, 2 * m * k * n / min(seconds(lambda a=a, b=b: a @ b) for _ in range(repeats)))
    return peak


def main() -> None:
    model, tokenizer = models.load(models.EMBEDDED, torch.float32)
    speedup, same = generation_speedup(model, tokenizer)
    figures = {
        "scoring_over_forward": scoring_over_forward(model, tokenizer),
        "generation_speedup": speedup,
        "forward_gemm_efficiency": forward_gemm_efficiency(model),
    }
    for name, value in figures.items():
        word, goal = GOALS[name]
        met = value <= goal if word == "at most" else value >= goal
        print(f"{name:24} {value:7.3f}   goal {word} {goal}: {'met' if met else 'missed'}")
    native = models.preferred_dtype("cpu") == torch.bfloat16
    print(f"answers identical to one-at-a-time: {same:.1%}; bfloat16 is native here: {native}")
    details = {"identical_answers": same, "dtype": "float32", "threads": torch.get_num_threads(), "machine": platform.machine()}
    write_json(
        REFERENCE / "bench.json",
        {name: round(value, 3) for name, value in figures.items()} | details | {"versions": versions()},
    )


if __name__ == "__main__":
    main()
