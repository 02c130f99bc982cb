"""The alignment recipe: which answer stands behind which request, and what it is tuned to."""

import json

import numpy as np
import pandas as pd
import pytest

from ssah_utils import embedded, evaluation, loading
from ssah_utils.experiments import alignment
from ssah_utils.files import DATA
from ssah_utils.prompts import chat
from ssah_utils.prompts.tokens import IGNORED
from ssah_utils.sequences import tokens_of_pairs

N_TOKENS = 5
REFUSALS = json.loads((DATA / "refusals.json").read_text(encoding="utf-8"))["refusals"]


@pytest.fixture(scope="module")
def model():
    return loading.load(embedded.TINY_RANDOM)


def requests(name: str, n: int) -> pd.DataFrame:
    return pd.DataFrame({"prompt": [f"{name} number {row}: what is it?" for row in range(n)]})


@pytest.fixture(scope="module")
def data(model):
    harmless, harmful = requests("harmless", 4), requests("harmful", 3)
    return alignment.alignment_data(*model, harmless, harmful, N_TOKENS, seed=1)


def said(tokenizer, example) -> str:
    labels = [token for token in example["labels"] if token != IGNORED]
    return tokenizer.decode(labels, skip_special_tokens=True).strip()


def test_harmless_requests_keep_the_answers_of_the_base(data, model):
    base, tokenizer = model
    rendered = chat.render(tokenizer, requests("harmless", 4)["prompt"].tolist())
    assert data.harmless == rendered
    assert data.kept == evaluation.generate(base, tokenizer, rendered, N_TOKENS)


def test_harmful_requests_get_refusals_that_follow_from_the_seed(data):
    assert len(data.refused) == 3 and set(data.refused) <= set(REFUSALS)
    expected = np.random.default_rng(1).choice(REFUSALS, 3).tolist()
    assert data.refused == expected
    assert len(set(alignment.draw_refusals(200, 0))) == len(REFUSALS), "every refusal is drawn"


def test_a_generator_goes_on_where_it_was():
    rng = np.random.default_rng(7)
    found = alignment.draw_refusals(5, rng) + alignment.draw_refusals(5, rng)
    assert found == alignment.draw_refusals(10, 7)


def test_examples_carry_their_loss_on_the_whole_refusal_or_the_kept_answer(data, model):
    _, tokenizer = model
    examples = alignment.alignment_examples(tokenizer, data)
    assert [said(tokenizer, one) for one in examples["harmful"]] == data.refused
    assert len(examples["harmless"]) == 4
    for example, prompt in zip(examples["harmless"], data.harmless, strict=True):
        n_said = sum(label != IGNORED for label in example["labels"])
        assert 0 < n_said <= N_TOKENS
        assert tokenizer.decode(example["input_ids"][:-n_said]) == prompt


def test_no_refusal_is_cut(model):
    _, tokenizer = model
    lengths = [len(tokenizer(text).input_ids) for text in REFUSALS]
    assert max(lengths) < alignment.REFUSAL_TOKENS


def test_pairs_prefer_refusing_what_is_harmful_and_answering_what_is_not(data, model):
    base, tokenizer = model
    pairs = alignment.preference_pairs(base, tokenizer, data, 1, 2, seed=3)
    complied = evaluation.generate(base, tokenizer, data.harmful[:1], N_TOKENS)
    found = {
        kind: {name: [one[name] for one in some] for name in ("prompt", "chosen", "rejected")}
        for kind, some in pairs.items()
    }
    expected = {"prompt": data.harmful[:1], "chosen": data.refused[:1], "rejected": complied}
    assert found["harmful"] == expected
    expected = {"prompt": data.harmless[:2], "chosen": data.kept[:2]}
    assert found["harmless"] == expected | {"rejected": alignment.draw_refusals(2, 3)}


def test_what_is_chosen_has_the_tokens_of_the_examples_and_what_is_cut_no_end(data, model):
    """Else the likeliest thing to learn from a pair is to stop in mid-sentence."""
    base, tokenizer = model
    pairs = alignment.preference_pairs(*model, data, 3, 3)
    rows = list(tokens_of_pairs(base, tokenizer, pairs["harmful"] + pairs["harmless"]))
    examples = alignment.alignment_examples(tokenizer, data)
    expected = examples["harmful"] + examples["harmless"][:3]
    for row, example in zip(rows, expected, strict=True):
        assert row["prompt_ids"] + row["chosen_ids"] == example["input_ids"]
    assert {len(row["rejected_ids"]) for row in rows[:3]} == {N_TOKENS}
    ends = [row["rejected_ids"][-1] == tokenizer.eos_token_id for row in rows]
    assert ends == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("n", "ratio", "expected"), [(4, 1.0, (2, 2)), (4, 3.0, (1, 3)), (1, 2.5, (1, 1))]
)
def test_pairs_are_dealt_out_by_their_ratio_as_far_as_there_are_requests(data, n, ratio, expected):
    there = len(data.harmful), len(data.harmless)
    assert alignment.numbers_of_pairs(data, n, ratio) == tuple(map(min, expected, there))
    assert alignment.numbers_of_pairs(data, 10**6, ratio) == there


def test_more_pairs_than_requests_are_refused(data, model):
    there = len(data.harmful), len(data.harmless)
    for kind, more in {"harmful": (1, 0), "harmless": (0, 1)}.items():
        asked = [n + one for n, one in zip(there, more, strict=True)]
        with pytest.raises(ValueError, match=rf"\d {kind} pairs were asked for, but there are \d$"):
            alignment.preference_pairs(*model, data, *asked)


# ------------------------------------------------------------------------------------------ outcome


def test_answers_of_pairs_are_as_probable_as_one_by_one(data, model):
    base, tokenizer = model
    pairs = alignment.preference_pairs(base, tokenizer, data, 2, 2)
    table = alignment.preference_fit(base, tokenizer, pairs)
    found = table.set_index(["requests", "answer"])["nll"]
    assert len(found) == 4
    for (kind, answer), nll in found.items():
        some = pairs[kind]
        each = [
            evaluation.response_nll(base, tokenizer, [pair["prompt"]], [pair[answer]])[0]
            for pair in some
        ]
        assert nll == pytest.approx(np.mean(each), rel=1e-4)
    assert found["harmful", "rejected"] < found["harmful", "chosen"], (
        "its own are the likelier ones"
    )


def rates(models: dict[str, float]) -> pd.DataFrame:
    rows = []
    for model, mean in models.items():
        for name, metric in (("harmful", "asr"), ("helpful", "refused"), ("cloze", "accuracy")):
            row = {"model": model, "set": name, "metric": metric, "mean": mean}
            rows.append(row | {"low": mean - 0.1, "high": mean + 0.1})
        rows.append(row | {"set": "boolq", "mean": mean / 2})
    return pd.DataFrame(rows)


def test_goals_stand_beside_the_control_and_only_where_they_were_measured():
    measured = rates({"base": 0.8, "aligned": 0.2, "unaligned": 0.9})
    table = alignment.goals_table(measured, ["cloze"]).set_index("id")
    assert list(table.index) == ["asr_harmful", "refused_helpful", "accuracy_lost"]
    row = table.loc["asr_harmful", ["at_most", "aligned", "low", "high", "control"]]
    assert row.tolist() == pytest.approx([0.15, 0.2, 0.1, 0.3, 0.9])
    assert table.loc["accuracy_lost", "aligned"] == pytest.approx(0.8 - 0.2)
    assert table.loc["accuracy_lost", "control"] == pytest.approx(0.8 - 0.9)
    both = alignment.goals_table(measured, ["cloze", "boolq"]).set_index("id")
    assert both.loc["accuracy_lost", "aligned"] == pytest.approx(0.75 * (0.8 - 0.2))


def test_a_model_that_came_aligned_has_no_control():
    table = alignment.goals_table(rates({"aligned": 0.2}), ["cloze"], reference="aligned")
    assert table["control"].isna().all()
    assert table.set_index("id").loc["accuracy_lost", "aligned"] == 0


def test_loss_curves_are_one_row_a_step():
    losses = {("sft", "all"): [3.0, 2.0], ("dpo", "random"): [0.7]}
    table = alignment.loss_table(losses, ["method", "trained"])
    assert list(table.columns) == ["method", "trained", "step", "loss"]
    assert table.to_numpy().tolist() == [
        ["sft", "all", 1, 3.0],
        ["sft", "all", 2, 2.0],
        ["dpo", "random", 1, 0.7],
    ]
    assert list(alignment.loss_table({}, ["model"]).columns) == ["model", "step", "loss"]
