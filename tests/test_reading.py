"""A reader against the whole text read at once, without any cache, in every architecture."""

import pytest
import torch
from torch import Tensor, nn

from ssah_utils import reading

PROMPTS = [[5, 6, 7, 8], [9], [4, 11, 3]]
CONTINUATIONS = [[3, 4, 5], [6], [3, 9], [7, 8, 3, 4]]
APPENDED = torch.tensor([[12, 13], [14, 15], [16, 17]])


@torch.inference_mode()
def log_p_at_once(model: nn.Module, before: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([before + continuation])
    said = model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
    return float(said[range(len(continuation)), continuation].sum())


def expected(model: nn.Module, appended: Tensor = APPENDED[:, :0]) -> Tensor:
    texts = [prompt + more for prompt, more in zip(PROMPTS, appended.tolist(), strict=True)]
    return torch.tensor([[log_p_at_once(model, text, ids) for ids in CONTINUATIONS] for text in texts], dtype=torch.float64)


@torch.inference_mode()
def test_continuations_are_as_probable_as_after_the_whole_text(any_model):
    reader = reading.Reader(any_model, PROMPTS)
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(reader.log_probabilities(CONTINUATIONS, reader.last), expected(any_model), **close)
    said = reader.append(APPENDED)[:, -1]
    assert reader.n_after == 2
    for _ in range(2):  # the second time what the first one read must be forgotten
        torch.testing.assert_close(reader.log_probabilities(CONTINUATIONS, said), expected(any_model, APPENDED), **close)
    torch.testing.assert_close(reader.append(APPENDED[:, :1])[:, -1], whole(any_model, [*APPENDED.T, APPENDED[:, 0]]), **close)
    reader.back_to(0)
    torch.testing.assert_close(reader.log_probabilities(CONTINUATIONS, reader.last), expected(any_model), **close)


@torch.inference_mode()
def whole(model: nn.Module, columns: list[Tensor]) -> Tensor:
    """What the model says after each prompt and the tokens of the columns."""
    after = torch.stack(columns, 1).tolist()
    return torch.stack([model(input_ids=torch.tensor([p + a])).logits[0, -1] for p, a in zip(PROMPTS, after, strict=True)])


@pytest.mark.parametrize("n_after", [2, 5])
def test_going_back_to_where_one_is_or_beyond_changes_nothing(llama, n_after):
    with torch.inference_mode():
        reader = reading.Reader(llama, PROMPTS)
        said = reader.append(APPENDED)
        reader.back_to(n_after)
        assert reader.n_after == 2
        found = reader.log_probabilities(CONTINUATIONS, said[:, -1])
    torch.testing.assert_close(found, expected(llama, APPENDED), atol=1e-4, rtol=0)


def test_batches_hold_every_row_once_shortest_first():
    sequences = ["aaaa", "b", "cc", "", "ddd"]
    assert reading.length_sorted(sequences, 2) == [[3, 1], [2, 4], [0]]
    assert reading.length_sorted([], 2) == []
