"""A model whose safety units are switched off by growing shares, and what it then says.

Every share has its control: as many random units in every module. Knows a language model through
its Hugging Face interface, requests, and one value per unit that ranks them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import evaluation, interventions, units
from ssah_utils.per_unit import PerUnit

NOTHING, SAFETY, RANDOM = "nothing", "safety units", "random units"


@dataclass(frozen=True)
class SafetySwitch:
    """The model, the requests, and the order in which units are switched off.

    * ``base``: the model under which an answer is improbable if it is gibberish; ``ValueError``
      where it is the very model whose units are switched off.
    * ``requests``: table of id, category and prompt.
    * ``contrast``: z_S - z_U of every unit; those with the highest are the safety units.
    * ``seed``: of the random units.
    """

    model: nn.Module
    base: nn.Module
    tokenizer: PreTrainedTokenizerBase
    requests: pd.DataFrame
    contrast: PerUnit
    new_tokens: int = 16
    system_prompt: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.base is self.model:
            raise ValueError("the base is the model that is ablated: load it a second time")

    def sets(self, share: float) -> dict[str, PerUnit]:
        """What is switched off for a share of all units, by name: ``SAFETY``, and ``RANDOM`` as
        many in every module. For a share of 0, ``NOTHING``.
        """
        if share == 0:
            return {NOTHING: self.contrast.empty_set()}
        safety = units.top_units(self.contrast, share)
        generator = torch.Generator().manual_seed(self.seed)
        return {SAFETY: safety, RANDOM: units.random_units(safety, generator)}

    def look(self, share: float, rows: Sequence[int] | None = None) -> pd.DataFrame:
        """What the model says with a share of its units off; one row a request and set.

        ``rows``: of ``requests``; None for all. Columns: switched_off, share, units, id, prompt,
        response, verdict, coherent_asr, margin (nats; above 0 it leans towards refusing).
        """
        asked = self.requests if rows is None else self.requests.iloc[list(rows)]
        found = []
        for name, chosen in self.sets(share).items():
            with interventions.ablated(self.model, chosen):
                said = evaluation.answer_and_judge(
                    self.model,
                    self.base,
                    self.tokenizer,
                    asked,
                    self.new_tokens,
                    self.system_prompt,
                )
                said["margin"] = evaluation.refusal_margin(
                    self.model, self.tokenizer, asked["prompt"].tolist(), self.system_prompt
                )
            kept = said[["id", "prompt", "response", "verdict", "coherent_asr", "margin"]]
            keys = {"switched_off": name, "share": share, "units": chosen.count()}
            found.append(kept.assign(**keys))
        return pd.concat(found, ignore_index=True)
