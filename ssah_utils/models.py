"""The units of causal language models: where they are, how many, and what writes them.

A *unit* is one input channel of the matrix through which a sub-layer writes to the residual stream,
its *writer*: ``o_proj`` (kind ``attention``) or ``down_proj`` (kind ``mlp``). The matrices whose
output rows feed a unit are its *readers*. Where they are, ``architectures`` says; that is held
against a model wherever its shape is asked for. Of a model that also sees or hears, the part that
reads and writes text is looked at. Does not know prompts, scores or sets of units.
"""

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from ssah_utils import placement, quantised
from ssah_utils.architectures import Architecture, Mixture, ModelShape, architecture
from ssah_utils.experts import ExpertsWriter, GatedWriter, HookedWriter, layout
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.wrappers import plain_name, uncompiled, unwrapped

Hookable = nn.Module | HookedWriter  # what takes hooks on its input, like a module
FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"


@contextmanager
def hooking() -> Iterator[list]:
    """Hooks whose handles are put into the list take effect inside the block and are gone after it.

    Compiled models, and compiled parts of models, run uncompiled inside the block: code that
    ``torch.compile`` made before does not look for new hooks.
    """
    handles: list = []
    with uncompiled:
        try:
            yield handles
        finally:
            for handle in handles:
                handle.remove()


# ---------------------------------------------------------------------------------------- structure


def architecture_of(model: nn.Module) -> Architecture:
    """Entry of ``ARCHITECTURES`` for a model.

    ``ValueError`` where there is none says which matrices it would have to name.
    """
    model_type = text_config(model).model_type
    try:
        return architecture(model_type)
    except ValueError as error:
        lists = [part for part in backbone_of(model).modules() if isinstance(part, nn.ModuleList)]
        blocks = max(lists, key=len, default=None)
        if not blocks:
            raise
        matrices = [name for name, one in blocks[0].named_parameters() if one.ndim > 1]
        named = ", ".join(name.removesuffix(".weight") for name in matrices)
        raise ValueError(f"{error}: {named}") from None


def text_config(model: nn.Module) -> PretrainedConfig:
    """Configuration of the part of a model that reads and writes text."""
    return unwrapped(model).config.get_text_config(decoder=True)


def shape_of(model: nn.Module) -> ModelShape:
    """Sizes from ``model.config``, checked against the model.

    ``ValueError`` where they disagree, or where a block has a matrix that the architecture's entry
    does not name, so that neither a wrong entry nor a block of another kind can go unnoticed.
    """
    family, config = architecture_of(model), text_config(model)
    where = f"architecture '{config.model_type}'"
    _check_computation(config, where)
    blocks = {f"{where}: block {number}": block for number, block in enumerate(blocks_of(model))}
    for name, block in blocks.items():
        if family.mixture and not _is_there(block, family.mixture.experts):
            raise ValueError(
                f"{name} has no '{family.mixture.experts}': blocks with experts and blocks without"
                " have different numbers of units, and a model of both is not supported"
            )
        _check_covered(block, family, config.hidden_size, name)
    try:
        shape = _configured_shape(model)
    except (AttributeError, RuntimeError, TypeError) as error:  # absent, or one for each block
        why = str(error).splitlines()[0]
        raise ValueError(f"{where}: its configuration does not say its sizes: {why}") from error
    if len(blocks) != shape.n_layers or not blocks:
        raise ValueError(
            f"the model has {len(blocks)} blocks, its configuration says {shape.n_layers}"
        )
    sizes = {kind: _sizes_of(family, shape, kind) for kind in KINDS}
    for name, block in blocks.items():
        if family.mixture:
            _check_experts(block, family.mixture.experts, shape, name)
        for kind in KINDS:
            _check_sizes(block, *sizes[kind], name)
    return shape


def _configured_shape(model: nn.Module) -> ModelShape:
    """Sizes from ``model.config`` alone, and where the blocks are."""
    config = text_config(model)
    n_heads, first = config.num_attention_heads, functools.partial(_first_of, config)
    # of Falcon, whose newer layout has groups whatever the first of them says
    is_one_group = first("multi_query") and not first("new_decoder_architecture")
    n_groups = first("num_key_value_heads", "num_kv_heads") or n_heads
    times_d_model = first("expansion_ratio") or 4  # where no width is given
    dense = first("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    mixture = architecture_of(model).mixture
    return ModelShape(
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=n_heads,
        n_kv_heads=1 if is_one_group else n_groups,
        head_dim=first("head_dim") or config.hidden_size // n_heads,
        d_ff=mixture.d_shared(config) if mixture else dense or times_d_model * config.hidden_size,
        blocks=f"{backbone_path(model)}.{architecture_of(model).blocks}",
        n_experts=first("num_local_experts", "num_experts") or 0 if mixture else 0,
        d_expert=first(mixture.d_expert) or 0 if mixture else 0,
    )


def _first_of(config: PretrainedConfig, *names: str) -> int | None:
    """The first of some fields that is there and neither zero nor None."""
    return next(filter(None, (getattr(config, name, None) for name in names)), None)


def _check_computation(config: PretrainedConfig, where: str) -> None:
    """``ValueError`` for a configuration under which units are not what is said of them here."""
    both_ways = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if both_ways or not getattr(config, "is_causal", True):
        raise ValueError(
            f"{where}: by its configuration it also reads what follows a token, so it is no causal"
            " language model"
        )
    if getattr(config, "slow_but_exact", False) and config.pretraining_tp > 1:  # BLOOM
        raise ValueError(
            f"{where} multiplies by slices of its writers, where no hook sees a unit:"
            " set slow_but_exact to false in its config.json"
        )


def _check_covered(block: nn.Module, family: Architecture, d_model: int, where: str) -> None:
    """``ValueError`` for a block with a matrix that no part of the entry names."""
    sizes = {plain_name(name): one.shape for name, one in block.named_parameters()}
    matrices = [name for name, size in sizes.items() if len(size) > 1]
    # quantised ones may hold no parameter
    maps = [name for name, module in block.named_modules() if hasattr(module, "out_features")]
    left_out = [name for name in (*matrices, *map(plain_name, maps)) if not family.covers(name)]
    if left_out:
        # rather one that can write to the residual stream
        writing = [name for name in left_out if d_model in sizes.get(name, ())[:-1]]
        name = (writing or left_out)[0].removesuffix(".weight")
        raise ValueError(
            f"{where} has '{name}', which may write to the residual stream and is covered by no"
            " entry of ARCHITECTURES in ssah_utils/architectures.py"
        )


def _sizes_of(
    family: Architecture, shape: ModelShape, kind: str
) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """By the configuration: the shape of a kind's writer, and how many rows each reader needs.

    Both by path; nothing of experts.
    """
    n_channels = shape.n_channels(kind) if kind == "attention" else shape.d_ff
    if not n_channels:  # a mixture without a shared expert
        return {}, {}
    needed: dict[str, int] = {}
    for reader in family.readers[kind]:
        n_rows = int(reader.rows(shape).max()) + 1
        needed[reader.path] = max(n_rows, needed.get(reader.path, 0))
    return {family.writers[kind]: (shape.d_model, n_channels)}, needed


def _check_sizes(
    block: nn.Module, expected: dict[str, tuple[int, int]], needed: dict[str, int], where: str
) -> None:
    """``ValueError`` unless a block's writer and readers have the sizes of ``_sizes_of``."""
    for path in (*expected, *needed):
        try:
            found = matrix_size(block.get_submodule(path))
        except AttributeError:
            raise ValueError(
                f"{where} has no '{path}', which its entry in ARCHITECTURES names"
            ) from None
        if (found[0] < needed[path]) if path in needed else (found != expected[path]):
            wanted = f"{needed[path]} rows" if path in needed else f"the shape {expected[path]}"
            raise ValueError(
                f"{where} has '{path}' of shape {found}, which the configuration does not explain:"
                f" it asks for {wanted}"
            )


def _check_experts(block: nn.Module, path: str, shape: ModelShape, where: str) -> None:
    """``ValueError`` unless a block of a mixture has experts of the configuration's sizes."""
    found = matrix_size(ExpertsWriter(block.get_submodule(path), f"{where}: {path}"))
    if found != (shape.d_model, shape.n_routed):
        raise ValueError(
            f"{where} has '{path}' of shape {found}, which the configuration does not explain:"
            f" it asks for the shape {(shape.d_model, shape.n_routed)}"
        )


def _is_there(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def matrix_size(module: Hookable) -> tuple[int, int]:
    """Outputs and inputs of a linear map, whatever its storage; reads no weight."""
    if isinstance(module, nn.Module) and quantised.is_quantised(module):
        return quantised.outputs_and_inputs(module)
    if isinstance(n_outputs := getattr(module, "out_features", None), int):
        return n_outputs, cast("int", module.in_features)
    size = cast("Tensor", module.weight).shape
    n_outputs, n_inputs = reversed(size) if is_transposed(module) else size
    return n_outputs, n_inputs


def backbone_of(model: nn.Module) -> nn.Module:
    """The part that turns tokens into states, without the language-model head.

    Unwrapped, as it may be compiled on its own; of a model that also sees or hears, the part that
    reads text.
    """
    return unwrapped(unwrapped(model).get_decoder())


def backbone_path(model: nn.Module) -> str:
    """Where ``backbone_of`` is in the model: ``model``, or ``model.language_model``."""
    backbone, named = backbone_of(model), unwrapped(model).named_modules()
    return plain_name(next(name for name, module in named if module is backbone))


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Next-token logits of backbone states: (..., d_model) -> (..., vocabulary).

    By the model's own forward pass, in which the backbone is replaced by what it would return, so
    that what a family does to logits after its head (scales, soft caps) is done here, too.
    """
    plain = unwrapped(model)
    top = backbone_path(plain).partition(".")[0]
    head = copy.copy(plain)  # with the same modules in a dictionary of its own
    head._modules = plain._modules | {top: GivenStates(hidden.reshape(1, -1, hidden.shape[-1]))}
    # of the class, as accelerate binds the forward of a model that it prepares to that model
    logits = type(plain).forward(head).logits
    return logits.reshape(*hidden.shape[:-1], -1)


class GivenStates:
    """Stands in for a backbone, and for its output, of which only the states are known."""

    def __init__(self, states: Tensor) -> None:
        self.states = states

    def __call__(self, *args, **kwargs) -> "GivenStates":
        return self

    def __getitem__(self, place: int) -> Tensor:
        return (self.states,)[place]

    def __getattr__(self, name: str) -> "Tensor | GivenStates | None":
        # OPT asks its backbone for the decoder inside; caches and attentions are nobody's business
        known: dict[str, Tensor | GivenStates] = {"last_hidden_state": self.states, "decoder": self}
        return known.get(name)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, first block first."""
    path = architecture_of(model).blocks
    try:
        return list(cast("nn.ModuleList", backbone_of(model).get_submodule(path)))
    except AttributeError:
        raise ValueError(
            f"architecture '{text_config(model).model_type}': its backbone,"
            f" '{backbone_path(model)}', has no '{path}', which its entry in ARCHITECTURES names"
        ) from None


@dataclass(frozen=True)
class Writer:
    """What writes channels of one block to the residual stream.

    ``channels``: which of the channels of this kind in ``block`` are the inputs of ``module``, a
    linear map, or what can be hooked like one.
    """

    kind: str
    layer: int
    block: nn.Module
    channels: slice
    module: Hookable


def writers(model: nn.Module, *kinds: str) -> list[Writer]:
    """The ``o_proj`` and ``down_proj`` of every block, or those of some kinds; first block first.

    In a mixture, experts and shared expert of a block one after the other. Raises what ``shape_of``
    raises.
    """
    shape, family, blocks = shape_of(model), architecture_of(model), blocks_of(model)
    found = []
    for kind in kinds or KINDS:
        mixture = family.mixture if kind == "mlp" else None
        n_routed, n_channels = shape.n_routed if mixture else 0, shape.n_channels(kind)
        for layer, block in enumerate(blocks):
            if mixture:
                experts = ExpertsWriter(block.get_submodule(mixture.experts), mixture.experts)
                found.append(Writer(kind, layer, block, slice(0, n_routed), experts))
            if n_routed < n_channels:
                module = _module_of(block, family.writers[kind], mixture)
                found.append(Writer(kind, layer, block, slice(n_routed, n_channels), module))
    return found


def _module_of(block: nn.Module, path: str, mixture: Mixture | None) -> Hookable:
    linear = block.get_submodule(path)
    if not mixture or not mixture.gate:
        return linear
    shared = block.get_submodule(path.rpartition(".")[0])
    return GatedWriter(linear, shared, block.get_submodule(mixture.gate))


def writer_of(model: nn.Module, kind: str, layer: int, channel: int) -> Writer:
    """What writes one unit; ``ValueError`` where there is none of that number."""
    for writer in writers(model, kind):
        if writer.layer == layer and writer.channels.start <= channel < writer.channels.stop:
            return writer
    raise ValueError(f"the model has no unit {kind}/{layer}/{channel}")


def owned_entries(
    writer: Writer, shape: ModelShape
) -> Iterator[tuple[nn.Module, str, tuple[int, ...], Tensor]]:
    """What the channels of a writer own, in a model of this shape: of which parameter which places.

    The module that holds the parameter and its name there; its dimensions that count rows or
    columns; and which of these, counted through, each channel owns: (n_channels,) int64. A
    parameter comes as often as a channel owns something of it.
    """
    module = writer.module
    if isinstance(module, ExpertsWriter):
        for name, dimension, rows in layout(module.experts):
            n_rows = getattr(module.experts, name).shape[dimension]
            first = torch.arange(module.n_experts)[:, None] * n_rows
            for own in rows:
                yield module.experts, name, (0, dimension), (first + own).flatten()
        return
    writing = module.linear if isinstance(module, GatedWriter) else module
    columns = torch.arange(matrix_size(writing)[1])
    yield cast("nn.Module", writing), "weight", (0 if is_transposed(writing) else 1,), columns
    for reader in architecture(shape.model_type).readers[writer.kind]:
        reading, rows = writer.block.get_submodule(reader.path), reader.rows(shape)
        yield reading, "weight", (1 if is_transposed(reading) else 0,), rows
        if isinstance(getattr(reading, "bias", None), Tensor):
            yield reading, "bias", (0,), rows


def per_unit_of(values: Iterable[tuple[Writer, Tensor]]) -> PerUnit:
    """Values of every writer's channels, (n_channels,) each, in the order of ``writers``."""
    rows: dict[str, dict[int, list[Tensor]]] = {kind: {} for kind in KINDS}
    for writer, own in values:
        rows[writer.kind].setdefault(writer.layer, []).append(own.cpu())
    return PerUnit.of_layers(
        {kind: [torch.cat(parts) for parts in own.values()] for kind, own in rows.items()}
    )


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b of weights that it holds, and nothing else."""
    own = type(module)
    is_falcons = f"{own.__module__}.{own.__name__}" == FALCON_LINEAR
    return own in (nn.Linear, transformers.pytorch_utils.Conv1D) or is_falcons


def is_transposed(module: Hookable) -> bool:
    """Whether a linear map is GPT-2's ``Conv1D``, which stores (in, out), not (out, in)."""
    return isinstance(module, transformers.pytorch_utils.Conv1D)


def column_weight(module: Hookable, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight of a linear map as (out, in), whatever its storage; a view, or fetched to be read.

    Of a quantised one, the numbers that its codes stand for, for a model that computes in
    ``dtype``. ``ValueError`` where those cannot be read (``quantised.weight_of``).
    """
    if isinstance(module, GatedWriter):
        module = module.linear
    # fused experts are in floating point, or refused
    if isinstance(module, nn.Module) and quantised.is_quantised(module):
        return quantised.weight_of(module, dtype)
    weight = placement.value_of(cast("nn.Module", module), "weight")
    return weight.T if is_transposed(module) else weight


def check_per_unit(model: nn.Module, values: Mapping[str, Tensor]) -> PerUnit:
    """The values, also those of a plain dict, as ``PerUnit``.

    ``ValueError`` unless they have the model's shape.
    """
    shape = shape_of(model)
    for kind in KINDS:
        expected = (shape.n_layers, shape.n_channels(kind))
        found = tuple(values[kind].shape) if kind in values else "no"
        if found != expected:
            raise ValueError(
                f"the unit set has {found} {kind} units,"
                f" the model has {expected} (blocks, channels)"
            )
    return PerUnit(values)


def owned_rows(rows: Tensor, units: Tensor, n_rows: int) -> Tensor:
    """Rows of a reader that feed units of a set and no others: (n_rows,) bool.

    ``rows``: of ``InputProjection``, (n_channels,); ``units``: the set, (n_channels,) bool;
    ``n_rows``: of the whole matrix.
    """
    n_inside = torch.bincount(rows[units], minlength=n_rows)
    return (n_inside > 0) & (n_inside == torch.bincount(rows, minlength=n_rows))
