"""A model whose safety units are switched off by growing shares, and what it then says.

Every share has its control: as many random units in every module. Knows a probe of ablations, and
one value per unit that ranks them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from ssah_utils import units
from ssah_utils.experiments.ablation_probe import AblationProbe
from ssah_utils.per_unit import PerUnit

NOTHING, SAFETY, RANDOM = "nothing", "safety units", "random units"


@dataclass(frozen=True)
class SafetySwitch:
    """What is asked of a model, and the order in which its units are switched off.

    * ``contrast``: z_S - z_U of every unit; those with the highest are the safety units.
    * ``seed``: of the random units.
    """

    probe: AblationProbe
    contrast: PerUnit
    seed: int = 0

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

        ``rows``: of the probe's requests; None for all. Columns: switched_off, share, units, id,
        prompt, response, verdict, coherent_asr, margin (nats; above 0 it leans towards refusing).
        """
        probe = self.probe
        if rows is not None:
            probe = replace(probe, requests=probe.requests.iloc[list(rows)])
        found = []
        for name, chosen in self.sets(share).items():
            said = probe.answers(chosen).assign(margin=probe.margins(chosen))
            kept = said[["id", "prompt", "response", "verdict", "coherent_asr", "margin"]]
            keys = {"switched_off": name, "share": share, "units": chosen.count()}
            found.append(kept.assign(**keys))
        return pd.concat(found, ignore_index=True)
