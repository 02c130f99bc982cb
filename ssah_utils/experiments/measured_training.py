"""One fine-tuning and what is measured on its way: the unit of which experiments on training are
made.

A model is trained on examples, whole, with some units frozen, by an adapter, or with a defence; at
chosen steps *probes* look at it, and at the end a panel does. What is found is plain JSON, so that
``cache.cached(train_and_measure, ...)`` keeps it under everything that went in. Knows models, token
sequences, sets of units and measurements. Does not know data sets or notebooks.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import (
    adapters,
    attribution,
    cache,
    defences,
    evaluation,
    fingerprints,
    hooked_training,
    loading,
    precision,
    scoring,
    sequences,
    training,
    unit_training,
    units,
)
from ssah_utils.defences import Defence
from ssah_utils.experiments import panel, transfer
from ssah_utils.experiments.frontier import LossPath
from ssah_utils.judge import answers
from ssah_utils.per_unit import PerUnit
from ssah_utils.prompts import chat
from ssah_utils.settings import SFTConfig, training_seed

Row = dict[str, object]
T = TypeVar("T")
# Names of margins on other requests: of another source, and on safe ones that sound harmful.
FRESH, SAFE = "fresh_margin", "safe_margin"
# what probes find, in this order
SCALARS = ("task_loss", "margin", FRESH, SAFE, "exact_match", "left")


# ------------------------------------------------------------------------------------------- probes


@dataclass(frozen=True)
class TaskProbe:
    """How well the task is learned: ``task_loss``, nats per token of held-out responses.

    * ``pairs``: table of held-out prompts and responses.
    * ``numeric``: whether responses end in a number; then also ``exact_match``, pair by pair.
    """

    tokenizer: PreTrainedTokenizerBase
    pairs: pd.DataFrame
    system_prompt: str = ""
    numeric: bool = False

    def measure(self, model: nn.Module) -> Row:
        prompts, responses = (self.pairs[column].tolist() for column in ("prompt", "response"))
        rendered = chat.render(self.tokenizer, prompts, self.system_prompt)
        nll = evaluation.response_nll(model, self.tokenizer, rendered, responses)
        found: Row = {"task_loss": float(np.nanmean(nll))}
        if self.numeric:
            found["exact_match"] = evaluation.exact_match(
                model, self.tokenizer, rendered, responses
            )
        return found


@dataclass(frozen=True)
class MarginProbe:
    """How far the model is on the side of refusal: ``margin`` of every harmful request, in nats.

    ``name``: that of what is found, where requests of several sources are looked at.
    """

    tokenizer: PreTrainedTokenizerBase
    requests: list[str]
    system_prompt: str = ""
    name: str = "margin"

    def measure(self, model: nn.Module) -> Row:
        margin = evaluation.refusal_margin(model, self.tokenizer, self.requests, self.system_prompt)
        return {self.name: margin.tolist()}


@dataclass(frozen=True)
class TransferProbe:
    """Where the units of every group are now: ``moves`` (``units.transition_table``), and ``left``,
    whether each safety unit is in another group.

    * ``before``: the partition of the model before training.
    * ``sample``: batches of ``harmful`` and ``helpful`` sequences it was made from.
    * ``fractions``: those of ``units.partition``.
    """

    before: units.UnitPartition
    sample: Mapping[str, list[dict[str, torch.Tensor]]]
    fractions: Mapping[str, float]

    def measure(self, model: nn.Module) -> Row:
        after, _ = scoring.partition_model(model, self.sample, **self.fractions)
        moves = units.transition_table(self.before, after).to_dict("records")
        return {"moves": moves, "left": transfer.left_group(self.before, after).tolist()}


# A probe is part of the cache key by its name and its fields, and its code by being of this module.
Probe = TaskProbe | MarginProbe | TransferProbe


def measure(model: nn.Module, probes: Sequence[Probe], at_end: panel.Panel | None = None) -> Row:
    """What all probes find in a model, and under ``panel`` the rows of a panel."""
    found: Row = {}
    for probe in probes:
        if not isinstance(probe, Probe):
            raise TypeError(
                f"a {type(probe).__name__} is no probe: write it in {__name__}, so that what it"
                " found is not taken for what its code would find after a change"
            )
        found |= probe.measure(model)
    if at_end is not None:
        rows = at_end.measure(model)
        kept = dict.fromkeys(["set", *answers.JUDGED, *panel.METRICS])
        kept = [name for name in kept if name in rows]
        found["panel"] = json.loads(rows[kept].to_json(orient="records", double_precision=15))
    return found


# ----------------------------------------------------------------------------------------- training


def train_and_measure(
    aligned: nn.Module,
    place: str,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, list[int]]],
    config: SFTConfig,
    steps: list[int],
    probes: Sequence[Probe],
    at_end: panel.Panel | None = None,
    frozen: PerUnit | None = None,
    adapter: str = "",
    defence: Defence | None = None,
) -> list[Row]:
    """Fine-tune a copy of a model; one row per checkpoint: ``step``, what the probes found, at the
    end ``panel``.

    * ``aligned``: the model, as it is measured: on its device, in its precision.
    * ``place``, ``dtype``: where it is loaded from for training, and in which precision.
    * ``steps``: optimizer steps after which the probes look; the last ends the training.
    * ``frozen``: units that stay as they are; None trains everything.
    * ``adapter``: a method of ``adapters``; then its parameters alone are trained.
    * ``defence``: one of ``defences``. What the probes look at is what it keeps.

    ``ValueError`` where ``place`` holds another model, the last step is not the config's, or both
    ``frozen`` and ``adapter`` are given.
    """
    if frozen is not None and adapter:
        raise ValueError(f"give frozen units or the adapter '{adapter}', not both")
    if max(steps) != config.max_steps:
        raise ValueError(f"steps end at {max(steps)}, the training at {config.max_steps}")
    subject, _ = loading.load(place, dtype, aligned.device.type)
    found, wanted = (fingerprints.fingerprint(model) for model in (subject, aligned))
    if found != wanted:
        raise ValueError(f"{place} holds model {found}, not {wanted}: load both from one place")
    if adapter:
        subject = adapters.with_adapter(subject, adapter, tokenizer, config.seed)
    rows: list[Row] = []

    def look(step: int) -> None:
        fast = training.evaluation_copy(subject, aligned.dtype)
        asked = at_end if step == max(steps) else None
        with hooked_training.with_kept_weights(fast, subject, hooks):
            rows.append({"step": step} | measure(fast, probes, asked))

    with contextlib.nullcontext() if adapter else _kept(subject, frozen):
        hooks = defences.hooks_of(defence, subject, examples, config)
        made = functools.partial(hooked_training.HookedTrainer, hooks)
        looking = (training.AtSteps(steps, look),)
        training.train_sft(subject, tokenizer, examples, config, looking, made)
    return rows


@dataclass(frozen=True)
class FineTuning:
    """What the fine-tunings of a study have in common, so that only what is compared differs.

    * ``aligned``, ``place``, ``tokenizer``, ``probes``: as ``train_and_measure`` takes them.
    * ``recipe``: learning rate, batches and warm-up. Its seed is that of the run.
    """

    aligned: nn.Module
    place: str
    tokenizer: PreTrainedTokenizerBase
    recipe: SFTConfig
    probes: Sequence[Probe]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of training, which need not be that of measuring."""
        return precision.training_dtype(self.aligned)

    @functools.cached_property
    def untrained(self) -> Row:
        """What the probes find before training: step 0 of every path."""
        return {"step": 0} | measure(self.aligned, self.probes)

    def follow(
        self,
        examples: list[dict[str, list[int]]],
        steps: list[int],
        k: int = 0,
        factor: float = 1.0,
        **how: object,
    ) -> list[Row]:
        """Rows of ``train_and_measure``, the untrained model first; from the cache, if done before.

        * ``k``: the repetition, from 0. It has a seed that no other run shares
          (``settings.training_seed``).
        * ``factor``: of the recipe's learning rate.
        * ``how``: ``at_end``, ``frozen``, ``adapter`` or ``defence``.
        """
        config = replace(
            self.recipe,
            learning_rate=self.recipe.learning_rate * factor,
            max_steps=max(steps),
            seed=training_seed(self.recipe.seed, k),
        )
        rows = cache.cached(
            train_and_measure,
            aligned=self.aligned,
            place=self.place,
            dtype=self.dtype,
            tokenizer=self.tokenizer,
            examples=examples,
            config=config,
            steps=steps,
            probes=self.probes,
            **how,
        )
        return [self.untrained, *rows]

    def first_gradients(self, examples: list[dict[str, list[int]]], n: int = 32) -> PerUnit:
        """Norm per unit of the gradient over the first ``n`` examples, before any step, in the
        precision of training (``attribution.unit_gradients``).
        """
        subject, _ = loading.load(self.place, self.dtype, self.aligned.device.type)
        chosen = examples[:n]
        batches = [
            sequences.batch_of_examples(chosen[start : start + 8])
            for start in range(0, len(chosen), 8)
        ]
        return attribution.unit_gradients(subject, batches)


def _kept(model: nn.Module, frozen: PerUnit | None) -> contextlib.AbstractContextManager[nn.Module]:
    """Units frozen inside the block, where any are given; either way all else is trained alike."""
    if frozen is None:
        return unit_training.training_all(model)
    return unit_training.freezing(model, frozen)


# ------------------------------------------------------------------------------------------- tables


def path_table(rows: Sequence[Row], **keys: object) -> pd.DataFrame:
    """One row per checkpoint: ``keys``, ``step``, and the mean of each of ``SCALARS`` that was
    measured.
    """
    found = []
    for row in rows:
        means = {name: float(np.mean(row[name])) for name in SCALARS if name in row}
        found.append(keys | {"step": row["step"]} | means)
    return pd.DataFrame(found)


def loss_path(rows: Sequence[Row], margin: str = "margin") -> LossPath:
    """Task loss and margins at the checkpoints of one run, the first before training.

    ``margin``: the name of the probe.
    """
    return LossPath([row["task_loss"] for row in rows], [row[margin] for row in rows])


def panel_rates(rows: Sequence[Row], **keys: object) -> pd.DataFrame:
    """``panel.rates`` of what a panel found at the end, with ``keys`` as further columns."""
    return panel.rates(pd.DataFrame(rows[-1]["panel"])).assign(**keys)


def panel_answers(runs: Mapping[tuple, Sequence[Row]], names: Sequence[str]) -> answers.AnswerLog:
    """Judged answers of the runs that ended with a panel, by one value for each of ``names``."""
    log = answers.AnswerLog()
    for key, rows in runs.items():
        if "panel" in rows[-1]:
            log.add(pd.DataFrame(rows[-1]["panel"]), **dict(zip(names, key, strict=True)))
    return log


def moves_table(rows: Sequence[Row], **keys: object) -> pd.DataFrame:
    """``units.transition_table`` at every checkpoint but the untrained one, with ``keys`` and
    ``step`` as further columns.
    """
    trained = [row for row in rows if row["step"] > 0]
    parts = [pd.DataFrame(row["moves"]).assign(**keys, step=row["step"]) for row in trained]
    return pd.concat(parts, ignore_index=True)


def stacked(
    table: Callable[..., pd.DataFrame], runs: Mapping[tuple, T], names: Sequence[str]
) -> pd.DataFrame:
    """The tables of several runs in one, as ``table(run, **keys)`` makes them.

    ``runs``: by what tells them apart, one value for each of ``names``.
    """
    parts = [table(run, **dict(zip(names, key, strict=True))) for key, run in runs.items()]
    return pd.concat(parts, ignore_index=True)


def last_margins(runs: Mapping[tuple[str, int], Sequence[Row]]) -> dict[str, np.ndarray]:
    """Margin of every request at the end, by condition: (n_seeds, n_requests), in nats.

    ``runs``: by (condition, seed).
    """
    found: dict[str, list] = {}
    for (name, _), rows in runs.items():
        found.setdefault(name, []).append(rows[-1]["margin"])
    return {name: np.array(margins) for name, margins in found.items()}
