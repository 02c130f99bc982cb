"""Stored results: where they are, and their tables. Nothing else is imported, so that figures and
verdicts are drawn from them at once.

Knows paths and tables. Does not know models, notebooks or how results came about.
"""

import json
import os
from pathlib import Path

import pandas as pd

from ssah_utils.files import workplace


def runs_root() -> Path:
    """``SSAH_RUNS``, else runs/ in the clone, or in the current folder outside of one."""
    return Path(os.environ.get("SSAH_RUNS") or workplace() / "runs").expanduser().resolve()


def find_run(profile: str, seed: int = 0) -> Path:
    """The newest run of a profile with this seed on this machine.

    ``FileNotFoundError`` says how to make one.
    """
    stamps = list((runs_root() / profile).glob(f"*/seed-{seed}/*/stamp.json"))
    if not stamps:
        command = f"ssah run --profile {profile} --set seed={seed}"
        what = f"no finished run of profile '{profile}' with seed {seed}"
        raise FileNotFoundError(f"{what}: run {command}")
    return max(stamps, key=lambda stamp: stamp.stat().st_mtime).parents[1]


def load_result(path: Path) -> dict:
    """A stored result with its tables as data frames.

    ``FileNotFoundError`` or ``ValueError`` says which stage to run again.
    """
    stage = path.parent.name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: re-run {stage}")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} is truncated or not JSON: re-run {stage}") from error
    found = result.get("format") if isinstance(result, dict) else None
    if found != "ssah-result-1" or not isinstance(result.get("tables"), dict):
        what = f"{path} has format {found!r} or no tables, expected 'ssah-result-1'"
        raise ValueError(f"{what}: re-run {stage}")
    result["tables"] = {name: pd.DataFrame(rows) for name, rows in result["tables"].items()}
    return result


def judged_by(result: dict) -> str:
    """Who judged the answers of a stored result; where it does not say, the rules did."""
    return result.get("judge", "rules")


class Stored(dict):
    """Tables of one stage's result, by name, with the parameters that it was run with."""

    def __init__(self, tables: dict[str, pd.DataFrame], parameters: dict | None = None) -> None:
        super().__init__(tables)
        self.parameters = parameters or {}


def differing_parameters(first: dict, second: dict) -> list[str]:
    """Parameters but the seed that both results of a stage have stored, and that differ."""
    both = first.keys() & second.keys() - {"seed"}
    return sorted(name for name in both if first[name] != second[name])
