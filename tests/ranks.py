"""What two processes do with one model: started by ``test_ranks``, one process a rank; each prints
what it found as JSON.

python -m tests.ranks RANK FILE
"""

import json
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ssah_utils import precision, training, unit_training
from tests.conftest import VOCABULARY, tiny_model
from tests.test_training import examples_of
from tests.test_unit_training import scattered, trainable_entries

BATCHES = [
    torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(n))
    for n in range(4)
]


def steps(model: nn.Module, rank: int, n_ranks: int) -> None:
    """Plain steps, each rank on its share of every batch."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=2e-2, momentum=0.9
    )
    for ids in BATCHES:
        part = ids.chunk(n_ranks)[rank]
        model(part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


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


def sharded(shard: Callable[[nn.Module], nn.Module], when: str) -> dict:
    model = tiny_model("llama")
    chosen = scattered(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = BATCHES[0][:2]
    if when == "before":
        model = shard(model)
        found = {}
        for context in (unit_training.training_only, unit_training.freezing):

            def enter(context=context) -> None:
                with context(model, chosen):
                    pass

            found[context.__name__] = said(enter)
        return found

    def train() -> None:
        with unit_training.training_only(model, chosen):
            wrapped = shard(model)
            wrapped(ids, labels=ids).loss.backward()

    def leave() -> None:
        with unit_training.training_only(model, chosen):
            steps(model, 0, 1)
            trained.update({key: value.clone() for key, value in model.state_dict().items()})
            model.eval()(ids)
            shard(model)

    found, trained = {"first step": said(train)}, {}
    # in the other, all units are trained
    matrices = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 2)]
    found["whole"] = all(
        torch.equal(model.get_parameter(name), start[name])
        for name in matrices
        if is_there(model, name)
    )
    model = tiny_model("llama")
    found["leaving"] = said(leave)
    found["trained"] = all(
        torch.equal(model.get_parameter(name), trained[name])
        for name in matrices
        if is_there(model, name)
    )
    found["there"] = sum(is_there(model, name) for name in matrices)
    return found


def is_there(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_parameters())


def trained_sft(rank: int) -> dict:
    """The trainer of the package, in two processes and in one."""
    made = training.training_arguments

    def in_order(*args):
        arguments = made(*args)
        arguments.train_sampling_strategy = "sequential"
        return arguments

    training.training_arguments = in_order
    from tests.test_ranks import tokenizer_of_words

    model, tokenizer = tiny_model("llama"), tokenizer_of_words()
    training.train_sft(
        model,
        tokenizer,
        examples_of(16),
        training.SFTConfig(1e-2, max_steps=3, batch_size=2, warmup_steps=0),
    )
    return {
        "spread": spread(model),
        "sum": sum(p.double().abs().sum().item() for p in model.parameters()),
    }


SHARDS = {
    "FSDP 2": lambda model: fully_shard(model),
    "FSDP 2 of blocks": lambda model: ([fully_shard(block) for block in model.model.layers], model)[
        1
    ],
    "FSDP 1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "FSDP 1, original parameters": lambda model: FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True
    ),
}


def main(rank: int, file: str) -> None:
    precision.preferred_dtype = lambda device: torch.float32
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {
        f"{name}, {rest}, {when}": parallel(rank, name, rest, when)
        for name in ("llama", "gpt2")
        for rest in (False, True)
        for when in ("before", "inside")
    }
    found["settings"] = parallel(
        rank,
        "llama",
        True,
        "before",
        forward_sync_buffers=False,
        static_graph=True,
        bucket_cap_mb=1,
    )
    found["hooks"] = hooks(rank)
    for name, shard in SHARDS.items():
        for when in ("before", "inside"):
            found[f"{name}, {when}"] = sharded(shard, when)
    found["train_sft"] = trained_sft(rank)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
