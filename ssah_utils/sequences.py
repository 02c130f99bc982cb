"""What is trained on, as token ids and right-padded batches; what cannot be is named at once.

Padding is ours: on the right, where learned positions count from 0, and masked, so that the
tokenizer's padding token and side mean nothing. Does not know how a model is trained.
"""

import sys

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import extras
from ssah_utils.prompt_cache import n_positions
from ssah_utils.prompts.tokens import IGNORED, encode, right_padded

with extras.needed("train"):
    from datasets import Dataset

Example = dict[str, list[int]]  # input_ids and labels
PAIR = ("prompt", "chosen", "rejected")
LIMITS = {"chosen": "chosen_tokens", "rejected": "rejected_tokens"}


def check_examples(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    """``ValueError`` for no examples, one without a response token, or one beyond the positions."""
    if not examples:
        raise ValueError("nothing to train on: the list of examples is empty")
    for number, example in enumerate(examples):
        if all(label == IGNORED for label in example["labels"]):
            raise ValueError(
                f"example {number} has no response token to learn:"
                f" {tokenizer.decode(example['input_ids'])!r}"
            )
        _check_length(model, len(example["input_ids"]), f"example {number}")


def tokens_of_pairs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: list[dict]
) -> Dataset:
    """Token ids of preference pairs: prompt_ids, chosen_ids, rejected_ids.

    As ``tokens.encode`` makes them: ``chosen_tokens`` and ``rejected_tokens`` of a pair are the
    most that its answers may have, and one that is cut there has no end. Without them none is cut.
    ``ValueError`` for no pairs, for one that is not three texts, for one longer than the model's
    positions, and where no pair prefers anything.
    """
    if not pairs:
        raise ValueError("nothing to train on: the list of pairs is empty")
    for number, pair in enumerate(pairs):
        wrong = [name for name in PAIR if not isinstance(pair.get(name), str)]
        if wrong:
            raise ValueError(
                f"pair {number} has no text '{wrong[0]}':"
                " a pair has a prompt, a chosen and a rejected answer"
            )
        for name in LIMITS.values():
            if name in pair and not (type(pair[name]) is int and pair[name] > 0):
                raise ValueError(
                    f"pair {number} has {name} = {pair[name]!r}: a number of tokens is needed"
                )
    texts = {name: [pair[name] for pair in pairs] for name in PAIR}
    encoded = {
        answer: encode(tokenizer, texts["prompt"], texts[answer], sys.maxsize) for answer in LIMITS
    }
    rows = []
    for number, pair in enumerate(pairs):
        row = {}
        for answer, limit in LIMITS.items():
            examples = encoded[answer]
            ids = examples[number]["input_ids"]
            n_prompt = examples[number]["labels"].count(IGNORED)
            row["prompt_ids"] = ids[:n_prompt]
            row[f"{answer}_ids"] = ids[n_prompt:][: pair.get(limit)]
            _check_length(model, n_prompt + len(row[f"{answer}_ids"]), f"pair {number}")
        rows.append(row)
    if all(row["chosen_ids"] == row["rejected_ids"] for row in rows):
        raise ValueError(
            "nothing to prefer: the chosen and the rejected answer are the same in every pair"
        )
    return Dataset.from_list(rows)


def _check_length(model: nn.Module, length: int, what: str) -> None:
    limit = n_positions(model.config)
    if limit is not None and length > limit:
        raise ValueError(
            f"{what} has {length} tokens, but the model has {limit} positions: shorten or drop it"
        )


def with_prompt_length(examples: list[Example]) -> Dataset:
    """The examples with the length by which to group batches: that of the prompt.

    Whole lengths would sort short refusals from long answers, and batches of nothing but refusals
    teach a model to refuse everything.
    """
    lengths = [sum(label == IGNORED for label in example["labels"]) for example in examples]
    return Dataset.from_list(examples).add_column("prompt_length", lengths)


def batch_of_examples(examples: list[Example]) -> dict[str, Tensor]:
    """A right-padded batch: input_ids, labels and attention_mask, (B, T) int64."""
    return dict(zip(("input_ids", "labels", "attention_mask"), right_padded(examples), strict=True))


def batch_of_pairs(pairs: list[dict]) -> dict[str, Tensor]:
    """A right-padded batch as TRL's trainer reads it, the chosen answers first.

    input_ids, attention_mask and completion_mask: (2 B, T) int64. With the log-probabilities of the
    reference, (B,) float32, where the pairs have them.
    """
    sequences = []
    for answer in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            prompt, ids = pair["prompt_ids"], pair[answer]
            sequences.append({"input_ids": prompt + ids, "labels": [IGNORED] * len(prompt) + ids})
    ids, labels, mask = right_padded(sequences)
    # Padding is masked. It reads as the last token of an answer, because token 0 begins a sequence
    # in some vocabularies.
    ids = ids.where(mask.bool(), pairs[0]["chosen_ids"][-1])
    references = [name for name in pairs[0] if name.startswith("ref_")]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": (labels != IGNORED).long(),
        **{name: Tensor([pair[name] for pair in pairs]) for name in references},
    }
