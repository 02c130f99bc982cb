"""What a model does with requests: batched answers and their verdicts, the refusal margin, utility.

Returns tidy tables, one row per request. Knows language models through their Hugging Face interface
and fingerprint: no units, no module names. What makes an answer a refusal or gibberish is decided
in ``judge``.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils import fingerprints, placement, prompt_cache, wrappers
from ssah_utils.cache import cached
from ssah_utils.judge.decisions import judged
from ssah_utils.prompt_cache import Ids
from ssah_utils.prompts.arithmetic import is_correct
from ssah_utils.prompts.chat import end_tokens, render
from ssah_utils.prompts.datasets import load_refusals
from ssah_utils.prompts.tokens import IGNORED, encode, right_padded

Progress = Callable[[list, str], Iterator]


def _silent(items: list, label: str) -> Iterator:
    return iter(items)


# ------------------------------------------------------------------------------------------ answers


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Progress = _silent,
) -> list[str]:
    """Greedy answers to rendered prompts, in their order: ``generate_ids`` as texts."""
    ids = generate_ids(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    return [prompt_cache.decoded(tokenizer, answer).strip() for answer in ids]


@torch.inference_mode()
def generate_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Progress = _silent,
) -> list[Ids]:
    """Token ids of greedy answers to rendered prompts, in their order, without their end.

    The likeliest token each time, whatever the checkpoint's generation configuration asks for; run
    in batches of similar length. Raises ``ValueError`` in one line for a prompt that leaves no room
    for its answer.
    """
    model = wrappers.without_wrappers(model)
    prompt_cache.check_lengths(tokenizer, model.config, prompts, max_new_tokens)
    sequences, ends = prompt_cache.token_ids(tokenizer, prompts), end_tokens(model, tokenizer)
    found: list[Ids] = [[] for _ in prompts]
    for rows in progress(prompt_cache.length_sorted(sequences, batch_size), "answers"):
        cache = prompt_cache.read_prompts(model, [sequences[row] for row in rows])
        for row, ids in zip(rows, cache.answer(max_new_tokens, ends), strict=True):
            found[row] = ids
    return found


def cached_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    fingerprint: str = "",
    progress: Progress = _silent,
) -> list[str]:
    """``generate``, kept in the cache.

    ``ValueError`` where the model is not the one of ``fingerprint``, if given.
    """
    if fingerprint and fingerprint != (found := fingerprints.fingerprint(model)):
        raise ValueError(
            f"the model has fingerprint {found}, not {fingerprint}:"
            " it was changed since, or is another one"
        )
    return cached(
        _answers,
        model=model,
        tokenizer=tokenizer,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )


def _answers(model, tokenizer, prompts, max_new_tokens, progress) -> list[str]:
    return generate(model, tokenizer, prompts, max_new_tokens, progress=progress)


@torch.inference_mode()
def response_nll(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    responses: list[str],
    max_response_tokens: int = 64,
    batch_size: int = 16,
) -> np.ndarray:
    """Mean negative log-likelihood per token (nats) of each response after its rendered prompt.

    (n_prompts,); NaN for a response without a token.
    """
    plain = wrappers.without_wrappers(model)
    examples = encode(tokenizer, prompts, responses, max_response_tokens, end=False)
    n_labels = [sum(label != IGNORED for label in example["labels"]) for example in examples]
    prompt_cache.check_lengths(tokenizer, plain.config, prompts, n_labels)
    nll, device = np.full(len(examples), np.nan), placement.input_device(plain)
    sequences = [example["input_ids"] for example in examples]
    for rows in prompt_cache.length_sorted(sequences, batch_size):
        ids, labels, mask = right_padded([examples[row] for row in rows])
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        # logits from the batch's earliest response token on
        n_kept = int((labels != IGNORED).flip(1).cumsum(1).argmax(1).max()) + 2
        with wrappers.evaluating(plain):
            output = plain(**inputs, use_cache=False, logits_to_keep=n_kept)
        logits = output.logits[:, :-1].cpu()
        targets = labels[:, -logits.shape[1] :]
        marked = targets != IGNORED
        loss = torch.zeros(targets.shape)
        loss[marked] = nn.functional.cross_entropy(
            logits[marked].float(), targets[marked], reduction="none"
        )
        n_tokens = marked.sum(1)
        nll[rows] = torch.where(n_tokens > 0, loss.sum(1) / n_tokens, torch.nan).numpy()
    return nll


# ----------------------------------------------------------------------------------------- verdicts


def answer_and_judge(
    model: nn.Module,
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    table: pd.DataFrame,
    max_new_tokens: int = 24,
    system_prompt: str = "",
    progress: Progress = _silent,
) -> pd.DataFrame:
    """Answer every request of a data set and judge the answers.

    Columns: id, category, prompt, response, base_nll (nats per token of the answer under ``base``,
    so that ``decisions.judged`` can decide again by another judge), verdict, and as True/False:
    refused, asr (the paper's: not refused), coherent_asr (complied), degenerate.
    """
    rendered = render(tokenizer, table["prompt"].tolist(), system_prompt)
    responses = generate(model, tokenizer, rendered, max_new_tokens, progress=progress)
    base_nll = response_nll(base, tokenizer, rendered, responses, max_new_tokens)
    return judged(table[["id", "category", "prompt"]].assign(response=responses, base_nll=base_nll))


# ------------------------------------------------------------------------------------------- margin


@torch.inference_mode()
def opening_log_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    openings: list[str],
    batch_size: int = 32,
) -> np.ndarray:
    """log P(opening | rendered prompt) in nats: (n_prompts, n_openings).

    Each prompt is read once; then all openings are, side by side in one pass, none seeing another.
    """
    model = wrappers.without_wrappers(model)
    prompt_ids = prompt_cache.token_ids(tokenizer, prompts)
    opening_ids = prompt_cache.opening_ids(tokenizer, prompts, openings)
    prompt_cache.check_lengths(tokenizer, model.config, prompts, max(map(len, opening_ids)))
    scores = np.zeros((len(prompts), len(openings)))
    for rows in prompt_cache.length_sorted(prompt_ids, batch_size):
        cache = prompt_cache.read_prompts(model, [prompt_ids[row] for row in rows])
        scores[rows] = cache.log_probabilities(opening_ids, cache.next_logits).cpu().numpy()
    return scores


def refusal_margin(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    system_prompt: str = "",
    n_openings: int | None = None,
) -> np.ndarray:
    """log P(refusal openings) - log P(compliance openings) per request, in nats: (n_prompts,).

    Which way the model leans before it says a word: more sensitive than a verdict, and without a
    judge. Above 0 it leans towards refusing. Each side is the mean probability of its openings.
    ``n_openings`` takes only the first few of either side, where many sets are compared; margins of
    different numbers of openings are not on one scale.
    """
    openings = load_refusals()
    rendered = render(tokenizer, prompts, system_prompt)
    refusal, compliance = (
        openings[f"{side}_openings"][:n_openings] for side in ("refusal", "compliance")
    )
    log_p = opening_log_probabilities(model, tokenizer, rendered, refusal + compliance)
    refusing, complying = log_p[:, : len(refusal)], log_p[:, len(refusal) :]
    log_mean = prompt_cache.log_mean_probability
    return log_mean(refusing) - log_mean(complying)


# ------------------------------------------------------------------------------------------ utility


def exact_match(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rendered: list[str],
    responses: list[str],
    max_new_tokens: int = 24,
) -> list[bool]:
    """Whether each greedy answer ends in the number in which its reference response ends."""
    answers = generate(model, tokenizer, rendered, max_new_tokens)
    return [
        is_correct(answer, response) for answer, response in zip(answers, responses, strict=True)
    ]
