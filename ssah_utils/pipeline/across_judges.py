"""The same answers under several judges: how much of an effect is the judge's.

Keyword matching, as the paper counts, takes every answer without the words of a refusal for a
success. The rules want language besides, and the learned judge wants the request fulfilled. Of
04_ablation the shares are stored as a run is published, because its answers are not. Knows answers
and judges that need no model. Loads no model.
"""

import json
from pathlib import Path

import pandas as pd

from ssah_utils.files import REFERENCE, write_json
from ssah_utils.judge import answers, decisions, rules
from ssah_utils.pipeline import verdicts
from ssah_utils.pipeline.across_models import folders
from ssah_utils.pipeline.result_tables import markdown, percent
from ssah_utils.stats import rate_table

STAGE, FILE = "04_ablation", "judges.json"
CONDITIONS = ("nothing", "safety", "random, as safety")
METRICS = {  # what each judge counts
    "keywords": "no word of refusal (keywords)",
    "rules": "complied (rules)",
    "learned": "fulfilled (learned)",
    "degenerate": "gibberish",
}


def success_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """What each judge counts of the answers to harmful requests: ``stats.rate_table`` by condition,
    one of ``CONDITIONS``, and metric, one of ``METRICS``.

    ``rows``: answers as 04_ablation keeps them. Draws of random units count together, so their
    interval is too narrow for one of them.
    """
    rows = rows[(rows["set"] == "harmful") & rows["condition"].isin(CONDITIONS)]
    by_judge = {judge: decisions.judged(rows, judge) for judge in decisions.JUDGES}
    found = pd.DataFrame(
        {
            "condition": rows["condition"],
            "keywords": [not rules.has_refusal_substring(text) for text in rows["response"]],
            **{judge: judged["coherent_asr"] for judge, judged in by_judge.items()},
            "degenerate": by_judge[decisions.JUDGE]["degenerate"],
        }
    )
    return rate_table(found, "condition", list(METRICS))


def keep(run: Path, place: Path) -> None:
    """Store what each judge counts in a finished run beside its results; without answers, nothing.

    What was stored of another run goes in either case.
    """
    path, target = run / STAGE / answers.FILE, place / STAGE / FILE
    target.unlink(missing_ok=True)
    if path.exists():
        write_json(target, success_rates(answers.read(path)).to_dict("records"))


def stored_rates(stored: Path) -> pd.DataFrame:
    """``success_rates`` of every run that is stored, with ``model`` and ``seed``; empty where none
    is.
    """
    parts = []
    for model, folder in folders(stored).items():
        for seed, run in verdicts.runs_by_seed(folder).items():
            path = run / STAGE / FILE
            if path.exists():
                rates = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
                parts.append(rates.assign(model=model, seed=seed))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def judges_table(results: dict[str, dict]) -> str:
    """Every stored run of 04_ablation under every judge, in percent with 95% intervals."""
    rows = []
    for (*which, condition), part in stored_rates(REFERENCE).groupby(
        ["model", "seed", "condition"], sort=False
    ):
        counted = part.set_index("metric")
        is_one = condition != CONDITIONS[-1]  # of the draws, the mean
        cells = [
            percent(counted.loc[metric]) if is_one else f"{100 * counted['mean'][metric]:.0f}"
            for metric in METRICS
        ]
        rows.append([*map(str, which), condition, *cells])
    return markdown(rows, ["model", "seed", "switched off", *METRICS.values()])
