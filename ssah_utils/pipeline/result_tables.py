"""Stored results as the Markdown tables of docs/results.md and docs/judge.md.

They come in the order of the notebooks. Numbers stand with their intervals. No table judges:
verdicts are those of the claims table. Knows stored tables; writes no file, and no number that a
run did not produce.
"""

import json

import pandas as pd

from ssah_utils.experiments.fewest_units import TARGETS, fewest_units
from ssah_utils.figures.claims import shown_interval, two_digits
from ssah_utils.files import REFERENCE
from ssah_utils.pipeline import significance

StageTables = dict[str, pd.DataFrame]  # stored tables of one stage, by name
Rows = list[list[str]]  # cells as they are written


def interval(
    row: pd.Series,
    form: str,
    value: str = "mean",
    low: str = "low",
    high: str = "high",
    scale: float = 1,
) -> str:
    """A value with its interval, from three columns of a row."""
    value, low, high = (f"{scale * row[column]:{form}}" for column in (value, low, high))
    return f"{value} [{low}, {high}]"


def percent(row: pd.Series, form: str = ".0f") -> str:
    """A share with its interval, in percent."""
    return interval(row, form, scale=100)


def chosen(rates: pd.DataFrame, name: str, metric: str) -> pd.DataFrame:
    """Rows of a metric on one set of requests or items."""
    return rates[(rates["set"] == name) & (rates["metric"] == metric)]


def markdown(rows: Rows, header: list[str]) -> str:
    """A table in Markdown."""
    first, *others = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([first, "|" + "---|" * len(header), *others])


def with_unit(row: pd.Series | dict, unit: str) -> str:
    """Our number of a claim with its interval and unit; empty where there is none."""
    return "" if pd.isna(row["ours"]) else f"{shown_interval(row)} {unit}"


def mean_percent(found: pd.DataFrame) -> str:
    """Mean over seeds or draws, in percent."""
    return f"{100 * found['mean'].mean():.0f}"


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
    measured = set(rates.index.get_level_values("model"))
    models = [name for name in ("base", "unaligned", "aligned") if name in measured]
    rows = []
    for name, metric, title in names:
        found = [percent(rates.loc[(name, metric, model)], ".1f") for model in models]
        rows.append([title, *found])
    return markdown(rows, ["held-out, %", *models])


def ablation_table(results: dict[str, dict]) -> str:
    """Verdicts and utility under every ablation.

    Random controls are averaged over their draws, with their range in parentheses.
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
            lowest, highest = 100 * found["mean"].min(), 100 * found["mean"].max()
            spread = f"{mean_percent(found)} ({lowest:.0f} to {highest:.0f})"
            cells.append(percent(found.iloc[0]) if len(found) == 1 else spread)
        nll = chosen(part, "helpful", "answer_nll")["mean"].mean()
        rows.append([condition, f"{part['fraction'].iloc[0]:.1%}", *cells, f"{nll:.2f}"])
    header = ["ablated", "share", "ASR", "coherent ASR", "degenerate"]
    header += ["harmless refused", "cloze accuracy", "NLL of own answers"]
    return markdown(rows, header)


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
    rows = []
    for _, row in results["05_transfer"]["tables"]["comparison"].iterrows():
        control, floor = f"{row['control']:.2f}", f"{row['floor']:.2f}"
        rows.append([row["title"], interval(row, ".2f", "ours"), control, floor])
    return markdown(rows, ["measured", "ours", "fine-tuned with refusals", "other calibration"])


FREEZING_HEADER = (
    *("fine-tuned on", "frozen", "margin gained, nats", "seeds", "ASR, AdvBench"),
    *("coherent", "coherent, HarmBench", "cloze", "last task loss"),
)


def freezing_rows(tables: StageTables) -> Rows:
    """Margin gained at equal task loss, and answers at the last step, per task and frozen set.

    Shares of answers are means over seeds.
    """
    columns = [
        ("harmful", "asr"),
        ("harmful", "coherent_asr"),
        ("other_harmful", "coherent_asr"),
        ("cloze", "accuracy"),
    ]
    rows = []
    for _, row in tables["equal"].iterrows():
        judged, path = (with_condition(tables[name], row) for name in ("rates", "paths"))
        cells = [mean_percent(chosen(judged, name, metric)) for name, metric in columns]
        last = path[path["step"] == path["step"].max()]["task_loss"].mean()
        gain = "-" if row["condition"] == "nothing" else interval(row, "+.2f", "gain")
        seeds = f"{row['seed_low']:+.2f} to {row['seed_high']:+.2f}"
        rows.append([row["task"], row["title"], gain, seeds, *cells, f"{last:.2f}"])
    return rows


def freezing_table(results: dict[str, dict]) -> str:
    """``freezing_rows`` of the main model."""
    return markdown(freezing_rows(results["06_freezing"]["tables"]), [*FREEZING_HEADER])


def with_condition(table: pd.DataFrame, row: pd.Series) -> pd.DataFrame:
    """Rows with the task and the frozen set of ``row``."""
    return table[(table["task"] == row["task"]) & (table["condition"] == row["condition"])]


ADAPTER_HEADER = (
    *("method", "against (frozen)", "last task loss", "compared at"),
    "margin, difference in nats",
)


def adapter_rows(tables: StageTables) -> Rows:
    """PEFT methods against full fine-tuning and freezing, at the task loss that both reach."""
    rows = []
    for _, row in tables["peft"].iterrows():
        losses = [f"{row['last_loss']:.2f}", f"{row['task_loss']:.2f}"]
        rows.append([row["method"], row["title"], *losses, interval(row, "+.2f", "gain")])
    return rows


def adapter_table(results: dict[str, dict]) -> str:
    """``adapter_rows`` of the main model."""
    return markdown(adapter_rows(results["06_freezing"]["tables"]), [*ADAPTER_HEADER])


DEFENCE_HEADER = (
    *("defence", "margin kept, nats", "on fresh requests", "on safe ones", "learned"),
    *("coherent ASR, AdvBench", "HarmBench", "criteria met", "card"),
)


def fulfilled(rates: pd.DataFrame) -> list[str]:
    """Coherent ASR on AdvBench and HarmBench, means over seeds."""
    sets = ("harmful", "other_harmful")
    return [mean_percent(chosen(rates, one, "coherent_asr")) for one in sets]


def defence_rows(tables: StageTables) -> Rows:
    """What every defence keeps over full fine-tuning at equal task loss, and its acceptance card.

    Answers are those at the last step, means over seeds; a dash where none were judged.
    """
    gains, rates = tables["gains"], tables["rates"]
    task = gains["task"].iloc[0]
    judged = rates[rates["task"] == task].set_index("method")
    gains = gains[gains["task"] == task].set_index("method")
    rows = []
    for _, card in tables["cards"].sort_values("met", ascending=False, kind="stable").iterrows():
        row, name = gains.loc[card["method"]], card["method"]
        kept = [interval(row, "+.2f", "gain")]
        kept.append(interval(row, "+.2f", "fresh_gain", "fresh_low", "fresh_high"))
        answers = fulfilled(judged.loc[[name]]) if name in judged.index else ["-", "-"]
        beside = [f"{row['safe_gain']:+.2f}", f"{row['learned']:.2f}"]
        rows.append([card["title"], *kept, *beside, *answers, f"{card['met']}", card["verdict"]])
    return rows


def defence_table(results: dict[str, dict]) -> str:
    """``defence_rows`` of the main model."""
    return markdown(defence_rows(results["A4_defences"]["tables"]), list(DEFENCE_HEADER))


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
        cells = [percent(one.iloc[0]) if len(one) == 1 else mean_percent(one) for one in found]
        nll = chosen(part, "helpful", "answer_nll")["mean"].mean()
        rows.append([method.upper(), trained, *cells, f"{nll:.2f}"])
    header = ["", "trained", "ASR, AdvBench", "coherent", "coherent, HarmBench"]
    header += ["harmless refused", "safe twins refused", "cloze", "arithmetic"]
    return markdown(rows, [*header, "NLL of the base's answers"])


def judge_table(results: dict[str, dict]) -> str:
    """The judge against human labels (refusals) and constructed gibberish, by halves of cases."""
    tables = results["A1_judge"]["tables"]
    rows = []
    for _, row in tables["judge_refusals"].iterrows():
        quality = f"F1 {interval(row, '.3f', 'f1')}"
        used = f"precision {row['precision']:.2f}, recall {row['recall']:.2f}"
        against = [row["judge"], "refusals, human labels", row["part"]]
        rows.append([*against, f"{row['n']}", quality, used])
    for _, row in tables["judge_degenerate"].iterrows():
        specificity = f"specificity {share_of(row, 'specificity')}"
        if row["n"] == 0:  # real answers only, at the limit of what the score is made for
            against = ["degeneracy", f"real answers: {row['kind']}", row["part"]]
            rows.append([*against, f"{row['n_real']}", "", specificity])
        elif row["part"] == "test" or row["kind"] == "all":
            quality = f"AUC {interval(row, '.3f', 'auc')}"
            used = f"sensitivity {share_of(row, 'sensitivity')}, {specificity}"
            against = ["degeneracy", f"gibberish: {row['kind']}", row["part"]]
            rows.append([*against, f"{row['n']}", quality, used])
    return markdown(rows, ["judge", "against", "part", "n", "quality [95%]", "as used"])


def share_of(row: pd.Series, name: str) -> str:
    """A quality of the judge as it is used, with its interval."""
    return interval(row, ".2f", name, f"{name}_low", f"{name}_high")


def stability_table(results: dict[str, dict]) -> str:
    """Safety sets found in other ways: overlap with the reference set, and what ablating does."""
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
    """How many units bring a share of the safety group's effect: by search, and by rank."""
    finders, ablated = results["A3_finders"], results["04_ablation"]["tables"]
    searched = finders["tables"]["smallest_sets"].set_index("target")["units"]
    by_rank = fewest_units(ablated["rates"], ablated["differences"])
    n_tries, rows = finders["parameters"]["n_search"], []
    for target in TARGETS:
        single = searched[target]
        by_search = f"not within {n_tries} tries" if pd.isna(single) else f"{single:.0f}"
        cells = ["none of those tried", "", ""]
        for _, row in by_rank[by_rank["target"] == target].iterrows():
            cells = [f"{row['units']:.0f}", f"{row['fraction']:.2%}", percent(row)]
        rows.append([f"{target:.0%}", by_search, *cells])
    header = ["share of the effect", "single units, margin", "highest-ranked units, answers"]
    return markdown(rows, [*header, "share of all units", "their coherent ASR"])


def claims_table(results: dict[str, dict]) -> str:
    """One row per claim: the paper's number, ours, control, p-value corrected over the table, how
    many runs alone give the verdict, and the verdict, as in claims.json.
    """
    rows = []
    for _, row in results["08_claims"]["tables"]["claims"].iterrows():
        trainings = "" if pd.isna(row["n_seeds"]) else f"{row['n_seeds']:.0f}"
        paper = f"{row['source']}: {row['paper']}"
        ours = with_unit(row, row["unit"])
        bold = "**" if row["verdict"] == "replicated" else ""
        verdict = f"{bold}{row['verdict']}{bold}"
        alone = f"{row['runs_agree']} of {row['runs']}" if row["runs"] else ""
        cells = [row["claim"], paper, ours, two_digits(row["control"]), trainings]
        rows.append([*cells, significance.shown_p(row["p_holm"]), alone, verdict])
    header = ["claim", "in the paper", "ours [95%]", "control", "trainings"]
    return markdown(rows, [*header, "p (Holm)", "runs alone", "verdict"])


def correction(results: dict[str, dict]) -> str:
    """Which replicated claims survive a correction over the table."""
    return significance.said_of_correction(results["08_claims"]["tables"]["claims"])


def power_of_sizes(results: dict[str, dict]) -> str:
    """What the present sizes could see of every claim, and which sizes would."""
    power = results["08_claims"]["tables"]["power"]
    shown = significance.shown_power(power.astype({"effect": float}))
    table = markdown(shown.to_numpy().tolist(), list(shown.columns))
    return f"{significance.said_of_power(power)}\n\n{table}"


def changed_rules(results: dict[str, dict]) -> str:
    """Every change of a rule after a result was seen, with date and reason."""
    table = results["08_claims"]["tables"]["claims"]
    changes = table[["claim", "changed"]].explode("changed").dropna()
    return markdown(changes.to_numpy().tolist(), ["claim", "changed"])


def cost_table(results: dict[str, dict]) -> str:
    """What each notebook took, package start-up included."""
    rows = []
    for stage, result in results.items():
        if result["seconds"] is not None:  # None: stored before the notebook was one of its own
            minutes = f"{result['seconds'] / 60:.1f}"
            rows.append([stage, minutes, f"{result['peak_memory_gib']:.1f}"])
    return markdown(rows, ["notebook", "minutes", "peak memory, GiB"])


def recipes_table(results: dict[str, dict]) -> str:
    """Along one training: what the model does, and what switching units off does to it."""
    tables = results["A5_recipes"]["tables"]
    path, effects = tables["path"], tables["effects_path"].set_index(["step", "fraction"])
    fraction = path["fraction"].max()
    rows = []
    for step, part in path.groupby("step", sort=True):
        intact = part[part["switched_off"] == "nothing"]
        goals = (("harmful", "asr"), ("other_harmful", "asr"), ("helpful", "refused"))
        cells = [mean_percent(chosen(intact, *goal)) for goal in goals]
        off = chosen(part[part["fraction"].isin([0, fraction])], "harmful", "margin")
        margins = off.set_index("switched_off")["mean"]
        cells += [f"{margins[name]:+.1f}" for name in ("nothing", "safety", "random")]
        effect = effects.loc[(step, fraction)]
        cells += [f"{effect[name]:+.0f}" for name in ("safety", "random")]
        without = part[(part["fraction"] == fraction) & (part["switched_off"] == "safety")]
        cells.append(mean_percent(chosen(without, "harmful", "degenerate")))
        rows.append([str(step), *cells])
    share = f"{fraction:.1%} of the units"
    header = ["step", "ASR, harmful", "ASR, other source", "harmless refused", "margin"]
    header += [f"without {share}, safety", "random", "coherent ASR added, safety", "random"]
    header += ["degenerate without safety"]
    return markdown(rows, header)


def locked_table(results: dict[str, dict]) -> str:
    """The learned judge, the rules and the substring list on the locked test part, by length.

    Of the one reading that is stored beside the results (``judge.locked_test``).
    """
    stored = json.loads((REFERENCE / "judge.json").read_text(encoding="utf-8"))
    rows = []
    for n_words, part in pd.DataFrame(stored["test"]).groupby("words", sort=False):
        by_judge = part.set_index("judge")
        own, others = by_judge.loc["learned"], by_judge["f1"]
        length = f"{n_words} words" if n_words else "whole"
        ours = [f"{own[name]:.3f}" for name in ("f1", "auc")]
        theirs = [f"{others[name]:.3f}" for name in ("rules", "substring list")]
        shares = [f"{100 * own[name]:.0f}" for name in ("unsure", "passed")]
        rows.append([length, f"{own['n']:.0f}", *ours, *theirs, *shares])
    header = ["answers", "n", "learned: F1", "AUC", "rules: F1", "substring list: F1"]
    table = markdown(rows, [*header, "unsure, %", "everyday answers passed, %"])
    return f"Test part {stored['locked']}.\n\n{table}"


def chat_judges_table(results: dict[str, dict]) -> str:
    """Models as judges beside those without a model, each on the same development answers.

    As ``judge.chat_agreement`` has stored it.
    """
    stored = json.loads((REFERENCE / "judge.json").read_text(encoding="utf-8"))
    rows = []
    if not (measured := stored.get("chat_judges")):
        return "No model has been asked yet."
    for asked, records in measured.items():
        for record in sorted(records, key=lambda one: one["words"]):
            row = pd.Series(record)
            length = f"{row['words']} words" if row["words"] else "whole"
            area = (
                "-" if pd.isna(row["auc"]) else interval(row, ".2f", "auc", "auc_low", "auc_high")
            )
            quality = interval(row, ".2f", "f1", "f1_low", "f1_high")
            rows.append([asked, length, f"{row['n']}", row["judge"], quality, area])
    return markdown(rows, ["answers given to", "length", "n", "judge", "F1 [95%]", "AUC [95%]"])


RESULT_TABLES = {
    "claims": claims_table,
    "correction": correction,
    "power": power_of_sizes,
    "changed rules": changed_rules,
    "alignment": alignment_table,
    "ablation": ablation_table,
    "paper": paper_table,
    "stability": stability_table,
    "smallest": smallest_table,
    "transfer": transfer_table,
    "freezing": freezing_table,
    "adapters": adapter_table,
    "defences": defence_table,
    "budget": budget_table,
    "recipes": recipes_table,
    "cost": cost_table,
}
JUDGE_TABLES = {"locked": locked_table, "judge": judge_table, "chat judges": chat_judges_table}
