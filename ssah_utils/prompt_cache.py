"""Score several continuations of a prompt in one forward pass, reusing the prompt's KV cache.

The openings of refusals and of compliance, for example. Everything is done on token ids, because
text cut between two tokens need not be read back as the same tokens.

- Knows language models through their Hugging Face interface only: no requests, no verdicts.
- Asks no tokenizer to pad: padding is on the left, masked, and ours.
- Keeps all keys and values of a prompt, also those outside of a sliding window.
- Models of which that cannot be asked read whole texts anew: slower, with the same results.
"""

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from ssah_utils.placement import input_device
from ssah_utils.prompts.chat import answer_separator, without_special_tokens
from ssah_utils.wrappers import evaluating, without_wrappers

Ids = list[int]
LAYER_TYPES = ("full_attention", "sliding_attention")  # that can be cached here
WITH_MASKS = ("sdpa", "eager")  # attention implementations that take a mask of one's own
# rotary positions that change for a whole batch as soon as one row of it is longer
STRETCHED = ("dynamic", "longrope")


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Ids]:
    """Token ids of texts that hold their special tokens already, as rendered prompts do."""
    if not texts:
        return []
    as_they_are = {"add_special_tokens": False, "padding": False, "truncation": False}
    return tokenizer(texts, **as_they_are).input_ids


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], texts: list[str]
) -> list[Ids]:
    """Token ids of texts as answers to rendered prompts, one to each, as they stand there.

    That is, after ``chat.answer_separator``, so that a model is asked about the tokens on which it
    was trained. An empty text has none. Where the last tokens of a prompt would be others if the
    text were there, the text is tokenized on its own: the prompt has been read already.
    """
    separator = answer_separator(tokenizer)
    answers = [separator + text for text in texts]
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    before, alone, together = (token_ids(tokenizer, part) for part in (prompts, answers, whole))
    found = []
    for text, start, own, ids in zip(texts, before, alone, together, strict=True):
        is_continued = ids[: len(start)] == start
        found.append((ids[len(start) :] if is_continued else own) if text else [])
    return found


def opening_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], openings: list[str]
) -> list[Ids]:
    """``answer_ids`` of openings, the same after each of the prompts, one for each opening.

    So they are scored side by side for a whole batch. Prompts of one template end alike, in the
    opened turn of the assistant; ``ValueError`` in one line where they do not.
    """
    n, prompts = len(openings), prompts or [""]
    repeated = [prompt for prompt in prompts for _ in openings]
    ids = answer_ids(tokenizer, repeated, openings * len(prompts))
    for number in range(1, len(prompts)):
        if ids[number * n : (number + 1) * n] != ids[:n]:
            raise ValueError(
                f"prompt {number + 1} of {len(prompts)} ends otherwise than the first, so an"
                " opening after it has other tokens: measure openings on prompts of one chat"
                " template"
            )
    return ids[:n]


def log_mean_probability(log_p: np.ndarray) -> np.ndarray:
    """Log of the mean probability of the openings of one kind, from the log of each: (..., n) ->
    (...) nats.

    The mean and not the sum, so that kinds with different numbers of openings are on one scale.
    """
    return np.logaddexp.reduce(log_p, axis=-1) - np.log(log_p.shape[-1])


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> str:
    """The text of an answer without special tokens, also without those that the model spelt."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return without_special_tokens(tokenizer, tokenizer.decode(ids, **options))


def length_sorted(sequences: Sequence[Sequence], batch_size: int) -> list[list[int]]:
    """Rows of the sequences in batches of similar length, shortest first."""
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


# ------------------------------------------------------------------------------------------ lengths


def n_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a model was made to read at once; None where no limit is configured."""
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    # some models have one set of parameters for each type of layer
    parameters = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    stretched = [one for one in parameters if one.get("rope_type") in STRETCHED]
    originals = [one.get("original_max_position_embeddings") for one in stretched]
    limits = [getattr(config, "max_position_embeddings", None), *originals]
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)


def check_lengths(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    prompts: list[str],
    n_more: int | list[int],
) -> None:
    """``ValueError`` in one line if a prompt and ``n_more`` tokens exceed the model's positions.

    Or if a rendered prompt is empty: a model says nothing before it has read something.
    """
    limit = n_positions(config)
    after = [n_more] * len(prompts) if isinstance(n_more, int) else n_more
    lengths = [len(ids) for ids in token_ids(tokenizer, prompts)]
    for number, (prompt, length, more) in enumerate(zip(prompts, lengths, after, strict=True), 1):
        which = f"prompt {number} of {len(prompts)}"
        if not length:
            raise ValueError(f"{which} has no token: render it as a chat, or leave it out")
        if limit is not None and length + more > limit:
            raise ValueError(
                f"{which} ('{' '.join(prompt.split()[:4])} ...') has {length} tokens,"
                f" with {more} after it {length + more}, but the model"
                f" '{config.name_or_path}' has {limit} positions:"
                " shorten the prompt, leave it out, or ask for fewer tokens"
            )


# -------------------------------------------------------------------------------------------- cache


def read_prompts(model: nn.Module, prompts: list[Ids]) -> "PromptCache":
    """A batch of prompts, read: a ``PromptCache``, or ``WholePasses`` where a model takes none.

    cache = read_prompts(model, token_ids(tokenizer, rendered))
    log_p = cache.log_probabilities(openings, cache.next_logits)  # (B, n_openings)
    """
    return (PromptCache if is_cacheable(model) else WholePasses)(model, prompts)


class PromptCache:
    """The KV cache of a batch of prompts, which tokens extend and ``truncate`` restores.

    ``next_logits``: (B, vocabulary) float32, after the prompts. ``n_after``: tokens appended so
    far. ``attention_mask``: (B, n_prefix + T), of the prompts alone. Raises ``ValueError`` in one
    line for texts longer than the model's positions, and for an empty prompt. For models that
    ``is_cacheable``.
    """

    def __init__(self, model: nn.Module, prompts: list[Ids]) -> None:
        _require_tokens(prompts)
        self.model, prefix, n_prefix = _learned_prefix(without_wrappers(model), len(prompts))
        self.config = model.config.get_text_config(decoder=True)
        self.cache = _cache_that_keeps_all(self.config)
        for layer, kept in enumerate(prefix.layers if prefix is not None else ()):
            self.cache.update(kept.keys, kept.values, layer)
        width = max(map(len, prompts))
        padded = [[0] * (width - len(row)) + row for row in prompts]
        ids = torch.tensor(padded, device=input_device(self.model))
        lengths = torch.tensor([len(row) for row in prompts], device=ids.device)
        own = (torch.arange(width, device=ids.device) >= width - lengths[:, None]).long()
        self.attention_mask = pad(own, (n_prefix, 0), value=1)
        self.lengths, self.n_after, self.longest = lengths + n_prefix, 0, width + n_prefix
        self._check_room(0)
        positions = (self.attention_mask.cumsum(1) - 1).clamp_min(0)[:, n_prefix:]
        logits = self._logits(
            input_ids=ids,
            attention_mask=self.attention_mask,
            position_ids=positions,
            logits_to_keep=1,
        )
        self.next_logits = logits[:, -1].float()

    def answer(self, n_tokens: int, ends: Ids) -> list[Ids]:
        """Greedy answers of at most ``n_tokens`` token ids, one a row, cut before an end token."""
        chosen, logits = [self.lengths.new_empty(len(self.lengths), 0)], self.next_logits
        ended = torch.zeros_like(self.lengths, dtype=torch.bool)
        ending = torch.tensor(ends, dtype=torch.long, device=ended.device)
        for step in range(n_tokens):
            chosen.append(logits.argmax(1, keepdim=True))
            ended |= torch.isin(chosen[-1][:, 0], ending)
            if ended.all() or step + 1 == n_tokens:
                break
            logits = self.extend(chosen[-1])[:, -1]
        return [_before_end(row, ends) for row in torch.cat(chosen, 1).tolist()]

    def extend(self, ids: Tensor) -> Tensor:
        """Append ``ids`` (B, n); returns the logits after each: (B, n, vocabulary) float32."""
        n_new = ids.shape[1]
        self._check_room(n_new)
        steps = self.n_after + torch.arange(n_new, device=ids.device)
        self.n_after += n_new
        positions = self.lengths[:, None] + steps
        mask = self._mask_so_far()
        return self._logits(input_ids=ids, attention_mask=mask, position_ids=positions).float()

    def truncate(self, n_after: int) -> None:
        """Forget what was appended beyond the first ``n_after`` tokens."""
        self._forget(self.n_after - n_after)
        self.n_after = min(self.n_after, n_after)

    @torch.inference_mode()
    def log_probabilities(self, continuations: list[Ids], logits: Tensor) -> Tensor:
        """log P(continuation | what has been read) in nats: (B, n_continuations) float64.

        ``logits``: (B, vocabulary), after what has been read. The continuations are read side by
        side in one pass, none seeing another, and forgotten again. ``ValueError`` for an empty one:
        it is certain, and would outweigh all others.
        """
        _require_openings(continuations)
        read_ids, sequence, place = _side_by_side(continuations, logits.device)
        parts = [logits[:, None]]  # (B, 1, vocabulary): for every first token
        if len(read_ids):
            self._check_room(int(place.max()) + 1)
            n_read = self._mask_so_far().sum(1, keepdim=True)
            inputs = {
                "input_ids": read_ids.expand(len(n_read), -1),
                "attention_mask": self._side_by_side_masks(sequence, place),
                "position_ids": n_read + place,
            }
            parts.append(self._logits(**inputs))
            self._forget(len(read_ids))
        shape = (len(logits), len(continuations))
        scores = torch.zeros(shape, dtype=torch.float64, device=logits.device)
        # row by row, because in float32 the logits of all would be large
        for row, own in enumerate(zip(*parts, strict=True)):
            log_p, start = torch.cat([part.float() for part in own]).log_softmax(-1), 1
            for column, ids in enumerate(continuations):
                n_own = len(ids) - 1  # the last token is predicted, not read
                predicted_at = [0, *range(start, start + n_own)]
                scores[row, column] = log_p[predicted_at, ids].sum()
                start += n_own
        return scores

    def _logits(self, **inputs) -> Tensor:
        with evaluating(self.model):
            return self.model(**inputs, past_key_values=self.cache, use_cache=True).logits

    def _side_by_side_masks(self, sequence: Tensor, place: Tensor) -> Tensor | dict[str, Tensor]:
        """What each token of ``_side_by_side`` may see: (B, 1, n_read, all keys), to be added.

        One mask where all layers are of one type, else one by type.
        """
        if self.config._attn_implementation not in WITH_MASKS:
            raise ValueError(
                f"attention '{self.config._attn_implementation}' takes no mask that reads openings"
                f" side by side: load the model with attn_implementation='{WITH_MASKS[0]}'"
            )
        past = self._mask_so_far()
        own = (sequence[:, None] == sequence) & (place[:, None] >= place)  # (n_read, n_read)
        of_past = past.bool()[:, None].expand(-1, len(sequence), -1)
        visible = torch.cat([of_past, own.expand(len(past), -1, -1)], 2)
        query_positions = past.sum(1, keepdim=True) + place  # (B, n_read)
        key_positions = torch.cat([past.cumsum(1) - 1, query_positions], 1)  # (B, all keys)
        distance = query_positions[:, :, None] - key_positions[:, None]
        masks = {}
        for kind, window in sorted(_layers(self.config)):
            near = visible if window is None else visible & (distance < window)
            blocked = torch.zeros(near.shape, dtype=self.model.dtype, device=near.device)
            masks[kind] = blocked.masked_fill(~near, torch.finfo(self.model.dtype).min)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _check_room(self, n_more: int) -> None:
        limit, length = n_positions(self.config), self.longest + self.n_after + n_more
        if limit is not None and length > limit:
            raise ValueError(
                f"a text of {length} tokens is longer than the {limit} positions of the model"
                f" '{self.config.name_or_path}':"
                " shorten the prompts, or ask for fewer tokens after them"
            )

    def _mask_so_far(self) -> Tensor:
        return pad(self.attention_mask, (0, self.n_after), value=1)

    def _forget(self, n_tokens: int) -> None:
        if n_tokens > 0:
            self.cache.crop(-n_tokens)  # a negative number is what goes


class WholePasses(PromptCache):
    """As ``PromptCache``, without a cache: each question is answered by reading whole texts anew.

    Texts of one length are read together, so that none is padded: what a model remembers and how
    it counts positions does not matter. Slow: every token of an answer costs a pass over all before
    it, and every opening one over the prompt.
    """

    def __init__(self, model: nn.Module, prompts: list[Ids]) -> None:
        _require_tokens(prompts)
        self.model, self.texts, self.n_after = without_wrappers(model), prompts, 0
        self.config = self.model.config.get_text_config(decoder=True)
        self.lengths = torch.tensor([len(ids) for ids in prompts], device=input_device(self.model))
        self.longest = max(map(len, prompts))
        self._check_room(0)
        self.next_logits = torch.stack(self._read(prompts, [1] * len(prompts)))[:, -1]

    def extend(self, ids: Tensor) -> Tensor:
        n_new = ids.shape[1]
        self._check_room(n_new)
        self.texts = [text + new for text, new in zip(self.texts, ids.tolist(), strict=True)]
        self.n_after += n_new
        return torch.stack(self._read(self.texts, [n_new] * len(ids)))

    @torch.inference_mode()
    def log_probabilities(self, continuations: list[Ids], logits: Tensor) -> Tensor:
        _require_openings(continuations)
        self._check_room(max(map(len, continuations)) - 1)
        # the last token is predicted, not read; the first is predicted by what has been read
        texts = [text + ids[:-1] for text in self.texts for ids in continuations]
        after = iter(self._read(texts, [len(ids) for ids in continuations] * len(self.texts)))
        shape = (len(self.texts), len(continuations))
        scores = torch.zeros(shape, dtype=torch.float64, device=logits.device)
        for row in range(len(self.texts)):
            for column, ids in enumerate(continuations):
                said = torch.cat([logits[row, None].float(), next(after)[1:]]).log_softmax(-1)
                scores[row, column] = said[range(len(ids)), ids].sum()
        return scores

    def _read(self, texts: list[Ids], n_last: list[int]) -> list[Tensor]:
        """Logits after the last tokens of each text: (n_last, vocabulary) float32."""
        found: dict[int, Tensor] = {}
        for length in sorted(set(map(len, texts))):
            alike = [number for number, ids in enumerate(texts) if len(ids) == length]
            for start in range(0, len(alike), len(self.texts)):  # as many as there are prompts
                rows = alike[start : start + len(self.texts)]
                ids = torch.tensor([texts[row] for row in rows], device=self.lengths.device)
                with evaluating(self.model):
                    logits = self.model(input_ids=ids, use_cache=False).logits
                found |= {
                    row: own[length - n_last[row] :].float()
                    for row, own in zip(rows, logits, strict=True)
                }
        return [found[number] for number in range(len(texts))]

    def _forget(self, n_tokens: int) -> None:
        if n_tokens > 0:
            self.texts = [ids[:-n_tokens] for ids in self.texts]


def _require_tokens(prompts: list[Ids]) -> None:
    if not all(prompts):
        raise ValueError("a prompt has no token: a model says nothing before it has read something")


def _require_openings(continuations: list[Ids]) -> None:
    for number, ids in enumerate(continuations, 1):
        if not ids:
            raise ValueError(
                f"continuation {number} of {len(continuations)} has no token, so it has no"
                " probability to compare: leave the empty opening out"
            )


def is_cacheable(model: nn.Module) -> bool:
    """Whether a model remembers keys and values alone, which it finds by masks and positions.

    Then what it has read can be taken back, and texts can be read side by side. Not so where there
    are states, or where attention counts distances in the memory itself (ALiBi, local layers).
    """
    plain = without_wrappers(model)
    inner = without_wrappers(plain.get_base_model()) if hasattr(plain, "get_base_model") else plain
    config = inner.config.get_text_config(decoder=True)
    takes = set(inspect.signature(inner.forward).parameters)
    is_local = "local" in getattr(config, "attention_layers", ())
    by_distance = is_local or getattr(config, "alibi", False)
    if by_distance or not {"past_key_values", "position_ids"} <= takes:
        return False
    layers = _layers(config)
    kinds = {kind for kind, _ in layers}
    return kinds <= set(LAYER_TYPES) and len(kinds) == len(layers)  # a type has one window


def _cache_that_keeps_all(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache of plain keys and values, from which tokens can be taken back.

    transformers' own forgets what leaves a sliding window; here a mask hides it.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer
        for layer in cache.layers
    ]
    return cache


def _layers(config: PreTrainedConfig) -> set[tuple[str, int | None]]:
    """The types of layers, and how far back those see, in tokens; None: to the beginning."""
    layers = zip(*get_layer_types_and_kwargs(config), strict=True)
    found = {(kind, more.get("sliding_window")) for kind, more in layers}
    return {(kind, window) for kind, window in found if kind != "dummy"}  # which remembers nothing


def _before_end(ids: Ids, ends: Ids) -> Ids:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _learned_prefix(
    model: nn.Module, batch_size: int
) -> tuple[nn.Module, DynamicCache | None, int]:
    """The model without PEFT's prefix, that prefix as a cache, and its length.

    PEFT takes no other cache beside its own.
    """
    if not hasattr(model, "peft_config") or not model.active_peft_config.is_prompt_learning:
        return model, None, 0
    with evaluating(model):
        prefix = model.get_prompt(batch_size)
    n_prefix = model.active_peft_config.num_virtual_tokens
    return without_wrappers(model.get_base_model()), prefix, n_prefix


def _side_by_side(sequences: list[Ids], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens but each sequence's last, in one row: id, number of the sequence, place in it."""
    rows = [
        (token, number, place)
        for number, ids in enumerate(sequences)
        for place, token in enumerate(ids[:-1])
    ]
    columns = zip(*rows, strict=True) if rows else ([],) * 3
    return tuple(torch.tensor(column, dtype=torch.long, device=device) for column in columns)
