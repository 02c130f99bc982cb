"""Which quantised models are read, and by what; methods have the names that transformers gives.

Some are computed as they are stored, by kernels of a library. Of others, transformers makes
ordinary weights as it loads them: then everything goes that goes with an ordinary model. All others
are refused. Knows configurations and libraries. Does not know modules or units.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import (
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PretrainedConfig,
)

from ssah_utils import extras
from ssah_utils.precision import Quantised
from ssah_utils.quantised import DEQUANTISE

# LLM.int8() computes in float16; of every product in other numbers it says so anew
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

UNNAMED = "a method that its config.json does not name"


@dataclass(frozen=True)
class Method:
    """What reads the weights of a method.

    ``libraries`` by the names under which they are imported; ``packages`` to install them. ``made``
    is the configuration by which transformers makes ordinary weights of the codes.
    """

    libraries: tuple[str, ...] = ()
    packages: str = ""
    made: Callable | None = None


METHODS = {
    "bitsandbytes": Method(("accelerate", "bitsandbytes"), '"ssah-utils[quantised]"'),
    "gptq": Method(("optimum", "gptqmodel"), "gptqmodel optimum"),
    "awq": Method(("accelerate", "gptqmodel"), "gptqmodel accelerate"),
    "torchao": Method(("torchao",), "torchao"),
    "compressed-tensors": Method(
        ("compressed_tensors",), "compressed-tensors", CompressedTensorsConfig
    ),
    "fp8": Method(made=FineGrainedFP8Config),
    "mxfp4": Method(made=Mxfp4Config),
}


def method_of(config: PretrainedConfig) -> str:
    """How a model's weights are stored as codes; '' where they are numbers."""
    of_text = config.get_text_config(decoder=True)
    found = (getattr(one, "quantization_config", None) for one in (config, of_text))
    quantised = next((one for one in found if one is not None), None)
    if quantised is None:
        return ""
    is_dict = isinstance(quantised, dict)
    method = quantised.get("quant_method") if is_dict else quantised.quant_method
    is_old = is_dict and (quantised.get("load_in_4bit") or quantised.get("load_in_8bit"))
    return "bitsandbytes" if is_old else str(getattr(method, "value", method) or UNNAMED)


def keeps_codes(config: PretrainedConfig) -> bool:
    """Whether a loaded model has codes in its matrices, not ordinary weights made of them."""
    method = method_of(config)
    return bool(method) and (method not in METHODS or METHODS[method].made is None)


def check_method(config: PretrainedConfig, name: str) -> None:
    """``ValueError`` for a model whose method is not read, here or anywhere; reads no weights."""
    method = method_of(config)
    if not method:
        return
    if method not in METHODS:
        raise ValueError(
            f"model '{name}' is quantised with {method}, which is not read"
            f" (read: {', '.join(METHODS)}): {DEQUANTISE}"
        )
    for library in METHODS[method].libraries:
        if find_spec(library) is None:
            raise ValueError(
                f"model '{name}' is quantised with {method}, which {library} reads:"
                f" pip install {METHODS[method].packages}; or {DEQUANTISE}"
            )


def check_quantises(config: PretrainedConfig, name: str, dtype: Quantised) -> None:
    """``ValueError`` for a model that cannot be quantised as it is loaded.

    ``ModuleNotFoundError`` where the extra is missing that does it.
    """
    extras.require("quantised")
    if method := method_of(config):
        raise ValueError(
            f"model '{name}' is quantised already ({method}), so it cannot be loaded as"
            f" {dtype.codes}: take dtype auto, float32 or bfloat16, in which the rest is computed"
        )


def loading_arguments(
    config: PretrainedConfig, dtype: torch.dtype | Quantised, device_map: object
) -> dict[str, object]:
    """What ``from_pretrained`` is to be told of the numbers in which a model is loaded.

    ``device_map``: where it goes, for methods that have to know as they load.
    """
    method = method_of(config)
    if isinstance(dtype, Quantised):
        by_codes = {
            "int8": BitsAndBytesConfig(load_in_8bit=True),
            "nf4": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype.dtype,
            ),
        }
        quantise = by_codes[dtype.codes]
        return {"dtype": dtype.dtype, "quantization_config": quantise, "device_map": device_map}
    if not method:
        return {"dtype": dtype}
    if made := METHODS[method].made:
        return {"dtype": dtype, "quantization_config": made(dequantize=True)}
    return {"dtype": dtype, "device_map": device_map}


def not_run(config: PretrainedConfig, name: str, reason: str) -> ValueError:
    """One line for a model that its method's library would not load."""
    where = "this machine" if torch.cuda.is_available() else "this machine, which has no GPU"
    return ValueError(
        f"model '{name}' is quantised with {method_of(config)}, which cannot be loaded on {where}"
        f" ({reason}): {DEQUANTISE}"
    )
