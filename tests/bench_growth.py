"""How cost grows with a model's size: ``python -m tests.bench_growth`` writes growth.json.

Time is measured on blocks with random weights: what two blocks more take, times half the number of
blocks, so that no model has to fit. Memory is what ``ssah plan`` would say, from shapes alone. Both
are of one batch, without embeddings and head in the time. ``--whole`` measures the embedded models
as they are, to hold the blocks against.

* ``forward``: the backbone, nothing looked at.
* ``scoring``: the moments of all channels.
* ``ablation``: a forward pass with a random 1.3% of the units at zero.
* ``training``: a step of a random 20% of the units.
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig

from ssah_utils import activations, interventions, loading, models, precision, unit_training
from ssah_utils.files import REFERENCE, write_json
from ssah_utils.pipeline import memory
from ssah_utils.pipeline.runs import versions
from tests import bench, bench_training

BATCH, LENGTH = 8, 64  # sequences, and tokens of each
N_BLOCKS = (1, 3)  # of the two models whose difference is taken
SMALL_VOCABULARY = 64  # of what time is measured on
WHOLE = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct")


def llama(d_model: int, d_ff: int, n_layers: int, n_heads: int, n_vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        vocab_size=n_vocabulary,
        tie_word_embeddings=False,
    )


def sizes() -> dict[str, PretrainedConfig]:
    """Shapes to measure: tiny ones, the embedded models', and those of Llama 2 7B."""
    embedded_ones = {name: loading.config_of(name) for name in WHOLE}
    return {
        "tiny, 1M": llama(128, 344, 4, 4, 512),
        "small, 10M": llama(256, 688, 12, 4, 512),
        **embedded_ones,
        "Llama-2-7B shapes": llama(4096, 11008, 32, 32, 32000),
    }


def random_batch(vocabulary: int, n: int, length: int) -> dict[str, torch.Tensor]:
    """The same random sequences each time, all of one length, all positions scored."""
    ids = torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "positions": mask.bool()}


def batch_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return random_batch(model.get_input_embeddings().num_embeddings, BATCH, LENGTH)


def works(model: nn.Module) -> dict[str, Callable[[], object]]:
    """What is timed, each by a function that does it once; they take turns."""
    backbone, batch, shape = models.backbone_of(model), batch_of(model), models.shape_of(model)
    read = {name: batch[name] for name in ("input_ids", "attention_mask")}
    off = bench_training.random_share(shape, 0.013)

    @torch.inference_mode()
    def forward() -> object:
        return backbone(**read, use_cache=False)

    def ablation() -> object:
        with interventions.ablated(model, off):
            return forward()

    return {
        "forward": forward,
        "scoring": lambda: activations.channel_moments(model, [batch]),
        "ablation": ablation,
    }


@contextlib.contextmanager
def stepping(model: nn.Module):
    """Inside the block, a function that does one step of a random 20% of the units."""
    batch = batch_of(model)
    some = bench_training.random_share(models.shape_of(model), bench_training.TRAINED)
    read = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with unit_training.training_only(model, some):
        learned = [one for one in model.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=1e-6, fused=True)

        def step() -> None:
            states = models.backbone_of(model)(**read, use_cache=False).last_hidden_state
            states.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        yield step


def seconds_of(config: PretrainedConfig, n_layers: int, repeats: int = 5) -> dict[str, float]:
    """Median seconds of every work on so many blocks of these shapes."""
    few = memory.with_layers(config, n_layers)
    few.get_text_config(decoder=True).vocab_size = SMALL_VOCABULARY
    few.get_text_config(decoder=True).pad_token_id = None
    torch.manual_seed(0)
    dtype = precision.preferred_dtype("cpu")
    model = loading.auto_class(few).from_config(few, dtype=dtype).eval()
    return timed(model, repeats)


def timed(model: nn.Module, repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {}
    named = works(model)
    for round_ in range(repeats + 1):  # the first is not counted
        for name, work in named.items():
            spent = bench.seconds(work)
            taken.setdefault(name, []).extend([spent] * (round_ > 0))
    with stepping(model) as step:
        spent = [bench.seconds(step) for _ in range(repeats + 1)]
    taken["training"] = spent[1:]
    return {name: statistics.median(values) for name, values in taken.items()}


def gib_of(config: PretrainedConfig) -> dict[str, float]:
    """Memory at most of every work, weights included, from shapes alone."""
    dtype = precision.preferred_dtype("cpu")
    shapes = memory.Shapes(config, dtype)
    weights = memory.n_numbers(config) * dtype.itemsize
    reading = shapes.peak(memory.taking_moments(BATCH, LENGTH, BATCH * LENGTH))
    forward = shapes.peak(memory.reading_prompts(BATCH, LENGTH))
    step = shapes.peak(memory.training(BATCH, LENGTH, BATCH * LENGTH // 4, False))
    held = memory.Trained.units_of(config, bench_training.TRAINED, False, dtype)
    found = {"forward": weights + forward, "scoring": weights + reading}
    found |= {"ablation": weights + forward, "training": held.peak(step)}
    return {name: n_bytes / 2**30 for name, n_bytes in found.items()}


def rows_of(name: str, config: PretrainedConfig) -> list[dict]:
    """One row a work: size, n_parameters (of the blocks), work, seconds, gib."""
    n_layers = config.get_text_config(decoder=True).num_hidden_layers
    few, more = (seconds_of(config, n) for n in N_BLOCKS)
    blocks = models.blocks_of(loading.without_weights(config))
    n_parameters = sum(one.numel() for block in blocks for one in block.parameters())
    memory_of, rows = gib_of(config), []
    for work, seconds in more.items():
        taken = (seconds - few[work]) / (N_BLOCKS[1] - N_BLOCKS[0]) * n_layers
        row = {"size": name, "n_parameters": n_parameters, "work": work}
        rows.append(row | {"seconds": round(taken, 4), "gib": round(memory_of[work], 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_growth")
    parser.add_argument("--whole", action="store_true", help="the embedded models as they are")
    parser.add_argument("--size", choices=sizes(), help="one size alone; writes nothing")
    options = parser.parse_args()
    if options.whole:
        for name in WHOLE:
            model = loading.load(name, precision.preferred_dtype("cpu"))[0]
            print(name, {work: round(taken, 3) for work, taken in timed(model, 3).items()})
        return
    rows = []
    for name, config in sizes().items():
        if options.size in (None, name):
            rows += rows_of(name, config)
            print(json.dumps(rows[-4:]), flush=True)
    if not options.size:
        path = REFERENCE / "growth.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        of_here = {"rows": rows, "processor": bench.processor(), "versions": versions()}
        write_json(path, stored | {bench.kind_of_machine(): of_here})


if __name__ == "__main__":
    main()
