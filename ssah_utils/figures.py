"""Every figure as a function from stored tables to a ``Figure``; notebooks call them, ``make figures`` redraws them.

    python -m ssah_utils.figures --profile laptop

Knows tables. Loads no model. One style, colours that colour-blind readers can tell apart.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ssah_utils import direction_figures, paper_figures, stability_figures, training_figures
from ssah_utils.results import CONTROL, GROUP_COLOURS, INK, REFERENCE, ROOT, find_run, load_result, save_figure, set_style
from ssah_utils.units import GROUPS, load_partition, to_table

Tables = dict[str, pd.DataFrame]
VERDICT_COLOURS = {"refused": "#0072B2", "complied": "#D55E00", "degenerate": "#BBBBBB"}
MODEL_COLOURS = {"base": "#999999", "unaligned": "#E69F00", "aligned": "#0072B2"}
SET_NAMES = {"harmful": "harmful requests", "other_harmful": "harmful, other source", "harmful_twin": "harmful twins",
             "safe_twin": "safe twins", "over_refusal": "safe but scary", "helpful": "harmless requests"}  # fmt: skip
CASE_COLOURS = {"real": "#0072B2", "words shuffled": "#E69F00", "words looped": "#CC79A7", "characters replaced": "#999999",
                "ablated": "#D55E00", "telegram style": "#56B4E9"}  # fmt: skip


def stacked_verdicts(ax: Axes, labels: list[str], shares: pd.DataFrame) -> None:
    """Horizontal bars of the three verdicts, one per label, first label on top."""
    left = np.zeros(len(labels))
    for verdict, colour in VERDICT_COLOURS.items():
        width = shares[verdict].to_numpy(dtype=float)
        ax.barh(labels, width, left=left, color=colour, label=verdict, height=0.72)
        for row, (start, size) in enumerate(zip(left, width, strict=True)):
            if size >= 0.07:
                ax.text(start + size / 2, row, f"{size:.0%}", ha="center", va="center", fontsize=7,
                        color=INK if verdict == "degenerate" else "white")  # fmt: skip
        left = left + width
    ax.set(xlim=(0, 1), xlabel="share of requests", xticks=[0, 0.5, 1])
    ax.invert_yaxis()


def verdict_shares(rates: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """refused, complied, degenerate per row of ``index``, in order of first appearance."""
    wide = rates[rates["metric"].isin(["refused", "coherent_asr", "degenerate"])]
    wide = wide.pivot_table(index=index, columns="metric", values="mean", sort=False, observed=True)
    return wide.rename(columns={"coherent_asr": "complied"}).reindex(columns=list(VERDICT_COLOURS), fill_value=0.0)


# ------------------------------------------------------------------------------------------------------ 01_alignment


def alignment_verdicts(tables: Tables) -> Figure:
    """Verdicts of every model on every set of held-out requests."""
    shares = verdict_shares(tables["rates"], ["set", "model"])
    sets = [name for name in SET_NAMES if name in shares.index.get_level_values(0)]
    figure, axes = plt.subplots(1, len(sets), figsize=(2.1 * len(sets), 1.9), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], sets, strict=True):
        part = shares.loc[name]
        stacked_verdicts(ax, list(part.index), part)
        ax.set_title(SET_NAMES[name])
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Alignment turns compliance with harm into refusal", x=0.01, ha="left", fontweight="bold")
    return figure


def training_loss(tables: Tables) -> Figure:
    """Loss per step, raw and smoothed."""
    figure, ax = plt.subplots(figsize=(4.2, 2.2))
    for model, part in tables["training"].groupby("model", sort=False):
        ax.plot(part["step"], part["loss"], color=MODEL_COLOURS[model], alpha=0.25, lw=0.8)
        ax.plot(part["step"], part["loss"].rolling(10, min_periods=1).mean(), color=MODEL_COLOURS[model], label=model)
    ax.set(xlabel="optimizer step", ylabel="loss per response token (nats)", title="Both models train the same number of steps")
    ax.legend()
    return figure


def judge_validation(tables: Tables) -> Figure:
    """Left: refusals found, against labels by people. Right: real answers and gibberish, and the line the judge draws."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 2.8), width_ratios=[1, 1.4])
    refusals = tables["judge_refusals"]
    parts, judges = list(dict.fromkeys(refusals["part"])), list(dict.fromkeys(refusals["judge"]))
    for number, (judge, colour) in enumerate(zip(judges, (MODEL_COLOURS["aligned"], CONTROL), strict=True)):
        rows = refusals[refusals["judge"] == judge].set_index("part").loc[parts]
        height = np.arange(len(parts)) + 0.24 * (number - 0.5)
        left.errorbar(rows["f1"], height, xerr=[rows["f1"] - rows["low"], rows["high"] - rows["f1"]], fmt="os"[number], ms=5,
                      color=colour, capsize=2, label=judge)  # fmt: skip
    left.set_yticks(range(len(parts)), [f"{part} (n={rows.loc[part, 'n']:.0f})" for part in parts])
    left.set(xlabel="F1 against people (95% interval)", title="Refusals", ylim=(len(parts) - 0.5, -0.5))
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    cases = tables["judge_cases"]
    for kind, colour in CASE_COLOURS.items():
        of_kind = cases[cases["kind"].str.startswith(kind)]
        right.scatter(of_kind["base_nll"], of_kind["repetition"], s=12, color=colour, alpha=0.7, lw=0, label=kind,
                      marker="^" if of_kind["gibberish"].any() else "o")  # fmt: skip
    weight, threshold = tables["judge_constants"].set_index("constant")["stored"][["REPETITION_WEIGHT", "MAX_DEGENERACY"]]
    right.plot([threshold, threshold - weight], [0, 1], color=INK, lw=1, label="the judge's line")
    right.set(xlabel="NLL under the base model (nats per token)", ylabel="repetition", title="Gibberish lies beyond the line",
              ylim=(-0.03, 1), xlim=(0, None))  # fmt: skip
    right.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# -------------------------------------------------------------------------------------------------------- 02_probing


def band(ax: Axes, part: pd.DataFrame, colour: str, label: str, style: str = "-") -> None:
    ax.plot(part["layer"], part["mean"], style, color=colour, label=label)
    ax.fill_between(part["layer"], part["low"], part["high"], color=colour, alpha=0.2, lw=0)


def probing(tables: Tables) -> Figure:
    """Left: the paper's quantity. Middle: the same for harmful minus harmless queries. Right: the behavioural margin."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.6, 2.9), width_ratios=[1.15, 1, 0.9])
    for (model, queries), part in tables["distances"].groupby(["model", "queries"], sort=False):
        band(left, part, MODEL_COLOURS[model], f"{model}, {queries}", "-" if queries == "harmful" else ":")
    left.set(title="As in the paper: refusal - compliance", ylabel="difference in cosine distance", xlabel="block")
    left.legend(fontsize=6.5)
    for model, part in tables["residual"].groupby("model", sort=False):
        band(middle, part, MODEL_COLOURS[model], model)
    middle.set(title="Harmful minus harmless", ylabel="difference in cosine distance", xlabel="block")
    middle.legend(fontsize=6.5)
    for ax in (left, middle):
        ax.axhline(0, color=INK, lw=0.6)
    margins = tables["margins"]
    models, kinds = list(dict.fromkeys(margins["model"])), ["harmless", "harmful"]
    for position, (model, kind) in enumerate((m, k) for m in models for k in kinds):
        values = margins[(margins["model"] == model) & (margins["queries"] == kind)]["margin"].to_numpy()
        jitter = np.random.default_rng(0).uniform(-0.16, 0.16, len(values))
        right.scatter(position + jitter, values, s=5, color=MODEL_COLOURS[model], alpha=0.5, lw=0)
        right.hlines(values.mean(), position - 0.3, position + 0.3, color=INK, lw=1.6)
    right.axhline(0, color=INK, lw=0.6)
    right.set_xticks(range(len(models) * 2), [f"{model}\n{kind}" for model in models for kind in kinds], fontsize=6.5)
    right.set(title="Behavioural margin", ylabel="log P(refuse) / P(comply), nats")
    return figure


# ---------------------------------------------------------------------------------------------------------- 03_units


def score_histograms(units: pd.DataFrame) -> Figure:
    """Standardised scores on both kinds of data, by kind of unit."""
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 2.3), sharey=True)
    for ax, kind in zip(axes, ("attention", "mlp"), strict=True):
        part = units[units["kind"] == kind]
        bins = np.linspace(-1, np.quantile(part[["z_safety", "z_utility"]], 0.999), 60)
        for column, colour in (("z_safety", GROUP_COLOURS["safety"]), ("z_utility", GROUP_COLOURS["utility"])):
            ax.hist(
                part[column].clip(upper=bins[-1]),
                bins,
                histtype="step",
                color=colour,
                label=column.replace("z_", "on ") + " data",
            )
        ax.set(yscale="log", xlabel="score, standardised within module (z)", title=f"{kind}: few units stand out")
    axes[0].set_ylabel("units")
    axes[0].legend()
    return figure


def score_scatter(units: pd.DataFrame) -> Figure:
    """Score on safety data against score on utility data, coloured by group."""
    figure, ax = plt.subplots(figsize=(4.4, 3.6))
    for group in ("redundant", "complex", "utility", "safety"):  # the rarest on top
        part = units[units["group"] == group]
        ax.scatter(part["z_utility"], part["z_safety"], s=3, lw=0, alpha=0.6, color=GROUP_COLOURS[group], rasterized=True,
                   label=f"{group} ({len(part) / len(units):.1%})")  # fmt: skip
    limit = float(np.quantile(units[["z_safety", "z_utility"]].abs(), 0.9999))
    ax.plot([-1, limit], [-1, limit], color=INK, lw=0.6, ls="--")
    ax.set(xscale="symlog", yscale="symlog", xlabel="z on utility data", ylabel="z on safety data",
           title="Safety units lie above the diagonal")  # fmt: skip
    ax.legend(markerscale=4, loc="upper left", fontsize=7)
    return figure


def group_map(units: pd.DataFrame) -> Figure:
    """Share of each block's units in a group, for both kinds: where the groups sit."""
    figure, axes = plt.subplots(1, 4, figsize=(9.0, 2.4), sharex=True)
    shares = units.groupby(["kind", "layer"], observed=True)["group"].value_counts(normalize=True).rename("share").reset_index()
    for ax, group in zip(axes, GROUPS, strict=True):
        for kind, style in (("attention", "--"), ("mlp", "-")):
            part = shares[(shares["group"] == group) & (shares["kind"] == kind)].sort_values("layer")
            ax.plot(part["layer"], part["share"] * 100, style, color=GROUP_COLOURS[group], label=kind)
        ax.set(title=group, xlabel="block", ylim=(0, None))
    axes[0].set_ylabel("share of the block's units (%)")
    axes[0].legend(fontsize=7)
    return figure


def unit_grid(units: pd.DataFrame) -> Figure:
    """Every unit as one pixel, channels of a module sorted by group."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.6), width_ratios=[1, 1.8])
    colours = ListedColormap([GROUP_COLOURS[group] for group in GROUPS])
    for ax, kind in zip(axes, ("attention", "mlp"), strict=True):
        codes = units[units["kind"] == kind]["group"].cat.codes.to_numpy()
        n_layers = units["layer"].max() + 1
        ax.imshow(np.sort(codes.reshape(n_layers, -1), 1), aspect="auto", cmap=colours, vmin=0, vmax=3, interpolation="nearest")
        ax.set(title=kind, xlabel="channels, sorted by group", ylabel="block" if kind == "attention" else "")
    handles = [plt.Rectangle((0, 0), 1, 1, color=GROUP_COLOURS[group]) for group in GROUPS]
    figure.legend(handles, GROUPS, loc="outside lower center", ncols=4)
    return figure


# ------------------------------------------------------------------------------------------------------- 04_ablation


def ablation_groups(tables: Tables) -> Figure:
    """Verdicts on harmful requests and utility when a group is ablated, with its size-matched random control below it."""
    rates = tables["rates"][tables["rates"]["part"] == "groups"]
    order = list(dict.fromkeys(rates["condition"]))
    harmful = rates[rates["set"] == "harmful"].groupby(["condition", "metric"], sort=False)["mean"].mean().reset_index()
    shares = verdict_shares(harmful, ["condition"]).loc[order]
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(9.6, 0.34 * len(order) + 1.1), sharey=True, width_ratios=[1.5, 1, 1]
    )
    stacked_verdicts(left, order, shares)
    left.set_title("harmful requests")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    for ax, metric, title in ((middle, "refused", "harmless requests refused"), (right, "accuracy", "utility: cloze accuracy")):
        part = rates[(rates["metric"] == metric) & (rates["set"] == ("helpful" if metric == "refused" else "cloze"))]
        for row, condition in enumerate(order):
            values = part[part["condition"] == condition]
            colour = GROUP_COLOURS.get(condition, CONTROL)
            for _, value in values.iterrows():
                ax.plot([value["low"], value["high"]], [row, row], color=colour, lw=1, alpha=0.5 if len(values) > 1 else 1)
                ax.plot(value["mean"], row, "o", color=colour, ms=4, mfc="none" if "random" in condition else colour)
        ax.set(xlim=(-0.02, 1.02), title=title, xlabel="share (95% interval)")
    right.axvline(0.25, color=INK, lw=0.6, ls=":")
    right.text(0.26, -0.55, "chance", fontsize=7)
    figure.suptitle("What breaks when a group is switched off", x=0.01, ha="left", fontweight="bold")
    return figure


CURVE_METRICS = {
    ("harmful", "coherent_asr"): "harmful: coherent ASR",
    ("helpful", "refused"): "harmless: refused",
    ("helpful", "answer_nll"): "harmless: NLL of own answers",
}


def ablation_curve(tables: Tables) -> Figure:
    """Safety and its price against the share of units switched off, for safety units and random ones."""
    rates = tables["rates"][tables["rates"]["part"] == "curve"]
    figure, axes = plt.subplots(1, 3, figsize=(9.2, 2.6))
    for ax, ((name, metric), title) in zip(axes, CURVE_METRICS.items(), strict=True):
        part = rates[(rates["set"] == name) & (rates["metric"] == metric)]
        for condition, colour, style in (("safety", GROUP_COLOURS["safety"], "o-"), ("random", CONTROL, "s--")):
            line = part[part["condition"] == condition].sort_values("fraction")
            ax.plot(line["fraction"] * 100, line["mean"], style, color=colour, label=condition, ms=3.5)
            ax.fill_between(line["fraction"] * 100, line["low"], line["high"], color=colour, alpha=0.18, lw=0)
        ax.set(xscale="log", xlabel="units ablated (% of all)", title=title)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter("")
        if metric == "answer_nll":
            ax.set_ylabel("nats per token")
        else:
            ax.set(ylim=(-0.03, 1.03), ylabel="share of requests")
    axes[0].legend()
    return figure


# ------------------------------------------------------------------------------------------------------------ redraw

FIGURES: dict[str, dict[str, Callable]] = {
    "01_alignment": {"alignment_verdicts": alignment_verdicts, "training_loss": training_loss,
                     "judge_validation": judge_validation},
    "02_probing": {"probing": probing, "direction_steps": direction_figures.direction_steps,
                   "direction_blocks": direction_figures.direction_blocks},
    "03_units": {"score_histograms": score_histograms, "score_scatter": score_scatter, "group_map": group_map,
                 "unit_grid": unit_grid, "stability_matrix": stability_figures.stability_matrix},
    "04_ablation": {"ablation_groups": ablation_groups, "ablation_curve": ablation_curve}
    | {name: getattr(stability_figures, name) for name in ("variant_ablation", "category_matrix", "smallest_sets")},
    "05_transfer": {name: getattr(training_figures, name) for name in ("transfer_flow", "transfer_heat", "transfer_path")},
    "06_freezing": {name: getattr(training_figures, name) for name in ("freezing_paths", "frontier", "freezing_rates")},
    "07_redundant_units": {"alignment_budget": training_figures.alignment_budget},
}  # fmt: skip
FIGURES |= {stage: FIGURES.get(stage, {}) | drawings for stage, drawings in paper_figures.DRAWINGS.items()}
FROM_UNITS = {"score_histograms", "score_scatter", "group_map", "unit_grid"}  # the others are drawn from result.json


def stored_units(folder: Path) -> pd.DataFrame:
    parted, scores = load_partition(folder / "units.safetensors")
    return to_table(scores["z_safety"], scores["z_utility"], parted)


def redraw(source: Path, target: Path) -> list[str]:
    """Draw every figure whose stored result is in ``source``; returns one line per stage that could not be drawn."""
    problems = []
    for stage, drawings in FIGURES.items():
        folder = source / stage
        try:
            tables = load_result(folder / "result.json")["tables"]
            units = stored_units(folder) if FROM_UNITS & set(drawings) else None
        except KeyError as error:
            problems.append(f"{stage}: {error} is missing from the stored result: re-run {stage}")
            continue
        except (OSError, ValueError) as error:
            problems.append(f"{stage}: {error}")
            continue
        missing = {}
        for name, draw in drawings.items():
            try:
                if name != "training_loss" or len(tables.get("training", ())):  # a model that was given has no loss curve
                    save_figure(draw(units if name in FROM_UNITS else tables), target, name)
            except (LookupError, ValueError, TypeError, AttributeError) as error:  # a table, column, row or value is not there
                missing[name] = f"lacks {error}" if isinstance(error, KeyError) else f"fails: {error}"
                plt.close("all")
        if missing:
            what = "; ".join(f"figure {name} {error}" for name, error in missing.items())
            problems.append(f"{stage}: {what}: re-run {stage}")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ssah_utils.figures", description="Redraw all figures from stored results.")
    parser.add_argument("--profile", default="", help="whose results: a profile that ran here (default: the committed ones)")
    parser.add_argument("--seed", type=int, default=0, help="of that run (default: 0)")
    parser.add_argument("--to", type=Path, default=ROOT / "figures", help="folder for the files (default: figures)")
    options = parser.parse_args(arguments)
    set_style()
    try:
        source = find_run(options.profile, options.seed) if options.profile else REFERENCE
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems = redraw(source, options.to)
    print(f"figures from {source} written to {options.to}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
