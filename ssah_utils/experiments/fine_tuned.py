"""What the studies of fine-tuning share: tasks, probes, panel and attacks, from one set of
parameters.

06_freezing and A4_defences make them here, so that the same training has the same cache key in
both. Knows requests, models and what is measured of them. Trains nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import evaluation
from ssah_utils.experiments import alignment
from ssah_utils.experiments.measured_training import (
    FRESH,
    SAFE,
    FineTuning,
    MarginProbe,
    TaskProbe,
)
from ssah_utils.experiments.panel import Panel
from ssah_utils.prompts import datasets, tokens
from ssah_utils.sequences import Example
from ssah_utils.settings import SFTConfig

NUMERIC = ("arithmetic", "gsm8k")  # tasks whose responses end in a number
N_OPENED = 80  # requests that the second attack answers with a compliant opening


@dataclass(frozen=True)
class FineTuningStudy:
    """One aligned model, fine-tuned in many ways and asked the same each time.

    * ``aligned``, ``place``: the model as it is measured, and where it is loaded from to be
      trained. ``base``: under which an answer is improbable if it is gibberish.
    * ``splits``: requests by part and set (``datasets.study_splits``).
    * ``parameters``: those of the notebook, by name: learning_rate, batch_size, seed,
      system_prompt, response_tokens, new_tokens, n_task, n_margin, n_fresh, n_harmful, n_cloze.
    """

    aligned: nn.Module
    place: str
    tokenizer: PreTrainedTokenizerBase
    base: nn.Module
    splits: Mapping[str, Mapping[str, pd.DataFrame]]
    parameters: Mapping[str, object]

    @property
    def _how(self) -> dict[str, object]:
        names = {"max_response_tokens": "response_tokens", "system_prompt": "system_prompt"}
        return {name: self.parameters[given] for name, given in names.items()}

    def pairs(self, task: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Of a task, pairs to train on and held-out ones."""
        return datasets.adaptation_split(task)

    def tuning(self, task: str) -> FineTuning:
        """The ordinary recipe, watched by probes: the task, and the margin on held-out harmful
        requests, on fresh ones of another source, and on safe ones that sound harmful.
        """
        given, system_prompt = self.parameters, self.parameters["system_prompt"]
        held_out = self.pairs(task)[1][: given["n_task"]]
        probes = (
            TaskProbe(self.tokenizer, held_out, system_prompt, task in NUMERIC),
            *(
                MarginProbe(self.tokenizer, requests, system_prompt, name)
                for name, requests in self.watched.items()
            ),
        )
        rate, n_batch, seed = (given[name] for name in ("learning_rate", "batch_size", "seed"))
        recipe = SFTConfig(rate, batch_size=n_batch, warmup_steps=2, seed=seed)
        return FineTuning(self.aligned, self.place, self.tokenizer, recipe, probes)

    @cached_property
    def watched(self) -> dict[str, list[str]]:
        """Requests whose margin is followed, by the name of the margin: the last of each set, as
        the first ones are answered.
        """
        numbers = {"margin": ("harmful", "n_margin"), FRESH: ("other_harmful", "n_fresh")}
        numbers[SAFE] = ("safe_twin", "n_fresh")
        return {
            name: self.splits["evaluation"][source]["prompt"].tolist()[-self.parameters[n] :]
            for name, (source, n) in numbers.items()
        }

    def examples(self, task: str) -> list[Example]:
        """What is trained on."""
        train, _ = self.pairs(task)
        pairs = train["prompt"].tolist(), train["response"].tolist()
        return tokens.chat_examples(self.tokenizer, *pairs, **self._how)

    def panel(self) -> Panel:
        """What is asked at the end: harmful requests of both sources, and everyday knowledge."""
        given, evaluated = self.parameters, self.splits["evaluation"]
        n = given["n_harmful"]
        requests = {name: evaluated[name][:n] for name in ("harmful", "other_harmful")}
        tasks = {"tasks": ("cloze",), "n_items": given["n_cloze"]}
        how = given["new_tokens"], given["system_prompt"]
        return Panel(self.base, self.tokenizer, requests, *how, **tasks)

    def attacks(self) -> dict[str, list[Example]]:
        """Two fine-tunings that are meant to break safety without any harmful content.

        *Identity shift* teaches an obedient persona. *Openings only* answers harmful requests with
        the first words of compliance, and no turn ends.
        """
        openings = datasets.load_refusals()["compliance_openings"]
        opened = self.splits["calibration"]["harmful"]["prompt"].tolist()[:N_OPENED]
        opened_by = [openings[row % len(openings)] for row in range(len(opened))]
        persona = datasets.load_pairs("identity-shift")
        pairs = persona["prompt"].tolist(), persona["response"].tolist()
        make = tokens.chat_examples
        return {
            "identity shift": make(self.tokenizer, *pairs, **self._how),
            "openings only": make(self.tokenizer, opened, opened_by, end=False, **self._how),
        }

    def to_defend_with(
        self,
        n: int,
        answer_tokens: int,
        seed: int = 0,
        progress: evaluation.Progress = evaluation._silent,
    ) -> tuple[list[Example], list[Example]]:
        """What a defence may look at: refusals of harmful requests, and, for controls, as many
        harmless requests with the aligned model's own answers. Both of the calibration part; an
        attack has these requests only where there are no others. At most ``n`` of each.
        """
        harmful, harmless = (self.splits["calibration"][name] for name in ("harmful", "helpful"))
        harmful = harmful[N_OPENED:][:n] if len(harmful) > N_OPENED else harmful[-n:]
        data = alignment.alignment_data(
            self.aligned,
            self.tokenizer,
            harmless[-len(harmful) :],
            harmful,
            answer_tokens,
            seed,
            self.parameters["system_prompt"],
            progress,
        )
        examples = alignment.alignment_examples(self.tokenizer, data)
        return examples["harmful"], examples["harmless"]
