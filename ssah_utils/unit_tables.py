"""Unit files as tables, for spreadsheets and data frames: one row per unit, one column per set or
score.

Knows unit files and tables. What a set is and how it was found stays in the unit file.
"""

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ssah_utils.architectures import ModelShape, writer_path
from ssah_utils.files import complete_only
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.unit_files import COLUMNS, UnitFile, check_shape, load_units

HOOKS = {  # of TransformerLens
    "attention": "blocks.{layer}.attn.hook_z",  # at [..., head, index_in_head]
    "mlp": "blocks.{layer}.mlp.hook_post",  # at [..., channel]
}


def unit_table(file: UnitFile, shape: ModelShape | None = None) -> pd.DataFrame:
    """One row per unit: where it is (``COLUMNS``), a bool column per set, a float32 one per score.

    ``head`` and ``index_in_head`` are missing for kind ``mlp``, ``hook`` for that of a mixture of
    experts, where TransformerLens hooks something else. ``shape`` is needed for a file of
    version 1, which does not say it (``models.shape_of``); ``ValueError`` without.
    """
    shape = shape or file.info.model.shape
    if shape is None:
        raise ValueError(
            "a unit file of version 1 does not say its model's shape: give"
            " shape=models.shape_of(model), or save it again as version 2"
        )
    named = file.sets | file.scores
    for name, values in named.items():
        check_shape(values, shape, name)
    frames = []
    for kind in KINDS:
        n_channels = shape.n_channels(kind)
        layer = torch.arange(shape.n_layers).repeat_interleave(n_channels)
        channel = torch.arange(n_channels).repeat(shape.n_layers)
        frame = pd.DataFrame({"kind": kind, "layer": layer.numpy(), "channel": channel.numpy()})
        in_heads = frame["channel"].astype("Int64").where(frame["kind"] == "attention")
        frame["head"] = in_heads // shape.head_dim
        frame["index_in_head"] = in_heads % shape.head_dim
        paths = [writer_path(shape, kind, number) for number in range(n_channels)]
        places = zip(frame["layer"], frame["channel"], strict=True)
        frame["module"] = [paths[channel].format(layer=layer) for layer, channel in places]
        frame["hook"] = frame["layer"].map(lambda layer, hook=HOOKS[kind]: hook.format(layer=layer))
        if kind == "mlp" and shape.n_experts:
            frame["hook"] = pd.NA
        columns = {name: values[kind].flatten().numpy() for name, values in named.items()}
        frames.append(frame.assign(**columns))
    return pd.concat(frames, ignore_index=True)


def export_units(path: Path | str, to: Path | str, shape: ModelShape | None = None) -> None:
    """Write a unit file as a table (``unit_table``) in CSV or Parquet, whole or not at all.

    Raises what ``load_units`` and ``unit_table`` raise, ``ValueError`` for another ending than .csv
    and .parquet, and ``ModuleNotFoundError`` where Parquet needs a library that is not installed.
    """
    _check_ending(to)
    table = unit_table(load_units(path), shape)
    with complete_only(to) as partial:
        if partial.suffix == ".csv":
            table.to_csv(partial, index=False)
        else:
            table.to_parquet(partial, index=False)


def read_table(path: Path | str) -> tuple[dict[str, PerUnit], dict[str, PerUnit]]:
    """Sets and scores by name, of a table like those of ``export_units``, in whatever order.

    Columns of true and false are sets, columns of numbers are scores; the columns that say where a
    unit is are needed up to ``channel``. Raises ``ValueError`` for a table without these, with
    another kind of column, or that does not hold every unit once.
    """
    _check_ending(path)
    if Path(path).suffix == ".csv":
        table = pd.read_csv(path, float_precision="round_trip")
    else:
        table = pd.read_parquet(path)
    if missing := [name for name in ("kind", "layer", "channel") if name not in table]:
        raise ValueError(f"{path} is no table of units: it has no column '{missing[0]}'")
    values = table.drop(columns=[*COLUMNS], errors="ignore")
    for name, column in values.items():
        if not pd.api.types.is_numeric_dtype(column):  # bool counts as a number
            raise ValueError(f"{path}: column '{name}' is neither of true and false nor of numbers")
    names = {True: [], False: []}
    for name, column in values.items():
        names[column.dtype == bool].append(name)
    kinds = {kind: rows.sort_values(["layer", "channel"]) for kind, rows in table.groupby("kind")}
    sizes = {kind: _size(rows, f"{path}: {kind}") for kind, rows in kinds.items()}

    def per_unit(name: str, dtype: torch.dtype) -> PerUnit:
        def of(kind: str) -> Tensor:
            return torch.tensor(kinds[kind][name].to_numpy(), dtype=dtype).view(sizes[kind])

        return PerUnit({kind: of(kind) for kind in kinds})

    sets = {name: per_unit(name, torch.bool) for name in names[True]}
    scores = {name: per_unit(name, torch.float32) for name in names[False]}
    return sets, scores


def _size(rows: pd.DataFrame, what: str) -> tuple[int, int]:
    """(n_layers, n_channels) of sorted rows; ``ValueError`` unless every unit is there once."""
    n_layers, n_channels = int(rows["layer"].max()) + 1, int(rows["channel"].max()) + 1
    places = rows["layer"].to_numpy() * n_channels + rows["channel"].to_numpy()
    if places.tolist() != list(range(n_layers * n_channels)):
        raise ValueError(f"{what}: not every unit is there once: export the unit file again")
    return n_layers, n_channels


def _check_ending(path: Path | str) -> None:
    if Path(path).suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path} is no table: its name has to end in .csv or .parquet")
    if Path(path).suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ModuleNotFoundError(
                f"{path} needs pyarrow, which is not installed: pip install pyarrow, or take .csv"
            ) from error
