"""Prompts read once, and what may follow them scored side by side: the openings of refusals and of compliance, for example.

Everything is done on token ids, because text cut between two tokens need not be read back as the same tokens. Knows
language models through their Hugging Face interface only: no requests, no verdicts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

Ids = list[int]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Ids]:
    """Token ids of texts that hold their special tokens already, as rendered prompts do."""
    return tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def length_sorted(sequences: Sequence[Sequence], batch_size: int) -> list[list[int]]:
    """Rows of the sequences in batches of similar length, shortest first."""
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Reader:
    """A batch of prompts read once; tokens are appended and taken back at will.

    ``last``: (B, vocabulary) float32, what the model says after the prompts. ``n_after``: tokens appended so far.
    """

    def __init__(self, model: nn.Module, prompts: list[Ids]) -> None:
        self.model, prefix, n_prefix = _learned_prefix(model, len(prompts))
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=model.device)
        lengths = torch.tensor([len(row) for row in prompts], device=model.device)
        own = (torch.arange(width, device=model.device) >= width - lengths[:, None]).long()
        self.seen = pad(own, (n_prefix, 0), value=1)  # (B, n_prefix + T)
        self.lengths, self.n_after = lengths + n_prefix, 0
        read = self.model(
            input_ids=ids, attention_mask=self.seen, position_ids=(self.seen.cumsum(1) - 1).clamp_min(0)[:, n_prefix:],
            past_key_values=prefix, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.cache, self.last = read.past_key_values, read.logits[:, -1].float()

    def append(self, ids: Tensor) -> Tensor:
        """``ids``: (B, n); returns what the model says after each of them: (B, n, vocabulary) float32."""
        steps = self.n_after + torch.arange(ids.shape[1], device=ids.device)
        self.n_after += ids.shape[1]
        read = self.model(input_ids=ids, attention_mask=self._seen_so_far(), position_ids=self.lengths[:, None] + steps,
                          past_key_values=self.cache, use_cache=True)  # fmt: skip
        return read.logits.float()

    def back_to(self, n_after: int) -> None:
        """Forget what was appended beyond the first ``n_after`` tokens."""
        self._forget(self.n_after - n_after)
        self.n_after = min(self.n_after, n_after)

    @torch.inference_mode()
    def log_probabilities(self, continuations: list[Ids], logits: Tensor) -> Tensor:
        """log P(continuation | what has been read) in nats: (B, n_continuations) float64.

        ``logits``: (B, vocabulary), what the model says after what has been read. The continuations are read side by side
        in one pass, none seeing another, and forgotten again.
        """
        read_ids, of, place = _side_by_side(continuations, logits.device)
        said = [logits[:, None]]  # (B, 1, vocabulary): of every first token
        if len(read_ids):
            seen = self._seen_so_far()
            before = (of[:, None] == of) & (place[:, None] >= place)  # (n_read, n_read)
            may_see = torch.cat([seen.bool()[:, None].expand(-1, len(read_ids), -1), before.expand(len(seen), -1, -1)], 2)
            blocked = torch.zeros(may_see.shape, dtype=self.model.dtype, device=logits.device)
            said.append(self.model(
                input_ids=read_ids.expand(len(seen), -1),
                attention_mask=blocked.masked_fill(~may_see, torch.finfo(self.model.dtype).min)[:, None],
                position_ids=seen.sum(1, keepdim=True) + place,
                past_key_values=self.cache, use_cache=True,
            ).logits)  # fmt: skip
            self._forget(len(read_ids))
        scores = torch.zeros(len(logits), len(continuations), dtype=torch.float64, device=logits.device)
        for row, parts in enumerate(zip(*said, strict=True)):  # one by one: in float32 they are large
            log_p, start = torch.cat([part.float() for part in parts]).log_softmax(-1), 1
            for column, ids in enumerate(continuations):
                at = [0, *range(start, start + len(ids) - 1)]  # where each of its tokens is predicted
                scores[row, column] = log_p[at, ids].sum()
                start += len(ids) - 1
        return scores

    def _seen_so_far(self) -> Tensor:
        return pad(self.seen, (0, self.n_after), value=1)

    def _forget(self, n_tokens: int) -> None:
        if n_tokens > 0:
            self.cache.crop(-n_tokens)  # a negative number is what goes


def _learned_prefix(model: nn.Module, batch_size: int) -> tuple[nn.Module, object | None, int]:
    """The model without PEFT's prefix, that prefix as a cache, and its length: PEFT takes no other cache beside its own."""
    if not hasattr(model, "peft_config") or not model.active_peft_config.is_prompt_learning:
        return model, None, 0
    return model.get_base_model(), model.get_prompt(batch_size), model.active_peft_config.num_virtual_tokens


def _side_by_side(sequences: list[Ids], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens but each sequence's last, in one row: ids, which sequence each is of, its place there."""
    rows = [(token, number, place) for number, ids in enumerate(sequences) for place, token in enumerate(ids[:-1])]
    return tuple(
        torch.tensor(column, dtype=torch.long, device=device) for column in (zip(*rows, strict=True) if rows else ([],) * 3)
    )
