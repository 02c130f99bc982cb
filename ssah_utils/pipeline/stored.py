"""Stored results: where they are, their tables, and whether they are what they were made as.

Nothing else is imported, so that figures and verdicts are drawn from them at once.

Knows paths and tables. Does not know models, notebooks or how results came about.
"""

import json
import os
from pathlib import Path

import pandas as pd

from ssah_utils.files import sha256_of_file, workplace


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


def stamp_of(folder: Path) -> dict:
    """What a finished stage left in its folder, else nothing; an unreadable stamp is none."""
    return _read(folder / "stamp.json")


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def changed_since(folder: Path) -> list[str]:
    """Outputs of a finished stage that are not as they were when its stamp was written."""
    outputs = stamp_of(folder).get("made", {}).get("outputs", {})
    return [name for name, found in outputs.items() if hash_of(folder / name) != found]


def hash_of(path: Path) -> str:
    """Hash of a file's bytes; '' where there is none."""
    return sha256_of_file(path) if path.exists() else ""


def made_from_another(folder: Path, result: dict) -> str:
    """What is amiss with the files of earlier stages that a stage's result was made from; '' if
    nothing is.

    They are beside its folder. One that is not there does not count: of some runs not all is kept.
    """
    for name, found in result.get("inputs", {}).items():
        if hash_of(folder.parent / name) not in ("", found):
            return f"was made from another {name} than is there"
    return ""


def amiss(folder: Path) -> str:
    """Why a finished stage does not stand for what is in the run, and what to do; '' if it does."""
    stage = folder.name
    if changed := changed_since(folder):
        return f"{changed[0]} of {stage} was changed since it was made: run {stage} again"
    if replaced := made_from_another(folder, _read(folder / "result.json")):
        return f"{stage} {replaced}: run {stage} again"
    return ""


class Stored(dict):
    """Tables of one stage's result, by name, with the parameters that it was run with."""

    def __init__(self, tables: dict[str, pd.DataFrame], parameters: dict | None = None) -> None:
        super().__init__(tables)
        self.parameters = parameters or {}


def differing_parameters(first: dict, second: dict) -> list[str]:
    """Parameters but the seed that two results of a stage differ in, or that only one has."""
    only_one_has = first.keys() ^ second.keys()
    differ = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    return sorted((only_one_has | differ) - {"seed"})
