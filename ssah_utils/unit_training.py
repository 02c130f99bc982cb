"""Train some units of a model and leave every other entry exactly as it is.

A unit owns its writer column and the matching reader rows (``models``). A matrix of which some
entries are trained is cut in two parameters, of which the other one is frozen
(``partial_parameters``). So frozen entries can have no gradient, no optimizer state and no decay,
whatever loop, optimizer or precision is used, and they stay bit-identical. What cannot be trained
so, ``guards`` refuses. A plain ``{kind: tensor}`` will do for a set of units. Does not know how a
model is trained, or on what.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssah_utils import (
    guards,
    models,
    partial_experts,
    partial_linear,
    partial_parameters,
    ranks,
    shards,
    wrappers,
)
from ssah_utils.experts import ExpertsWriter
from ssah_utils.partial_parameters import Partial, PartialParameter
from ssah_utils.per_unit import KINDS, PerUnit

TOGETHER = 30  # seconds in which all processes must leave a block that failed


@contextmanager
def training_only(
    model: nn.Module, trainable: Mapping[str, Tensor], train_rest: bool = False
) -> Iterator[nn.Module]:
    """Inside the block only the given units are parameters; leaving it returns the model, trained.

    Use any loop that takes the model's parameters: Hugging Face ``Trainer``, TRL, accelerate, plain
    torch. Checkpoints written inside are ordinary checkpoints of the whole model.

        with training_only(model, partition.units("redundant")):
            optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
            ...

    ``train_rest`` decides about what belongs to no unit: query and key rows, norms, embeddings,
    language-model head, output biases. Under grouped-query attention, a value row that several
    channels share is trainable only if all of them are. A block is kept in float32 also where the
    model is in bfloat16.

    Make optimizers inside the block, and use them only there: the first step of one made before
    raises ``ValueError``, as does one used afterwards. ``model`` may come in ``torch.compile``,
    ``DataParallel``, ``DistributedDataParallel`` or FSDP2 (``fully_shard``), or be wrapped inside.
    In several processes, all must enter and leave the block, with the same units. Under FSDP2, all
    must also ask for ``state_dict()`` together, and leaving gives a model that is still sharded.

    Raises ``ValueError`` for a model sharded otherwise (FSDP 1, DeepSpeed ZeRO-3, tensor
    parallelism), also when that happens inside; for one in bfloat16 under FSDP2 whose rest is
    trained, at the latest in its first forward pass, unless that is mixed precision; where the
    processes differ; for a set that is not of the model's shape, leaves nothing to train, or is
    everything; and for a matrix that is shared, quantised or no plain linear map. Raises
    ``TypeError`` for a set of numbers.
    """
    guards.refuse_sharded(model)
    guards.refuse_quantised(model)
    plain = wrappers.unwrapped(model)
    trainable = _checked(plain, trainable)
    if not trainable.any() and not train_rest:
        raise ValueError("nothing to train: the set of trainable units is empty")
    if trainable.all() and train_rest:
        raise ValueError("nothing is frozen: train the model as it is")
    with _cut_inside(model, plain, trainable, train_rest):
        yield model


@contextmanager
def _cut_inside(
    model: nn.Module, plain: nn.Module, trainable: PerUnit, train_rest: bool
) -> Iterator[None]:
    """Inside the block the given units, and perhaps the rest, are all that is trained."""
    ranks.require_agreement(_common_ground(plain, trainable, train_rest))
    required = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    watch = None
    try:
        replaced = _cut_all(model, plain, trainable, train_rest)
        guards.follow_parameters(model)
        watch = guards.Watch(plain, replaced)
        del replaced  # what nobody else holds is given back
        yield
    except BaseException as error:
        is_sharded = any(shards.is_shared_out(part.block) for _, _, part in _parts(plain))
        if is_sharded and not ranks.all_come(TOGETHER):
            error.add_note("Other ranks are elsewhere, so the sharded model was not put together.")
            raise
        # FSDP2 says so at its first forward pass, where it is told of the parameters inside
        is_refused = isinstance(error, AssertionError) and shards.Lists(model).has_two_precisions
        try:
            _leave(model, plain, required, watch)
        except (ValueError, RuntimeError) as another:  # or a rank is gone
            error.add_note(str(another))
        if is_refused:
            raise ValueError(shards.TWO_PRECISIONS) from error
        raise
    _leave(model, plain, required, watch)


def _common_ground(model: nn.Module, trainable: PerUnit, train_rest: bool) -> dict[str, object]:
    """What must be the same in every process."""
    units = {
        kind: hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()
        for kind, values in trainable.items()
    }
    shapes = [(name, tuple(one.shape), str(one.dtype)) for name, one in model.named_parameters()]
    return {
        "the units to train": units,
        "whether the rest is trained": train_rest,
        "the shape of the model": shapes,
        "the versions of ssah_utils or of libraries": ranks.code_and_libraries(),
    }


def _cut_all(
    model: nn.Module, plain: nn.Module, trainable: PerUnit, train_rest: bool
) -> list[tuple[Tensor, PartialParameter]]:
    """Make the given units all that is trained of the matrices that units own.

    Returns what optimizers may hold of these matrices, and what replaces it.
    """
    uses = Counter(id(parameter) for _, parameter in plain.named_parameters(remove_duplicate=False))
    lists = shards.Lists(model)
    for parameter in plain.parameters():
        parameter.requires_grad_(train_rest)
        parameter.grad = None  # an optimizer would follow it
    for experts, chosen in _mixtures(plain, trainable):
        partial_experts.check_parameters(experts, uses)
        partial_experts.cut_experts(experts, chosen, lists)
    for linear, name, trained, by_columns in _matrices(plain, trainable, train_rest):
        _check_matrix(linear, name, uses)
        # All of a float32 matrix needs no block. In a lower precision, only a block keeps small
        # updates.
        if not trained.any() or (trained.all() and linear.weight.dtype == torch.float32):
            linear.weight.requires_grad_(bool(trained.any()))
            if not by_columns and linear.bias is not None:
                linear.bias.requires_grad_(bool(trained.any()))
        else:
            partial_linear.cut_linear(linear, trained, by_columns, lists)
    lists.close()
    held = [(lists.as_held(part.original[0]), part) for _, _, part in _parts(plain)]
    return [(whole, part) for whole, part in held if whole is not None]


def _leave(
    model: nn.Module, plain: nn.Module, required: dict[str, bool], watch: guards.Watch | None
) -> None:
    """Make ordinary parameters of all; ``ValueError`` where this process cannot."""
    parts, lists = list(_parts(plain)), shards.Lists(model)
    guards.refuse_out_of_reach([(part, "block") for _, _, part in parts], lists)
    if watch is not None:
        watch.close({part: (module, name) for module, name, part in parts})
    for module in [one for one in plain.modules() if isinstance(one, Partial)]:
        partial_parameters.merge(module, lists)
    # by name: some parameters may have been exchanged inside
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(required.get(name, parameter.requires_grad))
    lists.widen()
    lists.close()
    guards.follow_parameters(model)


@contextmanager
def freezing(
    model: nn.Module, frozen: Mapping[str, Tensor], train_rest: bool = True
) -> Iterator[nn.Module]:
    """Inside the block everything but the given units is trained: ``training_only`` for the others.

    with freezing(model, partition.units("safety")):
        train_sft(model, tokenizer, examples, config)
    """
    guards.refuse_sharded(model)
    guards.refuse_quantised(model)
    frozen = _checked(wrappers.unwrapped(model), frozen)
    if not frozen.any():
        raise ValueError(
            "nothing is frozen: the set of frozen units is empty; train the model as it is"
        )
    if frozen.all() and not train_rest:
        raise ValueError("nothing to train: every unit is frozen")
    with training_only(model, ~frozen, train_rest):
        yield model


@contextmanager
def training_all(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block everything is trained, and computed as where some units are frozen.

    So trainings with and without frozen units differ in nothing else. In float32 that is the model
    as it is. In a lower precision, matrices of units are kept in float32 here as they are there, or
    small updates would add up under frozen units alone. Raises what ``training_only`` raises for a
    model.
    """
    plain = wrappers.unwrapped(model)
    if all(one.dtype.itemsize >= torch.float32.itemsize for one in plain.parameters()):
        yield model
        return
    guards.refuse_sharded(model)
    guards.refuse_quantised(model)
    shape = models.shape_of(plain)
    sizes = {kind: (shape.n_layers, shape.n_channels(kind)) for kind in KINDS}
    every = PerUnit({kind: torch.ones(size, dtype=torch.bool) for kind, size in sizes.items()})
    with _cut_inside(model, plain, _checked(plain, every), train_rest=True):
        yield model


def _checked(model: nn.Module, units: Mapping[str, Tensor]) -> PerUnit:
    """The set; ``ValueError`` when it cannot be trained or frozen on the model.

    ``TypeError`` when it is no set.
    """
    if is_partial(model):
        raise ValueError(
            "some units of this model are being trained already: leave that block first"
        )
    return models.check_per_unit(model, units).as_set()


def _check_matrix(linear: nn.Module, name: str, uses: dict[int, int]) -> None:
    """``ValueError`` unless a matrix is a plain linear map with weights of its own.

    ``uses``: how many modules hold each parameter, by its id.
    """
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    parameters = [one for one in (weight, bias) if one is not None]
    if any(uses[id(parameter)] > 1 for parameter in parameters):
        raise ValueError(
            f"the weights of '{name}' are shared with another module,"
            " which would be trained along: untie them"
        )
    is_plain = models.is_linear_map(linear) and "forward" not in vars(linear)
    if not is_plain or not all(isinstance(parameter, nn.Parameter) for parameter in parameters):
        raise ValueError(
            f"'{name}' is a {type(linear).__name__} that computes its output or its weights"
            " in a way of its own: take off what does"
            " (an adapter, a quantiser, a parametrization, a device map) first"
        )


def is_partial(model: nn.Module) -> bool:
    """Whether some units of the model are being trained, inside a block."""
    return any(isinstance(module, Partial) for module in model.modules())


def count_trainable(model: nn.Module) -> int:
    """Entries that an optimizer would change now."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _parts(model: nn.Module) -> Iterator[tuple[nn.Module, str, PartialParameter]]:
    """Every partial parameter: the module that holds it, its ordinary name there, its parts."""
    for module in model.modules():
        if isinstance(module, Partial):
            for name, part in module.parts().items():
                yield module, name, part


def _matrices(
    model: nn.Module, trainable: PerUnit, train_rest: bool
) -> Iterator[tuple[nn.Module, str, Tensor, bool]]:
    """Every matrix that units own: the linear map, its name, its trained entries.

    Last, whether these are columns and not rows.
    """
    shape, architecture = models.shape_of(model), models.architecture_of(model)
    rows_of: dict[tuple[int, str], Tensor] = {}  # trained rows, by block and path of the matrix
    blocks = models.blocks_of(model)
    for writer in models.writers(model):
        if isinstance(writer.module, ExpertsWriter):
            continue
        block, chosen = writer.block, _chosen(trainable, writer)
        path = architecture.writers[writer.kind]
        yield block.get_submodule(path), path.rpartition(".")[2], chosen, True
        for reader in architecture.readers[writer.kind]:
            n_rows = len(models.column_weight(block.get_submodule(reader.path)))
            none = torch.full((n_rows,), train_rest)
            trained = rows_of.setdefault((writer.layer, reader.path), none)
            rows = reader.rows(shape)
            trained[rows] = models.owned_rows(rows, chosen, n_rows)[rows]
    for (layer, path), trained in rows_of.items():
        yield blocks[layer].get_submodule(path), path.rpartition(".")[2], trained, False


def _mixtures(model: nn.Module, trainable: PerUnit) -> Iterator[tuple[nn.Module, Tensor]]:
    """The fused experts of every block, and their trained units."""
    for writer in models.writers(model, "mlp"):
        if isinstance(writer.module, ExpertsWriter):
            yield writer.module.experts, _chosen(trainable, writer)


def _chosen(units: PerUnit, writer: models.Writer) -> Tensor:
    """Which of a writer's channels are in a set: (n_channels,) bool."""
    return units[writer.kind][writer.layer, writer.channels].cpu()
