"""Calibration data: requests with the model's own answers, as token ids on which units are scored.

Harmful requests that the model refuses show what it does when it keeps itself safe; harmless ones
show what it does when it helps. Knows language models through their Hugging Face interface.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import evaluation
from ssah_utils.judge.decisions import refuses
from ssah_utils.prompts import chat, tokens

MIN_REFUSED = 4  # with fewer refusals, all answers are used: four are little, less is chance


@dataclass(frozen=True)
class Calibration:
    """Requests of one set that are used for scoring.

    * ``table``: id, category, prompt, response of every request used.
    * ``examples``: their ``input_ids`` and ``labels``, as ``tokens.encode`` makes them.
    * ``n_asked``: how many requests were answered.
    * ``refused_only``: whether only refused ones are used; False where there were too few.
    """

    table: pd.DataFrame
    examples: list[dict[str, list[int]]]
    n_asked: int
    refused_only: bool

    def __len__(self) -> int:
        return len(self.examples)

    def batches(self, positions: str = "response") -> list[dict[str, Tensor]]:
        """``tokens.token_batches`` of the examples, with ``positions`` marked."""
        return tokens.token_batches(self.examples, positions)


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Mapping[str, pd.DataFrame],
    n_requests: int | None = None,
    answer_tokens: int = 48,
    system_prompt: str = "",
    refused_only: tuple[str, ...] = ("harmful",),
    progress: evaluation.Progress = evaluation._silent,
) -> dict[str, Calibration]:
    """Let the model answer the first ``n_requests`` of every set, and keep what can be scored.

    ``requests``: tables (id, category, prompt) by the name of their set. Of the sets named in
    ``refused_only``, only requests that the model refuses are kept; where it refuses fewer than
    ``MIN_REFUSED``, all of them. An answer of a single token is left out: a variance needs two.
    ``ValueError`` where no answer of a set can be scored. Answers come from the cache.
    """
    found = {}
    for name, table in requests.items():
        table = table[["id", "category", "prompt"]][:n_requests]
        rendered = chat.render(tokenizer, table["prompt"].tolist(), system_prompt)
        answers = evaluation.cached_answers(
            model, tokenizer, rendered, answer_tokens, progress=progress
        )
        pairs = zip(answers, table["prompt"], strict=True)
        refused = [refuses(*pair) for pair in pairs]
        only_refused = name in refused_only and sum(refused) >= MIN_REFUSED
        used = [
            row
            for row, answer in enumerate(answers)
            if (refused[row] or not only_refused) and _n_tokens(tokenizer, answer) > 1
        ]
        if not used:
            raise ValueError(
                f"none of the model's {len(answers)} answers to '{name}' has two tokens, so"
                " nothing can be scored: allow longer answers (answer_tokens)"
            )
        asked, said = [rendered[row] for row in used], [answers[row] for row in used]
        examples = tokens.encode(tokenizer, asked, said, answer_tokens)
        kept = table.iloc[used].assign(response=said).reset_index(drop=True)
        found[name] = Calibration(kept, examples, len(answers), only_refused)
    return found


def halves(
    answered: Mapping[str, Calibration], positions: str = "response"
) -> tuple[dict[str, list[dict[str, Tensor]]], dict[str, list[dict[str, Tensor]]]]:
    """Two samples without a common request, as batches by set: every other request each.

    What differs between a model's scores on both is due to the sample alone.
    """
    parts: tuple[dict, dict] = ({}, {})
    for start, part in enumerate(parts):
        for name, found in answered.items():
            part[name] = tokens.token_batches(found.examples[start::2], positions)
    return parts


def _n_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)
