"""Finders of safety units side by side: the same requests, the same number of units.

Every finder looks at two halves of the calibration requests, one after the other. What it saw in
both is put together for its set, and the two halves alone say how far its sets agree. So agreement
costs no second pass. Knows models, token ids and openings.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import activations, attribution, evaluation, scores, scoring, unit_masks, units
from ssah_utils import weights as unit_weights
from ssah_utils.activations import Batch, ChannelMoments
from ssah_utils.experiments import finders
from ssah_utils.experiments.finders import Subset
from ssah_utils.per_unit import PerUnit
from ssah_utils.prompt_cache import Ids, opening_ids
from ssah_utils.prompts import chat, tokens
from ssah_utils.prompts.datasets import load_refusals

Example = dict[str, list[int]]
SIDES = ("harmful", "helpful")
PAPER = "variance x norm"  # the finder of the paper, with which the others are compared


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


@dataclass(frozen=True)
class Finder:
    """One way to find units.

    * ``measure``: what it sees of a subset of the requests.
    * ``merge``: that of two disjoint subsets together.
    * ``choose``: a set with the given share of all units, from what was seen.
    * ``seconds``: what it needs from before ``measure``, where others have measured that already.
    """

    measure: Callable[[Subset], Any]
    merge: Callable[[Any, Any], Any]
    choose: Callable[[Any, float], PerUnit]
    seconds: float = 0.0


@dataclass(frozen=True)
class Found:
    """What a finder has found: sets of any size, and at the size that was asked for, how long it
    took and how far the sets of two halves of the requests agree (Jaccard, corrected for chance).
    """

    choose: Callable[[float], PerUnit]
    chosen: PerUnit
    seconds: float
    agreement_of_halves: float


def find_all(
    compared: Mapping[str, Finder],
    n_harmful: int,
    n_helpful: int,
    share: float,
    progress: evaluation.Progress = evaluation._silent,
) -> dict[str, Found]:
    """Let every finder choose the given share of all units, on the first requests of both kinds.

    ``ValueError`` for fewer than four requests of a kind: half of them have no variance.
    """
    if min(n_harmful, n_helpful) < 4:
        raise ValueError(
            f"finders need at least 4 requests of each kind to be halved, not {n_harmful} harmful"
            f" and {n_helpful} helpful: raise n_calibration of 03_units, or n_finder"
        )
    halves = list(finders.disjoint_halves(n_harmful, n_helpful).values())
    found = {}
    for name in progress(list(compared), "finding units"):
        finder, clock = compared[name], Stopwatch()
        parts = [finder.measure(half) for half in halves]
        whole = functools.reduce(finder.merge, parts)
        choose = functools.partial(finder.choose, whole)
        chosen = choose(share)
        seconds = finder.seconds + clock.seconds
        pair = {number: finder.choose(part, share) for number, part in enumerate(parts)}
        agreement = units.overlap_table(pair).query("first == 0 and second == 1")["corrected"]
        found[name] = Found(choose, chosen, seconds, float(agreement.iloc[0]))
    return found


# ------------------------------------------------------------------------------------- what is seen


@dataclass(frozen=True)
class Mean:
    """A mean per unit and what it is over, so that means of disjoint parts can be merged."""

    value: PerUnit
    count: int

    def merged(self, other: "Mean") -> "Mean":
        """The mean over both parts."""
        count = self.count + other.count
        return Mean(self.value * (self.count / count) + other.value * (other.count / count), count)


def _by_side(merge: Callable[[Any, Any], Any]) -> Callable[[Mapping, Mapping], dict]:
    """``merge`` for each of what is there of harmful and of helpful requests."""
    return lambda one, other: {side: merge(one[side], other[side]) for side in one}


_means = _by_side(Mean.merged)


@dataclass(frozen=True)
class Evidence:
    """What all finders look at.

    * ``model``: the aligned one. ``unaligned``: its version without refusals, or None.
    * ``examples``: calibration requests with the model's answers, harmful and helpful.
    * ``moments``: of every such request alone, and the ``moments_seconds`` that this took.
    * ``openings``: token ids of openings that refuse and that comply, as ``openings_of`` gives.
    * ``positions``: which positions are scored, where a finder does not say it itself.
    * ``n_steps``, ``n_rows``: of the learned mask, for each half of the requests, and its requests
      per step. ``seed``: of their order.
    """

    model: nn.Module
    unaligned: nn.Module | None
    examples: Mapping[str, Sequence[Example]]
    moments: Mapping[str, list[ChannelMoments]]
    moments_seconds: float
    openings: Mapping[str, Sequence[Ids]]
    positions: str = "response"
    n_steps: int = 8
    n_rows: int = 4
    price: float = unit_masks.PRICE
    seed: int = 0

    def chosen(self, subset: Subset) -> dict[str, list[Example]]:
        """The examples of a subset, by side."""
        rows = {"harmful": subset.harmful, "helpful": subset.helpful}
        return {side: [self.examples[side][row] for row in rows[side]] for side in SIDES}

    def batches(self, subset: Subset) -> dict[str, list[Batch]]:
        """Batches of a subset with the scored positions marked."""
        found = self.chosen(subset)
        return {side: tokens.token_batches(found[side], self.positions) for side in SIDES}

    def last_positions(self, subset: Subset) -> dict[str, list[Batch]]:
        """The prompts of a subset with one position marked, the last, which begins the answer."""
        found = self.chosen(subset)
        return {side: tokens.token_batches([*map(opened, found[side])]) for side in SIDES}


def opened(example: Example) -> Example:
    """A request and the first token of its answer, which the last prompt position predicts."""
    end = n_prompt(example) + 1
    return {"input_ids": example["input_ids"][:end], "labels": example["labels"][:end]}


def n_prompt(example: Example) -> int:
    """Tokens of a request, before its answer."""
    return sum(label == tokens.IGNORED for label in example["labels"])


def openings_of(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], system_prompt: str = ""
) -> dict[str, list[Ids]]:
    """Token ids of the openings that refuse and that comply, as they stand after these prompts."""
    rendered, openings = chat.render(tokenizer, prompts, system_prompt), load_refusals()
    return {
        side: opening_ids(tokenizer, rendered, openings[f"{side}_openings"])
        for side in ("refusal", "compliance")
    }


def first_tokens(openings: Mapping[str, Sequence[Ids]]) -> tuple[list[int], list[int]]:
    """First tokens of refusing openings and of complying ones; one that begins both is left out.

    ``ValueError`` where no token is left on a side: then the first token says nothing.
    """
    refusing, complying = ({ids[0] for ids in openings[side]} for side in ("refusal", "compliance"))
    if not refusing - complying or not complying - refusing:
        raise ValueError(
            "refusing and complying openings begin with the same tokens, so the first token"
            " tells nothing: change refusal_openings or compliance_openings in data/refusals.json"
        )
    return sorted(refusing - complying), sorted(complying - refusing)


# ---------------------------------------------------------------------------------------- finders


def all_finders(evidence: Evidence, n_units: int) -> dict[str, Finder]:
    """The finders by name, that of the paper first; without the one that needs an unaligned model
    where there is none. ``n_units``: for how many units the mask is learned.
    """
    found = _of_moments(evidence)
    found["gradient x activation"] = _gradient(evidence)
    if evidence.unaligned is not None:
        found["activation change"] = _change(evidence)
    found["refusal direction"] = _direction(evidence)
    found["first-token KL"] = _first_token(evidence)
    found["learned mask"] = _mask(evidence, n_units)
    return found


def _of_moments(evidence: Evidence) -> dict[str, Finder]:
    """Finders that see means and variances alone."""
    norms = unit_weights.squared_column_norms(evidence.model)
    absolute = unit_weights.mean_absolute_columns(evidence.model)

    def measure(subset: Subset) -> dict[str, ChannelMoments]:
        return subset.moments(evidence.moments)

    def variance(seen: dict[str, ChannelMoments], share: float) -> PerUnit:
        return units.top_units(finders.by_variance(seen, norms), share)

    def weighted_norm(seen: dict[str, ChannelMoments], share: float) -> PerUnit:
        return units.top_units(finders.by_weighted_norm(seen, absolute), share)

    def difference(seen: dict[str, ChannelMoments], share: float) -> PerUnit:
        z = {side: scoring.standardised(seen[side], norms) for side in SIDES}
        return units.set_difference(z["harmful"], z["helpful"], share)

    chosen = {PAPER: variance, "WIFN": weighted_norm, "set difference": difference}
    merge = _by_side(activations.merged)
    return {
        name: Finder(measure, merge, choose, evidence.moments_seconds)
        for name, choose in chosen.items()
    }


def _gradient(evidence: Evidence) -> Finder:
    def measure(subset: Subset) -> dict[str, Mean]:
        found = {}
        for side, batches in evidence.batches(subset).items():
            count = sum(int(batch["positions"].sum()) for batch in batches)
            found[side] = Mean(activations.gradient_activation(evidence.model, batches), count)
        return found

    def choose(seen: dict[str, Mean], share: float) -> PerUnit:
        products = {side: mean.value for side, mean in seen.items()}
        return units.top_units(finders.by_gradient(products), share)

    return Finder(measure, _means, choose)


def _change(evidence: Evidence) -> Finder:
    def measure(subset: Subset) -> dict[str, Mean]:
        batches = evidence.batches(subset)["harmful"]
        count = sum(int(batch["positions"].sum()) for batch in batches)
        changes = activations.mean_squared_changes(evidence.model, evidence.unaligned, batches)
        return {"harmful": Mean(changes, count)}

    def choose(seen: dict[str, Mean], share: float) -> PerUnit:
        return units.top_units(finders.by_change(seen["harmful"].value), share)

    return Finder(measure, _means, choose)


def _direction(evidence: Evidence) -> Finder:
    Seen = dict[str, tuple[Tensor, Mean]]  # by side: states at the last prompt position, means

    def measure(subset: Subset) -> Seen:
        found = {}
        for side, batches in evidence.last_positions(subset).items():
            states = activations.marked_states(evidence.model, batches)
            mean = activations.channel_moments(evidence.model, batches).mean
            found[side] = (states, Mean(mean, len(states)))
        return found

    def merge(one: tuple[Tensor, Mean], other: tuple[Tensor, Mean]) -> tuple[Tensor, Mean]:
        return torch.cat([one[0], other[0]]), one[1].merged(other[1])

    def choose(seen: Seen, share: float) -> PerUnit:
        states = [seen[side][0] for side in SIDES]
        _, direction = scores.widest_separation(*states)
        along = unit_weights.columns_along(evidence.model, direction)
        means = {side: seen[side][1].value for side in SIDES}
        return units.top_units(finders.by_direction(along, means), share)

    return Finder(measure, _by_side(merge), choose)


def _first_token(evidence: Evidence) -> Finder:
    refusing, complying = first_tokens(evidence.openings)

    def measure(subset: Subset) -> dict[str, Mean]:
        model, batches = evidence.model, evidence.last_positions(subset)
        odds = attribution.next_token_effect(model, batches["harmful"], refusing, complying)
        kl = attribution.next_token_kl(model, batches["helpful"])
        n_requests = {"harmful": len(subset.harmful), "helpful": len(subset.helpful)}
        found = {"harmful": odds, "helpful": kl}
        return {side: Mean(found[side], n_requests[side]) for side in SIDES}

    def choose(seen: dict[str, Mean], share: float) -> PerUnit:
        score = finders.by_first_token(seen["harmful"].value, seen["helpful"].value)
        return units.top_units(score, share)

    return Finder(measure, _means, choose)


def _mask(evidence: Evidence, n_units: int) -> Finder:
    """A mask is learned on each half of the requests; the logits of the two are added up."""

    def measure(subset: Subset) -> PerUnit:
        steps = mask_steps(evidence, subset)
        return unit_masks.learn_mask(evidence.model, steps, n_units, evidence.price)

    return Finder(measure, PerUnit.__add__, units.top_units)


def mask_steps(evidence: Evidence, subset: Subset) -> list[unit_masks.MaskStep]:
    """Steps of a learned mask: requests of a subset in random order, openings taking turns."""
    rng, examples = np.random.default_rng(evidence.seed), evidence.chosen(subset)
    rows: dict[str, list[int]] = {}
    for side in SIDES:
        n_wanted, n_there = evidence.n_steps * evidence.n_rows, len(examples[side])
        orders = [rng.permutation(n_there) for _ in range(-(-n_wanted // n_there))]
        rows[side] = np.concatenate(orders)[:n_wanted].tolist()
    found = []
    for step in range(evidence.n_steps):
        here = slice(step * evidence.n_rows, (step + 1) * evidence.n_rows)
        asked = [examples["harmful"][row] for row in rows["harmful"][here]]
        kept = [examples["helpful"][row] for row in rows["helpful"][here]]
        sides = [
            _one_batch([_with_opening(one, openings[step % len(openings)]) for one in asked])
            for openings in (evidence.openings["refusal"], evidence.openings["compliance"])
        ]
        found.append(unit_masks.MaskStep(*sides, _one_batch(kept)))
    return found


def _with_opening(example: Example, opening: Ids) -> Example:
    n = n_prompt(example)
    ids = example["input_ids"][:n] + opening
    return {"input_ids": ids, "labels": [tokens.IGNORED] * n + opening}


def _one_batch(examples: list[Example]) -> Batch:
    return tokens.token_batches(examples, batch_size=len(examples))[0]
