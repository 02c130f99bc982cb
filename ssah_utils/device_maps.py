"""Which part of a model goes where: device maps as users write them, read and checked before use.

A map gives modules, by name, to devices: a GPU by its number or as ``cuda:0``, ``cpu``, or
``disk``. Knows models without weights and the devices of this machine. Loads nothing.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ssah_utils import extras, models
from ssah_utils.display import first_line
from ssah_utils.precision import Precision, Quantised

DeviceMap = dict[str, int | str]
NAMED = ("auto", "balanced", "balanced_low_0", "sequential")  # transformers makes the map
OFFLOADED = ("cpu", "disk")  # from where a GPU fetches weights that it does not keep
WHAT = f"device_map takes {', '.join(NAMED)}, a JSON object such as {{'': 0}}, or a file of one"


def is_inline(asked: str) -> bool:
    """Whether a map is written out, not the name of a map or of a file."""
    return asked.lstrip().startswith("{")


def read_map(asked: str) -> DeviceMap | str:
    """What is to be given to ``from_pretrained``: a map, one of ``NAMED``, or '' for none.

    ``asked`` is one of ``NAMED``, JSON, or the path of a JSON file. ``ValueError`` in one line for
    anything else, for a device that is not there, and ``ModuleNotFoundError`` without accelerate.
    """
    if not asked or asked in NAMED:
        if asked:
            extras.require("devices")
        return asked
    if not is_inline(asked) and not Path(asked).is_file():
        near = difflib.get_close_matches(asked, NAMED, n=1)
        hint = f"; nearest is '{near[0]}'" if near else ""
        raise ValueError(f"device_map '{asked}' is no file{hint}: {WHAT}")
    where = "device_map" if is_inline(asked) else f"device_map '{asked}'"
    try:
        text = asked if is_inline(asked) else Path(asked).read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} is not JSON ({first_line(error)}): {WHAT}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{where} gives no module to a device: {WHAT}")
    extras.require("devices")
    for module, device in found.items():
        _check_device(device, f"{where} puts '{module}' on {device!r}")
    return found


def _check_device(device: object, what: str) -> None:
    there = ["cpu", "disk", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.accelerator.is_available() and (kind := torch.accelerator.current_accelerator().type):
        n_devices = torch.accelerator.device_count()
        there = ["cpu", "disk", *(f"{kind}:{number}" for number in range(n_devices))]
    numbers = [int(name.rpartition(":")[2]) for name in there if ":" in name]
    kinds = {name.partition(":")[0] for name in there}
    is_number = type(device) is int and device in numbers
    if not is_number and not (isinstance(device, str) and device in {*there, *kinds}):
        raise ValueError(f"{what}, but there are {', '.join(there)}")


def describe_map(asked: str) -> str:
    """A map in a few words: its name, or what is where."""
    found = read_map(asked)
    if isinstance(found, str):
        return found
    places: dict[str, list[str]] = {}
    for module, device in found.items():
        places.setdefault(str(device), []).append(module or "all else")
    shown = [
        f"{len(parts)} parts" if len(parts) > 2 else ", ".join(parts) for parts in places.values()
    ]
    return "; ".join(f"{place}: {parts}" for place, parts in zip(places, shown, strict=True))


# --------------------------------------------------------------------------------------- on a model


def check_map(
    device_map: DeviceMap, model: nn.Module, name: str, dtype: Precision, has_codes: bool = False
) -> None:
    """``ValueError`` in one line for a map that does not fit a model.

    ``model``: without weights. One that names a module which is not there, leaves a part without a
    device, or splits a block. Codes (``dtype``, or as they are stored) cannot be kept apart from
    the GPU that computes with them.
    """
    parts = [part for part, _ in model.named_modules()] + [part for part, _ in _tensors(model)]
    for module in device_map:
        if module and module not in parts:
            near = difflib.get_close_matches(module, parts, n=1, cutoff=0)
            raise ValueError(
                f"device_map names '{module}', which '{name}' has not; nearest is '{near[0]}'"
            )
    left_out = [part for part, _ in _tensors(model) if place_of(device_map, part) is None]
    if left_out:
        raise ValueError(
            f"device_map gives no device to '{left_out[0]}' of '{name}', and to"
            f" {len(left_out) - 1} more: name it, or all else by ''"
        )
    for number, block in enumerate(models.blocks_of(model)):
        path = next(part for part, module in model.named_modules() if module is block)
        own = {part: place_of(device_map, f"{path}.{part}") for part, _ in _tensors(block)}
        if len(set(own.values())) > 1:
            one, *_, other = sorted(own, key=lambda part: str(own[part]))
            raise ValueError(
                f"device_map splits block {number} of '{name}': '{one}' on {own[one]}, '{other}' on"
                f" {own[other]}: give '{path}' to one device"
            )
    _check_codes(device_map, name, dtype, has_codes)


def _check_codes(
    device_map: DeviceMap, name: str, dtype: Precision, has_codes: bool = False
) -> None:
    """``ValueError`` for a map that would keep codes apart from what computes with them."""
    places = set(map(str, device_map.values()))
    is_apart = "disk" in places or ("cpu" in places and len(places) > 1)
    if is_apart and (has_codes or isinstance(dtype, Quantised)):
        codes = str(dtype) if isinstance(dtype, Quantised) else "codes, as it is stored"
        raise ValueError(
            f"device_map keeps parts of '{name}' on {', '.join(sorted(places & {*OFFLOADED}))}, and"
            f" {codes} cannot be fetched from there: use GPUs alone, or dtype bfloat16"
        )


def place_of(device_map: DeviceMap, part: str) -> int | str | None:
    """Device of a part: that of the nearest module around it that the map names."""
    while part not in device_map:
        if not part:
            return None
        part = part.rpartition(".")[0]
    return device_map[part]


def flat_map(device_map: DeviceMap, model: nn.Module) -> DeviceMap:
    """The same map with no module inside another: accelerate would put all of the outer one first.

    ``model``: without weights, or with them.
    """
    found: DeviceMap = {}

    def assign(path: str, module: nn.Module) -> None:
        names = [f"{path}.{name}".lstrip(".") for name, _ in _tensors(module)]
        places = {place_of(device_map, name) for name in names}
        if len(places) == 1:
            found[path] = places.pop()
            return
        for name, child in module.named_children():
            assign(f"{path}.{name}".lstrip("."), child)

    assign("", model)
    return found


def bytes_by_place(device_map: DeviceMap, model: nn.Module, dtype: Precision) -> dict[str, int]:
    """How much of a model's weights a map keeps where, in ``dtype``; shared weights count once."""
    found: dict[str, float] = {}
    seen: set[int] = set()
    for part, tensor in _tensors(model):
        if id(tensor) not in seen and isinstance(tensor, nn.Parameter):
            place = str(place_of(device_map, part))
            found[place] = found.get(place, 0) + tensor.numel() * dtype.itemsize
        seen.add(id(tensor))
    return {place: int(n_bytes) for place, n_bytes in found.items()}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
