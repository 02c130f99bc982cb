"""Step by step: what a model would choose after every token, also after tokens put in its mouth.

The paper's reasoning direction. Everything is done on token ids, because text cut between two
tokens need not be read back as the same tokens. Knows language models through their Hugging Face
interface, and prompts as strings. Does not know blocks, notebooks or figures.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ssah_utils.judge.decisions import judged
from ssah_utils.placement import input_device
from ssah_utils.prompt_cache import (
    Ids,
    PromptCache,
    answer_ids,
    check_lengths,
    decoded,
    length_sorted,
    log_mean_probability,
    opening_ids,
    read_prompts,
    token_ids,
)
from ssah_utils.prompts.chat import end_tokens
from ssah_utils.wrappers import without_wrappers


@dataclass(frozen=True)
class Trajectory:
    """What followed each prompt, forced tokens and then greedy ones, and the margin on the way.

    ``tokens``: without the end-of-sequence token, so of different lengths. ``refusal`` and
    ``compliance``: log of the mean probability of the openings of a kind, ``{step: (n_prompts,)}``
    in nats, where ``step`` counts tokens after the prompt; NaN where the answer had ended before.
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
    """``n_tokens`` token ids to force after each rendered prompt: an opening, continued.

    The openings take turns. The continuation is the model's own greedy one, except that it never
    ends, whatever the model prefers.
    """
    model, sequences = without_wrappers(model), token_ids(tokenizer, prompts)
    texts = [openings[row % len(openings)] for row in range(len(prompts))]
    forced = answer_ids(tokenizer, prompts, texts)
    check_lengths(tokenizer, model.config, prompts, max([n_tokens, *map(len, forced)]))
    ends = end_tokens(model, tokenizer)
    starts = [ids + opening for ids, opening in zip(sequences, forced, strict=True)]
    for rows in length_sorted(starts, batch_size):
        cache = read_prompts(model, [starts[row] for row in rows])
        chosen, logits = [], cache.next_logits
        for _ in range(n_tokens - min(len(forced[row]) for row in rows)):
            logits[:, [end for end in ends if end < logits.shape[1]]] = -torch.inf
            chosen.append(logits.argmax(1, keepdim=True))
            logits = cache.extend(chosen[-1])[:, -1]
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
    """Answer greedily after every variant of forced tokens, and probe openings at given steps.

    ``variants``: by name, one list of token ids for each rendered prompt, all of one length (empty:
    no attack). ``openings``: those of refusals and those of compliance. The end of the forced part
    is always a step; steps inside of it belong to a shorter variant and are left out. Each prompt
    is read once for all variants. Raises ``ValueError`` for a variant whose forced parts differ in
    length.

    A limit: at every step an opening has the tokens that it has right after the prompt. In
    mid-sentence a text would often put a space before it, which is another token in many
    vocabularies. So both kinds are less probable there than in a text; the margin compares like
    with like.
    """
    for name, forced in variants.items():
        if len(forced) != len(prompts) or len(set(map(len, forced))) > 1:
            raise ValueError(
                f"variant {name!r}: one list of token ids for each prompt is needed,"
                " all of one length"
            )
    model, sequences = without_wrappers(model), token_ids(tokenizer, prompts)
    n_refusals = len(openings[0])
    opened = opening_ids(tokenizer, prompts, [*openings[0], *openings[1]])
    ends = torch.tensor(end_tokens(model, tokenizer), dtype=torch.long, device=input_device(model))
    n_forced = {name: len(forced[0]) if forced else 0 for name, forced in variants.items()}
    at = {name: _steps_after(k, k + n_tokens, steps) for name, k in n_forced.items()}
    longest_opening = max(map(len, opened))
    farthest = [max(n_forced[name] + n_tokens, at[name][-1] + longest_opening) for name in variants]
    check_lengths(tokenizer, model.config, prompts, max(farthest, default=0))
    tokens = {name: [[] for _ in prompts] for name in variants}
    blank = np.full(len(prompts), np.nan)
    log_p = {
        name: [{step: blank.copy() for step in at[name]} for _ in openings] for name in variants
    }
    for rows in progress(length_sorted(sequences, batch_size), "steps"):
        cache = read_prompts(model, [sequences[row] for row in rows])
        for name, forced in variants.items():
            given = torch.tensor([forced[row] for row in rows], device=input_device(model))
            given = given.reshape(len(rows), -1).long()  # (B, n_forced), also where it is 0
            ids, after = _greedy(cache, given, n_tokens, at[name])  # (B, n_forced + n_tokens)
            ended = torch.isin(ids, ends)
            ended[:, : n_forced[name]] = False
            lengths = (ended.cumsum(1) == 0).sum(1).tolist()  # tokens before the first end
            for row, answer, length in zip(rows, ids.tolist(), lengths, strict=True):
                tokens[name][row] = answer[:length]
            for step in reversed(at[name]):  # backwards, so that the cache need only shrink
                cache.truncate(step)
                scores = cache.log_probabilities(opened, after[step]).cpu().numpy()
                has_ended = np.array(lengths) < step
                sides = scores[:, :n_refusals], scores[:, n_refusals:]
                for by_step, side in zip(log_p[name], sides, strict=True):
                    log_mean = log_mean_probability(side)
                    by_step[step][rows] = np.where(has_ended, np.nan, log_mean)
            cache.truncate(0)
    return {
        name: Trajectory(sequences, tokens[name], n_forced[name], *log_p[name]) for name in variants
    }


def _steps_after(n_forced: int, end: int, steps: Iterable[int]) -> list[int]:
    """Where the forced part ends, and the steps after that up to ``end``, in order."""
    return sorted({n_forced, *(step for step in steps if n_forced < step <= end)})


def _greedy(
    cache: PromptCache, forced: Tensor, n_tokens: int, steps: list[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Forced and then greedy token ids, and the logits after given steps; the cache holds all."""
    logits, n_forced = cache.next_logits, forced.shape[1]
    after = {0: logits} if 0 in steps else {}
    ids = [forced]
    if n_forced:
        logits = cache.extend(forced)[:, -1]
    for step in range(n_forced, n_forced + n_tokens):
        if step in steps:
            after[step] = logits
        ids.append(logits.argmax(1, keepdim=True))
        logits = cache.extend(ids[-1])[:, -1]
    if (last := n_forced + n_tokens) in steps:
        after[last] = logits
    return torch.cat(ids, 1), after


@torch.inference_mode()
def continuation_nll(
    base: nn.Module, trajectories: dict[object, Trajectory], batch_size: int = 32
) -> dict[object, np.ndarray]:
    """Mean negative log-likelihood per token (nats) of what each answer adds to its forced tokens.

    Under ``base``; (n_prompts,) for every trajectory. All trajectories follow the same prompts,
    each of which is read once. NaN where nothing was added.
    """
    base, prompts = without_wrappers(base), next(iter(trajectories.values())).prompts
    nll = {name: np.full(len(prompts), np.nan) for name in trajectories}
    for rows in length_sorted(prompts, batch_size):
        cache = read_prompts(base, [prompts[row] for row in rows])
        first_logits = cache.next_logits[:, None]
        for name, trajectory in trajectories.items():
            answers = [trajectory.tokens[row] for row in rows]
            lengths = torch.tensor(list(map(len, answers)))
            width = int(lengths.max())
            if width <= trajectory.n_forced:
                continue
            padded = [[*answer, *[0] * (width - len(answer))] for answer in answers]
            ids = torch.tensor(padded, device=input_device(base))
            logits = torch.cat([first_logits, cache.extend(ids)[:, :-1]], 1)  # (B, width, V)
            loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
            column = torch.arange(width)
            own = (column >= trajectory.n_forced) & (column < lengths[:, None])
            own = own.to(loss.device)
            nll[name][rows] = (loss.where(own, 0).sum(1) / own.sum(1)).double().cpu().numpy()
            cache.truncate(0)
    return nll


# ------------------------------------------------------------------------------------ what came out


def margin_rows(trajectory: Trajectory, requests: pd.DataFrame, **keys) -> pd.DataFrame:
    """Margins of every step and request whose answer had not ended, in long form.

    Columns: id, queries, step, margin, log_p_refusal (nats), and ``keys``.
    """
    ids, parts = requests[["id", "queries"]], []
    for step, refusal in trajectory.refusal.items():
        margin = refusal - trajectory.compliance[step]
        parts.append(ids.assign(step=step, margin=margin, log_p_refusal=refusal))
    return pd.concat(parts, ignore_index=True).dropna(subset="margin").assign(**keys)


def verdict_rows(
    trajectory: Trajectory,
    nll: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    requests: pd.DataFrame,
    **keys,
) -> pd.DataFrame:
    """Verdicts on what the model said after the forced tokens, one row per request.

    Columns: id, queries, prompt, ``keys``, response, and those of ``decisions.judged``. After a
    prefill, ``refused`` means that the model recovered. ``nll``: ``continuation_nll`` of the
    trajectory under the base model.
    """
    said = {"response": trajectory.answers(tokenizer), "base_nll": nll}
    return judged(requests[["id", "queries", "prompt"]].assign(**keys, **said))


Variants = dict[tuple[str, int], Trajectory]  # by attack and number of forced tokens


def margin_table(trajectories: Variants, requests: pd.DataFrame, **keys) -> pd.DataFrame:
    """``margin_rows`` of every variant, with its name in the columns attack and prefill."""
    parts = []
    for (attack, k), trajectory in trajectories.items():
        parts.append(margin_rows(trajectory, requests, **keys, attack=attack, prefill=k))
    return pd.concat(parts, ignore_index=True)


def behaviour_table(
    trajectories: Variants,
    nll: dict[tuple[str, int], np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    requests: pd.DataFrame,
    **keys,
) -> pd.DataFrame:
    """``verdict_rows`` of every variant, with its name in the columns attack and prefill."""
    parts = []
    for (attack, k), trajectory in trajectories.items():
        named = keys | {"attack": attack, "prefill": k}
        parts.append(verdict_rows(trajectory, nll[attack, k], tokenizer, requests, **named))
    return pd.concat(parts, ignore_index=True)


def step_batches(
    trajectory: Trajectory, steps: Iterable[int], batch_size: int = 16
) -> tuple[list[dict[str, Tensor]], pd.DataFrame]:
    """Prompts with their answers as batches for ``activations.marked_states``, and their marks.

    Marked is the last token before the model chooses what follows after ``steps`` tokens; none
    after the end of an answer. The table has one row per mark, in their order: row (of the
    prompts), step. Batches are right-padded.
    """
    batches, marks = [], []
    pairs = list(zip(trajectory.prompts, trajectory.tokens, strict=True))
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in batch])
        width = int(lengths.max())
        whole = [[*prompt, *answer] for prompt, answer in batch]
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in whole])
        positions = torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(batch):
            for step in sorted(step for step in steps if step <= len(answer)):
                positions[row, len(prompt) + step - 1] = True
                marks.append({"row": start + row, "step": step})
        mask = (torch.arange(width) < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask, "positions": positions})
    return batches, pd.DataFrame(marks, columns=["row", "step"])
