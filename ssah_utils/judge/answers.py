"""Judged answers as a file, so that every verdict can be taken again without generating.

Whole answers are written, those to harmful requests among them: the file belongs into the folder of
a run and is never published. Knows tables of answers; makes none.
"""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from ssah_utils.files import complete_only

FILE = "answers.jsonl"
# what a verdict is taken from, and what it was
JUDGED = ("id", "prompt", "response", "base_nll", "verdict")
VERDICT_OF = {"refused": "refused", "coherent_asr": "complied", "degenerate": "degenerate"}


class AnswerLog:
    """Collects answers while they are measured; ``write`` makes the file.

    A row has what tells its condition apart, ``set`` (the name of its requests) where there is one,
    and the columns ``JUDGED``.
    """

    def __init__(self) -> None:
        self.tables: list[pd.DataFrame] = []

    def add(self, rows: pd.DataFrame, *columns: str, **keys: Hashable) -> pd.DataFrame:
        """Keep those of ``rows`` that are judged answers, and give ``rows`` back.

        What tells their condition apart: ``columns`` of them, and ``keys``, which all have.

        ``ValueError`` for rows without a column that a verdict needs.
        """
        if missing := [name for name in JUDGED if name not in rows]:
            raise ValueError(f"rows of answers have no column {', '.join(missing)}")
        named = [name for name in (*columns, "set", *JUDGED) if name in rows]
        self.tables.append(rows.loc[rows["verdict"].notna(), named].assign(**keys))
        return rows

    def add_all(self, measured: Mapping[tuple, pd.DataFrame], names: Sequence[str]) -> None:
        """``add`` of several measurements, by what tells them apart: one value for each of
        ``names``.
        """
        for key, rows in measured.items():
            self.add(rows, **dict(zip(names, key, strict=True)))

    def write(self, path: Path | str) -> None:
        """One JSON object a line; an answer that two conditions share has a line in each."""
        columns = ["set", *JUDGED]
        table = pd.concat(self.tables) if self.tables else pd.DataFrame(columns=columns)
        keys = [name for name in table if name not in columns]
        table = table[[*keys, *(name for name in columns if name in table)]]
        with complete_only(path) as partial_file:
            table.to_json(partial_file, orient="records", lines=True, double_precision=15)


def read(path: Path | str) -> pd.DataFrame:
    """The rows of an ``AnswerLog``; texts stay texts, whatever they look like."""
    return pd.read_json(path, lines=True, dtype=False, convert_dates=False)


def conditions_of(answers: pd.DataFrame) -> list[str]:
    """The columns that tell conditions of a table of answers apart, ``set`` the last of them."""
    keys = [name for name in answers if name not in (*JUDGED, "set")]
    return [*keys, "set"] if "set" in answers else keys


def changes(answers: pd.DataFrame, verdicts: pd.Series) -> pd.DataFrame:
    """What other verdicts on the same answers change, one row a condition.

    Columns: those of ``conditions_of``, n, changed (share of the verdicts), and for every metric of
    ``VERDICT_OF`` its stored share (``coherent_asr_was``) and that by the other verdicts
    (``coherent_asr``).
    """
    rows, by = [], conditions_of(answers)
    for key, part in answers.groupby(by, sort=False, dropna=False):
        now = verdicts[part.index]
        row = dict(zip(by, key, strict=True)) | {"n": len(part)}
        row["changed"] = (now != part["verdict"]).mean()
        for metric, verdict in VERDICT_OF.items():
            row |= {f"{metric}_was": (part["verdict"] == verdict).mean()}
            row |= {metric: (now == verdict).mean()}
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.astype({name: object for name in by if len(table)})  # a draw is no fraction
