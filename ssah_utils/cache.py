"""What a function returned, kept under everything it depends on: inputs, code and libraries.

The key is made here and nowhere else, from the very arguments with which the function is called. A
function that looks at anything besides its arguments (a variable of the notebook, say) is refused,
so that nothing can be left out of the key. Does not know what is measured.
"""

import ast
import builtins
import dis
import functools
import hashlib
import inspect
import json
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import fingerprints, placement, precision, quantised, wrappers
from ssah_utils.files import (
    DATA,
    LIBRARIES,
    PACKAGE,
    cache_dir,
    installed_versions,
    sha256_of,
    sha256_of_file,
    write_json,
)
from ssah_utils.per_unit import PerUnit

READS_DATA = {
    "ssah_utils.prompts.datasets",
    "ssah_utils.evaluation",
    "ssah_utils.judge.learned",
}
# Of these, hooks change no output; in ``experts`` they let others see the units.
HARMLESS_HOOKS = ("transformers.", "accelerate.", "ssah_utils.experts")
SILENT = {"progress", "report"}  # arguments that only show how far a function is
T = TypeVar("T")


def cached(function: Callable[..., T], /, **arguments) -> T:
    """``function(**arguments)`` from the cache; where it is not there, called and kept.

    The result must be what JSON can hold. Raises ``ValueError`` when the function depends on more
    than its arguments, ``TypeError`` for an argument of a type without an identity.
    """
    path = cache_dir() / "measured" / f"{cache_key(function, **arguments)}.json"
    if not path.exists():
        write_json(path, function(**arguments))
    return json.loads(path.read_text(encoding="utf-8"))


def cache_key(function: Callable, /, **arguments) -> str:
    """Hash of all that ``function(**arguments)`` depends on.

    Arguments, code, data files, versions of libraries and the precision of matrix products.
    """
    check_pure(function)
    bound = inspect.signature(function).bind(**arguments)
    bound.apply_defaults()
    counted = {name: value for name, value in bound.arguments.items() if name not in SILENT}
    parts = {
        "inputs": {name: identity_of(value, name) for name, value in counted.items()},
        "code": code_of(function),
        "versions": installed_versions(LIBRARIES),
        # that of autocast, where it is not an argument
        "precision": str(precision.preferred_dtype(precision.preferred_device())),
    }
    return sha256_of(parts)[:16]


# ----------------------------------------------------------------------------------------- identity


def identity_of(value: object, name: str = "value") -> object:
    """What tells one value from another, as JSON.

    ``TypeError`` names the argument when its type has no identity here.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, nn.Module):
        return _identity_of_model(value, name)
    if isinstance(value, PreTrainedTokenizerBase):
        content = _hash_of_tokenizer(value.backend_tokenizer.to_str())
        return {"tokenizer": sha256_of([content, value.chat_template, value.special_tokens_map])}
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        entries = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"tensor": _hash(entries), "is": [str(value.dtype), *value.shape]}
    if isinstance(value, np.ndarray):
        return identity_of(value.tolist(), name)
    if isinstance(value, np.generic):
        return identity_of(value.item(), name)
    if isinstance(value, pd.DataFrame | pd.Series):
        frame = value.to_frame() if isinstance(value, pd.Series) else value
        content = frame.to_json(orient="split", double_precision=15)
        return {"table": _hash(content.encode()), "types": list(map(str, frame.dtypes))}
    if isinstance(value, Path):
        inside = sorted(path for path in value.rglob("*") if path.is_file())
        files = inside if value.is_dir() else [value]
        hashes = {str(path.relative_to(value.parent)): sha256_of_file(path) for path in files}
        return {"files": hashes}
    if is_dataclass(value) and not isinstance(value, type):
        content = {
            field.name: identity_of(getattr(value, field.name), name) for field in fields(value)
        }
        return {type(value).__name__: content}
    if isinstance(value, dict | PerUnit):
        pairs = [[identity_of(key, name), identity_of(item, name)] for key, item in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        return [identity_of(item, name) for item in value]
    if isinstance(value, set | frozenset):
        items = [json.dumps(identity_of(item, name), sort_keys=True) for item in value]
        return {"set": sorted(items)}
    if isinstance(value, types.FunctionType):
        check_pure(value)
        return {"function": code_of(value)}
    raise TypeError(
        f"argument '{name}' is a {type(value).__name__}, which has no identity:"
        " give what it is made of"
    )


@functools.lru_cache(maxsize=8)  # by its content: a key may hold the same tokenizer several times
def _hash_of_tokenizer(text: str) -> str:
    """Of a tokenizer's file, but for how it was called last, which it keeps."""
    return sha256_of(json.loads(text) | {"padding": None, "truncation": None})


def _identity_of_model(model: nn.Module, name: str) -> dict:
    """Of all that decides a model's outputs, answers and training."""
    plain = wrappers.unwrapped(model)
    refuse_hooks(plain, name)
    # rotary frequencies, for one, which are no weights
    in_codes = {name for name, _ in quantised.quantised_modules(plain)}
    buffers = {
        name: one
        for name, one in plain.named_buffers()
        if one.is_floating_point() and name.rpartition(".")[0] not in in_codes
    }
    return {
        "model": fingerprints.fingerprint(plain),
        "dtype": str(plain.dtype),
        # which of several devices computes what changes no number, nor where weights are kept
        "device": placement.kinds_of_devices(plain),
        "ends": getattr(plain.generation_config, "eos_token_id", None),
        "attention": plain.config._attn_implementation,
        "training": plain.training,
        "tied": _is_tied(plain),
        "buffers": {name: identity_of(buffer) for name, buffer in buffers.items()},
    }


def _is_tied(model: nn.Module) -> bool:
    """Whether a language model reads and writes tokens by one matrix."""
    one, other = (
        table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if one.is_meta or other.is_meta:  # fetched when they are needed, each by its own name
        return bool(getattr(model, "all_tied_weights_keys", {}))
    return one.data_ptr() == other.data_ptr()


def refuse_hooks(model: nn.Module, name: str) -> None:
    """``ValueError`` for a model with hooks of which nobody knows what they change.

    Those of ``interventions`` are in its fingerprint.
    """
    for module in model.modules():
        before = module._forward_pre_hooks.values()
        unknown = [hook for hook in before if not fingerprints.hook_values(hook)]
        for hook in (*module._forward_hooks.values(), *unknown):
            owner = getattr(hook, "__module__", None) or type(hook).__module__
            if not owner.startswith(HARMLESS_HOOKS):
                raise ValueError(
                    f"the model '{name}' has a hook of {owner}, which has no identity:"
                    " remove it first"
                )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --------------------------------------------------------------------------------------------- code


def code_of(function: Callable) -> dict[str, str]:
    """Hashes of the source of a function, of what it calls, and of the package's files behind them.

    Those are modules and, where a module reads them, data files.
    """
    found: dict[str, str] = {}
    for part in _functions(function):
        if _is_ours(part.__module__):
            found |= closure(part.__module__)
            continue
        # of defaults, the source need not show the values
        defaults = [*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values()]
        content = [inspect.getsource(part), identity_of(defaults, part.__name__)]
        found[part.__qualname__] = sha256_of(content)
        for name, value in _globals(part).items():
            if isinstance(value, types.ModuleType) and _is_users(value.__name__):
                found[name] = sha256_of_file(value.__file__)
            elif isinstance(value, type) and _is_users(value.__module__):
                found[name] = _hash(inspect.getsource(value).encode())
            elif isinstance(value, types.ModuleType) and _is_ours(value.__name__):
                found |= closure(value.__name__)
            elif _is_ours(getattr(value, "__module__", "")):
                found |= closure(value.__module__)
    return found


def _is_users(module: str) -> bool:
    """Whether a module is neither a library's nor ours: a notebook, or a file beside it."""
    if module == "__main__":
        return True
    if _is_ours(module) or module in sys.builtin_module_names:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    paths = sysconfig.get_paths()
    libraries = [paths[place] for place in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not (file and any(Path(file).is_relative_to(folder) for folder in libraries))


def _is_ours(module: str | None) -> bool:
    return (module or "").split(".")[0] == PACKAGE.name


def _path_of(module: str) -> Path | None:
    """The file of a module or of a package in this package; None where there is none."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    candidates = [place.with_suffix(".py"), place / "__init__.py"]
    return next((path for path in candidates if path.is_file()), None)


@functools.cache
def _source(module: str) -> tuple[str, tuple[str, ...]]:
    """Hash and imports of a module of the package as this process has it.

    Files may be edited while it runs.
    """
    path = _path_of(module)
    return sha256_of_file(path), tuple(_imports(path))


def closure(module: str) -> dict[str, str]:
    """Hashes of a module of the package and of all of the package that it imports, by dotted names.

    Where one of ``READS_DATA`` is among them, also of the data files. The package itself stands for
    all of its modules, as each can be reached through it.
    """
    found, waiting = {}, [*_modules()] if module == PACKAGE.name else [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name], imports = _source(name)
            waiting += imports
    if READS_DATA & found.keys():
        files = [*sorted(DATA.glob("*.json*")), DATA / "utility_cloze.yaml"]
        found |= {path.name: sha256_of_file(path) for path in files}
    return found


def _imports(path: Path) -> list[str]:
    """Modules of the package that a file imports, wherever in it, and the packages around them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ImportError(f"{path} imports relatively, which the cache's keys do not follow")
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [node.module, *(name for name in inner if _path_of(name))]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if _is_ours(alias.name)]
    packages = {name.rpartition(".")[0] for name in found} - {""}
    return [name for name in dict.fromkeys([*found, *sorted(packages)]) if name != PACKAGE.name]


# ------------------------------------------------------------------------------------------- purity


def check_pure(function: Callable) -> None:
    """``ValueError`` when a function of a notebook uses a value that is not an argument of it.

    Functions of the package are taken as they are: their constants are code, and code is in the
    key.
    """
    harmless = types.ModuleType | types.FunctionType | types.BuiltinFunctionType | type
    for part in _functions(function):
        if _is_ours(part.__module__):
            continue
        enclosed = zip(part.__code__.co_freevars, part.__closure__ or (), strict=True)
        values = {name: cell.cell_contents for name, cell in enclosed} | _globals(part)
        for name, value in values.items():
            if not isinstance(value, harmless):
                raise ValueError(
                    f"{part.__name__} uses '{name}', which is not an argument of it,"
                    " so its result cannot be cached: make it an argument"
                )


def _functions(function: Callable) -> Iterator[types.FunctionType]:
    """A function and all functions outside libraries that it uses, directly or not."""
    seen: list[types.FunctionType] = []
    waiting = [inspect.unwrap(function)]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, types.FunctionType):
            raise ValueError(f"{part!r} is no plain function, so its result cannot be cached")
        if part in seen:
            continue
        seen.append(part)
        yield part
        if _is_ours(part.__module__):
            continue
        cells = [cell.cell_contents for cell in part.__closure__ or ()]
        for value in [*_globals(part).values(), *cells]:
            if isinstance(value, types.FunctionType) and (
                _is_ours(value.__module__) or _is_users(value.__module__)
            ):
                waiting.append(value)


def _globals(function: types.FunctionType) -> dict[str, object]:
    """What a function, and functions inside of it, look up outside of themselves; no builtins."""
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                names.add(step.argval)
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    known = function.__globals__
    return {name: known[name] for name in names if name in known and not hasattr(builtins, name)}


def _modules() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__")


for _name in _modules():  # now, as they are being imported
    _source(_name)
