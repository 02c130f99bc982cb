"""Distances and separations against texts read one by one with hooks of the test's own, and
against small tables worked out by hand.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils.experiments import probing, stepwise

REQUESTS = ["w5 w6 w7", "w9", "w11 w12 w13 w14"]
OPENINGS = (["w30 w31 w32", "w33"], ["w40 w41"])


@pytest.fixture
def plain(tokenizer):
    """A tokenizer whose chat is the request alone."""
    tokenizer.chat_template = "{{ messages[0].content }} "
    yield tokenizer
    tokenizer.chat_template = None


def states_of(model, ids: list[int]) -> np.ndarray:
    """State after every block at every position of one text, unpadded: (n_layers, n_tokens,
    d_model).
    """
    seen = []

    def keep(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).squeeze(0).numpy())

    handles = [block.register_forward_hook(keep) for block in model.model.layers]
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return np.stack(seen)


def cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return 1 - (a.astype(float) * b).sum(-1) / norms


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def expected_distances(model, openings: list[str]) -> np.ndarray:
    found = np.zeros((len(openings), len(REQUESTS), 3))
    for row, request in enumerate(REQUESTS):
        alone = states_of(model, ids_of(request))[:, -1]
        for number, opening in enumerate(openings):
            opened = states_of(model, ids_of(f"{request} {opening}"))[:, -1]
            found[number, row] = cosine_distance(alone, opened)
    return found


def test_distances_are_between_the_last_token_of_a_request_and_of_it_with_an_opening(llama, plain):
    openings = [*OPENINGS[0], *OPENINGS[1]]
    found = probing.opening_distances(llama, plain, REQUESTS, openings)
    np.testing.assert_allclose(found, expected_distances(llama, openings), rtol=1e-4, atol=1e-6)


def test_the_gap_is_refusal_minus_compliance_each_on_average(llama, plain):
    found = probing.distance_gap(llama, plain, REQUESTS, OPENINGS)
    refusal, compliance = (expected_distances(llama, openings) for openings in OPENINGS)
    expected = (refusal[0] + refusal[1]) / 2 - compliance[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_every_block_has_the_interval_of_its_own_values():
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(3, 2, 400), np.full(400, -1.0), rng.normal(-5, 1, 400)], 1)
    table = probing.block_intervals(values)
    assert table["layer"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(table["mean"], values.mean(0))
    half_width = 1.96 * values.std(0, ddof=1) / np.sqrt(400)
    np.testing.assert_allclose(table["high"] - table["mean"], half_width, rtol=0.15)
    np.testing.assert_allclose(table["mean"] - table["low"], half_width, rtol=0.15)
    assert probing.share_below_zero(table) == pytest.approx(2 / 3)


def test_a_difference_of_blocks_is_between_groups_of_any_size():
    rng = np.random.default_rng(1)
    a, b = rng.normal([1, 0], 1, (300, 2)), rng.normal([0, 0], 2, (500, 2))
    table = probing.block_differences(a, b)
    np.testing.assert_allclose(table["mean"], a.mean(0) - b.mean(0))
    error = np.sqrt(a.var(0, ddof=1) / 300 + b.var(0, ddof=1) / 500)
    np.testing.assert_allclose(table["high"] - table["low"], 2 * 1.96 * error, rtol=0.15)
    assert (table["low"] > 0).tolist() == [True, False]


def test_the_first_direction_parts_the_groups_and_the_others_parts_of_the_same_sizes():
    states = torch.diag(torch.arange(1.0, 7))[:, None]  # request i alone has coordinate i
    found = probing.directions_with_control(states[:2], states[2:], n_shuffled=12)
    assert found.shape == (1, 13, 6)
    signs = (found[0] > 0).int().tolist()
    assert signs[0] == [1, 1, 0, 0, 0, 0]
    assert all(sum(row) == 2 for row in signs) and len(set(map(tuple, signs))) > 5
    again = probing.directions_with_control(states[:2], states[2:], n_shuffled=12, seed=1)
    assert not torch.equal(found[:, 1:], again[:, 1:])
    assert torch.equal(found[:, 0], again[:, 0]), "the seed is that of the control alone"


def test_separation_is_a_difference_of_means_beside_the_largest_by_chance():
    rng = np.random.default_rng(2)
    is_harmful = np.arange(50) % 5 < 2
    values = rng.normal(0, 1, (50, 2, 4))
    values[is_harmful, 1, 0] += 5  # block 1, the direction itself
    values[is_harmful, 0, 2] -= 3  # block 0, a shuffled direction: its sign says nothing
    table = probing.separation(values, is_harmful)
    difference = values[is_harmful].mean(0) - values[~is_harmful].mean(0)
    np.testing.assert_allclose(table["mean"], difference[:, 0])
    np.testing.assert_allclose(table["shuffled"], np.abs(difference[:, 1:]).max(1))
    assert table["n"].tolist() == [20, 20]
    assert probing.share_apart(table) == 0.5


def test_separation_that_a_shuffled_direction_matches_does_not_count():
    is_harmful = np.arange(40) < 20
    values = np.random.default_rng(3).normal(0, 0.1, (40, 1, 2))
    values[is_harmful] += [[2.0, 3.0]]
    assert probing.share_apart(probing.separation(values, is_harmful)) == 0
    assert probing.share_apart(probing.separation(values[:, :, :1], is_harmful)) == 1
    assert probing.separation(values, np.ones(40, dtype=bool)).empty


def test_separation_by_step_is_that_of_the_states_after_each_step(llama):
    prompts = [[5, 6], [7], [8, 9, 10], [11, 12]]
    said = [[20, 21], [22, 23, 24], [25], [26, 27]]
    is_harmful = np.array([True, True, False, False])
    directions = torch.randn(3, 3, 42, generator=torch.Generator().manual_seed(0)).double()
    trajectory = stepwise.Trajectory(prompts, said, 0, {}, {})
    found = probing.separation_by_step(llama, trajectory, is_harmful, directions, [0, 2, 3])
    assert found["step"].unique().tolist() == [0, 2], "after 3 tokens no harmless answer goes on"
    for step, alive in ((0, [0, 1, 2, 3]), (2, [0, 1, 3])):
        along = []
        for row in alive:
            state = states_of(llama, prompts[row] + said[row][:step])[:, -1]
            along.append(np.einsum("ld,lkd->lk", state, directions.numpy()))
        along, kinds = np.stack(along), is_harmful[alive]
        difference = along[kinds].mean(0) - along[~kinds].mean(0)
        table = found[found["step"] == step]
        np.testing.assert_allclose(table["mean"], difference[:, 0], rtol=1e-4, atol=1e-5)
        chance = np.abs(difference[:, 1:]).max(1)
        np.testing.assert_allclose(table["shuffled"], chance, rtol=1e-4, atol=1e-5)


def test_the_margin_gap_is_harmful_minus_harmless():
    margins = pd.DataFrame(
        {"queries": ["harmful"] * 3 + ["harmless"] * 2, "margin": [4.0, 5, 6, 1, 2]}
    )
    mean, low, high = probing.margin_gap(margins)
    assert mean == 3.5 and 2.0 <= low < 3.5 < high <= 5.0
    assert np.isnan(probing.margin_gap(margins[:3])).all()


def margins_of(by_step: dict[int, list[float]]) -> pd.DataFrame:
    """Requests a, b, ...; None where the answer had ended."""
    rows = [
        {"id": "abcd"[row], "step": step, "margin": margin}
        for step, values in by_step.items()
        for row, margin in enumerate(values)
    ]
    return pd.DataFrame(rows).dropna()


def test_chosen_again_is_the_best_later_step_at_which_half_of_the_answers_go_on():
    margins = margins_of(
        {2: [9, 9, 9, 9], 4: [1, 1, 2, 2], 8: [4, 6, None, None], 16: [50, None, None, None]}
    )
    assert probing.chosen_again(margins, 2.0)[0] == 3.0, "not the start, not one answer alone"
    bar = pd.Series({"d": 0.0, "c": 0.0, "b": 5.0, "a": 4.0})
    excess = np.mean([1 - 4, 1 - 5, 2, 2]), np.mean([4 - 4, 6 - 5])
    assert probing.chosen_again(margins, bar)[0] == max(excess) == 0.5
    mean, low, high = probing.chosen_again(margins_of({0: [0] * 4, 1: [3] * 4}), 1.0)
    assert mean == low == high == 2.0


@pytest.mark.parametrize("steps", [{2: [9, 9, 9, 9]}, {2: [9, 9, 9, 9], 4: [1, None, None, None]}])
def test_without_a_later_step_nothing_is_said_of_choosing_again(steps):
    assert np.isnan(probing.chosen_again(margins_of(steps), 0.0)).all()


def test_changes_of_the_margin_are_paired_within_their_group():
    keys = {
        "id": list("abcd"),
        "source": ["rule"] * 4,
        "queries": ["harmful"] * 2 + ["harmless"] * 2,
    }
    before = pd.DataFrame(keys | {"margin": [1.0, 3, 5, 5], "log_p_refusal": [-4.0, -4, -8, -9]})
    after = before.assign(margin=[3.0, 3, 4, 4], log_p_refusal=[-6.0, -6, -8, -9])
    changes = probing.margin_changes(before, after, ["source", "queries"])
    found = changes.set_index(["queries", "measure"])
    assert found["difference"].to_dict() == {
        ("harmful", "margin"): 1.0,
        ("harmful", "log_p_refusal"): -2.0,
        ("harmless", "margin"): -1.0,
        ("harmless", "log_p_refusal"): 0.0,
    }
    assert found["present"]["harmful", "margin"] == 2.0 and set(changes["n"]) == {2}
    (row,) = probing.past_tense_table(changes).to_dict("records")
    assert (row["measure"], row["value"], row["control"]) == ("past_tense_lowers_margin", 1.0, -1.0)
    assert probing.past_tense_table(changes[changes["queries"] == "harmful"]).empty
    with pytest.raises(ValueError, match="rows of different requests"):
        probing.margin_changes(before, after[::-1], ["source"])


def test_evidence_is_one_row_a_model_and_measure():
    intervals = pd.DataFrame({"layer": [0, 1], "high": [-1.0, 1.0]})
    distances = pd.concat(
        [
            intervals.assign(model="aligned", queries="harmful", high=-1.0),
            intervals.assign(model="aligned", queries="harmless"),
        ]
    )
    kinds = ["harmful", "harmful", "harmless"]
    margins = pd.DataFrame({"model": "aligned", "queries": kinds, "margin": [3.0, 5.0, 1.0]})
    table = probing.evidence_table(distances, intervals.assign(model="aligned"), margins)
    assert table.set_index("measure")["value"].to_dict() == {
        "distance_below_0_harmful": 1.0,
        "distance_below_0_harmless": 0.5,
        "residual_below_0": 0.5,
        "margin_gap": 3.0,
    }
    assert table["title"].notna().all() and set(table["model"]) == {"aligned"}
    assert table["low"].notna().tolist() == [False, False, False, True]


def margins_of_a_study() -> pd.DataFrame:
    """Aligned and unaligned, two requests of each kind; margins tell where they belong."""
    rows = []
    for model, gap in (("aligned", 4.0), ("unaligned", 1.0)):
        for attack, k in (("none", 0), ("prefill", 1), ("prefill", 4), ("neutral", 3)):
            for step in (k, k + 1):
                for name, kind in zip("abcd", ["harmful"] * 2 + ["harmless"] * 2, strict=True):
                    margin = (gap if kind == "harmful" else 0.0) - k + 10 * (step > k)
                    rows.append((model, attack, k, step, name, kind, margin))
    columns = ["model", "attack", "prefill", "step", "id", "queries", "margin"]
    return pd.DataFrame(rows, columns=columns)


def test_the_direction_is_measured_where_the_forced_tokens_end_beside_the_unaligned_model():
    table = probing.held_table(margins_of_a_study()).set_index("measure")
    assert list(table.index) == ["holds_at_0", "holds_after_1", "holds_after_4", "holds_neutral"]
    assert table["value"].tolist() == [4.0] * 4 and table["control"].tolist() == [1.0] * 4
    assert "after 1 prefilled token" in table["title"]["holds_after_1"]
    alone = margins_of_a_study().query("model == 'aligned'")
    assert probing.held_table(alone)["control"].isna().all(), "a given model has no unaligned one"


def test_a_regained_margin_is_held_against_half_of_its_start():
    table = probing.regained_table(margins_of_a_study()).set_index("measure")
    assert list(table.index) == ["chosen_again_after_1", "chosen_again_after_4"]
    assert table["value"].tolist() == [4 - 1 + 10 - 2, 4 - 4 + 10 - 2]
    assert table["control"].tolist() == [0 - 1 + 10 - 2, 0 - 4 + 10 - 2]


def test_blocks_are_counted_before_and_after_the_prefill():
    rows = [
        {"model": model, "attack": "prefill", "prefill": 8, "step": step, "low": low}
        for model, step, lows in (
            ("aligned", 0, [1, 1]),
            ("aligned", 8, [1, -1]),
            ("aligned", 2, [-1, -1]),
            ("unaligned", 0, [-1, 1]),
            ("unaligned", 8, [-1, -1]),
        )
        for low in lows
    ]
    separations = pd.DataFrame(rows).assign(mean=2.0, shuffled=1.0)
    table = probing.apart_table(separations, 8).set_index("measure")
    assert table["value"].to_dict() == {"blocks_apart_after_0": 1.0, "blocks_apart_after_8": 0.5}
    assert table["control"].tolist() == [0.5, 0.0]
