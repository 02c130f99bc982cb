"""Prompts read once, and what may follow them scored side by side: the openings of refusals and of
compliance, for example.

Everything is done on token ids, because text cut between two tokens need not be read back as the
same tokens. Knows language models through their Hugging Face interface only: no requests, no
verdicts. No tokenizer is asked to pad.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from ssah_utils.prompts.chat import answer_separator, without_special_tokens
from ssah_utils.wrappers import evaluating, without_wrappers

Ids = list[int]
READABLE = ("full_attention", "sliding_attention")  # types of layers
WITH_MASKS = ("sdpa", "eager")  # attention implementations that take a mask of one's own
STRETCHED = (
    "dynamic",
    "longrope",
)  # rotary positions that turn otherwise as soon as one row of a batch is longer


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Ids]:
    """Token ids of texts that hold their special tokens already, as rendered prompts do."""
    return (
        tokenizer(texts, add_special_tokens=False, padding=False, truncation=False).input_ids
        if texts
        else []
    )


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], texts: list[str]
) -> list[Ids]:
    """Token ids of texts as answers to rendered prompts, one to each, as they stand there: after
    ``chat.answer_separator``.

    So a model is asked about the tokens that it was trained on. An empty text has none. Where the
    last tokens of a prompt would be others if the text were there, the text is read on its own: the
    prompt has been read already.
    """
    between = answer_separator(tokenizer)
    before, alone = (
        token_ids(tokenizer, prompts),
        token_ids(tokenizer, [between + text for text in texts]),
    )
    whole = token_ids(
        tokenizer, [prompt + between + text for prompt, text in zip(prompts, texts, strict=True)]
    )
    return [
        (ids[len(start) :] if ids[: len(start)] == start else own) if text else []
        for text, start, ids, own in zip(texts, before, whole, alone, strict=True)
    ]


def opening_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], openings: list[str]
) -> list[Ids]:
    """``answer_ids`` of openings, the same after each of the prompts; ``ValueError`` in one line
    where they are not.

    So they are read side by side for a whole batch. Prompts of one template end alike, in the
    opened turn of the assistant.
    """
    n, prompts = len(openings), prompts or [""]
    ids = answer_ids(
        tokenizer, [prompt for prompt in prompts for _ in openings], openings * len(prompts)
    )
    for number in range(1, len(prompts)):
        if ids[number * n : (number + 1) * n] != ids[:n]:
            raise ValueError(
                f"prompt {number + 1} of {len(prompts)} ends otherwise than the first, so that an"
                " opening after it has other tokens: measure openings on prompts of one chat"
                " template"
            )
    return ids[:n]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> str:
    """The text of an answer as it was said, without special tokens, those that the model spelt
    included.
    """
    return without_special_tokens(
        tokenizer,
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    )


def length_sorted(sequences: Sequence[Sequence], batch_size: int) -> list[list[int]]:
    """Rows of the sequences in batches of similar length, shortest first."""
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


# ------------------------------------------------------------------------------------------ lengths


def n_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a model was made to read at once; None where its configuration sets no
    limit.
    """
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [
        rope,
        *(part for part in rope.values() if isinstance(part, dict)),
    ]  # one for each type of layer, in some models
    originals = [
        kind.get("original_max_position_embeddings")
        for kind in kinds
        if kind.get("rope_type") in STRETCHED
    ]
    limits = [getattr(config, "max_position_embeddings", None), *originals]
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)


def check_lengths(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    prompts: list[str],
    n_more: int | list[int],
) -> None:
    """``ValueError`` in one line if a rendered prompt and ``n_more`` tokens after it go beyond the
    model's positions.

    Or if it is empty: a model says nothing before it has read something.
    """
    limit, after = (
        n_positions(config),
        [n_more] * len(prompts) if isinstance(n_more, int) else n_more,
    )
    for number, (prompt, ids, more) in enumerate(
        zip(prompts, token_ids(tokenizer, prompts), after, strict=True), 1
    ):
        if not ids:
            raise ValueError(
                f"prompt {number} of {len(prompts)} has no token: render it as a chat, or leave"
                " it out"
            )
        if limit is not None and len(ids) + more > limit:
            raise ValueError(
                f"prompt {number} of {len(prompts)} ('{' '.join(prompt.split()[:4])} ...') has"
                f" {len(ids)} tokens, with {more} after it {len(ids) + more}, but the model"
                f" '{config.name_or_path}' has {limit} positions: shorten the prompt, leave it out,"
                " or ask for fewer tokens"
            )


# ------------------------------------------------------------------------------------------- reader


class PromptCache:
    """A batch of prompts read once; tokens are appended and taken back at will.

    ``last``: (B, vocabulary) float32, what the model says after the prompts. ``n_after``: tokens
    appended so far. All keys are kept, those outside of a sliding window too, which a mask hides.
    ``ValueError`` in one line for a model whose memory is more than keys and values, for texts
    longer than its positions, and for an empty one.
    """

    def __init__(self, model: nn.Module, prompts: list[Ids]) -> None:
        if not all(prompts):
            raise ValueError(
                "a prompt has no token: a model says nothing before it has read something"
            )
        self.model, prefix, n_prefix = _learned_prefix(without_wrappers(model), len(prompts))
        self.config = model.config.get_text_config(decoder=True)
        self.cache = _cache_that_keeps_all(
            self.model, self.config
        )  # transformers' own forgets what leaves a window
        for layer, kept in enumerate(prefix.layers if prefix is not None else ()):
            self.cache.update(kept.keys, kept.values, layer)
        width = max(map(len, prompts))
        ids = torch.tensor(
            [[0] * (width - len(row)) + row for row in prompts], device=self.model.device
        )
        lengths = torch.tensor([len(row) for row in prompts], device=ids.device)
        own = (torch.arange(width, device=ids.device) >= width - lengths[:, None]).long()
        self.attention_mask = pad(own, (n_prefix, 0), value=1)  # (B, n_prefix + T)
        self.lengths, self.n_after, self.longest = lengths + n_prefix, 0, width + n_prefix
        self._check_room(0)
        places = (self.attention_mask.cumsum(1) - 1).clamp_min(0)[:, n_prefix:]
        self.next_logits = self._logits(
            input_ids=ids, attention_mask=self.attention_mask, position_ids=places, logits_to_keep=1
        )[:, -1].float()

    def answer(self, n_tokens: int, ends: Ids) -> list[Ids]:
        """What the model answers greedily: at most ``n_tokens`` token ids a row, without the end
        token or what is after it.
        """
        chosen, logits = [self.lengths.new_empty(len(self.lengths), 0)], self.next_logits
        ended = torch.zeros_like(self.lengths, dtype=torch.bool)
        ending = torch.tensor(ends, dtype=torch.long, device=ended.device)
        for step in range(n_tokens):
            chosen.append(logits.argmax(1, keepdim=True))
            ended |= torch.isin(chosen[-1][:, 0], ending)
            if ended.all() or step + 1 == n_tokens:
                break
            logits = self.append(chosen[-1])[:, -1]
        return [_before_end(row, ends) for row in torch.cat(chosen, 1).tolist()]

    def append(self, ids: Tensor) -> Tensor:
        """``ids``: (B, n); returns what the model says after each of them: (B, n, vocabulary)
        float32.
        """
        self._check_room(ids.shape[1])
        steps = self.n_after + torch.arange(ids.shape[1], device=ids.device)
        self.n_after += ids.shape[1]
        places = self.lengths[:, None] + steps
        return self._logits(
            input_ids=ids, attention_mask=self._seen_so_far(), position_ids=places
        ).float()

    def truncate(self, n_after: int) -> None:
        """Forget what was appended beyond the first ``n_after`` tokens."""
        self._forget(self.n_after - n_after)
        self.n_after = min(self.n_after, n_after)

    @torch.inference_mode()
    def log_probabilities(self, continuations: list[Ids], logits: Tensor) -> Tensor:
        """log P(continuation | what has been read) in nats: (B, n_continuations) float64.

        ``logits``: (B, vocabulary), what the model says after what has been read. The continuations
        are read side by side in one pass, none seeing another, and forgotten again.
        """
        read_ids, of, place = _side_by_side(continuations, logits.device)
        said = [logits[:, None]]  # (B, 1, vocabulary): of every first token
        if len(read_ids):
            self._check_room(int(place.max()) + 1)
            n_read = self._seen_so_far().sum(1, keepdim=True)
            ids, masks = read_ids.expand(len(n_read), -1), self._side_by_side_masks(of, place)
            said.append(
                self._logits(input_ids=ids, attention_mask=masks, position_ids=n_read + place)
            )
            self._forget(len(read_ids))
        scores = torch.zeros(
            len(logits), len(continuations), dtype=torch.float64, device=logits.device
        )
        for row, parts in enumerate(
            zip(*said, strict=True)
        ):  # one by one: in float32 they are large
            log_p, start = torch.cat([part.float() for part in parts]).log_softmax(-1), 1
            for column, ids in enumerate(continuations):
                at = [
                    0,
                    *range(start, start + len(ids) - 1),
                ]  # where each of its tokens is predicted
                scores[row, column] = log_p[at, ids].sum()
                start += len(ids) - 1
        return scores

    def _logits(self, **inputs) -> Tensor:
        with evaluating(self.model):
            return self.model(**inputs, past_key_values=self.cache, use_cache=True).logits

    def _side_by_side_masks(self, of: Tensor, place: Tensor) -> Tensor | dict[str, Tensor]:
        """What each token of ``_side_by_side`` may see, added to its attention: (B, 1, n_read, all
        keys), by type of layer.

        One mask where all layers are of one type.
        """
        if self.config._attn_implementation not in WITH_MASKS:
            raise ValueError(
                f"attention '{self.config._attn_implementation}' takes no mask that reads openings"
                f" side by side: load the model with attn_implementation='{WITH_MASKS[0]}'"
            )
        seen = self._seen_so_far()
        before = (of[:, None] == of) & (place[:, None] >= place)  # (n_read, n_read)
        visible = torch.cat(
            [seen.bool()[:, None].expand(-1, len(of), -1), before.expand(len(seen), -1, -1)], 2
        )
        asking = seen.sum(1, keepdim=True) + place  # positions: (B, n_read)
        asked = torch.cat([seen.cumsum(1) - 1, asking], 1)  # (B, all keys)
        masks = {}
        for kind, window in _windows(self.config).items():
            near = (
                visible
                if window is None
                else visible & (asking[:, :, None] - asked[:, None] < window)
            )
            blocked = torch.zeros(near.shape, dtype=self.model.dtype, device=near.device)
            masks[kind] = blocked.masked_fill(~near, torch.finfo(self.model.dtype).min)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _check_room(self, n_more: int) -> None:
        limit = n_positions(self.config)
        if limit is not None and self.longest + self.n_after + n_more > limit:
            raise ValueError(
                f"a text of {self.longest + self.n_after + n_more} tokens is longer than the"
                f" {limit} positions of the model '{self.config.name_or_path}': shorten the"
                " prompts, or ask for fewer tokens after them"
            )

    def _seen_so_far(self) -> Tensor:
        return pad(self.attention_mask, (0, self.n_after), value=1)

    def _forget(self, n_tokens: int) -> None:
        if n_tokens > 0:
            self.cache.crop(-n_tokens)  # a negative number is what goes


def _cache_that_keeps_all(model: nn.Module, config: PreTrainedConfig) -> DynamicCache:
    """An empty cache of plain keys and values, from which tokens can be taken back whatever a
    layer's window is.
    """
    inner = without_wrappers(model.get_base_model()) if hasattr(model, "get_base_model") else model
    takes = set(inspect.signature(inner.forward).parameters)
    by_distance = getattr(config, "alibi", False) or "local" in getattr(
        config, "attention_layers", ()
    )  # not by our masks
    if (
        by_distance
        or not {"past_key_values", "position_ids"} <= takes
        or not set(_windows(config)) <= set(READABLE)
    ):
        raise ValueError(
            f"architecture '{config.model_type}' cannot be read step by step: needed are layers of"
            f" {' or '.join(READABLE)}, which take positions and masks"
        )
    cache = DynamicCache(config=config)
    cache.layers = [
        DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer
        for layer in cache.layers
    ]
    return cache


def _windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """How far back the layers of each type see, in tokens; None: to the beginning."""
    found = {
        (kind, more.get("sliding_window"))
        for kind, more in zip(*get_layer_types_and_kwargs(config), strict=True)
    }
    windows = dict(sorted(found, key=str))
    if len(windows) < len(found):
        raise ValueError(
            f"architecture '{config.model_type}' has layers of one type with different windows: not"
            " supported"
        )
    windows.pop("dummy", None)  # layers that remember nothing of their own
    return windows


def _before_end(ids: Ids, ends: Ids) -> Ids:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _learned_prefix(
    model: nn.Module, batch_size: int
) -> tuple[nn.Module, DynamicCache | None, int]:
    """The model without PEFT's prefix, that prefix as a cache, and its length: PEFT takes no other
    cache beside its own.
    """
    if not hasattr(model, "peft_config") or not model.active_peft_config.is_prompt_learning:
        return model, None, 0
    with evaluating(model):
        prefix = model.get_prompt(batch_size)
    return (
        without_wrappers(model.get_base_model()),
        prefix,
        model.active_peft_config.num_virtual_tokens,
    )


def _side_by_side(sequences: list[Ids], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens but each sequence's last, in one row: ids, which sequence each is of, its place
    there.
    """
    rows = [
        (token, number, place)
        for number, ids in enumerate(sequences)
        for place, token in enumerate(ids[:-1])
    ]
    return tuple(
        torch.tensor(column, dtype=torch.long, device=device)
        for column in (zip(*rows, strict=True) if rows else ([],) * 3)
    )
