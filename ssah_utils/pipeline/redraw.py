"""Draw every figure again from stored results, without a model: ``ssah figures``.

Knows stored results.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from ssah_utils.figures import (
    ablation,
    alignment,
    claims,
    defences,
    finders,
    freezing,
    judge,
    models,
    paper,
    probing,
    quickstart,
    recipes,
    redundant_units,
    speed,
    stepwise,
    transfer,
    units,
)
from ssah_utils.figures.style import save_figure, set_style
from ssah_utils.files import REFERENCE
from ssah_utils.pipeline import across_judges, across_models, speed_tables
from ssah_utils.pipeline.stored import find_run, load_result
from ssah_utils.unit_files import load_partition
from ssah_utils.units import to_table

FIGURES: dict[str, dict[str, Callable]] = {
    "00_quickstart": {"safety_switch": quickstart.safety_switch},
    "01_alignment": {
        "alignment_verdicts": alignment.alignment_verdicts,
        "training_loss": alignment.training_loss,
    },
    "02_probing": {
        "probing": probing.distances_and_margins,
    },
    "03_units": {
        "score_histograms": units.score_histograms,
        "score_scatter": units.score_scatter,
        "group_map": units.group_map,
        "unit_grid": units.unit_grid,
    },
    "04_ablation": {
        "ablation_groups": ablation.ablation_groups,
        "ablation_curve": ablation.ablation_curve,
        "table1_ablation": paper.table1_ablation,
    },
    "05_transfer": {
        "transfer_flow": transfer.transfer_flow,
        "transfer_heat": transfer.transfer_heat,
        "transfer_path": transfer.transfer_path,
    },
    "06_freezing": {
        "freezing_paths": freezing.freezing_paths,
        "frontier": freezing.frontier,
        "freezing_rates": freezing.freezing_rates,
        "table2_freezing": paper.table2_freezing,
        "table3_task": paper.table3_task,
        "table5_adapters": paper.table5_adapters,
    },
    "07_redundant_units": {
        "alignment_budget": redundant_units.alignment_budget,
        "table4_budget": paper.table4_budget,
    },
    "A1_judge": {
        "judge_validation": judge.judge_validation,
        "answer_length": judge.answer_length,
    },
    "A2_stepwise": {
        "direction_steps": stepwise.direction_steps,
        "direction_blocks": stepwise.direction_blocks,
        "recovered": stepwise.recovered,
    },
    "A3_finders": {
        "stability_matrix": finders.stability_matrix,
        "variant_ablation": finders.variant_ablation,
        "category_matrix": finders.category_matrix,
        "finders_compared": finders.finders_compared,
        "smallest_sets": finders.smallest_sets,
    },
    "A4_defences": {
        "defence_frontier": defences.defence_frontier,
        "defence_gains": defences.defence_gains,
        "defence_cards": defences.defence_cards,
    },
    "A5_recipes": {
        "recipe_path": recipes.recipe_path,
        "recipe_effects": recipes.recipe_effects,
    },
    "08_claims": {"claims": claims.claims},
}
# What a drawing raises where a table, column, row or value is not there.
LACKING = (LookupError, ValueError, TypeError, AttributeError)
# They run only when they are asked for, so there may be no result.
ONLY_NAMED = {"00_quickstart", "A5_recipes"}
# By figure, the table without which it is left out: a model that was given has no loss curve, and
# nothing is compared that a run was not asked for.
MAY_LACK = {
    "training_loss": "training",
    "recovered": "recovery",
    "finders_compared": "finders",
    "answer_length": "length_flips",  # of runs before it was measured
}
FROM_UNITS = set(FIGURES["03_units"])  # the others are drawn from result.json


def stored_units(folder: Path) -> pd.DataFrame:
    """Every unit of a stored partition, for the figures; ``ValueError`` says what to run again."""
    try:
        parted, scores = load_partition(folder / "units.safetensors")
        return to_table(scores["z_safety"], scores["z_utility"], parted)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}: re-run {folder.name}") from error
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: re-run {folder.name}") from error


def stored_results(profile: str, seed: int) -> Path:
    """Of the newest run of a profile; without one, those that come with the project."""
    return find_run(profile, seed) if profile else REFERENCE


def redraw(source: Path, target: Path) -> list[str]:
    """Draw every figure whose stored result is in ``source``, on all cores.

    Returns one line per stage that could not be drawn.
    """
    set_style()
    drawings = [partial(redraw_stage, stage) for stage in FIGURES]
    drawings += [redraw_across_models, redraw_growth]
    return [problem for problems in _on_all_cores(drawings, source, target) for problem in problems]


def _on_all_cores(drawings: list[Callable], source: Path, target: Path) -> list[list[str]]:
    """What each returns for ``(source, target)``, in order.

    On Linux in forked processes, which need not import anything again; elsewhere one by one. Each
    computes with one thread: torch's others, had it any here before, are not there after a fork,
    and would be waited for.
    """
    if sys.platform != "linux":
        return [draw(source, target) for draw in drawings]
    n = min(len(drawings), len(os.sched_getaffinity(0)))
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(n, fork, torch.set_num_threads, (1,)) as pool:
        found = [pool.submit(draw, source, target) for draw in drawings]
    return [one.result() for one in found]


def redraw_stage(stage: str, source: Path, target: Path) -> list[str]:
    """Draw the figures of one stage; one line on those that could not be drawn."""
    folder = source / stage
    if stage in across_models.SHOWN_WITH and not folder.exists():
        folder = across_models.model_folder(source, across_models.SHOWN_WITH[stage]) / stage
    if stage in ONLY_NAMED and not folder.exists():
        return []
    drawings = FIGURES[stage]
    try:
        tables = load_result(folder / "result.json")["tables"]
        stored = stored_units(folder) if FROM_UNITS & set(drawings) else None
    except (OSError, ValueError) as error:
        return [f"{stage}: {error}"]
    missing = []
    for name, draw in drawings.items():
        if name in MAY_LACK and not len(tables.get(MAY_LACK[name], ())):
            continue
        try:
            save_figure(draw(stored if name in FROM_UNITS else tables), target, name)
        except LACKING as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"fails: {error}"
            missing.append(f"figure {name} {what}")
            plt.close("all")
    return [f"{stage}: {'; '.join(missing)}: re-run {stage}"] if missing else []


def redraw_across_models(source: Path, target: Path) -> list[str]:
    """Draw what shows all stored models side by side; one line where it could not be drawn.

    Nothing where ``source`` is one run.
    """
    try:
        rates = across_judges.stored_rates(source)
        if not rates.empty:
            save_figure(models.ablation_by_model(rates), target, "ablation_by_model")
    except LACKING as error:
        plt.close("all")
        return [f"figure ablation_by_model fails: {error}: publish 04_ablation of every model"]
    return []


def redraw_growth(source: Path, target: Path) -> list[str]:
    """Draw how cost grows with size, where ``source`` has it; one line where that fails."""
    try:
        growth = speed_tables.growth(source)
        if not growth.empty:
            save_figure(speed.cost_growth(growth), target, "cost_growth")
    except LACKING as error:
        plt.close("all")
        return [f"figure cost_growth fails: {error}: python -m tests.bench_growth"]
    return []
