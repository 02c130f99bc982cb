"""Alignment that lasts: an aligned model is trained once more, so that it finds back to a refusal
after its answer has begun to comply.

What it is trained on, what it then does with and without such a beginning, and what that costs on
harmless requests. Knows models, requests and token ids. Trains nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import stats
from ssah_utils.experiments import probing, stepwise
from ssah_utils.experiments.alignment import AlignmentData, alignment_examples, recovery_examples
from ssah_utils.prompt_cache import Ids
from ssah_utils.prompts import chat

OUTCOMES = ["refused", "coherent_asr", "degenerate"]
Lessons = dict[str, list[dict[str, list[int]]]]


def lessons(
    tokenizer: PreTrainedTokenizerBase,
    data: AlignmentData,
    begun: list[Ids],
    seed: int | np.random.Generator = 0,
) -> Lessons:
    """What an aligned model is trained on once more: ``recovery``, and its control ``without``.

    Both have every harmless request with its kept answer, and every harmful one with its refusal
    twice. In ``recovery`` the second refusal follows the first tokens of ``begun``, of which there
    are as many as ``seed`` draws: one up to all. In ``without`` it follows the request.
    """
    rng = np.random.default_rng(seed)
    cut = [ids[: rng.integers(1, len(ids) + 1)] for ids in begun]
    plain = alignment_examples(tokenizer, data)
    once = plain["harmless"] + plain["harmful"]
    again = recovery_examples(tokenizer, data.harmful, cut, data.refused)
    return {"recovery": once + again, "without": once + plain["harmful"]}


@dataclass(frozen=True)
class PrefillTest:
    """What is asked of a model, and the words of compliance that are put in its mouth.

    * ``base``: the model under which an answer is improbable if it is gibberish.
    * ``requests``: id, ``queries`` (harmful, harmless, safe twin) and prompt.
    * ``forced``: token ids to follow each request; none where it is asked without a prefill only.
    * ``lengths``: of the prefills, which are beginnings of ``forced``.
    * ``openings``: those of refusals and those of compliance, for the margin.
    """

    base: nn.Module
    tokenizer: PreTrainedTokenizerBase
    requests: pd.DataFrame
    forced: list[Ids]
    lengths: list[int]
    n_tokens: int
    openings: tuple[list[str], list[str]]
    system_prompt: str = ""

    def measure(self, model: nn.Module, condition: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """``stepwise.margin_table`` where the prefills end, and ``stepwise.behaviour_table`` of
        what follows, both with a column ``condition``.
        """
        prompts = chat.render(self.tokenizer, self.requests["prompt"].tolist(), self.system_prompt)
        margins, said = [], []
        for is_forced in (True, False):
            rows = [row for row, ids in enumerate(self.forced) if bool(ids) == is_forced]
            if not rows:
                continue
            variants: dict[tuple[str, int], list[Ids]] = {("none", 0): [[]] * len(rows)}
            for k in self.lengths if is_forced else ():
                variants["prefill", k] = [self.forced[row][:k] for row in rows]
            asked = [prompts[row] for row in rows]
            found = stepwise.generate_and_probe(
                model, self.tokenizer, asked, variants, self.n_tokens, [], self.openings
            )
            table = self.requests.iloc[rows]
            nll = stepwise.continuation_nll(self.base, found)
            keys = {"condition": condition}
            margins.append(stepwise.margin_table(found, table, **keys))
            said.append(stepwise.behaviour_table(found, nll, self.tokenizer, table, **keys))
        return pd.concat(margins, ignore_index=True), pd.concat(said, ignore_index=True)


def rates(said: pd.DataFrame) -> pd.DataFrame:
    """Shares of refused, coherently answered and degenerate requests: condition, queries, attack,
    prefill, metric, mean, low, high, n.
    """
    return stats.rate_table(said, ["condition", "queries", "attack", "prefill"], OUTCOMES)


def directions(margins: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How far each model tells harmful from harmless at the end of every prefill, in nats:
    condition, prefill, value, low, high, and the mean margin on harmful requests with its interval:
    margin, margin_low, margin_high.
    """
    rows = []
    for (condition, k), there in margins.groupby(["condition", "prefill"], sort=False):
        gap = probing.margin_gap(there, seed)
        harmful = there.loc[there["queries"] == "harmful", "margin"]
        row = dict(zip(("value", "low", "high"), gap, strict=True))
        mean = dict(
            zip(("margin", "margin_low", "margin_high"), stats.mean_interval(harmful), strict=True)
        )
        rows.append({"condition": condition, "prefill": k} | row | mean)
    return pd.DataFrame(rows)


def differences(
    said: pd.DataFrame, pairs: Iterable[tuple[str, str]], seed: int = 0
) -> pd.DataFrame:
    """Share of harmful requests that one condition refuses minus that of another, request by
    request: condition, against, attack, and the columns of ``stats.paired_table``. Pairs of which
    one was not measured are left out.

    ``attack``: ``none``, or ``prefill``, where a request counts by its mean over all lengths.
    """
    harmful = said[said["queries"] == "harmful"]
    by_request = harmful.groupby(["condition", "attack", "id"], sort=False)["refused"].mean()
    there = set(harmful["condition"])
    found = []
    for one, other in (pair for pair in pairs if there.issuperset(pair)):
        for attack in ("none", "prefill"):
            ours, theirs = by_request[one, attack], by_request[other, attack]
            names = {"condition": one, "against": other, "attack": attack}
            found.append((names, ours.to_numpy(float), theirs[ours.index].to_numpy(float)))
    return stats.paired_table(found, seed)
