"""From rendered prompts and responses to token ids, labels and padded batches.

Does not know models or data sets.
"""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ssah_utils.prompt_cache import answer_ids, token_ids
from ssah_utils.prompts.chat import check_plain, end_of_turn, render

IGNORED = -100  # label of positions that carry no loss, as torch's cross_entropy has it
POSITIONS = ("response", "prompt", "all")


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    responses: list[str],
    max_response_tokens: int,
    end: bool = True,
) -> list[dict[str, list[int]]]:
    """``input_ids`` and ``labels`` of rendered prompts with responses; the prompt is ``IGNORED``.

    A response has the tokens that it has in its place, behind the white space that the chat
    template puts before it. ``end`` appends the token that ends a turn, but never to a response cut
    at ``max_response_tokens``: a model trained on it would learn to stop in mid-sentence. Raises
    ``ValueError`` when there is no such token, and for a response that holds it, or another special
    token, as text.
    """
    check_plain(tokenizer, responses, "response")
    last = end_of_turn(tokenizer) if end else None
    if end and last is None:
        raise ValueError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no token that ends an answer:"
            " set its eos_token"
        )
    all_prompt_ids = token_ids(tokenizer, prompts)
    all_response_ids = answer_ids(tokenizer, prompts, responses)
    examples = []
    for prompt_ids, response_ids in zip(all_prompt_ids, all_response_ids, strict=True):
        response_ids = (response_ids + [last] * end)[:max_response_tokens]
        labels = [IGNORED] * len(prompt_ids) + response_ids
        examples.append({"input_ids": prompt_ids + response_ids, "labels": labels})
    return examples


def chat_examples(
    tokenizer: PreTrainedTokenizerBase,
    requests: list[str],
    answers: list[str],
    max_response_tokens: int,
    system_prompt: str = "",
    end: bool = True,
) -> list[dict[str, list[int]]]:
    """Requests and their answers as examples to train on: ``chat.render``, then ``encode``."""
    rendered = render(tokenizer, requests, system_prompt)
    return encode(tokenizer, rendered, answers, max_response_tokens, end)


def chat_batches(
    tokenizer: PreTrainedTokenizerBase,
    requests: list[str],
    answers: list[str],
    max_response_tokens: int,
    positions: str = "response",
    system_prompt: str = "",
    end: bool = True,
    sort: bool = True,
) -> list[dict[str, Tensor]]:
    """Requests and their answers as a model reads them: rendered as chats, encoded, in batches.

    ``chat_examples``, then ``token_batches``, whose arguments these are. An empty answer leaves the
    request alone, up to where the answer would begin.
    """
    examples = chat_examples(tokenizer, requests, answers, max_response_tokens, system_prompt, end)
    return token_batches(examples, positions, sort=sort)


def token_batches(
    examples: list[dict[str, list[int]]],
    positions: str = "response",
    batch_size: int = 16,
    sort: bool = True,
) -> list[dict[str, Tensor]]:
    """Right-padded batches of similar length: input_ids, attention_mask and positions, (B, T) each.

    ``positions`` are those to look at: ``response`` marks the ones that predict a response token
    (from the prompt's last token on), ``prompt`` those before, ``all`` both. The last token
    predicts nothing and is never marked. ``sort=False`` keeps the examples' order.
    """
    if positions not in POSITIONS:
        raise ValueError(f"unknown positions '{positions}' (there: {', '.join(POSITIONS)})")
    pad = torch.nn.functional.pad
    batches = []
    ordered = sorted(examples, key=lambda example: len(example["input_ids"])) if sort else examples
    for start in range(0, len(ordered), batch_size):
        ids, labels, mask = right_padded(ordered[start : start + batch_size])
        attended_next = pad(mask[:, 1:], (0, 1)).bool()
        predicts_response = pad(labels[:, 1:] != IGNORED, (0, 1))
        marked = {
            "response": predicts_response,
            "prompt": attended_next & ~predicts_response,
            "all": attended_next,
        }
        batches.append({"input_ids": ids, "attention_mask": mask, "positions": marked[positions]})
    return batches


def right_padded(examples: list[dict[str, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of examples: input_ids, labels and attention_mask, (B, T) int64 each."""

    def pad(key: str, value: int) -> Tensor:
        rows = [torch.tensor(example[key]) for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids = pad("input_ids", 0)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return ids, pad("labels", IGNORED), (torch.arange(ids.shape[1]) < lengths[:, None]).long()
