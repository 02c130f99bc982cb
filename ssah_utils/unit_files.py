"""Unit files: named sets and scores of one model's units, with what they are and how they were
found.

    about = UnitFileInfo(
        ModelInfo.of(model),
        sets={"safety": SetInfo("the 1% of units with the largest z_safety - z_utility", seed=0)},
        scores={"z_safety": ScoreInfo("variance on refusals, per module", "standard deviations")},
    )
    save_units("units.safetensors", {"safety": safety}, {"z_safety": z_safety}, about=about)
    file = load_units("units.safetensors", fingerprint(model))  # refused for another model
    with ablated(model, file.sets["safety"]): ...

The format is specified in docs/unit-files.md, so that it can be read without this package. Knows
files, sets and scores of units, and models only to describe them.
"""

import difflib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ssah_utils import architectures
from ssah_utils.architectures import ModelShape
from ssah_utils.files import complete_only
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.units import GROUPS, UnitPartition
from ssah_utils.wrappers import unwrapped

VERSION = 2
FORMAT = f"ssah-units-{VERSION}"
OLD_FORMATS = ("ssah-units-1", "ssah-unit-set-1", "ssah-unit-sets-1")
COLUMNS = ("kind", "layer", "channel", "head", "index_in_head", "module", "hook")  # of a table
GROUP_RULES = {  # as ``units.partition`` hands them out
    "safety": "the units with the largest z_safety - z_utility",
    "utility": "the units with the largest z_utility - z_safety",
    "complex": "the units that are in no other group",
    "redundant": "of the units in neither safety nor utility, those with the smallest z_safety +"
    " z_utility",
}


# ------------------------------------------------------------------------------------ what is there


@dataclass(frozen=True)
class ModelInfo:
    """The model whose units these are.

    ``id``: of the hub, or any name by which a reader can find it. ``revision``: of the hub, or
    empty. ``fingerprint``: ``fingerprints.fingerprint``. ``shape``: None in files of version 1.
    """

    id: str
    revision: str
    fingerprint: str
    shape: ModelShape | None

    @classmethod
    def of(cls, model: nn.Module, id: str = "", revision: str = "") -> "ModelInfo":
        """Describe a model; where nothing is given, by the name and revision it was loaded by.

        Of a folder only the last name is kept, as its path means nothing elsewhere.
        """
        from ssah_utils import fingerprints, models  # seconds to import, and files need no model

        config = unwrapped(model).config
        id = id or config.name_or_path
        if Path(id).is_absolute() or Path(id).is_dir():
            id = Path(id).resolve().name
        revision = revision or getattr(config, "_commit_hash", None) or ""
        return cls(id, revision, fingerprints.fingerprint(model), models.shape_of(model))

    def __str__(self) -> str:
        return f"{self.fingerprint} ({self.id})" if self.id else self.fingerprint


@dataclass(frozen=True)
class SetInfo:
    """What a set of units is, in words, and how it was found; what does not apply stays empty.

    ``fractions``: shares of all units that were asked for, by name. ``data``: data sets by their
    role. ``positions``: the tokens that were looked at. ``seed``: of what was drawn.
    """

    what: str
    method: str = ""
    fractions: Mapping[str, float] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    positions: str = ""
    seed: int | None = None


@dataclass(frozen=True)
class ScoreInfo:
    """What a score measures, and in which unit of measurement."""

    definition: str
    unit: str


@dataclass(frozen=True)
class UnitFileInfo:
    """What a unit file says about its content: the model, and every set and score by name.

    ``version`` of the format, the ``ssah_utils`` that wrote it and the ``date`` (ISO 8601, UTC) are
    put in when it is written.
    """

    model: ModelInfo
    sets: Mapping[str, SetInfo] = field(default_factory=dict)
    scores: Mapping[str, ScoreInfo] = field(default_factory=dict)
    version: int = VERSION
    ssah_utils: str = ""
    date: str = ""


class Named(dict[str, PerUnit]):
    """Values per unit by name; ``KeyError`` for a name that is not there says the nearest."""

    def __missing__(self, name: str) -> PerUnit:
        near = difflib.get_close_matches(str(name), self, n=1, cutoff=0)
        there = f"the nearest is '{near[0]}' of {', '.join(self)}" if near else "there is none"
        raise KeyError(f"the unit file has no '{name}': {there}")


@dataclass(frozen=True)
class UnitFile:
    """What ``load_units`` read: ``sets`` of bool and ``scores`` of float32, and what they are."""

    sets: Named
    scores: Named
    info: UnitFileInfo


# -------------------------------------------------------------------------------------------- write


def save_units(
    path: Path | str,
    sets: Mapping[str, PerUnit],
    scores: Mapping[str, PerUnit] | None = None,
    *,
    about: UnitFileInfo,
) -> None:
    """Write named sets and scores of one model as safetensors, whole or not at all.

    ``about`` describes every one of them by the same name. Scores are stored as float32. Raises
    ``ValueError`` or ``TypeError`` in one line before anything is written: a name that is described
    but not there or the other way round, units of another shape than the model's, a set that is
    none, a model without a fingerprint.
    """
    scores = scores or {}
    if about.model.shape is None or not about.model.fingerprint:
        raise ValueError(
            "a unit file needs the shape and the fingerprint of its model: describe it by"
            " ModelInfo.of(model)"
        )
    _check_names(sets, about.sets, "set")
    _check_names(scores, about.scores, "score")
    both = sorted(sets.keys() & scores.keys())
    if both:
        raise ValueError(f"'{both[0]}' is the name of a set and of a score: rename one")
    for name, values in [*sets.items(), *scores.items()]:
        check_shape(values, about.model.shape, name)
        if values.is_set != (name in sets):
            found = {str(tensor.dtype).removeprefix("torch.") for tensor in values.values()}
            raise TypeError(
                f"'{name}' is of {', '.join(sorted(found))}: a set of units is of bool, a score is"
                " not"
            )
    stored = {f"sets.{name}": values for name, values in sets.items()}
    stored |= {f"scores.{name}": values.map(Tensor.float) for name, values in scores.items()}
    content = {  # copies, as safetensors refuses tensors that share memory
        f"{name}.{kind}": tensor.clone(memory_format=torch.contiguous_format)
        for name, values in stored.items()
        for kind, tensor in values.items()
    }
    with complete_only(path) as partial:
        save_file(content, partial, _metadata(about))


def save_set(
    path: Path | str,
    chosen: PerUnit,
    model: nn.Module | ModelInfo,
    what: str,
    name: str = "set",
    **found: Any,
) -> None:
    """Write one set of a model's units, to take away: ``what`` it is in words, and how it was
    ``found``, as in ``SetInfo``.
    """
    about = UnitFileInfo(_described(model), {name: SetInfo(what, **found)})
    save_units(path, {name: chosen}, about=about)


def save_partition(
    path: Path | str,
    partition: UnitPartition,
    model: nn.Module | ModelInfo,
    scores: Mapping[str, PerUnit] | None = None,
    about_scores: Mapping[str, ScoreInfo] | None = None,
    *,
    method: str = "contrast of two standardised scores (SSAH section 4.1)",
    **found: Any,
) -> None:
    """Write a partition as one set per group, and the scores it was made from.

    ``found`` is how it was found, as in ``SetInfo``. ``ValueError`` for a partition of another
    model than the one that is described.
    """
    model = _described(model)
    if partition.fingerprint not in ("", model.fingerprint):
        raise ValueError(
            f"the partition belongs to model {partition.fingerprint}, not to {model}: describe the"
            " model that it was made on"
        )
    about = UnitFileInfo(
        model,
        {group: SetInfo(GROUP_RULES[group], method, **found) for group in GROUPS},
        about_scores or {},
    )
    sets = {group: partition.units(group) for group in GROUPS}
    save_units(path, sets, scores, about=about)


def _described(model: nn.Module | ModelInfo) -> ModelInfo:
    return model if isinstance(model, ModelInfo) else ModelInfo.of(model)


def _check_names(values: Mapping, about: Mapping, what: str) -> None:
    """Every one is described, nothing else is, and all can be columns of a table."""
    for name in [*values, *about]:
        if not name or name in COLUMNS:
            raise ValueError(
                f"'{name}' cannot be the name of a {what}: it is empty or one of the columns"
                f" {', '.join(COLUMNS)}"
            )
        if name not in about:
            raise ValueError(f"the {what} '{name}' is not described: add it to about.{what}s")
        if name not in values:
            raise ValueError(f"about.{what}s describes '{name}', which is not among the {what}s")


def check_shape(values: Mapping[str, Tensor], shape: ModelShape, name: str) -> None:
    """``ValueError`` unless the named values are of the model's shape, in both kinds."""
    for kind in KINDS:
        expected = (shape.n_layers, shape.n_channels(kind))
        found = tuple(values[kind].shape) if kind in values else "no"
        if found != expected:
            raise ValueError(
                f"'{name}' has {found} {kind} units, where the model has {expected} (blocks,"
                " channels)"
            )


def _metadata(about: UnitFileInfo) -> dict[str, str]:
    """The header of a file: the format as plain text, everything else as JSON."""
    model = asdict(about.model)
    shape = model.pop("shape")
    del shape["blocks"]  # it is in the paths of the modules
    sizes = cast("ModelShape", about.model.shape)
    modules = {kind: architectures.writer_path(sizes, kind) for kind in KINDS}
    if sizes.n_experts and sizes.d_ff:
        modules["shared"] = architectures.writer_path(sizes, "mlp", sizes.n_routed)
    content = {
        "model": model | shape | {"modules": modules},
        "sets": {name: asdict(info) for name, info in about.sets.items()},
        "scores": {name: asdict(info) for name, info in about.scores.items()},
        "ssah_utils": _own_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    as_json = {key: json.dumps(value, ensure_ascii=False) for key, value in content.items()}
    return {"format": FORMAT} | as_json


def _own_version() -> str:
    try:
        return importlib.metadata.version("ssah-utils")
    except importlib.metadata.PackageNotFoundError:  # used from a folder, without being installed
        return "unknown"


# --------------------------------------------------------------------------------------------- read


def load_units(path: Path | str, fingerprint: str = "") -> UnitFile:
    """Sets and scores of a unit file, also of one that was written by version 1.

    ``fingerprint`` is that of the model they will be used on. Raises ``FileNotFoundError``, or
    ``ValueError`` in one line: not a safetensors file, not a unit file, one of a later version, of
    another model, or of another shape than it says.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"unit file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): write it again"
        ) from error
    form = metadata.get("format", "none")
    if form != FORMAT and form not in OLD_FORMATS:
        if match := re.fullmatch(r"ssah-units-([1-9]\d*)", form):
            raise ValueError(
                f"{path} is of version {match[1]}; this ssah_utils ({_own_version()}) reads up to"
                f" version {VERSION}: update it"
            )
        raise ValueError(f"{path} is no unit file: its format is '{form}', not {FORMAT}")
    try:
        read = (_current if form == FORMAT else _version_1)(metadata, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged ({what}): write it again") from error
    if fingerprint and read.info.model.fingerprint != fingerprint:
        raise ValueError(
            f"{path} belongs to model {read.info.model}, not to the loaded {fingerprint}: load that"
            " model, or find the units of this one (03_units)"
        )
    return read


def load_set(path: Path | str, fingerprint: str = "", name: str = "") -> PerUnit:
    """One set of a unit file; without a name, the only one.

    Raises what ``load_units`` raises, ``KeyError`` for a name that is not there, ``ValueError``
    where a name is needed.
    """
    sets = load_units(path, fingerprint).sets
    if not name and len(sets) != 1:
        raise ValueError(f"{path} has {len(sets)} sets, {', '.join(sets)}: say which by name")
    return sets[name or next(iter(sets))]


def load_partition(
    path: Path | str, fingerprint: str = ""
) -> tuple[UnitPartition, dict[str, PerUnit]]:
    """Partition and scores of a unit file; ``fingerprint`` is that of the model they will be used
    on.

    Raises what ``load_units`` raises, and ``ValueError`` where the file holds no partition.
    """
    file = load_units(path, fingerprint)
    if missing := [group for group in GROUPS if group not in file.sets]:
        raise ValueError(
            f"{path} holds no partition: it has no set '{missing[0]}', but"
            f" {', '.join(file.sets) or 'none'}"
        )
    index = file.sets["safety"].map(lambda chosen: torch.zeros_like(chosen, dtype=torch.int8))
    times = index
    for number, group in enumerate(GROUPS):
        index = index + file.sets[group].map(Tensor.char) * number
        times = times + file.sets[group].map(Tensor.char)
    if not bool((times.flatten() == 1).all()):
        raise ValueError(f"{path} holds no partition: not every unit is in exactly one group")
    return UnitPartition(index, file.info.model.fingerprint), file.scores


Described = TypeVar("Described", ModelInfo, ModelShape, ScoreInfo, SetInfo)


def _current(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> UnitFile:
    """What a file of the current version holds; what it holds beyond that is left alone."""
    content = {
        key: json.loads(metadata[key]) for key in ("model", "sets", "scores", "ssah_utils", "date")
    }
    blocks = content["model"]["modules"]["attention"].partition(".{layer}.")[0]
    shape = _made(ModelShape, content["model"] | {"blocks": blocks})
    info = UnitFileInfo(
        _made(ModelInfo, content["model"] | {"shape": shape}),
        {name: _made(SetInfo, said) for name, said in content["sets"].items()},
        {name: _made(ScoreInfo, said) for name, said in content["scores"].items()},
        VERSION,
        content["ssah_utils"],
        content["date"],
    )

    def values(what: str, name: str) -> PerUnit:
        found = PerUnit({kind: tensors[f"{what}.{name}.{kind}"] for kind in KINDS})
        check_shape(found, shape, name)
        return found

    sets = Named({name: values("sets", name).as_set() for name in info.sets})
    scores = Named({name: values("scores", name) for name in info.scores})
    return UnitFile(sets, scores, info)


def _made(kind: type[Described], said: Mapping) -> Described:
    """A dataclass from JSON that may say more than this version knows."""
    return kind(**{one.name: said[one.name] for one in fields(kind) if one.name in said})


def _version_1(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> UnitFile:
    """What a file of version 1 holds: a partition with scores, one set, or several by number."""
    named: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        named.setdefault(name, {})[kind] = tensor
    values = {name: PerUnit(of_kind) for name, of_kind in named.items()}
    if metadata["format"] == "ssah-units-1":
        partition = UnitPartition(values.pop("group"))
        sets = {group: partition.units(group) for group in json.loads(metadata["groups"])}
        about = {group: SetInfo(GROUP_RULES[group]) for group in sets}
    elif metadata["format"] == "ssah-unit-set-1":
        sets = {"set": values.pop("set")}
        about = {"set": SetInfo(metadata["what"])}
    else:
        names = json.loads(metadata["names"])
        sets = {name: values.pop(str(number)) for number, name in enumerate(names)}
        about = {name: SetInfo(name) for name in sets}
    model = ModelInfo("", "", metadata["fingerprint"], None)
    scores = {name: ScoreInfo("", "") for name in values}
    return UnitFile(Named(sets), Named(values), UnitFileInfo(model, about, scores, 1))
