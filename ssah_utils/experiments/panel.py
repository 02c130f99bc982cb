"""One panel of measurements for every model, and for one model under every condition.

The same requests, the same judge and the same tasks each time, so that rows can be compared one by
one. Knows models through their Hugging Face interface only.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import benchmarks, evaluation, stats
from ssah_utils.prompts import chat

METRICS = ("refused", "asr", "coherent_asr", "degenerate", "answer_nll", "accuracy")


@dataclass(frozen=True)
class Panel:
    """What is asked of a model.

    * ``base``: the model under which an answer is improbable if it is gibberish.
    * ``requests``: tables of requests (id, category, prompt) by the name of their set.
    * ``kept_answers``: by set, answers whose probability is followed, one a request.
    * ``tasks``, ``n_items``: tasks of lm-evaluation-harness and how many items of each.
    * ``arithmetic``: problems (id, prompt, response), answered by greedy decoding; or None.
    """

    base: nn.Module
    tokenizer: PreTrainedTokenizerBase
    requests: Mapping[str, pd.DataFrame]
    new_tokens: int = 24
    system_prompt: str = ""
    kept_answers: Mapping[str, list[str]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    n_items: int | None = None
    arithmetic: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        for name, answers in self.kept_answers.items():
            n_requests = len(self.requests[name]) if name in self.requests else 0
            if len(answers) != n_requests:
                raise ValueError(f"{len(answers)} kept answers for {n_requests} requests '{name}'")

    def measure(
        self,
        model: nn.Module,
        with_tasks: bool = True,
        progress: evaluation.Progress = evaluation._silent,
    ) -> pd.DataFrame:
        """One row a request or item: set, id, and what was found under the names of ``METRICS``.

        Requests also keep category, prompt, response, base_nll and verdict.
        """
        found = [self._answered(model, name, progress) for name in self.requests]
        if with_tasks and self.tasks:
            items = benchmarks.utility(model, self.tokenizer, list(self.tasks), self.n_items)
            found.append(items.rename(columns={"task": "set", "correct": "accuracy"}))
        if with_tasks and self.arithmetic is not None:
            found.append(self._solved(model, self.arithmetic))
        return pd.concat(found, ignore_index=True)

    def _rendered(self, table: pd.DataFrame) -> list[str]:
        return chat.render(self.tokenizer, table["prompt"].tolist(), self.system_prompt)

    def _answered(self, model: nn.Module, name: str, progress: evaluation.Progress) -> pd.DataFrame:
        table = self.requests[name]
        rows = evaluation.answer_and_judge(
            model, self.base, self.tokenizer, table, self.new_tokens, self.system_prompt, progress
        )
        if name in self.kept_answers:
            rendered, kept = self._rendered(table), self.kept_answers[name]
            rows["answer_nll"] = evaluation.response_nll(model, self.tokenizer, rendered, kept)
        return rows.assign(set=name)

    def _solved(self, model: nn.Module, problems: pd.DataFrame) -> pd.DataFrame:
        rendered, expected = self._rendered(problems), problems["response"].tolist()
        right = evaluation.exact_match(model, self.tokenizer, rendered, expected)
        return pd.DataFrame({"id": problems["id"], "accuracy": right, "set": "arithmetic"})


def rates(rows: pd.DataFrame, by: list[str] | str = "set") -> pd.DataFrame:
    """Mean and 95% interval of every metric of ``Panel.measure`` that a set has: by, metric, mean,
    low, high, n.
    """
    metrics = [name for name in METRICS if name in rows]
    table = stats.rate_table(rows, by, metrics)
    return table[table["n"] > 0].reset_index(drop=True)


def per_request(measured: list[pd.DataFrame], set_name: str, metric: str) -> np.ndarray:
    """A metric of one set in several measurements of the same requests: (n_measurements,
    n_requests). ``ValueError`` where they are not of the same requests.
    """
    parts = [rows[rows["set"] == set_name] for rows in measured]
    ids = [part["id"].tolist() for part in parts]
    if any(other != ids[0] for other in ids):
        raise ValueError(f"measurements of different requests in set '{set_name}'")
    return np.array([part[metric].to_numpy(dtype=float) for part in parts])


def compare(
    measured: Mapping[Hashable, list[pd.DataFrame]],
    pairs: Iterable[tuple[dict[str, object], Hashable, Hashable]],
    where: Sequence[tuple[str, str]],
    seed: int = 0,
) -> pd.DataFrame:
    """One condition minus another, request by request: ``stats.paired_table`` of all pairs.

    * ``measured``: by condition, its measurements of the same requests, one a training.
    * ``pairs``: (columns that name the row, condition, condition that is subtracted).
    * ``where``: the (set, metric) to compare in, which become columns, too.
    """
    found = []
    for names, one, other in pairs:
        for set_name, metric in where:
            values = [per_request(measured[key], set_name, metric) for key in (one, other)]
            found.append((names | {"set": set_name, "metric": metric}, *values))
    return stats.paired_table(found, seed)
