"""Stored results as the tables of the README: markdown, with intervals, in the order of the
notebooks.

Knows stored tables. Writes no file, and no number that a run did not produce.
"""

import pandas as pd

from ssah_utils.figures.claims import number, shown_interval


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
    table = results["04_ablation"]["tables"]["comparison"]
    rows = []
    for _, row in table.iterrows():
        change = {
            name: f"{row[name]:+.1f}"
            for name in row.index
            if name not in ("ablated", "same direction")
        }
        attack = f"{change['coherent ASR, ours']} [{change['low']}, {change['high']}]"
        beside = [
            change[name]
            for name in ("random control", "ASR, paper", "utility, ours", "utility, paper")
        ]
        rows.append(
            [
                row["ablated"],
                change["ASR, ours"],
                attack,
                *beside,
                "yes" if row["same direction"] else "no",
            ]
        )
    header = [
        "ablated",
        "ASR",
        "coherent ASR [95%]",
        "random control",
        "ASR, paper",
        "utility",
        "utility, paper",
    ]
    return markdown(rows, [*header, "same direction"])


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
    tables = results["01_alignment"]["tables"]
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
    done = results["04_ablation"]["tables"]
    carriers = done["carriers"].set_index("variant")
    coherent = done["variants"].query("metric == 'coherent_asr'").set_index("variant")
    rows = []
    for _, row in results["03_units"]["tables"]["variants"].iterrows():
        if row["variant"] in carriers.index:
            found, answered = carriers.loc[row["variant"]], coherent.loc[row["variant"]]
            drop = interval(found, ".1f", "margin_drop")
            cells = [f"{row['n_requests']:.0f}", f"{row['corrected']:.2f}", drop, percent(answered)]
            rows.append([row["variant"], *cells, "yes" if found["carries"] else "no"])
    return markdown(
        rows,
        [
            "safety set by",
            "requests",
            "overlap",
            "margin lost, nats",
            "coherent ASR",
            "carries safety",
        ],
    )


def smallest_table(results: dict[str, dict]) -> str:
    """How many units reach a target share of the safety group's effect: single ones by search, or
    the highest-ranked ones.
    """
    result = results["04_ablation"]
    searched = result["tables"]["smallest_sets"].set_index("target")
    rows = []
    for _, row in result["tables"]["smallest_by_answers"].iterrows():
        single = searched.loc[row["target"], "units"]
        by_search = (
            f"not within {result['parameters']['n_search']} tries"
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
    """One row per claim: ours and its interval, control, verdict; numbers are those of
    claims.json.
    """
    rows = []
    for _, row in results["08_claims"]["tables"]["claims"].iterrows():
        seeds = "" if pd.isna(row["n_seeds"]) else f"{row['n_seeds']:.0f}"
        cells = [
            row["claim"],
            row["source"],
            row["paper"],
            shown_interval(row),
            number(row["control"]),
            row["unit"],
            seeds,
        ]
        rows.append(
            [*cells, f"**{row['verdict']}**" if row["verdict"] == "replicated" else row["verdict"]]
        )
    return markdown(
        rows, ["claim", "in the paper", "paper", "ours", "control", "unit", "trainings", "verdict"]
    )


def cost_table(results: dict[str, dict]) -> str:
    """What each notebook took, package start-up included."""
    rows = [
        [stage, f"{result['seconds'] / 60:.1f}", f"{result['peak_memory_gib']:.1f}"]
        for stage, result in results.items()
    ]
    return markdown(rows, ["notebook", "minutes", "peak memory, GiB"])


TABLES = {
    "cost": cost_table,
    "claims": claims_table,
    "alignment": alignment_table,
    "judge": judge_table,
    "ablation": ablation_table,
    "paper": paper_table,
    "stability": stability_table,
    "smallest": smallest_table,
    "transfer": transfer_table,
    "freezing": freezing_table,
    "adapters": adapter_table,
    "budget": budget_table,
}
