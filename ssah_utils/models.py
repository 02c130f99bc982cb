"""Where the units of causal language models live. The only file that knows module names.

A *unit* is one input channel of the matrix through which a sub-layer writes to the residual stream,
its *writer*: ``o_proj`` (kind ``attention``) or ``down_proj`` (kind ``mlp``). The matrices whose
output rows feed a unit are its *readers*. Another architecture is one entry in ``ARCHITECTURES``.
Does not know prompts, scores or sets of units.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.wrappers import unwrapped

DEQUANTISE = "give the model as it was before it was quantised, or dequantise and save it"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer, all read from its configuration."""

    model_type: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int

    def n_channels(self, kind: str) -> int:
        """Units of one kind in one block."""
        return self.n_heads * self.head_dim if kind == "attention" else self.d_ff

    @property
    def n_units(self) -> int:
        """Units of the whole model."""
        return self.n_layers * sum(self.n_channels(kind) for kind in KINDS)


@dataclass(frozen=True)
class InputProjection:
    """A matrix whose output rows feed a kind of unit.

    ``rows``: which row feeds each channel, (n_channels,) int64. Several channels may share a row,
    as under grouped-query attention, and a row may feed none, as those of queries in a matrix that
    is fused of several.
    """

    path: str
    rows: Callable[[ModelShape], Tensor]


def _value_rows(shape: ModelShape, first: int, step: int) -> Tensor:
    """Where the rows of the values begin, and how far those of the next group of heads are.

    Both are counted in heads.
    """
    channel = torch.arange(shape.n_channels("attention"))
    head, within = channel // shape.head_dim, channel % shape.head_dim
    group = head // (shape.n_heads // shape.n_kv_heads)
    return (first + group * step) * shape.head_dim + within


def values_alone(shape: ModelShape) -> Tensor:
    """The matrix holds values only, a head of them for each group of query heads."""
    return _value_rows(shape, 0, 1)


def values_last(shape: ModelShape) -> Tensor:
    """The matrix holds all queries, then all keys, then all values."""
    return _value_rows(shape, shape.n_heads + shape.n_kv_heads, 1)


def values_by_group(shape: ModelShape) -> Tensor:
    """The matrix holds, for each group of heads, its queries, its key and its value."""
    n_queries = shape.n_heads // shape.n_kv_heads
    return _value_rows(shape, n_queries + 1, n_queries + 2)


def in_order(shape: ModelShape) -> Tensor:
    """Row j feeds feed-forward channel j."""
    return torch.arange(shape.d_ff)


def second_half(shape: ModelShape) -> Tensor:
    """Row d_ff + j feeds feed-forward channel j."""
    return shape.d_ff + in_order(shape)


def _in_order(*paths: str) -> tuple[InputProjection, ...]:
    return tuple(InputProjection(path, in_order) for path in paths)


def _fused_gate_and_up(path: str) -> tuple[InputProjection, ...]:
    return (InputProjection(path, in_order), InputProjection(path, second_half))


@dataclass(frozen=True)
class Architecture:
    """Where the units of a model family live; paths of writers and readers start at a block."""

    backbone: str = "model"
    blocks: str = "model.layers"
    writers: dict[str, str] = field(
        default_factory=lambda: {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
    )
    readers: dict[str, tuple[InputProjection, ...]] = field(
        default_factory=lambda: {
            "attention": (InputProjection("self_attn.v_proj", values_alone),),
            "mlp": _in_order("mlp.gate_proj", "mlp.up_proj"),
        }
    )


LLAMA_LIKE = Architecture()
PHI3 = Architecture(
    readers={
        "attention": (InputProjection("self_attn.qkv_proj", values_last),),
        "mlp": _fused_gate_and_up("mlp.gate_up_proj"),
    }
)
GPT2 = Architecture(
    backbone="transformer",
    blocks="transformer.h",
    writers={"attention": "attn.c_proj", "mlp": "mlp.c_proj"},
    readers={
        "attention": (InputProjection("attn.c_attn", values_last),),
        "mlp": _in_order("mlp.c_fc"),
    },
)
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), LLAMA_LIKE),
    "phi3": PHI3,
    "gpt2": GPT2,
}


@contextmanager
def hooking() -> Iterator[list]:
    """Hooks whose handles are put into the list take effect inside the block and are gone after it.

    Compiled models, and compiled parts of models, run uncompiled inside the block: code that
    ``torch.compile`` made before does not look for new hooks.
    """
    handles: list = []
    with torch.compiler.set_stance("force_eager"):
        try:
            yield handles
        finally:
            for handle in handles:
                handle.remove()


# ---------------------------------------------------------------------------------------- structure


def architecture(model_type: str) -> Architecture:
    """Entry of ``ARCHITECTURES`` for a model type; ``ValueError`` names the supported ones."""
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"architecture '{model_type}' is not in ARCHITECTURES of ssah_utils/models.py "
            f"(there: {', '.join(ARCHITECTURES)}): add one entry with its module names"
        )
    return ARCHITECTURES[model_type]


def architecture_of(model: nn.Module) -> Architecture:
    """``architecture`` of a model."""
    return architecture(unwrapped(model).config.model_type)


def writer_path(model_type: str, kind: str) -> str:
    """Where a kind's writer is in the model, with ``{layer}`` for the number of the block:
    ``model.layers.{layer}.mlp.down_proj``.
    """
    family = architecture(model_type)
    return f"{family.blocks}.{{layer}}.{family.writers[kind]}"


def shape_of(model: nn.Module) -> ModelShape:
    """Sizes from ``model.config``, checked against the weights.

    ``ValueError`` where they disagree, so that a wrong table entry cannot go unnoticed.
    """
    config = unwrapped(model).config
    n_heads = config.num_attention_heads
    shape = ModelShape(
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        d_ff=getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * config.hidden_size,
    )
    for kind in KINDS:
        found = column_weight(writers(model, kind)[0]).shape
        if found != (shape.d_model, shape.n_channels(kind)):
            raise ValueError(
                f"{kind} writer has shape {tuple(found)}, which the configuration does not explain"
            )
    return shape


def backbone_of(model: nn.Module) -> nn.Module:
    """The model without its language-model head; unwrapped, as it may be compiled on its own."""
    return unwrapped(unwrapped(model).get_submodule(architecture_of(model).backbone))


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Next-token logits of backbone states: (..., d_model) -> (..., vocabulary).

    With the soft-capping that Gemma 2 applies after its head.
    """
    plain = unwrapped(model)
    logits = plain.get_output_embeddings()(hidden)
    cap = getattr(plain.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, first block first."""
    return list(unwrapped(model).get_submodule(architecture_of(model).blocks))


def writers(model: nn.Module, kind: str) -> list[nn.Module]:
    """The ``o_proj`` or ``down_proj`` of every block, first block first."""
    path = architecture_of(model).writers[kind]
    return [block.get_submodule(path) for block in blocks_of(model)]


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear map is GPT-2's ``Conv1D``, which stores (in, out), not (out, in)."""
    return isinstance(module, transformers.pytorch_utils.Conv1D)


def column_weight(module: nn.Module) -> Tensor:
    """Weight of a linear map as (out, in), whatever its storage; a view.

    ``ValueError`` where it is quantised.
    """
    weight = getattr(module, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"a {type(module).__name__} holds quantised weights,"
            f" of which no column can be read: {DEQUANTISE}"
        )
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
