"""What two processes do with one model: started by ``test_ranks``, one process a rank; each prints
what it found as JSON.

python -m tests.ranks RANK FOLDER [JOB ...]
"""

import contextlib
import json
import os
import sys
import types
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import fsdp_utils
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ssah_utils import models, precision, ranks, training, unit_training
from ssah_utils.per_unit import KINDS, PerUnit
from tests.conftest import VOCABULARY, parameters_of, same_parameters, tiny_model
from tests.test_training import examples_of
from tests.test_unit_training import scattered, trainable_entries

BATCHES = [
    torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(n))
    for n in range(4)
]


def steps(model: nn.Module, rank: int, n_ranks: int) -> torch.optim.Optimizer:
    """Plain steps, each rank on its share of every batch."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=2e-2, momentum=0.9
    )
    for ids in BATCHES:
        part = ids.chunk(n_ranks)[rank]
        model(part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def distance(model: nn.Module, other: nn.Module) -> float:
    return max(
        (a - b).abs().max().item()
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def spread(model: nn.Module) -> float:
    """How far the ranks are apart."""
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return (high - low).max().item()


def said(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def alone(name: str, chosen: dict[str, Tensor], rest: bool) -> nn.Module:
    model = tiny_model(name)
    with unit_training.training_only(model, chosen, rest):
        steps(model, 0, 1)
    return model


def parallel(rank: int, name: str, rest: bool, when: str, **how) -> dict:
    """Some units trained by two ranks, and by one on the whole batches; then all of the model by
    the same wrapper.
    """
    model, chosen = tiny_model(name), scattered(tiny_model(name))
    # the first rank's weights count, as in any training with DistributedDataParallel
    if rank and when == "inside":
        model.load_state_dict({key: value + 0.01 for key, value in model.state_dict().items()})
    wrapper = DistributedDataParallel(model, **how) if when == "before" else None
    with unit_training.training_only(wrapper or model, chosen, rest) as inside:
        given = inside is (wrapper or model)
        steps(wrapper or DistributedDataParallel(model, **how), rank, 2)
    expected = alone(name, chosen, rest)
    start = dict(tiny_model(name).named_parameters())
    found = {"given": given, "distance": distance(model, expected), "spread": spread(model)}
    found["moved"] = distance(model, tiny_model(name))
    masks = trainable_entries(model, chosen, rest)
    found["frozen"] = all(
        torch.equal(p[~masks[key]], start[key][~masks[key]]) for key, p in model.named_parameters()
    )
    if when == "before":
        steps(wrapper, rank, 2)
        steps(expected, 0, 1)
        found["after"] = distance(model, expected)
    return found


def hooks(rank: int) -> dict:
    """What was registered on the wrapper goes on."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    wrapper, calls = DistributedDataParallel(tiny_model("llama"), forward_sync_buffers=False), []
    wrapper.register_comm_hook(
        None, lambda state, bucket: (calls.append("sum"), allreduce_hook(None, bucket))[1]
    )
    wrapper.register_forward_hook(lambda *args: calls.append("forward"))
    wrapper.eval()
    with unit_training.training_only(wrapper, scattered(wrapper.module)):
        steps(wrapper, rank, 2)
        kept = (wrapper.training, wrapper.forward_sync_buffers)
    return {
        "kept": kept,
        "sum": "sum" in calls,
        "forward": calls.count("forward"),
        "spread": spread(wrapper.module),
    }


def by_blocks(model: nn.Module, **how) -> nn.Module:
    """FSDP2 as it is used: every block, then what is around them."""
    for block in models.blocks_of(model):
        fully_shard(block, **how)
    return fully_shard(model, **how)


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(one) for name, one in model.named_parameters()}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in found)


def sharded(rank: int, name: str, rest: bool, when: str, **how) -> dict:
    """As ``parallel``, by FSDP2; inside, a checkpoint; then all of the still sharded model."""
    model, chosen = tiny_model(name), scattered(tiny_model(name))
    start, names = parameters_of(model), list(model.state_dict())
    if when == "before":
        by_blocks(model, **how)
        model(BATCHES[0], labels=BATCHES[0]).loss.backward()  # FSDP2 has made up its mind
    with unit_training.training_only(model, chosen, rest):
        if when == "inside":
            by_blocks(model, **how)
        parts = [p for p in model.parameters() if p.requires_grad]
        found = {"sharded": all(isinstance(p, DTensor) for p in model.parameters())}
        optimizer = steps(model, rank, 2)
        states = [state["momentum_buffer"] for state in optimizer.state.values()]
        found["states"] = len(states) == len(parts) and all(isinstance(s, DTensor) for s in states)
        inside = model.state_dict()
        found["names"] = list(inside) == names
        inside = {key: full(value) for key, value in inside.items()}
        one = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
        whole = get_model_state_dict(model, options=one)  # as accelerate asks for it
        found["checkpoint"] = rank > 0 or all(
            torch.equal(whole[key], inside[key]) for key in inside
        )
    alone_model = alone(name, chosen, rest)
    expected = parameters_of(alone_model)
    after = full_parameters(model)
    found["still"] = all(isinstance(p, DTensor) for p in model.parameters())
    found["distance"], found["moved"] = furthest(after, expected), furthest(after, start)
    found["saved"] = max((after[key] - inside[key]).abs().max().item() for key in after)
    masks = trainable_entries(alone_model, chosen, rest)
    found["frozen"] = all(torch.equal(after[k][~masks[k]], start[k][~masks[k]]) for k in after)
    steps(model, rank, 2)
    steps(alone_model, 0, 1)
    found["after"] = furthest(full_parameters(model), parameters_of(alone_model))
    return found


def early(rank: int) -> dict:
    """What an optimizer says, inside and afterwards, that was made of a sharded model before."""
    model, chosen = tiny_model("llama"), scattered(tiny_model("llama"))
    start = parameters_of(model)
    by_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def inside() -> None:
        with unit_training.training_only(model, chosen):
            run(model, optimizer, BATCHES[:1], rank, 2)

    found = {"inside": said(inside), "whole": furthest(full_parameters(model), start)}
    optimizer.zero_grad()
    found["after"] = said(lambda: run(model, optimizer, BATCHES[:1], rank, 2))
    found["still whole"] = furthest(full_parameters(model), start)
    found["anew"] = said(lambda: run(model, adamw(model), BATCHES[:1], rank, 2))
    found["moved"] = furthest(full_parameters(model), start)
    return found


def narrow(rank: int) -> dict:
    """A bfloat16 model of which blocks, in float32, and the rest are trained together."""
    found = {}
    for when in ("before", "inside"):
        model = tiny_model("llama").bfloat16()
        chosen, start = scattered(model), parameters_of(model)
        if when == "before":
            by_blocks(model)

        def go(model=model, chosen=chosen, when=when) -> None:
            with unit_training.freezing(model, chosen):
                if when == "inside":
                    by_blocks(model)
                run(model, adamw(model), BATCHES[:1], rank, 2)

        found[when] = said(go)
        found[f"{when}, whole"] = furthest(full_parameters(model), start)
    return found


def mixed(rank: int) -> dict:
    """The same model as ``accelerate launch --mixed_precision bf16`` prepares it."""
    PartialState(cpu=True)  # its loggers ask for it
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        mixed_precision_policy="bf16",
    )
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),
        mixed_precision="bf16",
        is_main_process=rank == 0,
    )
    model = tiny_model("llama").bfloat16()
    frozen, start = scattered(model), parameters_of(model)
    with unit_training.freezing(model, frozen):
        fsdp_utils.fsdp2_prepare_model(accelerator, model)
        run(model, adamw(model), BATCHES, rank, 2)
    after = {name: one.bfloat16() for name, one in full_parameters(model).items()}
    masks = trainable_entries(tiny_model("llama"), ~frozen, True)
    return {
        "frozen": all(torch.equal(after[k][~masks[k]], start[k][~masks[k]]) for k in after),
        "moved": furthest(after, start),
        "goes on": said(lambda: run(model, adamw(model), BATCHES[:1], rank, 2)),
    }


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def run(model: nn.Module, optimizer, batches: list[Tensor], rank: int, n_ranks: int) -> None:
    for ids in batches:
        part = ids.chunk(n_ranks)[rank]
        model(part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def resumed(rank: int, name: str, folder: str) -> dict:
    """Two steps on some ranks, two more on others; against four on one."""

    def part_of_run(batches: list, n: int, start: tuple | None, save: bool = True) -> tuple:
        """On ``n`` ranks: the state of model and optimizer, and the model that comes out."""
        model = tiny_model(name)
        with unit_training.training_only(model, scattered(model)):
            if n == 2:
                by_blocks(model)
            optimizer = adamw(model)
            if start is not None and n == 2:
                is_first = rank == 0
                weights, states = start if is_first else ({}, {})
                set_model_state_dict(model, dict(weights), options=FROM_FIRST)
                set_optimizer_state_dict(model, optimizer, dict(states), options=FROM_FIRST)
            elif start is not None:
                set_model_state_dict(model, dict(start[0]), options=FULL)
                set_optimizer_state_dict(model, optimizer, dict(start[1]), options=FULL)
            run(model, optimizer, batches, rank if n == 2 else 0, n)
            state = None
            if save:
                weights = get_model_state_dict(model, options=FULL)
                state = [weights, get_optimizer_state_dict(model, optimizer, options=FULL)]
                if n == 2:  # only the first rank is given them
                    dist.broadcast_object_list(state)
                if n == 2:
                    sharded = {"model": get_model_state_dict(model)}
                    checkpoint.save(sharded, checkpoint_id=f"{folder}/{name}")
        return state, full_parameters(model)

    _, expected = part_of_run(BATCHES, 1, None, save=False)
    found = {}
    for first, second in ((2, 1), (1, 2), (2, 2)):
        state, model = part_of_run(BATCHES[:2], first, None)
        _, after = part_of_run(BATCHES[2:], second, state, save=False)
        found[f"{first} to {second}"] = furthest(after, expected)
        if first == 2:
            here = furthest(model, {key: state[0][key] for key in model})
            found["whole"] = max(here, found.get("whole", 0.0))
            found["names"] = not [key for key in state[0] if "block" in key or "rest" in key]
    # what two ranks saved in shards, read by one model that never was sharded, and inside a block
    plain = tiny_model(name)
    values = {"model": get_model_state_dict(plain)}
    checkpoint.load(values, checkpoint_id=f"{folder}/{name}")
    set_model_state_dict(plain, values["model"])
    found["shards"] = furthest(parameters_of(plain), model)
    again = tiny_model(name)
    with unit_training.training_only(again, scattered(again)):
        by_blocks(again)
        values = {"model": get_model_state_dict(again)}
        checkpoint.load(values, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(again, values["model"])
    found["shards inside"] = furthest(full_parameters(again), model)
    return found


def accelerated(rank: int, folder: str, by_first: bool) -> dict:
    """What ``Accelerator.prepare`` and the Trainer's checkpoints do; then another model resumes."""
    PartialState(cpu=True)  # its loggers ask for it
    plugins = {
        kind: FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=by_first,
            state_dict_type=f"{kind}_STATE_DICT",
        )
        for kind in ("FULL", "SHARDED")
    }
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugins["FULL"]),
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=rank == 0,
        process_index=rank,
        num_processes=2,
        is_fsdp2=True,
        wait_for_everyone=dist.barrier,
    )
    chosen, name = scattered(tiny_model("llama")), "llama"
    model = tiny_model(name)
    with unit_training.training_only(model, chosen):
        fsdp_utils.fsdp2_prepare_model(accelerator, model)
        steps(model, rank, 2)
        optimizer = adamw(model)
        run(model, optimizer, BATCHES[:1], rank, 2)
        moments = [full(state["exp_avg"]) for state in optimizer.state.values()]
        for kind, plugin in plugins.items():
            place = f"{folder}/{kind}-{by_first}"
            fsdp_utils.save_fsdp_model(plugin, accelerator, model, place)
            fsdp_utils.save_fsdp_optimizer(plugin, accelerator, optimizer, model, place)
        names = list(get_model_state_dict(model, options=FULL))
    found = {"names": rank > 0 or names == list(tiny_model(name).state_dict())}
    trained = full_parameters(model)
    alone_model = tiny_model(name)
    with unit_training.training_only(alone_model, chosen):
        steps(alone_model, 0, 1)
        run(alone_model, adamw(alone_model), BATCHES[:1], 0, 1)
    found["distance"] = furthest(trained, parameters_of(alone_model))
    found["moved"] = furthest(trained, parameters_of(tiny_model(name)))
    for kind, plugin in plugins.items():
        again, place = tiny_model(name), f"{folder}/{kind}-{by_first}"
        with unit_training.training_only(again, chosen):
            fsdp_utils.fsdp2_prepare_model(accelerator, again)
            optimizer = adamw(again)
            fsdp_utils.load_fsdp_model(plugin, accelerator, again, place)
            fsdp_utils.load_fsdp_optimizer(plugin, accelerator, optimizer, again, place)
            loaded = [full(state["exp_avg"]) for state in optimizer.state.values()]
        found[kind.lower()] = furthest(full_parameters(again), trained)
        same = all(torch.equal(a, b) for a, b in zip(loaded, moments, strict=True))
        found["optimizer"] = found.get("optimizer", 0) + (not same)
    return found


def held(tensors) -> int:
    """Bytes in this process."""
    locals_ = [one.to_local() if isinstance(one, DTensor) else one for one in tensors]
    return sum({one.data_ptr(): one.untyped_storage().nbytes() for one in locals_}.values())


def memory(rank: int) -> dict:
    """Bytes of parameters and optimizer after a step: of plain FSDP2, and of some units."""

    def of(context) -> int:
        model = wide_model()
        with context(model):
            by_blocks(model)
            optimizer = adamw(model)
            run(model, optimizer, BATCHES[:1], rank, 2)
            states = [value for one in optimizer.state.values() for value in one.values()]
            originals = [m.original[0] for m in model.modules() if hasattr(m, "original")]
            return held([*model.parameters(), *model.buffers(), *originals, *states])

    return {
        "plain": of(lambda model: contextlib.nullcontext()),
        "20% trained": of(lambda m: unit_training.training_only(m, share_of(m, 0.2))),
        "7.5% frozen": of(lambda m: unit_training.freezing(m, share_of(m, 0.075))),
    }


def share_of(model: nn.Module, share: float) -> PerUnit:
    shape, generator = models.shape_of(model), torch.Generator().manual_seed(0)
    sizes = {kind: (shape.n_layers, shape.n_channels(kind)) for kind in KINDS}
    return PerUnit({k: torch.rand(size, generator=generator) < share for k, size in sizes.items()})


def wide_model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return transformers.AutoModelForCausalLM.from_config(config)


def disagreements(rank: int) -> dict:
    """What every rank says where one of them differs."""
    model, chosen = tiny_model("llama"), scattered(tiny_model("llama"))

    def enter(units, rest: bool = False) -> None:
        with unit_training.training_only(model, units, rest):
            raise AssertionError("entered")

    found = {
        "units": said(lambda: enter(scattered(model, seed=rank))),
        "rest": said(lambda: enter(chosen, bool(rank))),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "code_and_libraries", lambda: f"0.{rank}")
        found["version"] = said(lambda: enter(chosen))
    found["data"] = said(lambda: sft(model, examples_of(16, rank)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "PATIENCE", 1)
        found["absent"] = said(lambda: enter(chosen)) if rank == 0 else "nothing"
    if rank:  # so that both go on from the same place
        next(ranks._PLACES)
    dist.barrier()
    return found


def sharded_otherwise(when: str) -> dict:
    """FSDP 1, and an FSDP2 model of which a part is called."""
    found = {}
    for way, how in {"flat": {}, "original": {"use_orig_params": True}}.items():
        model, chosen = tiny_model("llama"), scattered(tiny_model("llama"))
        start = parameters_of(model)

        def wrap(model=model, how=how):
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **how)

        for context in (unit_training.training_only, unit_training.freezing):

            def go(context=context, model=model, chosen=chosen, wrap=wrap) -> None:
                with context(wrap() if when == "before" else model, chosen):
                    if when == "inside":
                        wrap()

            found[f"{way}, {context.__name__}"] = said(go)
            if when == "before":
                break
        if when == "inside":
            found[f"{way}, whole"] = same_parameters(model, start)
    return found


def failing(rank: int) -> dict:
    """An error in all ranks, and a part that is called before it was gathered."""
    model, chosen = tiny_model("llama"), scattered(tiny_model("llama"))
    start = parameters_of(model)

    def go() -> None:
        with unit_training.training_only(model, chosen):
            by_blocks(model)
            model(BATCHES[0], labels=BATCHES[0])  # and not back
            raise ZeroDivisionError

    def call_a_part() -> None:
        with unit_training.training_only(model, chosen):
            model.model.layers[0].mlp.down_proj(torch.zeros(1, 70))

    found = {"error": said(go), "whole": furthest(full_parameters(model), start)}
    found["part"] = said(call_a_part)
    found["still whole"] = furthest(full_parameters(model), start)
    return found


def sft(model: nn.Module, examples: list[dict]) -> None:
    from tests.test_ranks import tokenizer_of_words

    config = training.SFTConfig(1e-2, max_steps=3, batch_size=2, warmup_steps=0)
    training.train_sft(model, tokenizer_of_words(), examples, config)


def trained_sft(rank: int) -> dict:
    """The trainer of the package, in two processes and in one."""
    made = training.training_arguments

    def in_order(*args):
        arguments = made(*args)
        arguments.train_sampling_strategy = "sequential"
        return arguments

    training.training_arguments = in_order
    model = tiny_model("llama")
    sft(model, examples_of(16))
    return {
        "spread": spread(model),
        "sum": sum(p.double().abs().sum().item() for p in model.parameters()),
    }


def buffers_sent(rank: int) -> dict:
    """What DistributedDataParallel sends at every forward pass beside what it sends anyway."""
    model = tiny_model("llama")
    plain = len(DistributedDataParallel(tiny_model("llama")).modules_buffers)
    with unit_training.training_only(model, scattered(model)):
        return {"more": len(DistributedDataParallel(model).modules_buffers) - plain}


def main(rank: int, folder: str, *only: str) -> None:
    precision.preferred_dtype = lambda device: torch.float32
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    jobs: dict[str, Callable[[], dict]] = {}
    for name in ("llama", "gpt2"):
        for rest in (False, True):
            for when in ("before", "inside"):
                case = (rank, name, rest, when)
                jobs[f"DDP, {name}, {rest}, {when}"] = lambda case=case: parallel(*case)
    for name, rest, when in (
        ("llama", False, "inside"),
        ("llama", True, "before"),
        ("gpt2", True, "inside"),
        ("gpt2", False, "before"),
        ("mixtral", False, "inside"),
        ("mixtral", True, "before"),
    ):
        case = (rank, name, rest, when)
        jobs[f"FSDP2, {name}, {rest}, {when}"] = lambda case=case: sharded(*case)
    jobs["early"] = lambda: early(rank)
    jobs["narrow"] = lambda: narrow(rank)
    jobs["mixed"] = lambda: mixed(rank)
    kept = {"reshard_after_forward": False}
    jobs["FSDP2, kept gathered"] = lambda: sharded(rank, "llama", True, "inside", **kept)
    settings = {"forward_sync_buffers": False, "static_graph": True, "bucket_cap_mb": 1}
    jobs["settings"] = lambda: parallel(rank, "llama", True, "before", **settings)
    jobs["hooks"] = lambda: hooks(rank)
    jobs["buffers"] = lambda: buffers_sent(rank)
    for name in ("llama", "mixtral"):
        jobs[f"resumed, {name}"] = lambda name=name: resumed(rank, name, folder)
    for way, by_first in {"loaded by all": False, "loaded by the first": True}.items():
        job = lambda by_first=by_first: accelerated(rank, folder, by_first)  # noqa: E731
        jobs[f"accelerate, {way}"] = job
    jobs["memory"] = lambda: memory(rank)
    jobs["disagreements"] = lambda: disagreements(rank)
    for when in ("before", "inside"):
        jobs[f"FSDP 1, {when}"] = lambda when=when: sharded_otherwise(when)
    jobs["failing"] = lambda: failing(rank)
    jobs["train_sft"] = lambda: trained_sft(rank)
    found = {name: job() for name, job in jobs.items() if not only or name in only}
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
