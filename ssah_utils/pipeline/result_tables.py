"""Stored results as the Markdown tables of docs/results.md and docs/judge.md, in the order of the
notebooks.

Numbers stand with their intervals. No table judges: verdicts are those of the claims table. Knows
stored tables; writes no file, and no number that a run did not produce.
"""

import pandas as pd

from ssah_utils.figures.claims import shown_interval, two_digits


def interval(
    row: pd.Series,
    form: str,
    value: str = "mean",
    low: str = "low",
    high: str = "high",
    scale: float = 1,
) -> str:
    """A value with its interval, from three columns of a row."""
    return f"{scale * row[value]:{form}} [{scale * row[low]:{form}}, {scale * row[high]:{form}}]"


def percent(row: pd.Series, form: str = ".0f") -> str:
    return interval(row, form, scale=100)


def chosen(rates: pd.DataFrame, name: str, metric: str) -> pd.DataFrame:
    """Rows of a metric on one set of requests or items."""
    return rates[(rates["set"] == name) & (rates["metric"] == metric)]


def markdown(rows: list[list[str]], header: list[str]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def alignment_table(results: dict[str, dict]) -> str:
    """Rates of the three models on held-out requests, in percent with 95% intervals."""
    rates = results["01_alignment"]["tables"]["rates"].set_index(["set", "metric", "model"])
    names = [
        ("harmful", "asr", "ASR, AdvBench"),
        ("other_harmful", "asr", "ASR, HarmBench"),
        ("helpful", "refused", "harmless requests refused"),
        ("safe_twin", "refused", "safe contrast twins refused"),
        ("harmful_twin", "asr", "ASR, harmful contrast twins"),
        ("cloze", "accuracy", "cloze accuracy"),
    ]
    models = [
        name
        for name in ("base", "unaligned", "aligned")
        if name in rates.index.get_level_values("model")
    ]
    rows = [
        [title, *(percent(rates.loc[(name, metric, model)], ".1f") for model in models)]
        for name, metric, title in names
    ]
    return markdown(rows, ["held-out, %", *models])


def ablation_table(results: dict[str, dict]) -> str:
    """Verdicts and utility under every ablation; random controls are averaged over their draws,
    range in parentheses.
    """
    rates = results["04_ablation"]["tables"]["rates"]
    rates = rates[rates["part"].isin(["groups", "kinds"])]
    columns = [
        ("harmful", "asr"),
        ("harmful", "coherent_asr"),
        ("harmful", "degenerate"),
        ("helpful", "refused"),
        ("cloze", "accuracy"),
    ]
    rows = []
    for condition, part in rates.groupby("condition", sort=False):
        cells = []
        for name, metric in columns:
            found = chosen(part, name, metric)
            shares = 100 * found["mean"]
            spread = f"{shares.mean():.0f} ({shares.min():.0f} to {shares.max():.0f})"
            cells.append(percent(found.iloc[0]) if len(found) == 1 else spread)
        nll = chosen(part, "helpful", "answer_nll")["mean"].mean()
        rows.append([condition, f"{part['fraction'].iloc[0]:.1%}", *cells, f"{nll:.2f}"])
    header = [
        "ablated",
        "share",
        "ASR",
        "coherent ASR",
        "degenerate",
        "harmless refused",
        "cloze accuracy",
    ]
    return markdown(rows, [*header, "NLL of own answers"])


def paper_table(results: dict[str, dict]) -> str:
    """Changes in points beside the paper's Llama2-7B-Chat."""
    names = ["random_coherent_asr", "asr_paper", "utility", "utility_paper"]
    rows = []
    for _, row in results["04_ablation"]["tables"]["comparison"].iterrows():
        coherent = interval(row, "+.1f", "coherent_asr")
        beside = [f"{row[name]:+.1f}" for name in names]
        rows.append([row["ablated"], f"{row['asr']:+.1f}", coherent, *beside])
    header = ["ablated", "ASR", "coherent ASR [95%]", "random control", "ASR, paper"]
    return markdown(rows, [*header, "utility", "utility, paper"])


def transfer_table(results: dict[str, dict]) -> str:
    """What fine-tuning moved, against its two controls."""
    rows = [
        [
            row["title"],
            interval(row, ".2f", "ours"),
            f"{row['control']:.2f}",
            f"{row['floor']:.2f}",
        ]
        for _, row in results["05_transfer"]["tables"]["comparison"].iterrows()
    ]
    return markdown(rows, ["measured", "ours", "fine-tuned with refusals", "other calibration"])


def freezing_table(results: dict[str, dict]) -> str:
    """Margin gained at equal task loss, and the judged answers at the last step (mean over seeds),
    per task and frozen set.
    """
    tables = results["06_freezing"]["tables"]
    columns = [
        ("harmful", "asr"),
        ("harmful", "coherent_asr"),
        ("other_harmful", "coherent_asr"),
        ("cloze", "accuracy"),
    ]
    rows = []
    for _, row in tables["equal"].iterrows():
        part = tables["rates"][
            (tables["rates"]["task"] == row["task"])
            & (tables["rates"]["condition"] == row["condition"])
        ]
        cells = [
            f"{100 * chosen(part, name, metric)['mean'].mean():.0f}" for name, metric in columns
        ]
        path = tables["paths"][
            (tables["paths"]["task"] == row["task"])
            & (tables["paths"]["condition"] == row["condition"])
        ]
        last = path[path["step"] == path["step"].max()]["task_loss"].mean()
        gain = "-" if row["condition"] == "nothing" else interval(row, "+.2f", "gain")
        seeds = f"{row['seed_low']:+.2f} to {row['seed_high']:+.2f}"
        rows.append([row["task"], row["title"], gain, seeds, *cells, f"{last:.2f}"])
    header = [
        "fine-tuned on",
        "frozen",
        "margin gained, nats",
        "seeds",
        "ASR, AdvBench",
        "coherent",
        "coherent, HarmBench",
    ]
    return markdown(rows, [*header, "cloze", "last task loss"])


def adapter_table(results: dict[str, dict]) -> str:
    """PEFT methods against full fine-tuning and freezing, at the task loss that both reach."""
    rows = [
        [
            row["method"],
            row["title"],
            f"{row['last_loss']:.2f}",
            f"{row['task_loss']:.2f}",
            interval(row, "+.2f", "gain"),
        ]
        for _, row in results["06_freezing"]["tables"]["peft"].iterrows()
    ]
    return markdown(
        rows,
        [
            "method",
            "against (frozen)",
            "last task loss",
            "compared at",
            "margin, difference in nats",
        ],
    )


def budget_table(results: dict[str, dict]) -> str:
    """What was trained, the alignment it reached and the tax it paid."""
    rates = results["07_redundant_units"]["tables"]["rates"]
    columns = [
        ("harmful", "asr"),
        ("harmful", "coherent_asr"),
        ("other_harmful", "coherent_asr"),
        ("helpful", "refused"),
        ("safe_twin", "refused"),
        ("cloze", "accuracy"),
        ("arithmetic", "accuracy"),
    ]
    rows = []
    for (method, trained), part in rates.groupby(["method", "trained"], sort=False):
        found = [chosen(part, name, metric) for name, metric in columns]
        cells = [
            percent(one.iloc[0]) if len(one) == 1 else f"{100 * one['mean'].mean():.0f}"
            for one in found
        ]
        nll = chosen(part, "helpful", "answer_nll")["mean"].mean()
        rows.append([method.upper(), trained, *cells, f"{nll:.2f}"])
    header = [
        "",
        "trained",
        "ASR, AdvBench",
        "coherent",
        "coherent, HarmBench",
        "harmless refused",
        "safe twins refused",
    ]
    return markdown(rows, [*header, "cloze", "arithmetic", "NLL of the base's answers"])


def judge_table(results: dict[str, dict]) -> str:
    """The judge against human labels (refusals) and against constructed gibberish, by halves of the
    cases.
    """
    tables = results["A1_judge"]["tables"]
    rows = []
    for _, row in tables["judge_refusals"].iterrows():
        quality = f"F1 {interval(row, '.3f', 'f1')}"
        shares = f"precision {row['precision']:.2f}, recall {row['recall']:.2f}"
        rows.append(
            [row["judge"], "refusals, human labels", row["part"], f"{row['n']}", quality, shares]
        )
    for _, row in tables["judge_degenerate"].iterrows():
        found, share = (
            f"{name} {interval(row, '.2f', name, f'{name}_low', f'{name}_high')}"
            for name in ("sensitivity", "specificity")
        )
        if row["n"] == 0:  # real answers only, at the limit of what the score is made for
            rows.append(
                [
                    "degeneracy",
                    f"real answers: {row['kind']}",
                    row["part"],
                    f"{row['n_real']}",
                    "",
                    share,
                ]
            )
        elif row["part"] == "test" or row["kind"] == "all":
            quality = f"AUC {interval(row, '.3f', 'auc')}"
            rows.append(
                [
                    "degeneracy",
                    f"gibberish: {row['kind']}",
                    row["part"],
                    f"{row['n']}",
                    quality,
                    f"{found}, {share}",
                ]
            )
    return markdown(rows, ["judge", "against", "part", "n", "quality [95%]", "as used"])


def stability_table(results: dict[str, dict]) -> str:
    """Safety sets found in other ways: their overlap with the reference set, and what switching
    them off does.
    """
    done = results["A3_finders"]["tables"]
    margins = done["margins"].set_index("variant")
    coherent = done["rates"].query("metric == 'coherent_asr'").set_index("variant")
    rows = []
    for _, row in done["overlaps"].iterrows():
        if row["variant"] in margins.index:
            found, answered = margins.loc[row["variant"]], coherent.loc[row["variant"]]
            drop = interval(found, ".1f", "margin_drop")
            cells = [f"{row['n_requests']:.0f}", f"{row['corrected']:.2f}", drop, percent(answered)]
            rows.append([row["variant"], *cells])
    header = ["safety set by", "requests", "overlap", "margin lost, nats", "coherent ASR"]
    return markdown(rows, header)


def smallest_table(results: dict[str, dict]) -> str:
    """How many units reach a target share of the safety group's effect: single ones by search, or
    the highest-ranked ones.
    """
    finders = results["A3_finders"]
    searched = finders["tables"]["smallest_sets"].set_index("target")
    rows = []
    for _, row in results["04_ablation"]["tables"]["smallest_by_answers"].iterrows():
        single = searched.loc[row["target"], "units"]
        by_search = (
            f"not within {finders['parameters']['n_search']} tries"
            if pd.isna(single)
            else f"{single:.0f}"
        )
        rows.append(
            [
                f"{row['target']:.0%}",
                by_search,
                f"{row['units']:.0f}",
                f"{row['fraction']:.2%}",
                percent(row),
            ]
        )
    header = [
        "share of the effect",
        "single units, margin",
        "highest-ranked units, answers",
        "share of all units",
    ]
    return markdown(rows, [*header, "their coherent ASR"])


def claims_table(results: dict[str, dict]) -> str:
    """One row per claim: the paper's number, ours and its interval, control, verdict; numbers are
    those of claims.json.
    """
    rows = []
    for _, row in results["08_claims"]["tables"]["claims"].iterrows():
        trainings = "" if pd.isna(row["n_seeds"]) else f"{row['n_seeds']:.0f}"
        paper = f"{row['source']}: {row['paper']}"
        ours = "" if pd.isna(row["ours"]) else f"{shown_interval(row)} {row['unit']}"
        bold = "**" if row["verdict"] == "replicated" else ""
        verdict = f"{bold}{row['verdict']}{bold}"
        rows.append([row["claim"], paper, ours, two_digits(row["control"]), trainings, verdict])
    header = ["claim", "in the paper", "ours [95%]", "control", "trainings", "verdict"]
    return markdown(rows, header)


def cost_table(results: dict[str, dict]) -> str:
    """What each notebook took, package start-up included."""
    rows = [
        [stage, f"{result['seconds'] / 60:.1f}", f"{result['peak_memory_gib']:.1f}"]
        for stage, result in results.items()
        if result["seconds"] is not None  # stored before the notebook was one of its own
    ]
    return markdown(rows, ["notebook", "minutes", "peak memory, GiB"])


RESULT_TABLES = {
    "claims": claims_table,
    "alignment": alignment_table,
    "ablation": ablation_table,
    "paper": paper_table,
    "stability": stability_table,
    "smallest": smallest_table,
    "transfer": transfer_table,
    "freezing": freezing_table,
    "adapters": adapter_table,
    "budget": budget_table,
    "cost": cost_table,
}
JUDGE_TABLES = {"judge": judge_table}
