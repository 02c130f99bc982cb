"""What README.md and docs/guide.md say in numbers: counts of verdicts, findings, embedded models.

A finding is a list of claims. Its sentences, numbers and verdicts are those of the claims table:
a summary cannot say more than the claims do. Knows stored tables and which models are embedded.
Loads none, and writes no file.
"""

from functools import partial

import pandas as pd

from ssah_utils import assets, embedded
from ssah_utils.figures.claims import two_digits
from ssah_utils.pipeline.across_models import StoredResults, of_models
from ssah_utils.pipeline.claims import CLAIM_VERDICTS, load_claims
from ssah_utils.pipeline.result_tables import markdown, with_unit

FINDINGS = {
    "safety units": ("safety-units-carry-safety",),
    "freezing": (
        "freezing-safety",
        "freezing-safety-some-complex",
        "freezing-safety-all-complex",
        "freezing-complex-keeps-task",
    ),
    "not replicated": (
        "aligned-closer-to-refusal",
        "safety-units-exclusive",
        "redundant-units-no-utility",
        "budget-beats-random",
    ),
}


def claims_of(results: dict[str, dict]) -> pd.DataFrame:
    """The claims table as 08_claims stored it."""
    return results["08_claims"]["tables"]["claims"]


def verdict_counts(results: dict[str, dict]) -> str:
    """How many claims there are of every verdict on the main model, by experiment and in all."""
    table = claims_of(results)
    verdicts = [one for one in CLAIM_VERDICTS if (table["verdict"] == one).any()]
    parts = [*table.groupby("experiment", sort=False), ("**all**", table)]
    rows = []
    for name, part in parts:
        counts = [str((part["verdict"] == one).sum()) for one in verdicts]
        rows.append([name, *counts, str(len(part))])
    return markdown(rows, ["claims on", *verdicts, "in all"])


def finding_table(results: StoredResults, ids: tuple[str, ...]) -> str:
    """The claims of a finding: what is claimed, ours, what the control shows, the verdict, and on
    how many models it replicated.

    Raises ``KeyError`` for a claim that was not stored.
    """
    table, models = claims_of(results).set_index("id"), of_models(results.by_model)
    rows = []
    for one in ids:
        row = table.loc[one]
        ours = with_unit(row, row["unit"])
        rows.append([row["claim"], ours, two_digits(row["control"]), row["verdict"], models[one]])
    return markdown(rows, ["claim", "ours [95%]", "control", "verdict", "models"])


def finding_by_model(results: StoredResults, ids: tuple[str, ...]) -> str:
    """The same on every model that measured a claim, a row each and the claim in the first.

    Raises ``KeyError`` for a claim that no model has measured.
    """
    stated = {claim.id: claim for claim in load_claims()}
    by_model = results.by_model[results.by_model["verdict"] != "not measured"].set_index("id")
    rows = []
    for one in ids:
        claim = stated[one].claim
        for row in by_model.loc[[one]].to_dict("records"):
            ours = with_unit(row, stated[one].unit)
            rows.append([claim, row["model"], ours, two_digits(row["control"]), row["verdict"]])
            claim = ""
    return markdown(rows, ["claim", "model", "ours [95%]", "control", "verdict"])


def models_table(results: dict[str, dict]) -> str:
    """The models that come in wheels: what is fetched once and how much disk the model takes."""
    rows = []
    for name, model in embedded.MODELS.items():
        fetched = sum(assets.WHEELS[package].n_bytes for package, _ in model.parts)
        on_disk = f"{model.n_bytes_float32 / 1e9:.1f}"
        rows.append([f"`{name}`", f"{fetched / 1e6:.0f}", on_disk])
    return markdown(rows, ["embedded model", "MB fetched, once", "GB on disk"])


README_PARTS = {
    "verdicts": verdict_counts,
    **{name: partial(finding_table, ids=ids) for name, ids in FINDINGS.items()},
    "safety units": partial(finding_by_model, ids=FINDINGS["safety units"]),
}
GUIDE_PARTS = {"models": models_table}
