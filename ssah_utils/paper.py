"""The paper's own numbers, which stand once, in data/paper_tables.yaml.

Li & Kim, "Superficial Safety Alignment Hypothesis", arXiv 2410.10862 v3, ICLR 2026.
"""

import re
from functools import cache

import pandas as pd
import yaml

from ssah_utils.files import DATA

FILE = DATA / "paper_tables.yaml"
PLACEHOLDER = re.compile(r"\{(?P<table>\w+)/(?P<path>[^{}:]+)(?::(?P<format>[^{}]*))?\}")


@cache
def _tables() -> dict[str, pd.DataFrame]:
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {name: pd.DataFrame(rows) for name, rows in content.items()}


def table(name: str) -> pd.DataFrame:
    """A table of the paper, one row a condition; ``KeyError`` lists the names."""
    if name not in _tables():
        raise KeyError(f"the paper has no table '{name}' here (there are: {', '.join(_tables())})")
    return _tables()[name].copy()


def number(name: str, *path: str) -> float:
    """One number of a table: the values that pick its row, in any columns, then the column.

    ``number("table1", "Llama2-7B-Chat", "safety", "asr")``. ``LookupError`` unless it is exactly
    one.
    """
    rows, column = table(name), path[-1]
    for value in path[:-1]:
        rows = rows[(rows.astype(str) == value).any(axis=1)]
    if column not in rows or len(rows) != 1:
        raise LookupError(f"'{name}/{'/'.join(path)}' is {len(rows)} numbers of the paper, not one")
    return float(rows[column].iloc[0])


def fill(text: str) -> str:
    """``text`` with every ``{table1/Llama2-7B-Chat/safety/asr:+.1f}`` replaced by that number."""

    def found(match: re.Match) -> str:
        value = number(match["table"], *match["path"].split("/"))
        return format(value, match["format"] or "g")

    return PLACEHOLDER.sub(found, text)
