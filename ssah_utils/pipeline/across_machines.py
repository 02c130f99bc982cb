"""The same seed on another machine: which verdicts and numbers move.

Arithmetic differs between processors in the last bits, and a training carries that on. Each machine
has a file ``machines/NAME.json`` beside the stored results: the verdicts of one whole run there,
with what it was made by. Knows stored results and claims. Loads no model.
"""

import json
from pathlib import Path

import pandas as pd

from ssah_utils.figures.claims import shown_interval
from ssah_utils.files import REFERENCE, sha256_of_file, write_json
from ssah_utils.pipeline import verdicts
from ssah_utils.pipeline.across_models import MAIN
from ssah_utils.pipeline.claims import load_claims
from ssah_utils.pipeline.result_tables import markdown
from ssah_utils.pipeline.stored import judged_by, load_result

FOLDER = "machines"
FIELDS = ("id", "verdict", "ours", "ci_low", "ci_high", "control")
UNTOLD = "a processor that was not stored"


def keep_verdicts(run: Path, name: str, target: Path = REFERENCE) -> Path:
    """Store the verdicts of one finished run as those of a machine; returns the file.

    ``ValueError`` where its 08_claims has not run or has read other seeds, too, and for a run that
    is not of the stored model with seed 0: it would be held against another one.
    """
    try:
        result = load_result(run / "08_claims" / "result.json")
    except OSError as error:
        raise ValueError(f"{run} has no claims: run 08_claims there") from error
    model, seed = (result["parameters"][name] for name in ("model", "seed"))
    if (model, seed) != (MAIN, 0):
        raise ValueError(f"{run} is of {model}, seed {seed}: stored is {MAIN}, seed 0")
    claims = result["tables"]["claims"]
    if (claims["runs"] > 1).any():
        raise ValueError(f"08_claims of {run} has read several seeds: run it beside none")
    path = target / FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    made_by = {"inputs": result["inputs"]} | _made_by([run / one for one in result["inputs"]])
    write_json(path, made_by | {"claims": verdicts.to_records(claims[list(FIELDS)])})
    return path


def _made_by(paths: list[Path]) -> dict[str, list]:
    """Where, judged by whom and with which code the results that verdicts rest on were measured.

    That of 08_claims says nothing of it: it may have run elsewhere and later.
    """
    results = [load_result(path) for path in paths]
    places = [result.get("machine", {}) for result in results]
    found = {
        "machines": [
            " ".join([place.get("cpu", UNTOLD), place.get("dtype", "")]).strip() for place in places
        ],
        "judges": [judged_by(result) for result in results],
        "commits": [result["commit"] for result in results],
    }
    return {name: sorted(set(values)) for name, values in found.items()}


def of_machines(stored: Path) -> dict[str, dict]:
    """What is stored of every machine, by its name."""
    paths = sorted((stored / FOLDER).glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def on_both(stored: Path, name: str) -> pd.DataFrame:
    """Verdict and number of every claim that two runs have measured: columns of ``FIELDS``, and the
    same with ``_there`` of the machine ``name``. Both are of one seed alone. A claim whose stored
    result comes from that very run is no comparison, and has no row.
    """
    made_by = of_machines(stored)[name]
    paths = {f"{path.parent.name}/{path.name}": path for path in stored.glob("*/result.json")}
    read = made_by["inputs"].items()
    own = {
        Path(one).parent.name
        for one, sha in read
        if one in paths and sha256_of_file(paths[one]) == sha
    }
    stated = [one for one in load_claims() if not own & set(verdicts.stages_of([one]))]
    tables, _ = verdicts.read_tables(stored, verdicts.stages_of(stated))
    here = verdicts.verdict_table(stated, [tables])[["claim", *FIELDS]]
    there = pd.DataFrame(made_by["claims"])
    both = here.merge(there, on="id", suffixes=("", "_there"))
    is_measured = both[["verdict", "verdict_there"]].ne("not measured").all(axis=1)
    return both[is_measured].reset_index(drop=True)


def machines_table(results: dict[str, dict]) -> str:
    """Of every machine: on how many claims it agrees, then each on which it does not."""
    parts = []
    for name, made_by in of_machines(REFERENCE).items():
        table = on_both(REFERENCE, name)
        moved = table[table["verdict"] != table["verdict_there"]]
        where, judges = ", ".join(made_by["machines"]), made_by["judges"]
        of_stored = {stage[:2]: judged_by(result) for stage, result in results.items()}
        others = sorted(stage for stage, one in of_stored.items() if one not in judges)
        said = (
            f"`{name}` ({where}; seed 0; judge: {', '.join(judges)}; commit"
            f" {', '.join(made_by['commits'])}): the same verdict on"
            f" {len(table) - len(moved)} of {len(table)} claims."
        )
        if others:
            said += f" What is stored of {', '.join(others)} was judged by another judge."
        rows = []
        for row in moved.to_dict("records"):
            there = {key: row[f"{key}_there"] for key in FIELDS if key != "id"}
            cells = [row["claim"], shown_interval(row), row["verdict"]]
            rows.append([*cells, shown_interval(there), there["verdict"]])
        header = ["claim", "stored, seed 0 alone", "verdict", f"on {name}", "verdict there"]
        parts.append(f"{said}\n\n{markdown(rows, header)}")
    return "\n\n".join(parts)
