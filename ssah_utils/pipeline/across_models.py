"""The same claims and tables on every model whose results are stored, side by side.

Stored results of the main model are those of the notebooks as committed; beside them, in the folder
``models``, each other model has a folder of the same form. Knows stored tables and claims. Loads no
model and measures nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from ssah_utils import embedded, paper
from ssah_utils.experiments.defence_names import FULL, NAMED
from ssah_utils.experiments.fewest_units import TARGETS, fewest_units
from ssah_utils.figures.claims import shown_interval
from ssah_utils.pipeline import verdicts
from ssah_utils.pipeline.claims import Claim, load_claims
from ssah_utils.pipeline.result_tables import (
    ADAPTER_HEADER,
    DEFENCE_HEADER,
    FREEZING_HEADER,
    Rows,
    StageTables,
    adapter_rows,
    chosen,
    defence_rows,
    freezing_rows,
    fulfilled,
    interval,
    markdown,
    mean_percent,
    percent,
    with_unit,
)
from ssah_utils.pipeline.stored import load_result

FOLDER = "models"
MAIN = embedded.DEFAULT
# The model that a notebook is committed with, where it is not the main one.
SHOWN_WITH = {"00_quickstart": embedded.VENDOR_ALIGNED}
COLUMNS = ("id", "model", "verdict", "ours", "ci_low", "ci_high", "control", "n_seeds", "note")
SHORT = {"replicated": "**yes**", "partly": "partly", "not replicated": "no", "not measured": ""}


def model_folder(stored: Path, model: str) -> Path:
    """Where a model's results are, or would be."""
    return stored if model == MAIN else stored / FOLDER / model


def folders(stored: Path) -> dict[str, Path]:
    """Where each model's results are, the main model's first."""
    others = sorted(path for path in (stored / FOLDER).glob("*") if path.is_dir())
    return {MAIN: stored} | {path.name: path for path in others}


def results_by_model(stored: Path) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """Results of seed 0, by model and stage, and one line for each that could not be read."""
    found: dict[str, dict[str, dict]] = {}
    problems = []
    for model, folder in folders(stored).items():
        found[model] = {}
        for path in sorted(folder.glob("*/result.json")):
            try:
                found[model][path.parent.name] = load_result(path)
            except ValueError as error:
                problems.append(str(error))
    return found, problems


def verdicts_by_model(stored: Path, stated: list[Claim]) -> pd.DataFrame:
    """One row a claim and model, in their orders: ``COLUMNS``."""
    parts = []
    for model, folder in folders(stored).items():
        table, _ = verdicts.stored_verdicts(folder, claims_about(folder, stated))
        parts.append(table.assign(model=model))
    table = pd.concat(parts, ignore_index=True)
    order = {claim.id: place for place, claim in enumerate(stated)}
    table = table.sort_values("id", key=lambda ids: ids.map(order), kind="stable")
    return table[list(COLUMNS)].reset_index(drop=True)


def claims_about(folder: Path, stated: list[Claim]) -> list[Claim]:
    """The claims on which the results in a model's folder say something of that model.

    07 aligns the embedded base where the run's own model came aligned: that is of another one.
    """
    foreign = {stage for stage in verdicts.stages_of(stated) if _is_foreign(folder, stage)}
    return [claim for claim in stated if not set(verdicts.stages_of([claim])) & foreign]


def _is_foreign(folder: Path, stage: str) -> bool:
    """Whether a stage's result in a model's folder is of an embedded model that it is not about."""
    try:
        parameters = load_result(folder / stage / "result.json")["parameters"]
    except (OSError, ValueError):
        return False
    start = parameters.get("start_model") or parameters.get("model")
    return start in embedded.MODELS and start != parameters.get("model")


def counted(by_model: pd.DataFrame) -> pd.DataFrame:
    """On how many models each claim was measured, and on how many it replicated or did in part.

    Indexed by id: measured, replicated, partly.
    """
    measured = by_model[by_model["verdict"] != "not measured"]
    ids = by_model["id"].unique()
    by_verdict = pd.crosstab(measured["id"], measured["verdict"]).reindex(ids, fill_value=0)
    table = by_verdict.reindex(columns=["replicated", "partly"], fill_value=0)
    return table.assign(measured=by_verdict.sum(axis=1))


def of_models(by_model: pd.DataFrame) -> dict[str, str]:
    """By claim, on how many of the models that measured it it replicated: ``2/3``."""
    table = counted(by_model)
    return {row.Index: f"{row.replicated}/{row.measured}" for row in table.itertuples()}


class StoredResults(dict):
    """Results of the main model by stage.

    * ``models``: the same of every model, by name.
    * ``problems``: one line for each result that could not be read.
    * ``by_model``: verdicts on every model, as ``verdicts_by_model`` gives them.
    """

    def __init__(self, stored: Path) -> None:
        self.models, self.problems = results_by_model(stored)
        super().__init__(self.models[MAIN])
        self.by_model = verdicts_by_model(stored, load_claims())


# ------------------------------------------------------------------------------------------- tables


def claims_across(results: StoredResults) -> str:
    """One row a claim, one column a model: its verdict and our number; then the count over models.

    Only claims that more than one model has measured.
    """
    by_model, titles = results.by_model, {claim.id: claim.claim for claim in load_claims()}
    several = counted(by_model).query("measured > 1").index
    models, counts = list(by_model["model"].unique()), of_models(by_model)
    rows = []
    for name, part in by_model[by_model["id"].isin(several)].groupby("id", sort=False):
        by_name = part.set_index("model")
        cells = []
        for model in models:
            row = by_name.loc[model] if model in by_name.index else None
            is_there = row is not None and row["verdict"] != "not measured"
            cells.append(f"{SHORT[row['verdict']]} · {shown_interval(row)}" if is_there else "")
        rows.append([titles[name], *cells, counts[name]])
    return markdown(rows, ["claim", *models, "replicated on"])


def open_questions(results: StoredResults) -> str:
    """What the paper leaves open, and the claims here that answer it: on the main model, and on how
    many models they replicated.
    """
    table = results["08_claims"]["tables"]["claims"].set_index("id")
    models, rows = of_models(results.by_model), []
    for asked in paper.table("open_questions").itertuples():
        question = f"{asked.number}. {asked.question}"
        for one in asked.claims:
            row = table.loc[one]
            ours = with_unit(row, row["unit"])
            rows.append([question, row["claim"], ours, row["verdict"], models[one]])
            question = ""
    return markdown(rows, ["left open", "claimed here", "ours [95%]", "verdict", "models"])


def tables_of(results: StoredResults, stage: str) -> Iterator[tuple[str, StageTables]]:
    """The tables of a stage, of each model on which it was measured."""
    for model, stages in results.models.items():
        if stage in stages:
            yield model, stages[stage]["tables"]


def ablation_across(results: StoredResults) -> str:
    """What switching off each group does, per model: ASR, coherent ASR, gibberish, cloze accuracy.

    Random controls are averaged over their draws.
    """
    rows = []
    for model, tables in tables_of(results, "04_ablation"):
        rates = tables["rates"]
        for condition, part in rates[rates["part"] == "groups"].groupby("condition", sort=False):
            cells = [f"{part['units'].iloc[0]:,}"]
            for name, metric in (("harmful", "asr"), ("harmful", "coherent_asr")):
                found = chosen(part, name, metric)
                cells.append(percent(found.iloc[0]) if len(found) == 1 else mean_percent(found))
            cells.append(mean_percent(chosen(part, "harmful", "degenerate")))
            cells.append(mean_percent(chosen(part, "helpful", "refused")))
            cells.append(mean_percent(chosen(part, "cloze", "accuracy")))
            rows.append([model, condition, *cells])
    header = ["model", "switched off", "units", "ASR", "coherent ASR", "degenerate"]
    return markdown(rows, [*header, "harmless refused", "cloze accuracy"])


def units_across(results: StoredResults) -> str:
    """The safety units of each model: how many, where, how stable, and how few are enough."""
    rows = []
    for model, stages in results.models.items():
        if not {"03_units", "04_ablation"} <= stages.keys():
            continue
        found, ablated = stages["03_units"]["tables"], stages["04_ablation"]["tables"]
        safety = found["counts"].set_index("group").loc["safety"]
        agreed = found["stability"].set_index("group")["corrected"]["safety"]
        row = [model, f"{safety['units']:,.0f}"]
        row += [f"{safety[kind] / safety['units']:.0%}" for kind in ("attention", "mlp")]
        row.append(f"{agreed:.2f}")
        enough = fewest_units(ablated["rates"], ablated["differences"])
        for target in TARGETS:
            reached = enough[enough["target"] == target]
            row.append(f"{reached['fraction'].iloc[0]:.2%}" if len(reached) else "not seen")
        rows.append(row)
    header = ["model", "safety units", "in attention", "in feed-forward", "agreement of halves"]
    header += ["half of the effect at", "90% at"]
    return markdown(rows, header)


def of_others(
    results: StoredResults,
    stage: str,
    rows_of: Callable[[StageTables], Rows],
    header: Sequence[str],
) -> str:
    """What ``rows_of`` makes of a stage's tables, for every other model than the main one."""
    rows = [
        [model, *row]
        for model, tables in tables_of(results, stage)
        if model != MAIN
        for row in rows_of(tables)
    ]
    return markdown(rows, ["model", *header])


def freezing_across(results: StoredResults) -> str:
    """``freezing_rows`` of every other model."""
    return of_others(results, "06_freezing", freezing_rows, FREEZING_HEADER)


def adapters_across(results: StoredResults) -> str:
    """``adapter_rows`` of every other model."""
    return of_others(results, "06_freezing", adapter_rows, ADAPTER_HEADER)


def defences_across(results: StoredResults) -> str:
    """``defence_rows`` of every other model, under what full fine-tuning leaves of its safety."""

    def rows_of(tables: StageTables) -> Rows:
        return [full_row(tables), *defence_rows(tables)]

    return of_others(results, "A4_defences", rows_of, DEFENCE_HEADER)


def full_row(tables: StageTables) -> list[str]:
    """How full fine-tuning answers, in the columns of ``DEFENCE_HEADER``.

    What is learned and what is kept are measured from it, so it has learned all and kept nothing.
    """
    rates, task = tables["rates"], tables["gains"]["task"].iloc[0]
    full = rates[(rates["task"] == task) & (rates["method"] == FULL)]
    return [NAMED[FULL][0], "", "", "", "1.00", *fulfilled(full), "", ""]


def switched(row: pd.Series) -> list[str]:
    """What is gone with some units: margin lost, answers to harmful requests, and the price."""
    return [
        interval(row, "z.1f", "margin_drop"),
        interval(row, ".0f", "coherent_asr", "coherent_low", "coherent_high", scale=100),
        interval(row, "z.2f", "answer_nll", "nll_low", "nll_high"),
    ]


SWITCHED = ("margin lost, nats", "coherent ASR", "harmless answers less likely, nats")


def finders_across(results: StoredResults) -> str:
    """Sets of equal size by every finder, and random ones, switched off."""
    rows = []
    for model, tables in tables_of(results, "A3_finders"):
        for _, row in tables["finders"].iterrows():
            is_random = pd.isna(row["seconds"])
            cost = [f"{row['agreement_of_halves']:.2f}", f"{row['seconds']:.0f}"]
            cells = ["", ""] if is_random else cost
            rows.append([model, row["finder"], f"{row['units']:,}", *switched(row), *cells])
    header = ["model", "found by", "units", *SWITCHED, "agreement of halves", "seconds"]
    return markdown(rows, header)


def values_across(results: StoredResults) -> str:
    """The safety units, and random ones, held at other values than zero."""
    rows = []
    for model, tables in tables_of(results, "A3_finders"):
        for _, row in tables["interventions"].iterrows():
            rows.append([model, row["intervention"], row["set"], *switched(row)])
    return markdown(rows, ["model", "held at", "units", *SWITCHED])


def single_units_across(results: StoredResults) -> str:
    """Every finder's first unit alone under its strongest factor, and a random one under it."""
    rows = []
    for model, tables in tables_of(results, "A3_finders"):
        table = tables["single_units"]
        for _, row in table[table["is_strongest"]].iterrows():
            random = [interval(row, "z.1f", *(f"random_{end}" for end in ("drop", "low", "high")))]
            ends = (f"random_coherent_{end}" for end in ("asr", "low", "high"))
            random.append(interval(row, ".0f", *ends, scale=100))
            unit = [row["finder"], row["unit"], f"{row['factor']:.0f}"]
            rows.append([model, *unit, *switched(row), *random])
    header = ["model", "found by", "unit", "times", *SWITCHED]
    return markdown(rows, [*header, "random unit: margin", "random unit: coherent ASR"])


MODEL_TABLES = {
    "open questions": open_questions,
    "claims by model": claims_across,
    "ablation by model": ablation_across,
    "units by model": units_across,
    "freezing by model": freezing_across,
    "adapters by model": adapters_across,
    "defences by model": defences_across,
    "finders by model": finders_across,
    "values by model": values_across,
    "single units by model": single_units_across,
}
