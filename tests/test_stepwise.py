"""Step by step against the whole text read at once: on the test tokenizer every word is a token, so
text and ids agree.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import evaluation
from ssah_utils.experiments import stepwise
from tests.conftest import parameters_of, same_parameters

PROMPTS = ["w5 w6 w7", "w9", "w11 w12 w13 w14", "w20 w21"]
OPENINGS = (["w30 w31 w32", "w33"], ["w40 w41"])
REQUESTS = pd.DataFrame(
    {
        "id": list("abcd"),
        "queries": ["harmful", "harmful", "harmless", "harmless"],
        "prompt": ["Ask."] * 4,
    }
)


@pytest.fixture
def wordy(llama):
    """A model that never ends by itself, unless a test says so."""
    llama.generation_config.eos_token_id = 2
    llama.generation_config.suppress_tokens = None
    return llama


def text(ids) -> str:
    return " ".join(["<pad>", "<s>", "</s>"][index] if index < 3 else f"w{index}" for index in ids)


def forced(*lengths: int) -> list[list[int]]:
    (length,) = set(lengths)
    return [[50 + row + n for n in range(length)] for row in range(len(PROMPTS))]


def log_mean(model, tokenizer, prompts: list[str], openings: list[str]) -> np.ndarray:
    log_p = evaluation.opening_log_probabilities(model, tokenizer, prompts, openings)
    return np.log(np.exp(log_p).mean(1))


@pytest.mark.parametrize("batch_size", [64, 3, 1])
def test_openings_are_as_probable_as_after_the_text_so_far(wordy, tokenizer, batch_size):
    variants = {"none": [[]] * 4, "two": forced(2)}
    trajectories = stepwise.generate_and_probe(
        wordy, tokenizer, PROMPTS, variants, 4, [0, 1, 3, 6, 9], OPENINGS, batch_size
    )
    assert list(trajectories["none"].refusal) == [0, 1, 3]
    assert list(trajectories["two"].refusal) == [2, 3, 6], (
        "its end is measured, what is inside it or beyond the answer is not"
    )
    for trajectory in trajectories.values():
        for step in trajectory.refusal:
            alive = [row for row in range(4) if len(trajectory.tokens[row]) >= step]
            so_far = [
                f"{PROMPTS[row]} {text(trajectory.tokens[row][:step])}".strip() for row in alive
            ]
            for found, openings in (
                (trajectory.refusal, OPENINGS[0]),
                (trajectory.compliance, OPENINGS[1]),
            ):
                np.testing.assert_allclose(
                    found[step][alive], log_mean(wordy, tokenizer, so_far, openings), rtol=1e-4
                )
                assert np.isnan(np.delete(found[step], alive)).all()


def test_the_model_goes_on_as_generate_does(wordy, tokenizer):
    trajectories = stepwise.generate_and_probe(
        wordy, tokenizer, PROMPTS, {0: [[]] * 4, 3: forced(3)}, 5, [0], OPENINGS
    )
    assert trajectories[0].answers(tokenizer) == evaluation.generate(wordy, tokenizer, PROMPTS, 5)
    extended = [f"{prompt} {text(ids)}" for prompt, ids in zip(PROMPTS, forced(3), strict=True)]
    assert trajectories[3].answers(tokenizer) == evaluation.generate(wordy, tokenizer, extended, 5)
    assert [ids[:3] for ids in trajectories[3].tokens] == forced(3)


def test_nothing_is_measured_after_the_end_of_an_answer(wordy, tokenizer):
    free = stepwise.generate_and_probe(wordy, tokenizer, PROMPTS, {0: [[]] * 4}, 4, [0], OPENINGS)[
        0
    ]
    end = free.tokens[0][2]  # from now on this word ends an answer
    wordy.generation_config.eos_token_id = [2, end]
    trajectory = stepwise.generate_and_probe(
        wordy, tokenizer, PROMPTS, {0: [[]] * 4, 1: [[end]] * 4}, 4, [0, 1, 2, 3, 4], OPENINGS
    )
    n_said = len(trajectory[0].tokens[0])
    assert n_said <= 2 and end not in trajectory[0].tokens[0]
    assert [bool(np.isfinite(values[0])) for values in trajectory[0].refusal.values()] == [
        step <= n_said for step in range(5)
    ]
    assert all(ids[0] == end for ids in trajectory[1].tokens), "a forced token ends nothing"
    assert np.isfinite(trajectory[1].refusal[1]).all()
    rows = stepwise.margin_rows(trajectory[0], REQUESTS, model="m")
    assert len(rows[rows["id"] == "a"]) == n_said + 1 and rows["margin"].notna().all()


def test_margin_is_refusal_minus_compliance(wordy, tokenizer):
    trajectory = stepwise.generate_and_probe(
        wordy, tokenizer, PROMPTS, {0: [[]] * 4}, 1, [0], OPENINGS
    )[0]
    rows = stepwise.margin_rows(trajectory, REQUESTS, model="m", attack="none").set_index("id")
    expected = log_mean(wordy, tokenizer, PROMPTS, OPENINGS[0]) - log_mean(
        wordy, tokenizer, PROMPTS, OPENINGS[1]
    )
    np.testing.assert_allclose(rows["margin"], expected, rtol=1e-4)
    assert (
        set(rows["attack"]) == {"none"} and rows["queries"].tolist() == REQUESTS["queries"].tolist()
    )


def test_prefills_are_an_opening_and_its_likeliest_continuation_that_does_not_end(wordy, tokenizer):
    openings = ["w30 w31 w32", "w33"]
    found = stepwise.prefills(wordy, tokenizer, PROMPTS, openings, 5)
    assert [len(ids) for ids in found] == [5] * 4
    wordy.generation_config.eos_token_id = wordy.config.eos_token_id
    for row, (prompt, ids) in enumerate(zip(PROMPTS, found, strict=True)):
        opening = openings[row % 2]
        assert text(ids).startswith(opening)
        rest = evaluation.generate(
            wordy, tokenizer, [f"{prompt} {opening}"], 5 - len(opening.split())
        )[0]
        words = [word for word in text(ids).split() if word != "<s>"]  # which generate leaves out
        assert words == f"{opening} {rest}".split()
    ended = found[0][3]
    wordy.generation_config.eos_token_id = [ended]
    again = stepwise.prefills(wordy, tokenizer, PROMPTS, openings, 5)
    assert ended not in again[0] and len(again[0]) == 5
    assert stepwise.prefills(wordy, tokenizer, PROMPTS, openings, 2)[0] == found[0][:2]


def test_variants_that_do_not_fit_are_refused(wordy, tokenizer):
    for variant in ([[]] * 3, [[5], [5, 6], [5], [5]]):
        with pytest.raises(
            ValueError, match="variant 'odd': one list of token ids for each prompt"
        ):
            stepwise.generate_and_probe(
                wordy, tokenizer, PROMPTS, {"odd": variant}, 2, [0], OPENINGS
            )


def test_no_answer_at_all_still_gives_a_margin(wordy, tokenizer):
    trajectory = stepwise.generate_and_probe(
        wordy, tokenizer, PROMPTS, {0: [[]] * 4}, 0, [0, 1], OPENINGS
    )[0]
    assert (
        trajectory.tokens == [[]] * 4
        and list(trajectory.refusal) == [0]
        and np.isfinite(trajectory.refusal[0]).all()
    )


@pytest.mark.parametrize("batch_size", [64, 3])
def test_likelihood_is_that_of_the_added_tokens_after_prompt_and_forced_ones(
    wordy, tokenizer, batch_size
):
    said = [[50, 51, 60, 61, 62], [52, 53, 63], [54, 55], [56, 57, 64, 65]]
    sequences = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    trajectories = {
        "two": stepwise.Trajectory(sequences, said, 2, {}, {}),
        "none": stepwise.Trajectory(sequences, said, 0, {}, {}),
        "nothing": stepwise.Trajectory(sequences, [[]] * 4, 0, {}, {}),
    }
    found = stepwise.continuation_nll(wordy, trajectories, batch_size)
    for name, k in (("two", 2), ("none", 0)):
        before = [
            f"{prompt} {text(ids[:k])}".strip() for prompt, ids in zip(PROMPTS, said, strict=True)
        ]
        expected = evaluation.response_nll(
            wordy, tokenizer, before, [text(ids[k:]) for ids in said]
        )
        np.testing.assert_allclose(found[name], expected, rtol=1e-4)
    assert np.isnan(found["two"][2]) and np.isnan(found["nothing"]).all()


def test_verdicts_are_on_what_follows_the_prefill(tokenizer, monkeypatch):
    trajectory = stepwise.Trajectory([[5]] * 4, [[6, 7, 8]] * 4, 1, {}, {})
    assert trajectory.answers(tokenizer) == ["w7 w8"] * 4
    monkeypatch.setattr(
        stepwise.Trajectory,
        "answers",
        lambda *_: ["I'm sorry, I can't help.", "one two", "three", ""],
    )
    rows = stepwise.verdict_rows(
        trajectory, np.array([np.nan, 1.0, 9.0, np.nan]), tokenizer, REQUESTS, model="m", prefill=1
    )
    assert rows["refused"].tolist() == [True, False, False, False]
    assert rows["coherent_asr"].tolist() == [False, True, False, False]
    assert rows["degenerate"].tolist() == [False, False, True, True]
    assert rows["queries"].tolist() == REQUESTS["queries"].tolist() and set(rows["prefill"]) == {1}


def test_tables_hold_every_variant_under_its_attack_and_length(tokenizer):
    steps = {0: np.full(4, -1.0)}, {0: np.full(4, -3.0)}
    plain = stepwise.Trajectory([[5]] * 4, [[7]] * 4, 0, *steps)
    forced = stepwise.Trajectory(
        [[5]] * 4, [[6, 7]] * 4, 1, {1: np.full(4, -2.0)}, steps[1] | {1: np.full(4, -7.0)}
    )
    variants = {("none", 0): plain, ("prefill", 1): forced}
    margins = stepwise.margin_table(variants, REQUESTS, model="m")
    found = margins.groupby(["model", "attack", "prefill", "step"])["margin"].agg(["mean", "size"])
    assert found["mean"].to_dict() == {("m", "none", 0, 0): 2.0, ("m", "prefill", 1, 1): 5.0}
    assert set(found["size"]) == {4}
    nll = {("none", 0): np.full(4, 9.0), ("prefill", 1): np.full(4, 1.0)}
    verdicts = stepwise.behaviour_table(variants, nll, tokenizer, REQUESTS, model="m")
    degenerate = verdicts.groupby(["attack", "prefill"])["degenerate"].mean()
    assert degenerate.to_dict() == {("none", 0): 1.0, ("prefill", 1): 0.0}


def test_marks_are_the_last_token_before_every_step():
    trajectory = stepwise.Trajectory(
        [[3, 4], [5], [6, 7, 8]], [[10, 11], [], [12, 13, 14]], 0, {}, {}
    )
    batches, marks = stepwise.step_batches(trajectory, [0, 2, 3], batch_size=2)
    seen = torch.cat([batch["input_ids"][batch["positions"]] for batch in batches]).tolist()
    assert seen == [4, 11, 5, 8, 13, 14]
    assert list(marks.itertuples(index=False, name=None)) == [
        (0, 0),
        (0, 2),
        (1, 0),
        (2, 0),
        (2, 2),
        (2, 3),
    ]
    assert [batch["attention_mask"].sum(1).tolist() for batch in batches] == [[4, 1], [6]]


def test_models_are_left_as_they_were(wordy, tokenizer):
    before = parameters_of(wordy)
    stepwise.generate_and_probe(wordy, tokenizer, PROMPTS, {0: [[]] * 4}, 2, [0], OPENINGS)
    assert (
        same_parameters(wordy, before)
        and not wordy.training
        and all(p.grad is None for p in wordy.parameters())
    )
