"""How a model becomes aligned: recipes, and the effect of its safety units as training goes on.

A recipe says what the model learns and for how long. On the way a probe asks at chosen steps what
the model does, finds its safety units anew and switches them off. Everything is measured on
development requests, so that a recipe chosen here was chosen on none of the requests that the study
is judged by. Knows models, requests and sets of units.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import (
    evaluation,
    interventions,
    loading,
    prompt_cache,
    scoring,
    training,
    units,
)
from ssah_utils.experiments import alignment, calibration, panel
from ssah_utils.experiments.recipe import Recipe
from ssah_utils.prompts import datasets, splits
from ssah_utils.settings import SFTConfig

INTACT = "nothing"
HELD_BACK = 0.25  # of the pairs of twins that could be trained on, kept for development


def development_splits(
    harmful_data: str, other_harmful_data: str, helpful_data: str, development_data: str
) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    """Requests to train on and requests to look at, neither of the evaluation part.

    Looked at are the calibration requests of the study, a quarter of the pairs of twins, which are
    then not trained on, and ``development_data``, a second source of harmful requests. What is
    nearly the same as an evaluation request is left out there.
    """
    study = datasets.study_splits(harmful_data, other_harmful_data, helpful_data)
    trained = dict(study["alignment"])
    look = {name: study["calibration"][name] for name in ("harmful", "helpful")}
    pairs = trained["safe_twin"]["id"]
    kept = set(pairs[: len(pairs) - round(HELD_BACK * len(pairs))])
    for side in ("safe_twin", "harmful_twin"):
        is_kept = trained[side]["id"].isin(kept)
        look[side] = trained[side][~is_kept].reset_index(drop=True)
        trained[side] = trained[side][is_kept].reset_index(drop=True)
    others = (*study["evaluation"].values(), *trained.values(), *look.values())
    other = datasets.load_dataset(development_data).sample(frac=1, random_state=0)
    look["other_harmful"] = splits.without_near_duplicates(other, *others, name=development_data)
    return trained, look


def lesson(
    recipe: Recipe,
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Mapping[str, pd.DataFrame],
    answer_tokens: int,
    seed: int = 0,
    system_prompt: str = "",
    progress: evaluation.Progress = evaluation._silent,
) -> list[dict[str, list[int]]]:
    """Examples to train on: harmless requests with the base's own answers, harmful with refusals.

    ``requests``: the tables to train on, by ``helpful``, ``harmful``, ``safe_twin`` and
    ``harmful_twin``. Refusals are drawn by ``seed``.
    """
    harmless = [requests["helpful"][: recipe.n_helpful], requests["safe_twin"][: recipe.n_twins]]
    harmful = [requests["harmful"][: recipe.n_harmful], requests["harmful_twin"][: recipe.n_twins]]
    data = alignment.alignment_data(
        base,
        tokenizer,
        pd.concat(harmless),
        pd.concat(harmful),
        answer_tokens,
        seed,
        system_prompt,
        progress,
    )
    rng = np.random.default_rng(seed)
    phrases = datasets.load_refusals()
    refusals = rng.choice(phrases["refusals"][: recipe.n_refusals], len(data.harmful)).tolist()
    examples = alignment.alignment_examples(tokenizer, replace(data, refused=refusals))
    found = examples["harmless"] + examples["harmful"]
    n_recovered = round(recipe.recovery * len(data.harmful))
    if n_recovered:
        openings = rng.choice(phrases["compliance_openings"], n_recovered)
        prompts = data.harmful[:n_recovered]
        begun = prompt_cache.answer_ids(tokenizer, prompts, [f"{one} " for one in openings])
        refused = refusals[:n_recovered]
        found += alignment.recovery_examples(tokenizer, prompts, begun, refused)
    return found


@dataclass(frozen=True)
class EffectProbe:
    """What a model does with development requests, intact and without its safety units.

    * ``base``: under which an answer is improbable if it is gibberish.
    * ``requests``: by set; ``harmful`` is asked under every condition, the others intact only.
    * ``asked``: harmful and helpful requests, from whose answers the units are found.
    * ``fractions``: shares of all units to switch off, those with the highest z_S - z_U; beside
      each, as many random ones in every module.
    """

    base: nn.Module
    tokenizer: PreTrainedTokenizerBase
    requests: Mapping[str, pd.DataFrame]
    asked: Mapping[str, pd.DataFrame]
    fractions: tuple[float, ...] = (0.002, 0.013)
    new_tokens: int = 16
    answer_tokens: int = 32
    system_prompt: str = ""
    seed: int = 0

    def measure(self, model: nn.Module) -> pd.DataFrame:
        """Rows: switched_off, fraction, set, metric, mean, low, high, n; margins in nats."""
        everything = panel.Panel(
            self.base, self.tokenizer, self.requests, self.new_tokens, self.system_prompt
        )
        harmful = replace(everything, requests={"harmful": self.requests["harmful"]})
        found = [self._rows(everything, model, INTACT, 0.0)]
        data = calibration.collect(
            model,
            self.tokenizer,
            self.asked,
            answer_tokens=self.answer_tokens,
            system_prompt=self.system_prompt,
        )
        z = scoring.standardised_scores(
            model, {name: part.batches() for name, part in data.items()}
        )
        generator = torch.Generator().manual_seed(self.seed)
        for fraction in self.fractions:
            chosen = units.top_units(z["harmful"] - z["helpful"], fraction)
            drawn = units.random_units(chosen, generator)
            for name, one in (("safety", chosen), ("random", drawn)):
                with interventions.ablated(model, one):
                    found.append(self._rows(harmful, model, name, fraction))
        table = pd.concat(found, ignore_index=True)
        return table.assign(n_refused=len(data["harmful"]) if data["harmful"].refused_only else 0)

    def _rows(
        self, asked: panel.Panel, model: nn.Module, name: str, fraction: float
    ) -> pd.DataFrame:
        rates = panel.rates(asked.measure(model))
        prompts = self.requests["harmful"]["prompt"].tolist()
        margins = evaluation.refusal_margin(model, self.tokenizer, prompts, self.system_prompt)
        nats = {"set": "harmful", "metric": "margin", "mean": float(margins.mean())}
        rates = pd.concat([rates, pd.DataFrame([nats | {"n": len(prompts)}])], ignore_index=True)
        return rates.assign(switched_off=name, fraction=fraction)


def align_and_measure(
    base: nn.Module,
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, list[int]]],
    config: SFTConfig,
    steps: Sequence[int],
    probe: EffectProbe,
) -> list[dict]:
    """Align a copy of a model; records of ``EffectProbe.measure`` with their ``step``.

    ``base`` is measured and loaded from ``place`` for training. ``steps``: after which the probe
    looks; step 0 is the base. Plain JSON, so that ``cache.cached`` keeps it.
    """
    subject, _ = loading.load(place, torch.float32, base.device.type)
    found = []

    def look(step: int) -> None:
        table = probe.measure(training.evaluation_copy(subject, base.dtype))
        found.extend(json.loads(table.assign(step=step).to_json(orient="records")))

    training.train_sft(subject, tokenizer, examples, config, (training.AtSteps(steps, look),))
    return found


def effects(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Coherent answers that switching units off adds, in points: by, step, fraction, safety,
    random, above_random.
    """
    answered = rows[(rows["set"] == "harmful") & (rows["metric"] == "coherent_asr")]
    keys = [*by, "step"]
    intact = answered[answered["switched_off"] == INTACT].set_index(keys)["mean"]
    ablated = answered[answered["switched_off"] != INTACT]
    table = ablated.pivot_table("mean", [*keys, "fraction"], "switched_off", sort=False)
    table = table.reset_index()
    before = table.set_index(keys).index.map(intact)
    for name in ("safety", "random"):
        table[name] = 100 * (table[name] - before)
    return table.assign(above_random=table["safety"] - table["random"]).rename_axis(columns=None)
