"""The reasoning direction step by step: what a model would choose after every token, also after
tokens put in its mouth.

Everything is done on token ids, because text cut between two tokens need not be read back as the
same tokens. Knows language models through their Hugging Face interface, and prompts as strings.
Does not know blocks, notebooks or figures.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ssah_utils.judge import rules
from ssah_utils.prompt_cache import (
    Ids,
    PromptCache,
    answer_ids,
    check_lengths,
    decoded,
    length_sorted,
    opening_ids,
    token_ids,
)
from ssah_utils.prompts.chat import end_tokens
from ssah_utils.wrappers import without_wrappers


@dataclass(frozen=True)
class Trajectory:
    """What followed each prompt: some forced tokens, then greedy ones of the model; what it was
    about to say on the way.

    ``tokens``: without the end-of-sequence token, so of different lengths. ``refusal`` and
    ``compliance``: log of the mean probability of the openings of a kind, ``{step: (n_prompts,)
    nats}``, where ``step`` counts tokens after the prompt; NaN where the answer had ended before.
    The margin is their difference.
    """

    prompts: list[Ids]
    tokens: list[Ids]
    n_forced: int
    refusal: dict[int, np.ndarray]
    compliance: dict[int, np.ndarray]

    def answers(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Text of the model's own tokens, without the forced ones."""
        return [decoded(tokenizer, ids[self.n_forced :]) for ids in self.tokens]


@torch.inference_mode()
def prefills(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    openings: list[str],
    n_tokens: int,
    batch_size: int = 64,
) -> list[Ids]:
    """``n_tokens`` token ids to force after each rendered prompt: an opening, then the model's own
    greedy continuation of it.

    The openings take turns. The continuation never ends, whatever the model prefers.
    """
    model, sequences = without_wrappers(model), token_ids(tokenizer, prompts)
    forced = answer_ids(
        tokenizer, prompts, [openings[row % len(openings)] for row in range(len(prompts))]
    )
    check_lengths(tokenizer, model.config, prompts, max([n_tokens, *map(len, forced)]))
    ends = end_tokens(model, tokenizer)
    for rows in length_sorted(
        [ids + start for ids, start in zip(sequences, forced, strict=True)], batch_size
    ):
        reader = PromptCache(model, [sequences[row] + forced[row] for row in rows])
        chosen, logits = [], reader.next_logits
        for _ in range(n_tokens - min(len(forced[row]) for row in rows)):
            logits[:, [end for end in ends if end < logits.shape[1]]] = -torch.inf
            chosen.append(logits.argmax(1, keepdim=True))
            logits = reader.append(chosen[-1])[:, -1]
        added = torch.cat(chosen, 1).tolist() if chosen else [[]] * len(rows)
        for row, ids in zip(rows, added, strict=True):
            forced[row] = (forced[row] + ids)[:n_tokens]
    return forced


@torch.inference_mode()
def generate_and_probe(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    variants: dict[object, list[Ids]],
    n_tokens: int,
    steps: Iterable[int],
    openings: tuple[list[str], list[str]],
    batch_size: int = 64,
    progress: Callable[[list, str], Iterator] = lambda items, label: iter(items),
) -> dict[object, Trajectory]:
    """Let the model answer greedily after every variant of forced tokens, and ask at the given
    steps what it would say.

    ``variants``: per name, one list of token ids for each rendered prompt, all of one length
    (empty: no attack). ``openings``: those of refusals and those of compliance. Steps inside the
    forced part belong to a shorter variant and are left out; the end of the forced part is always
    measured. Each prompt is read once for all variants. Raises ``ValueError`` for a variant whose
    forced parts differ in length.
    """
    for name, forced in variants.items():
        if len(forced) != len(prompts) or len(set(map(len, forced))) > 1:
            raise ValueError(
                f"variant {name!r}: one list of token ids for each prompt is needed, all of one"
                " length"
            )
    model, sequences = without_wrappers(model), token_ids(tokenizer, prompts)
    opened, n_refusals = (
        opening_ids(tokenizer, prompts, [*openings[0], *openings[1]]),
        len(openings[0]),
    )
    ends, blank = (
        torch.tensor(end_tokens(model, tokenizer), dtype=torch.long, device=model.device),
        np.full(len(prompts), np.nan),
    )
    length = {name: len(forced[0]) if forced else 0 for name, forced in variants.items()}
    at = {
        name: sorted({k, *(s for s in steps if k < s <= k + n_tokens)})
        for name, k in length.items()
    }
    farthest = max(
        (max(length[name] + n_tokens, at[name][-1] + max(map(len, opened))) for name in variants),
        default=0,
    )
    check_lengths(tokenizer, model.config, prompts, farthest)
    tokens = {name: [[] for _ in prompts] for name in variants}
    log_p = {
        name: [{step: blank.copy() for step in at[name]} for _ in openings] for name in variants
    }
    for rows in progress(length_sorted(sequences, batch_size), "steps"):
        reader = PromptCache(model, [sequences[row] for row in rows])
        prompt_end = reader.next_logits
        for name, forced in variants.items():
            given = (
                torch.tensor([forced[row] for row in rows], device=model.device)
                .reshape(len(rows), -1)
                .long()
            )
            ids, after = _greedy(
                reader, prompt_end, given, n_tokens, at[name]
            )  # (B, n_forced + n_tokens)
            ended = torch.isin(ids, ends)
            ended[:, : length[name]] = False
            n_said = (ended.cumsum(1) == 0).sum(1).tolist()  # tokens before the first end
            for row, said, n in zip(rows, ids.tolist(), n_said, strict=True):
                tokens[name][row] = said[:n]
            for step in reversed(
                at[name]
            ):  # backwards, so that what is no longer needed can be taken back
                reader.truncate(step)
                each = reader.log_probabilities(opened, after[step])
                each[torch.tensor(n_said, device=each.device) < step] = torch.nan
                for kind, part in zip(
                    log_p[name], (each[:, :n_refusals], each[:, n_refusals:]), strict=True
                ):
                    kind[step][rows] = (part.logsumexp(1) - np.log(part.shape[1])).cpu().numpy()
            reader.truncate(0)
    return {
        name: Trajectory(sequences, tokens[name], length[name], *log_p[name]) for name in variants
    }


def _greedy(
    reader: PromptCache, logits: Tensor, forced: Tensor, n_tokens: int, steps: list[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Forced and then greedy token ids, and the logits after the given steps; the reader has then
    read all of them.
    """
    after = {0: logits} if 0 in steps else {}
    ids = [forced]
    if forced.shape[1]:
        logits = reader.append(forced)[:, -1]
    for step in range(forced.shape[1], forced.shape[1] + n_tokens):
        if step in steps:
            after[step] = logits
        ids.append(logits.argmax(1, keepdim=True))
        logits = reader.append(ids[-1])[:, -1]
    if (last := forced.shape[1] + n_tokens) in steps:
        after[last] = logits
    return torch.cat(ids, 1), after


@torch.inference_mode()
def continuation_nll(
    base: nn.Module, courses: dict[object, Trajectory], batch_size: int = 32
) -> dict[object, np.ndarray]:
    """Mean negative log-likelihood per token (nats) under ``base`` of what each answer adds to its
    forced tokens.

    All courses follow the same prompts, each of which is read once. NaN where nothing was added.
    """
    base, prompts = without_wrappers(base), next(iter(courses.values())).prompts
    nll = {name: np.full(len(prompts), np.nan) for name in courses}
    for rows in length_sorted(prompts, batch_size):
        reader = PromptCache(base, [prompts[row] for row in rows])
        prompt_end = reader.next_logits[:, None]
        for name, course in courses.items():
            said = [course.tokens[row] for row in rows]
            width = max(map(len, said))
            if width > course.n_forced:
                ids = torch.tensor(
                    [[*row, *[0] * (width - len(row))] for row in said], device=base.device
                )
                logits = torch.cat(
                    [prompt_end, reader.append(ids)[:, :-1]], 1
                )  # (B, width, vocabulary)
                loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
                column, lengths = torch.arange(width), torch.tensor(list(map(len, said)))
                own = ((column >= course.n_forced) & (column < lengths[:, None])).to(loss.device)
                nll[name][rows] = (loss.where(own, 0).sum(1) / own.sum(1)).double().cpu().numpy()
                reader.truncate(0)
    return nll


# ------------------------------------------------------------------------------------ what came out


def margin_rows(course: Trajectory, requests: pd.DataFrame, **keys) -> pd.DataFrame:
    """One row per step and request whose answer had not ended: its id and queries, step, margin,
    log_p_refusal (nats), keys.
    """
    parts = [
        requests[["id", "queries"]].assign(
            step=step, margin=values - course.compliance[step], log_p_refusal=values
        )
        for step, values in course.refusal.items()
    ]
    return pd.concat(parts, ignore_index=True).dropna(subset="margin").assign(**keys)


def verdict_rows(
    course: Trajectory,
    nll: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    requests: pd.DataFrame,
    **keys,
) -> pd.DataFrame:
    """Verdict on what the model said after the forced tokens: id, queries, refused, coherent_asr,
    degenerate, keys.

    After a prefill, ``refused`` means that the model recovered. ``nll``: ``continuation_nll`` of
    the trajectory under the base model.
    """
    verdicts = [
        rules.verdict(text, value)
        for text, value in zip(course.answers(tokenizer), nll, strict=True)
    ]
    metrics = {"refused": "refused", "coherent_asr": "complied", "degenerate": "degenerate"}
    table = requests[["id", "queries"]].assign(**keys)
    return table.assign(
        **{metric: [found == name for found in verdicts] for metric, name in metrics.items()}
    )


def step_batches(
    course: Trajectory, steps: Iterable[int], batch_size: int = 16
) -> tuple[list[dict[str, Tensor]], pd.DataFrame]:
    """Prompts with their answers as right-padded batches for ``activations.marked_states``; which
    row and step a mark is.

    Marked is the last token before the model chooses what follows after ``steps`` tokens; none
    after the end of an answer.
    """
    batches, marks = [], []
    for start in range(0, len(course.prompts), batch_size):
        pairs = list(zip(course.prompts, course.tokens, strict=True))[start : start + batch_size]
        width = max(len(prompt) + len(said) for prompt, said in pairs)
        ids = torch.tensor(
            [[*prompt, *said, *[0] * (width - len(prompt) - len(said))] for prompt, said in pairs]
        )
        lengths = torch.tensor([len(prompt) + len(said) for prompt, said in pairs])
        positions = torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, said) in enumerate(pairs):
            for step in sorted(step for step in steps if step <= len(said)):
                positions[row, len(prompt) + step - 1] = True
                marks.append({"row": start + row, "step": step})
        mask = (torch.arange(width) < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask, "positions": positions})
    return batches, pd.DataFrame(marks, columns=["row", "step"])
