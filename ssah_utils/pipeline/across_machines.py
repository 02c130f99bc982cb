"""Where runs were measured, and the same seed on another machine: which verdicts and numbers move.

Arithmetic differs between processors in the last bits, and a training carries that on. Each machine
has a file ``machines/NAME.json`` beside the stored results of a model: the verdicts of one run
there, with what it was made by, and how far it found the same safety units. So has every other seed
than 0, whose unit file is not stored. Knows stored results and claims. Loads no model.
"""

import json
from pathlib import Path

import pandas as pd

from ssah_utils import unit_files, units
from ssah_utils.figures.claims import shown_interval
from ssah_utils.files import REFERENCE, sha256_of_file, write_json
from ssah_utils.pipeline import verdicts
from ssah_utils.pipeline.across_models import StoredResults, claims_about, folders
from ssah_utils.pipeline.claims import load_claims
from ssah_utils.pipeline.result_tables import markdown
from ssah_utils.pipeline.stored import judged_by, load_result

FOLDER = "machines"
FIELDS = ("id", "verdict", "ours", "ci_low", "ci_high", "control")
UNITS = Path("03_units") / "units.safetensors"
AGREEMENT = "agreement.json"
UNTOLD = "a processor that was not stored"


def keep_verdicts(run: Path, name: str, target: Path = REFERENCE) -> Path:
    """Store the verdicts of one run, as far as it went, as those of a machine; returns the file.

    ``ValueError`` for a run without results, and for one that is not of a stored model with seed 0:
    it would be held against another one.
    """
    # a run's folder has the model's name as it is stored; of a hub id or a place it is another
    model, seed, places = run.parent.name, run.name.removeprefix("seed-"), folders(target)
    if model not in places or seed != "0":
        stored = ", ".join(places)
        raise ValueError(f"{run} is of {model}, seed {seed}: stored is seed 0 of {stored}")
    stated = claims_about(run, load_claims())
    tables, _ = verdicts.read_tables(run, verdicts.stages_of(stated))
    if not tables:
        raise ValueError(f"{run} has no result on which a claim rests: run some notebooks there")
    claims = verdicts.verdict_table(stated, [tables])
    claims = claims[claims["verdict"] != "not measured"]
    paths = {f"{stage}/result.json": run / stage / "result.json" for stage in tables}
    made_by = {"inputs": {one: sha256_of_file(path) for one, path in paths.items()}}
    made_by |= _made_by(list(paths.values()))
    agreed = safety_units_agree(places[model] / UNITS, run / UNITS)
    is_own = agreed and sha256_of_file(run / UNITS) == agreed["with"]  # what is stored is this run
    made_by["units"] = {} if is_own else agreed
    path = places[model] / FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, made_by | {"claims": verdicts.to_records(claims[list(FIELDS)])})
    return path


def safety_units_agree(stored: Path, there: Path) -> dict[str, object]:
    """How far a run found the safety units of a stored unit file, and the hash of that file.

    ``agree``: Jaccard, corrected for chance. Empty where one is not there.
    """
    if not (stored.exists() and there.exists()):
        return {}
    sets = {path: unit_files.load_set(path, name="safety") for path in (stored, there)}
    table = units.overlap_table(sets).set_index(["first", "second"])
    agree = round(float(table.loc[(stored, there), "corrected"]), 6)
    return {"agree": agree, "with": sha256_of_file(stored)}


def keep_agreement(run: Path, place: Path) -> None:
    """Store beside the results of a run with another seed how far it found the safety units of seed
    0. Of seed 0, or without a unit file, nothing.
    """
    is_other = place.name.startswith("seed-")
    if is_other and (found := safety_units_agree(place.parent / UNITS, run / UNITS)):
        write_json(place / UNITS.parent / AGREEMENT, found)


def runs_table(results: StoredResults) -> str:
    """Every stored run: its seed, its notebooks, and where each was measured; of another seed, how
    far it found the safety units of seed 0. Seeds of one model that agree in all this share a row.
    """
    rows: dict[tuple[str, ...], list[int]] = {}
    for model, folder in folders(REFERENCE).items():
        for seed, run in verdicts.runs_by_seed(folder).items():
            for place, stages in _stages_by_machine(run).items():
                agree = _agreement(folder, run) if UNITS.parent.name[:2] in stages else ""
                rows.setdefault((model, *place, ", ".join(stages), agree), []).append(seed)
    cells = [
        [model, ", ".join(map(str, seeds)), stages, *place, agree]
        for (model, *place, stages, agree), seeds in rows.items()
    ]
    header = ["model", "seed", "notebooks", "processor", "precision", "threads"]
    return markdown(cells, [*header, "safety units agree with seed 0"])


def _stages_by_machine(run: Path) -> dict[tuple[str, str, str], list[str]]:
    """The numbers of a run's notebooks that measure, by processor, precision and threads."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for path in sorted(run.glob("*/result.json")):
        place = load_result(path).get("machine", {})
        if "dtype" in place:  # a notebook without a model, as 08, has no precision
            where = place.get("cpu", UNTOLD), place["dtype"], str(place.get("threads", ""))
            found.setdefault(where, []).append(path.parent.name[:2])
    return found


def _agreement(stored: Path, run: Path) -> str:
    """What ``keep_agreement`` stored of a run; empty where it was with another unit file."""
    path = run / UNITS.parent / AGREEMENT
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    is_current = sha256_of_file(stored / UNITS) == found["with"]
    return f"{found['agree']:.2f}" if is_current else ""


def _made_by(paths: list[Path]) -> dict[str, list]:
    """Where, judged by whom and with which code the results that verdicts rest on were measured."""
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
    about = claims_about(stored, load_claims())
    stated = [one for one in about if not own & set(verdicts.stages_of([one]))]
    tables, _ = verdicts.read_tables(stored, verdicts.stages_of(stated))
    here = verdicts.verdict_table(stated, [tables])[["claim", *FIELDS]]
    there = pd.DataFrame(made_by["claims"])
    both = here.merge(there, on="id", suffixes=("", "_there"))
    is_measured = both[["verdict", "verdict_there"]].ne("not measured").all(axis=1)
    return both[is_measured].reset_index(drop=True)


def machines_table(results: StoredResults) -> str:
    """Of every model and machine: on how many claims it agrees, then each on which it does not."""
    parts = []
    for model, folder in folders(REFERENCE).items():
        judges = {stage[:2]: judged_by(result) for stage, result in results.models[model].items()}
        for name, made_by in of_machines(folder).items():
            table = on_both(folder, name)
            moved = table[table["verdict"] != table["verdict_there"]]
            said = (
                f"`{name}`, {model} ({', '.join(made_by['machines'])}; seed 0; judge:"
                f" {', '.join(made_by['judges'])}; commit {', '.join(made_by['commits'])}):"
                f" the same verdict on {len(table) - len(moved)} of {len(table)} claims."
            )
            found = made_by.get("units")
            if found and sha256_of_file(folder / UNITS) == found["with"]:
                said += (
                    f" Safety units agree to {found['agree']:.2f} (Jaccard, corrected for chance)."
                )
            others = sorted(stage for stage, one in judges.items() if one not in made_by["judges"])
            if others:
                said += f" What is stored of {', '.join(others)} was judged by another judge."
            parts.append(f"{said}\n\n{moved_table(moved, name)}" if len(moved) else said)
    return "\n\n".join(parts)


def moved_table(moved: pd.DataFrame, name: str) -> str:
    """Claims of ``on_both`` whose verdicts differ, with the number that each rests on."""
    rows = []
    for row in moved.to_dict("records"):
        there = {key: row[f"{key}_there"] for key in FIELDS if key != "id"}
        cells = [row["claim"], shown_interval(row), row["verdict"]]
        rows.append([*cells, shown_interval(there), there["verdict"]])
    header = ["claim", "stored, seed 0 alone", "verdict", f"on {name}", "verdict there"]
    return markdown(rows, header)
