"""Where the units of each model family live: the only file that knows module names.

A family is one entry of ``ARCHITECTURES``: where the *writers* of its units are, the matrices
through which a sub-layer writes to the residual stream, and which rows of which other matrices,
the *readers*, feed them. In a mixture of experts, the ``mlp`` units of a block are those of its
experts, one expert after the other, then those of the shared expert, if there is one. Does not know
models: ``models`` holds the entries against them.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssah_utils.per_unit import KINDS


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer, all read from its configuration.

    ``d_ff``: feed-forward units of a block outside of its experts; in a mixture, those of the
    shared expert, or 0. ``blocks``: where the blocks are in the model. ``n_experts``, ``d_expert``:
    0 where there is no mixture.
    """

    model_type: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    blocks: str = "model.layers"
    n_experts: int = 0
    d_expert: int = 0

    def n_channels(self, kind: str) -> int:
        """Units of one kind in one block."""
        if kind == "attention":
            return self.n_heads * self.head_dim
        return self.n_routed + self.d_ff

    @property
    def n_routed(self) -> int:
        """Units of all experts of a block: the first of its ``mlp`` channels."""
        return self.n_experts * self.d_expert

    def expert_of(self, channel: int) -> tuple[int, int] | None:
        """Of an ``mlp`` channel, its expert and its number there; None outside of the experts."""
        return divmod(channel, self.d_expert) if channel < self.n_routed else None

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


def values_in_quarters(shape: ModelShape) -> Tensor:
    """CodeGen's matrix holds, for each quarter of the heads, their queries, values and keys."""
    channel = torch.arange(shape.n_channels("attention"))
    quarter = shape.n_channels("attention") // 4
    return channel + (2 * (channel // quarter) + 1) * quarter


def _feed_forward(*paths: str) -> tuple[InputProjection, ...]:
    return tuple(InputProjection(path, in_order) for path in paths)


VALUES = (InputProjection("self_attn.v_proj", values_alone),)
GATE_AND_UP = _feed_forward("mlp.gate_proj", "mlp.up_proj")
FUSED_GATE_AND_UP = (
    InputProjection("mlp.gate_up_proj", in_order),
    InputProjection("mlp.gate_up_proj", second_half),
)


@dataclass(frozen=True)
class Mixture:
    """Where the experts of a block are, and how wide they are by the configuration.

    ``experts``, ``router``, ``gate``: paths that start at a block. The gate's sigmoid multiplies
    what the shared expert gives. ``d_expert``: a field of the configuration; ``d_shared``: width of
    the shared expert, 0 without one.
    """

    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    gate: str | None = None
    d_expert: str = "moe_intermediate_size"
    d_shared: Callable[[Any], int] = lambda config: 0


@dataclass(frozen=True)
class Architecture:
    """Where the units of a model family live.

    ``blocks`` starts at the decoder, the part that ``get_decoder`` of transformers returns; the
    paths of matrices start at a block. ``attention`` and ``mlp`` are the writers of these kinds,
    ``values`` and ``feed_forward`` their readers. ``others``: the matrices that are neither. In a
    ``mixture``, ``mlp`` and ``feed_forward`` are those of the shared expert.
    """

    attention: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    values: tuple[InputProjection, ...] = VALUES
    feed_forward: tuple[InputProjection, ...] = GATE_AND_UP
    others: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj")
    blocks: str = "layers"
    mixture: Mixture | None = None

    @property
    def writers(self) -> dict[str, str]:
        """Paths of the writers by kind."""
        return {"attention": self.attention, "mlp": self.mlp}

    @property
    def readers(self) -> dict[str, tuple[InputProjection, ...]]:
        """The readers by kind."""
        return {"attention": self.values, "mlp": self.feed_forward}

    def covers(self, name: str) -> bool:
        """Whether a matrix of a block, or the module that it is a part of, is named here."""
        readers = [reader.path for reader in (*self.values, *self.feed_forward)]
        named = [self.attention, self.mlp, *readers, *self.others]
        if self.mixture:
            named += [self.mixture.experts, self.mixture.router, self.mixture.gate or "-"]
        return any(f"{name}.".startswith(f"{path}.") for path in named)


def _like_neox(attention: str, blocks: str = "layers") -> Architecture:
    return Architecture(
        attention=f"{attention}.dense",
        mlp="mlp.dense_4h_to_h",
        values=(InputProjection(f"{attention}.query_key_value", values_by_group),),
        feed_forward=_feed_forward("mlp.dense_h_to_4h"),
        others=(),
        blocks=blocks,
    )


def _like_gpt2(values: Callable[[ModelShape], Tensor]) -> Architecture:
    return Architecture(
        attention="attn.c_proj",
        mlp="mlp.c_proj",
        values=(InputProjection("attn.c_attn", values),),
        feed_forward=_feed_forward("mlp.c_fc"),
        others=(),
        blocks="h",
    )


def _like_gptj(attention: str, mlp: str, feed_forward: str) -> Architecture:
    return Architecture(
        attention=f"{attention}.out_proj",
        mlp=mlp,
        values=(InputProjection(f"{attention}.v_proj", values_alone),),
        feed_forward=_feed_forward(feed_forward),
        others=(f"{attention}.q_proj", f"{attention}.k_proj"),
        blocks="h",
    )


def _experts_alone(experts: str = "mlp.experts", **more: Any) -> Architecture:
    """A mixture without a shared expert."""
    return Architecture(mlp="", feed_forward=(), mixture=Mixture(experts, **more))


def _sharing(path: str, d_shared: Callable[[Any], int], **more: Any) -> Architecture:
    """A mixture whose shared expert is at a path and like the feed-forward part of Llama."""
    return Architecture(
        mlp=f"{path}.down_proj",
        feed_forward=_feed_forward(f"{path}.gate_proj", f"{path}.up_proj"),
        mixture=Mixture(d_shared=d_shared, **more),
    )


LLAMA_LIKE = Architecture()
WITH_NORMS_OF_HEADS = Architecture(
    others=(*LLAMA_LIKE.others, "self_attn.q_norm", "self_attn.k_norm")
)
WITHOUT_GATE = Architecture(feed_forward=_feed_forward("mlp.up_proj"))
LIKE_GLM = Architecture(feed_forward=FUSED_GATE_AND_UP)
LIKE_OPT = Architecture(
    attention="self_attn.out_proj", mlp="fc2", feed_forward=_feed_forward("fc1")
)
GPTJ = _like_gptj("attn", "mlp.fc_out", "mlp.fc_in")
# Experts are as wide as in dense models the whole block.
LIKE_MIXTRAL = _experts_alone(d_expert="intermediate_size")
WITH_ROUTER = _experts_alone(router="mlp.router", d_expert="intermediate_size")
_OF_GRANITE = Mixture(
    "block_sparse_moe.experts", router="block_sparse_moe.router", d_expert="intermediate_size"
)
GRANITE_MOE = Architecture(mlp="", feed_forward=(), mixture=_OF_GRANITE)
GRANITE_MOE_SHARED = Architecture(
    mlp="shared_mlp.output_linear",
    feed_forward=(
        InputProjection("shared_mlp.input_linear", in_order),
        InputProjection("shared_mlp.input_linear", second_half),
    ),
    mixture=dataclasses.replace(
        _OF_GRANITE, d_shared=lambda config: config.shared_intermediate_size
    ),
)
# Several shared experts are one that is as much wider.
LIKE_GLM_MOE = _sharing(
    "mlp.shared_experts", lambda config: config.n_shared_experts * config.moe_intermediate_size
)
MIXTURES = {
    **dict.fromkeys(("mixtral", "olmoe", "flex_olmo", "minimax_m2"), LIKE_MIXTRAL),
    **dict.fromkeys(("gpt_oss", "phimoe"), WITH_ROUTER),
    "qwen3_moe": _experts_alone(),
    "qwen2_moe": _sharing(
        "mlp.shared_expert",
        lambda config: config.shared_expert_intermediate_size,
        gate="mlp.shared_expert_gate",
    ),
    "granitemoe": GRANITE_MOE,
    "granitemoeshared": GRANITE_MOE_SHARED,
    **dict.fromkeys(("glm4_moe", "dots1", "solar_open"), LIKE_GLM_MOE),
    "ernie4_5_moe": _sharing(
        "mlp.shared_experts",
        lambda config: config.moe_num_shared_experts * config.moe_intermediate_size,
    ),
    "hunyuan_v1_moe": _sharing(
        "mlp.shared_mlp", lambda config: config.intermediate_size, d_expert="intermediate_size"
    ),
}
ARCHITECTURES = MIXTURES | {
    **dict.fromkeys(
        (
            "llama mistral ministral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text vaultgemma"
            " olmo olmo2 olmo3 granite granite_swa stablelm smollm3 helium exaone4 seed_oss"
            " ernie4_5 hunyuan_v1_dense cwm hyperclovax internlm3 iquestcoder"
            " qwen2_vl_text qwen2_5_vl_text qwen3_vl_text"
        ).split(),
        LLAMA_LIKE,
    ),
    **dict.fromkeys(("cohere", "cohere2"), WITH_NORMS_OF_HEADS),
    **dict.fromkeys(("arcee", "apertus", "nemotron", "jais2"), WITHOUT_GATE),
    **dict.fromkeys(("glm", "glm4", "glm4v_text"), LIKE_GLM),
    **dict.fromkeys(("opt", "biogpt", "xglm"), LIKE_OPT),
    "phi": Architecture(
        attention="self_attn.dense", mlp="mlp.fc2", feed_forward=_feed_forward("mlp.fc1")
    ),
    "phi3": Architecture(
        values=(InputProjection("self_attn.qkv_proj", values_last),),
        feed_forward=FUSED_GATE_AND_UP,
        others=(),
    ),
    "nanochat": Architecture(mlp="mlp.fc2", feed_forward=_feed_forward("mlp.fc1")),
    "starcoder2": Architecture(mlp="mlp.c_proj", feed_forward=_feed_forward("mlp.c_fc")),
    "gpt_neox": _like_neox("attention"),
    "persimmon": _like_neox("self_attn"),
    "bloom": _like_neox("self_attention", "h"),
    "falcon": _like_neox("self_attention", "h"),
    "gpt2": _like_gpt2(values_last),
    "gpt_bigcode": _like_gpt2(values_by_group),
    "gptj": GPTJ,
    "codegen": dataclasses.replace(
        GPTJ, values=(InputProjection("attn.qkv_proj", values_in_quarters),), others=()
    ),
    "gpt_neo": _like_gptj("attn.attention", "mlp.c_proj", "mlp.c_fc"),
    "mpt": Architecture(
        attention="attn.out_proj",
        mlp="ffn.down_proj",
        values=(InputProjection("attn.Wqkv", values_last),),
        feed_forward=_feed_forward("ffn.up_proj"),
        others=(),
        blocks="blocks",
    ),
}


def architecture(model_type: str) -> Architecture:
    """Entry of ``ARCHITECTURES`` for a model type; ``ValueError`` names the supported ones."""
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"architecture '{model_type}' is not in ARCHITECTURES of ssah_utils/architectures.py"
            f" (there: {', '.join(ARCHITECTURES)}): add an entry that says which matrices of its"
            " blocks write to the residual stream, which feed these, and which do neither"
        )
    return ARCHITECTURES[model_type]


def writer_path(shape: ModelShape, kind: str, channel: int = 0) -> str:
    """Where a channel is written from, with ``{layer}`` for the number of the block:
    ``model.layers.{layer}.mlp.down_proj``; for those of experts, the module of all experts.
    """
    family = architecture(shape.model_type)
    path = family.writers[kind]
    if family.mixture and kind == "mlp" and channel < shape.n_routed:
        path = family.mixture.experts
    return f"{shape.blocks}.{{layer}}.{path}"
