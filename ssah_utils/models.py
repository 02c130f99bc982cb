"""Describe the units of causal language models, and tell models apart. The only file that knows module names.

A *unit* is one input channel of the matrix through which a sub-layer writes to the residual stream: ``o_proj`` (kind
``attention``) or ``down_proj`` (kind ``mlp``). Another architecture is one entry in ``ARCHITECTURES``.
Does not know prompts, scores or sets of units.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

from ssah_utils.files import sha256_of
from ssah_utils.loading import DEQUANTISE, checked_config
from ssah_utils.loading import EMBEDDED as EMBEDDED
from ssah_utils.loading import EMBEDDED_NAMES as EMBEDDED_NAMES
from ssah_utils.loading import TINY_RANDOM as TINY_RANDOM
from ssah_utils.loading import VENDOR_ALIGNED as VENDOR_ALIGNED
from ssah_utils.loading import load as load
from ssah_utils.loading import load_tokenizer as load_tokenizer
from ssah_utils.loading import resolve as resolve
from ssah_utils.loading import settle_padding as settle_padding
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.wrappers import WRAPPERS
from ssah_utils.wrappers import evaluating as evaluating
from ssah_utils.wrappers import unwrapped as unwrapped
from ssah_utils.wrappers import without_wrappers as without_wrappers

DTYPES = ("auto", "float32", "bfloat16")


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
        return self.n_layers * sum(self.n_channels(kind) for kind in KINDS)


@dataclass(frozen=True)
class Reader:
    """A matrix whose output rows feed a kind of unit; ``offset`` is where those rows begin when matrices are fused."""

    path: str
    offset: Callable[[ModelShape], int] = lambda shape: 0


@dataclass(frozen=True)
class Architecture:
    """Where the units of a model family live. Paths of writers and readers are relative to a block."""

    backbone: str = "model"
    blocks: str = "model.layers"
    writers: dict[str, str] = field(default_factory=lambda: {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"})
    readers: dict[str, tuple[Reader, ...]] = field(
        default_factory=lambda: {
            "attention": (Reader("self_attn.v_proj"),),
            "mlp": (Reader("mlp.gate_proj"), Reader("mlp.up_proj")),
        }
    )


LLAMA_LIKE = Architecture()
PHI3 = Architecture(
    readers={
        "attention": (Reader("self_attn.qkv_proj", lambda s: (s.n_heads + s.n_kv_heads) * s.head_dim),),
        "mlp": (Reader("mlp.gate_up_proj"), Reader("mlp.gate_up_proj", lambda s: s.d_ff)),
    },
)
GPT2 = Architecture(
    backbone="transformer",
    blocks="transformer.h",
    writers={"attention": "attn.c_proj", "mlp": "mlp.c_proj"},
    readers={"attention": (Reader("attn.c_attn", lambda s: 2 * s.d_model),), "mlp": (Reader("mlp.c_fc"),)},
)
ARCHITECTURES = {name: LLAMA_LIKE for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")} | {
    "phi3": PHI3,
    "gpt2": GPT2,
}


# ----------------------------------------------------------------------------------------------- models as users hold them


def gathered(model: nn.Module) -> nn.Module:
    """``unwrapped``, for looking at values: ``ValueError`` when not all of them are in the memory of this process."""
    model = unwrapped(model)
    for name, parameter in model.named_parameters():
        is_part = hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_status")  # FSDP 2, DeepSpeed ZeRO 3
        if is_part or "_fsdp_wrapped_module." in name or parameter.is_meta:
            raise ValueError(
                f"the values of {name} are sharded or offloaded, so they are not all here: load the whole model to look at it"
            )
    return model


@contextmanager
def hooking() -> Iterator[list]:
    """Hooks whose handles are put into the list take effect inside the block, and are gone after it.

    Code that ``torch.compile`` made before would go on without them: it does not look for new hooks. So compiled models and
    parts of models run uncompiled inside the block.
    """
    handles: list = []
    with torch.compiler.set_stance("force_eager"):
        try:
            yield handles
        finally:
            for handle in handles:
                handle.remove()


# ------------------------------------------------------------------------------------------------------------- structure


def architecture_of(model: nn.Module) -> Architecture:
    """Entry of ``ARCHITECTURES`` for a model; ``ValueError`` names the supported ones."""
    model_type = unwrapped(model).config.model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"architecture '{model_type}' is not in ARCHITECTURES of ssah_utils/models.py "
            f"(there: {', '.join(ARCHITECTURES)}): add one entry with its module names"
        )
    return ARCHITECTURES[model_type]


def shape_of(model: nn.Module) -> ModelShape:
    """Sizes from ``model.config``; checked against the weights, so that a wrong table entry cannot go unnoticed."""
    config = unwrapped(model).config
    n_heads = config.num_attention_heads
    shape = ModelShape(
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        d_ff=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size,
    )
    for kind in KINDS:
        found = column_weight(writers(model, kind)[0]).shape
        if found != (shape.d_model, shape.n_channels(kind)):
            raise ValueError(f"{kind} writer has shape {tuple(found)}, which the configuration does not explain")
    return shape


def backbone_of(model: nn.Module) -> nn.Module:
    """The model without its language-model head."""
    return unwrapped(unwrapped(model).get_submodule(architecture_of(model).backbone))  # it may be compiled on its own


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Next-token logits of backbone states, with the soft-capping that Gemma 2 applies after its head."""
    model = unwrapped(model)
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(unwrapped(model).get_submodule(architecture_of(model).blocks))


def writers(model: nn.Module, kind: str) -> list[nn.Module]:
    """The ``o_proj`` or ``down_proj`` of every block, first block first."""
    path = architecture_of(model).writers[kind]
    return [block.get_submodule(path) for block in blocks_of(model)]


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's ``Conv1D`` stores (in, out) where ``nn.Linear`` stores (out, in)."""
    return isinstance(module, transformers.pytorch_utils.Conv1D)


def column_weight(module: nn.Module) -> Tensor:
    """Weight of a linear map as (out, in), whatever its storage; a view. ``ValueError`` where it holds no plain numbers."""
    weight = getattr(module, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"a {type(module).__name__} holds quantised weights, of which no column can be read: {DEQUANTISE}")
    return weight.T if is_transposed(module) else weight


def squared_column_norms(model: nn.Module) -> PerUnit:
    """||W_:j||^2 of every writer column, in float64."""
    return _of_columns(model, lambda weight: weight.square().sum(0))


def mean_absolute_columns(model: nn.Module) -> PerUnit:
    """Mean of |W_ij| over every writer column, in float64."""
    return _of_columns(model, lambda weight: weight.abs().mean(0))


def _of_columns(model: nn.Module, function: Callable[[Tensor], Tensor]) -> PerUnit:
    """``function`` of every writer's weight as (d_model, n_channels) float64, which returns (n_channels,)."""
    model = gathered(model)
    of_module = lambda module: function(column_weight(module).detach().double())  # noqa: E731
    return PerUnit.of_layers({kind: [of_module(module) for module in writers(model, kind)] for kind in KINDS})


def squared_gradients(model: nn.Module) -> PerUnit:
    """Sum of squared gradients over the entries each unit owns, in float64.

    After a backward pass. A value row that several channels share counts for each of them.
    """
    model = gathered(model)
    shape, architecture = shape_of(model), architecture_of(model)
    squared: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        rows = reader_rows(shape, kind)
        for block in blocks_of(model):
            total = _gradient(block.get_submodule(architecture.writers[kind])).square().sum(0)
            for reader in architecture.readers[kind]:
                module = block.get_submodule(reader.path)
                of_rows = _gradient(module).square().sum(1)
                if module.bias is not None:
                    of_rows = of_rows + module.bias.grad.double().square()
                total = total + of_rows[reader.offset(shape) + rows.to(of_rows.device)]
            squared[kind].append(total)
    return PerUnit.of_layers(squared)


def _gradient(module: nn.Module) -> Tensor:
    """Gradient of a linear map's weight as (out, in) float64."""
    return (module.weight.grad.T if is_transposed(module) else module.weight.grad).double()


def check_per_unit(model: nn.Module, values: Mapping[str, Tensor]) -> PerUnit:
    """The values, also those of a plain dict, as ``PerUnit``; ``ValueError`` unless they are of the model's shape."""
    shape = shape_of(model)
    for kind in KINDS:
        expected, found = (shape.n_layers, shape.n_channels(kind)), tuple(values[kind].shape) if kind in values else "no"
        if found != expected:
            raise ValueError(f"the unit set has {found} {kind} units, the model has {expected} (blocks, channels)")
    return PerUnit(values)


def reader_rows(shape: ModelShape, kind: str) -> Tensor:
    """Row of the reader matrix (before its offset) that feeds each channel: (n_channels,) int64.

    The identity for ``mlp``. For ``attention``, grouped-query heads share a value row among n_heads / n_kv_heads channels.
    """
    channel = torch.arange(shape.n_channels(kind))
    if kind == "mlp":
        return channel
    head, within = channel // shape.head_dim, channel % shape.head_dim
    return head // (shape.n_heads // shape.n_kv_heads) * shape.head_dim + within


# -------------------------------------------------------------------------------------------------------------- identity

COSMETIC = {  # what of a configuration does not change what a model computes or learns, given its weights
    "architectures", "dtype", "torch_dtype", "transformers_version", "vocab_size", "tie_word_embeddings", "use_cache",
    "attn_implementation", "output_attentions", "output_hidden_states", "return_dict", "torchscript", "tokenizer_class",
    "id2label", "label2id", "num_labels", "problem_type", "pretraining_tp", "auto_map", "initializer_range",
    "task_specific_params",
}  # fmt: skip


def fingerprint(model: nn.Module) -> str:
    """Short hash of what a model computes: every entry of every weight, rounded to bfloat16, and its configuration.

    Equal for a float32 model and its bfloat16 copy, in any wrapper (``unwrapped``), saved and loaded, tied or not, and with
    rows added to its vocabulary that nobody trained. Another one while ``interventions.ablated`` holds units.
    """
    model = gathered(model)
    architecture_of(model)
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in COSMETIC}
    config = {key: value for key, value in config.items() if not key.endswith("_token_id") and not key.startswith("_")}
    vocabulary = {table.weight.data_ptr() for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    tensors = {_without_wrappers(name): tensor.detach() for name, tensor in model.state_dict().items()}
    # tied tensors are hashed once; several at a time, as neither rounding nor hashing needs the interpreter
    places = {name: (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in tensors.items()}
    distinct = {places[name]: tensor for name, tensor in tensors.items()}
    with ThreadPoolExecutor() as pool:
        hashed = pool.map(lambda t: _hash_of_values(trained_rows(t) if t.data_ptr() in vocabulary else t), distinct.values())
        hashes = dict(zip(distinct, hashed, strict=True))
    held = [
        [_without_wrappers(name), _hash_of_values(hook.channels), _hash_of_values(hook.fill)]
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if hasattr(hook, "fill")
    ]
    return sha256_of([model.config.model_type, config, {name: hashes[places[name]] for name in tensors}, held])[:16]


def _hash_of_values(tensor: Tensor) -> str:
    """Of a tensor's shape and of every entry; floating-point numbers are rounded to bfloat16."""
    values = tensor.to(torch.bfloat16).contiguous().view(torch.int16) if tensor.is_floating_point() else tensor.contiguous()
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    digest.update(values.cpu().numpy())
    return digest.hexdigest()


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def trained_rows(table: Tensor) -> Tensor:
    """An embedding, or the matrix of a head, without the rows at its end that say nothing: (n, d_model), a view.

    ``resize_token_embeddings`` appends rows that are the mean of the others, up to noise of 3e-5 of their spread; more of
    them do not move the mean. Training moves them. Allowed are that noise and what rounding to bfloat16 adds.
    """
    mean, spread = table.mean(0, dtype=torch.float32), table[:1024].float().std(0)
    near = mean.abs() / 2**8 + spread / 10**3
    n = len(table)
    while n > 1 and bool(((table[n - 1].float() - mean).abs() <= near).all()):
        n -= 1
    return table[:n]


# ------------------------------------------------------------------------------------------------------------- precision


def preferred_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def preferred_dtype(device: str) -> torch.dtype:
    """What ``SSAH_DTYPE`` asks for; else bfloat16 where matrix products run natively in it, else float32."""
    asked = os.environ.get("SSAH_DTYPE") or "auto"
    if asked not in DTYPES:
        raise ValueError(f"SSAH_DTYPE is '{asked}', but one of {', '.join(DTYPES)} is needed")
    if asked != "auto":
        return getattr(torch, asked)
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def training_dtype(model: nn.Module) -> torch.dtype:
    """Precision to fine-tune all parameters of a model in: float32 where that and AdamW's state fit, else bfloat16."""
    n_bytes = 16 * sum(parameter.numel() for parameter in model.parameters())
    device = next(model.parameters()).device
    if device.type != "cuda" or 1.3 * n_bytes < torch.cuda.get_device_properties(device).total_memory:
        return torch.float32
    return torch.bfloat16


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another precision, in place; as ``load`` would have it, unlike ``model.to(dtype)``.

    Rotary frequencies stay float32: rounded to bfloat16, they turn positions by up to half a per cent.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and "inv_freq" not in name:
                setattr(module, name, buffer.to(dtype))
    return model


def check_reachable(name: str) -> None:
    """Raise before any compute when a model cannot be had, or when its architecture is not supported."""
    if name in EMBEDDED_NAMES:
        return
    config = checked_config(name)
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"architecture '{config.model_type}' of '{name}' is not supported (there: {', '.join(ARCHITECTURES)})")
