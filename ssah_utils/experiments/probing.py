"""Where the reasoning direction shows: distances to openings in every block, and how far harmful
requests lie from harmless ones along a direction.

States are those of the residual stream after a block. Knows language models through
``activations``, and requests as strings.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import activations, scores, stats
from ssah_utils.experiments import stepwise
from ssah_utils.prompts.tokens import chat_batches

OPENING_TOKENS = 64  # openings are phrases; what is longer is cut

# --------------------------------------------------------------------------------------- distances


def request_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[str],
    opening: str = "",
    system_prompt: str = "",
) -> Tensor:
    """State after every block at the last token of each request, or of each request with an
    opening of its answer: (n_requests, n_layers, d_model) float32.
    """
    openings = [opening] * len(requests)
    batches = chat_batches(
        tokenizer,
        requests,
        openings,
        OPENING_TOKENS,
        system_prompt=system_prompt,
        end=False,
        sort=False,
    )
    return activations.last_token_states(model, batches)


def opening_distances(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[str],
    openings: list[str],
    system_prompt: str = "",
) -> np.ndarray:
    """Cosine distance between a request and the same request with an opening of its answer, each
    read at its last token (SSAH section 3): (n_openings, n_requests, n_layers).
    """
    alone = request_states(model, tokenizer, requests, "", system_prompt)
    distances = []
    for opening in openings:
        opened = request_states(model, tokenizer, requests, opening, system_prompt)
        distances.append(scores.cosine_distance(alone, opened))
    return torch.stack(distances).numpy()


def distance_gap(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[str],
    openings: tuple[list[str], list[str]],
    system_prompt: str = "",
) -> np.ndarray:
    """How much farther refusal openings are than compliance openings, each kind on average:
    (n_requests, n_layers). Below 0, refusal is closer.

    ``openings``: those of refusals and those of compliance, as for ``stepwise.generate_and_probe``.
    """
    refusal, compliance = openings
    distances = opening_distances(
        model, tokenizer, requests, [*refusal, *compliance], system_prompt
    )
    return distances[: len(refusal)].mean(0) - distances[len(refusal) :].mean(0)


# --------------------------------------------------------------------------------------- intervals


def _by_block(intervals: list[tuple[float, float, float]]) -> pd.DataFrame:
    table = pd.DataFrame(intervals, columns=["mean", "low", "high"])
    return table.rename_axis("layer").reset_index()


def block_intervals(values: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Mean over requests and its 95% interval in every block: layer, mean, low, high.

    ``values``: (n_requests, n_layers).
    """
    return _by_block([stats.mean_interval(column, seed) for column in values.T])


def block_differences(a: np.ndarray, b: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Mean of ``a`` minus mean of ``b`` and its 95% interval in every block: layer, mean, low,
    high.

    ``a``: (n, n_layers), ``b``: (m, n_layers), of different requests.
    """
    columns = zip(a.T, b.T, strict=True)
    return _by_block([stats.difference_interval(*pair, seed) for pair in columns])


def share_below_zero(intervals: pd.DataFrame) -> float:
    """Share of blocks whose whole interval lies below 0."""
    return float((intervals["high"] < 0).mean())


# -------------------------------------------------------------------------------------- separation


def directions_with_control(
    positive: Tensor, negative: Tensor, n_shuffled: int, seed: int = 0
) -> Tensor:
    """The direction from one group to the other in every block, and ``n_shuffled`` more between
    groups dealt at random: (n_layers, 1 + n_shuffled, d_model) float64.

    ``positive``: (n, n_layers, d_model), ``negative``: (m, n_layers, d_model); see
    ``scores.mean_difference_direction``. Along any direction two groups differ a little; the random
    ones, of groups of the same sizes, say how much.
    """
    states = torch.cat([positive, negative])
    is_positive = torch.arange(len(states)) < len(positive)
    generator = torch.Generator().manual_seed(seed)
    labels = [is_positive]
    for _ in range(n_shuffled):
        labels.append(is_positive[torch.randperm(len(states), generator=generator)])
    found = [scores.mean_difference_direction(states[one], states[~one]) for one in labels]
    return torch.stack(found, 1)


def separation(values: np.ndarray, is_harmful: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """How far harmful requests lie from harmless ones in every block: layer, mean, low, high, n,
    shuffled.

    ``values``: (n_requests, n_layers, 1 + n_shuffled), states projected on
    ``directions_with_control``. ``mean``: difference of the groups along the first; ``shuffled``:
    the largest absolute difference along the others; ``n``: size of the smaller group. Empty where
    a group is.
    """
    harmful, harmless = values[is_harmful], values[~is_harmful]
    n = min(len(harmful), len(harmless))
    if not n:
        return pd.DataFrame(columns=["layer", "mean", "low", "high", "n", "shuffled"])
    table = block_differences(harmful[:, :, 0], harmless[:, :, 0], seed)
    by_chance = np.abs(harmful[:, :, 1:].mean(0) - harmless[:, :, 1:].mean(0))
    return table.assign(n=n, shuffled=by_chance.max(1, initial=0.0))


def separation_by_step(
    model: nn.Module,
    trajectory: stepwise.Trajectory,
    is_harmful: np.ndarray,
    directions: Tensor,
    steps: list[int],
    seed: int = 0,
) -> pd.DataFrame:
    """``separation`` after each of the steps, of the requests whose answers have not ended: step
    and its columns.

    ``is_harmful``: (n_prompts,) of the trajectory's prompts. ``directions``:
    ``directions_with_control``.
    """

    def along(layer: int, states: Tensor) -> Tensor:
        return scores.projection(states[:, None], directions[layer])  # (n, 1 + n_shuffled)

    batches, marks = stepwise.step_batches(trajectory, steps)
    values = activations.marked_states(model, batches, along).numpy()
    found = []
    for step in steps:
        chosen = (marks["step"] == step).to_numpy()
        kinds = is_harmful[marks["row"].to_numpy()[chosen]]
        found.append(separation(values[chosen], kinds, seed).assign(step=step))
    return pd.concat([table for table in found if len(table)], ignore_index=True)


def share_apart(separations: pd.DataFrame) -> float:
    """Share of blocks in which harmful lies beyond harmless: interval above 0, and mean beyond all
    shuffled directions.
    """
    apart = (separations["low"] > 0) & (separations["mean"] > separations["shuffled"])
    return float(apart.mean())


# ----------------------------------------------------------------------------------------- margins


def margin_gap(margins: pd.DataFrame, seed: int = 0) -> tuple[float, float, float]:
    """Mean margin on harmful minus that on harmless requests and its 95% interval (nats); NaN where
    one of them is missing.

    ``margins``: rows of one model at one position, with ``queries`` and ``margin``.
    """
    harmful, harmless = (
        margins.loc[margins["queries"] == kind, "margin"] for kind in ("harmful", "harmless")
    )
    return stats.difference_interval(harmful, harmless, seed)


def chosen_again(
    margins: pd.DataFrame, bar: pd.Series | float, seed: int = 0
) -> tuple[float, float, float]:
    """By how much the margin exceeds a bar at the best step after the forced tokens, and its 95%
    interval (nats); NaN where there is no such step.

    ``margins``: id, step, margin of one variant of ``generate_and_probe``, whose first step is the
    end of the forced tokens. ``bar``: one number, or one by request id. Steps at which fewer than
    half of the answers go on are left out. The best of several steps is a little too good; so it
    must be held against a control that is chosen in the same way.
    """
    by_step = margins.pivot(index="id", columns="step", values="margin").sort_index(axis=1)
    excess = by_step.iloc[:, 1:].sub(bar, axis=0)
    excess = excess.loc[:, 2 * excess.notna().sum() >= len(by_step)]
    if excess.shape[1] == 0:
        return (float("nan"),) * 3
    return stats.mean_interval(excess[excess.mean().idxmax()].dropna(), seed)


def margin_changes(
    before: pd.DataFrame, after: pd.DataFrame, by: list[str], seed: int = 0
) -> pd.DataFrame:
    """How the same requests' margin and log_p_refusal changed, pair by pair, in every group: by,
    measure, n, present (mean before), and the columns of ``stats.paired_table``.

    Rows stand in the same order; ``ValueError`` where they are of different requests.
    """
    if before["id"].tolist() != after["id"].tolist():
        raise ValueError("rows of different requests: give both in the same order")
    pairs = []
    for key, rows in before.groupby(by, sort=False).indices.items():
        for measure in ("margin", "log_p_refusal"):
            was, is_now = (table[measure].to_numpy()[rows] for table in (before, after))
            names = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
            names |= {"measure": measure, "n": len(rows), "present": was.mean()}
            pairs.append((names, is_now, was))
    return stats.paired_table(pairs, seed)


# ------------------------------------------------------------------------------ tables of measures

SHARE = "blocks in which refusal is closer"
EVIDENCE = {
    "distance_below_0_harmful": f"{SHARE}, harmful requests",
    "distance_below_0_harmless": f"{SHARE}, harmless requests",
    "residual_below_0": "blocks in which harmful minus harmless lies below 0",
    "margin_gap": "margin, harmful minus harmless requests (nats)",
}


def evidence_table(
    distances: pd.DataFrame, residual: pd.DataFrame, margins: pd.DataFrame, seed: int = 0
) -> pd.DataFrame:
    """What three measurements say of each model: model, measure, title, value, low, high.

    ``distances``: ``block_intervals`` of ``distance_gap`` by model and queries. ``residual``:
    ``block_differences`` of the same, harmful minus harmless, by model. ``margins``: by model and
    queries, one row a request. Shares of blocks have no interval.
    """
    rows = []
    for (model, kind), part in distances.groupby(["model", "queries"], sort=False):
        rows.append((model, f"distance_below_0_{kind}", share_below_zero(part), np.nan, np.nan))
    for model, part in residual.groupby("model", sort=False):
        rows.append((model, "residual_below_0", share_below_zero(part), np.nan, np.nan))
    for model, part in margins.groupby("model", sort=False):
        rows.append((model, "margin_gap", *margin_gap(part, seed)))
    table = pd.DataFrame(rows, columns=["model", "measure", "value", "low", "high"])
    table.insert(2, "title", table["measure"].map(EVIDENCE))
    return table


POSITIONS = {
    "none": ("holds_at_0", "before the first token"),
    "neutral": ("holds_neutral", "after an off-topic opening"),
    "past tense": ("holds_past_tense", "in the past tense"),
}
COLUMNS = ["measure", "title", "value", "low", "high", "control", "control_is"]


def _tokens(k: int) -> str:
    return f"{k} prefilled token{'' if k == 1 else 's'}"


def held_table(margins: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """``margin_gap`` of the aligned model where the forced tokens of every attack end: measure,
    title, value, low, high, control (of the unaligned model), control_is.

    ``margins``: ``stepwise.margin_table`` of both models. An id is ``holds_at_0``,
    ``holds_after_K``, ``holds_neutral`` or ``holds_past_tense``.
    """
    rows = []
    at_end = margins[margins["step"] == margins["prefill"]]
    for (attack, k), there in at_end.groupby(["attack", "prefill"], sort=False):
        measure, where = POSITIONS.get(attack, (f"holds_after_{k}", f"after {_tokens(k)}"))
        title = f"margin, harmful minus harmless, {where}"
        ours, control = (
            margin_gap(there[there["model"] == name], seed) for name in ("aligned", "unaligned")
        )
        rows.append((measure, title, *ours, control[0], "unaligned model"))
    return pd.DataFrame(rows, columns=COLUMNS)


def regained_table(margins: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """``chosen_again`` of the aligned model after every prefill, in the columns of ``held_table``;
    ids ``chosen_again_after_K``.

    The bar is half of the margin on the same harmful request before any token. Control: harmless
    requests, against the mean of these bars.
    """
    aligned = margins[margins["model"] == "aligned"]
    is_start = (aligned["attack"] == "none") & (aligned["step"] == 0)
    is_harmful = aligned["queries"] == "harmful"
    bar = aligned[is_start & is_harmful].set_index("id")["margin"] / 2
    rows = []
    for k in sorted(aligned.loc[aligned["attack"] == "prefill", "prefill"].unique()):
        is_after = (aligned["attack"] == "prefill") & (aligned["prefill"] == k)
        ours = chosen_again(aligned[is_after & is_harmful], bar, seed)
        control = chosen_again(aligned[is_after & ~is_harmful], bar.mean(), seed)
        title = f"margin above half of its start, after {_tokens(k)}"
        rows.append((f"chosen_again_after_{k}", title, *ours, control[0], "harmless requests"))
    return pd.DataFrame(rows, columns=COLUMNS)


def apart_table(separations: pd.DataFrame, prefill: int) -> pd.DataFrame:
    """``share_apart`` of the aligned model's blocks before and after a prefill, in the columns of
    ``held_table``; ids ``blocks_apart_after_K``. No intervals.

    ``separations``: of ``separation_by_step``, by model, attack and prefill.
    """
    rows = []
    forced = separations[separations["prefill"] == prefill]
    for k in (0, prefill):
        there = forced[(forced["attack"] == "prefill") & (forced["step"] == k)]
        ours, control = (
            share_apart(there[there["model"] == name]) for name in ("aligned", "unaligned")
        )
        title = f"blocks that tell harmful from harmless after {_tokens(k)}"
        row = (f"blocks_apart_after_{k}", title, ours, np.nan, np.nan, control, "unaligned model")
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def past_tense_table(changes: pd.DataFrame) -> pd.DataFrame:
    """The change of the margin by our rule of the past tense, in the columns of ``held_table``; id
    ``past_tense_lowers_margin``. Empty where the rule applied to no request of a kind.

    ``changes``: ``margin_changes`` by source and queries. Control: harmless requests.
    """
    found = {}
    for row in changes.to_dict("records"):
        if row["source"] == "rule" and row["measure"] == "margin":
            found[row["queries"]] = row
    rows = []
    if {"harmful", "harmless"} <= set(found):
        ours = (found["harmful"][name] for name in ("difference", "low", "high"))
        title = "margin in the past tense minus in the present"
        control = found["harmless"]["difference"]
        rows.append(("past_tense_lowers_margin", title, *ours, control, "harmless requests"))
    return pd.DataFrame(rows, columns=COLUMNS)
