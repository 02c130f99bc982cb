"""Every finder finds units that were planted, none finds them where none are; what they see is
what is written down here by hand.
"""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssah_utils import activations, scores, scoring, units, weights
from ssah_utils.experiments import finders, rivals
from ssah_utils.experiments.finders import Subset
from ssah_utils.figures.finders import FINDER_LOOKS
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.pipeline.claims import load_claims
from tests.conftest import tiny_model, writers_by_name

HARMFUL, HARMLESS = 90, 91  # the word that says which it is, the last of a request ...
LAST = [92]  # ... or the last but this, which is the same for all, as a chat template's end is
REFUSING, COMPLYING = 5, 7  # first tokens
OPENINGS = {"refusal": [[REFUSING, 6], [REFUSING, 8, 12]], "compliance": [[COMPLYING, 9, 11]]}
PLANTED = {1: [3, 40], 2: [8]}  # channels of feed-forward units, by block
NAMES = [
    *("variance x norm", "WIFN", "set difference", "gradient x activation", "activation change"),
    *("refusal direction", "first-token KL", "learned mask"),
]


def requests(word: int, first: int, end: list[int], n: int = 8) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(word)
    found = []
    for row in range(n):
        body = torch.randint(15, 85, (3 + row % 3,), generator=generator).tolist()
        answer = [first, *torch.randint(15, 85, (4,), generator=generator).tolist()]
        asked = [*body, word, *end]
        found.append({"input_ids": asked + answer, "labels": [-100] * len(asked) + answer})
    return found


def both_kinds(end: list[int]) -> dict[str, list[dict[str, list[int]]]]:
    sides = {"harmful": (HARMFUL, REFUSING), "helpful": (HARMLESS, COMPLYING)}
    return {side: requests(*what, end) for side, what in sides.items()}


EXAMPLES, TEMPLATED = both_kinds([]), both_kinds(LAST)


@torch.no_grad()
def inputs_at_last(model: nn.Module, layer: int, examples: dict) -> dict[str, Tensor]:
    """What a feed-forward reads at the last position of every request: by side, (n, d_model)."""
    found = {}
    for side, own in examples.items():
        seen = []
        handle = model.model.layers[layer].mlp.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0][0, -1])
        )
        for example in own:
            model(torch.tensor([example["input_ids"][: rivals.n_prompt(example)]]))
        handle.remove()
        found[side] = torch.stack(seen)
    return found


@torch.no_grad()
def planted(model: nn.Module, examples: dict = EXAMPLES, written: float = 1.0) -> nn.Module:
    """A copy in which some units are on at the end of harmful requests, and write a refusal."""
    clone = copy.deepcopy(model)
    head = clone.lm_head.weight
    towards = head[REFUSING] - head[COMPLYING]
    for layer, channels in PLANTED.items():
        mlp, read = clone.model.layers[layer].mlp, inputs_at_last(clone, layer, examples)
        means = torch.stack([read[side].mean(0) for side in ("harmful", "helpful")])
        row = torch.linalg.pinv(means) @ torch.tensor([3.0, 0.0])
        for channel in channels:
            mlp.gate_proj.weight[channel] = mlp.up_proj.weight[channel] = row
            mlp.down_proj.weight[:, channel] = written * towards / towards.norm()
    return clone


def planted_set(model: nn.Module) -> PerUnit:
    chosen = {"attention": torch.zeros(3, 60), "mlp": torch.zeros(3, 70)}
    for layer, channels in PLANTED.items():
        chosen["mlp"][layer, channels] = 1
    return PerUnit(chosen) > 0


def evidence_of(
    model: nn.Module, unaligned: nn.Module | None, examples: dict = EXAMPLES, **more
) -> rivals.Evidence:
    moments = {side: scoring.moments_per_request(model, own) for side, own in examples.items()}
    how = {"n_steps": 3, "n_rows": 3, "price": 1.0} | more
    return rivals.Evidence(model, unaligned, examples, moments, 2.0, OPENINGS, **how)


@pytest.fixture(scope="module")
def intact() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def with_units(intact) -> nn.Module:
    return planted(intact)


def found_in(model: nn.Module, unaligned: nn.Module, examples: dict = EXAMPLES):
    chosen = planted_set(model)
    compared = rivals.all_finders(evidence_of(model, unaligned, examples), chosen.count())
    return rivals.find_all(compared, 8, 8, chosen.share)


@pytest.fixture(scope="module")
def found(with_units, intact):
    return found_in(with_units, intact)


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """A copy whose parameters all have moved a little."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def found_without(intact):
    """Of the model in which nothing is planted; the other one has moved a little, anywhere."""
    return found_in(intact, moved(intact))


# These two ask for another planting, below.
AT_ONCE = [name for name in NAMES if name not in ("activation change", "refusal direction")]


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_finder_finds_planted_units(found, with_units, name):
    assert found[name].chosen.count() == 3
    chosen = found[name].chosen & planted_set(with_units)
    assert chosen.count() >= 2, found[name].chosen.names()


def test_the_activation_change_finds_units_that_alignment_has_moved_most(intact):
    """They write next to nothing here: what reads them would have changed as well. All else has
    moved a little, too, as training moves it.
    """
    quiet = planted(intact, written=0.01)
    assert found_in(quiet, moved(intact))["activation change"].chosen.equals(planted_set(quiet))


def test_the_refusal_direction_finds_units_behind_a_template(intact):
    """Where requests end alike: else the last words tell them apart before any unit does."""
    model = planted(intact, TEMPLATED, written=0.6)
    found = found_in(model, intact, TEMPLATED)["refusal direction"]
    assert found.chosen.equals(planted_set(model))
    without = found_in(intact, planted(intact), TEMPLATED)["refusal direction"]
    assert not (without.chosen & planted_set(model)).any()


@pytest.mark.parametrize("name", NAMES)
def test_no_finder_finds_them_where_none_are_planted(found_without, intact, name):
    assert found_without[name].chosen.count() == 3
    assert not (found_without[name].chosen & planted_set(intact)).any()


def test_the_finders_have_their_names_the_papers_first(found):
    assert set(found) == set(NAMES) and next(iter(found)) == rivals.PAPER


def test_every_finder_can_be_drawn_and_is_asked_about_by_the_claims():
    assert set(FINDER_LOOKS) == set(NAMES)
    compared = [one for one in load_claims() if one.id.startswith("no-finder-")]
    assert len(compared) == 2
    for claim in compared:
        assert set(claim.ours.where["finder"]) == set(NAMES) - {rivals.PAPER}


def test_without_an_unaligned_model_its_finder_is_left_out(intact):
    compared = rivals.all_finders(evidence_of(intact, None), 3)
    assert set(compared) == set(NAMES) - {"activation change"}


def test_sets_of_any_size_come_from_what_was_seen_once(found):
    for name, one in found.items():
        sizes = [one.choose(share).count() for share in (1 / 390, 10 / 390, 39 / 390)]
        assert sizes == [1, 10, 39], name
        assert one.choose(3 / 390).equals(one.chosen)


def test_halves_together_are_all_of_the_requests(with_units, intact, found):
    """For finders whose evidence adds up exactly, the set is that of all requests at once."""
    compared = rivals.all_finders(evidence_of(with_units, intact), 3)
    whole = Subset(range(8), range(8))
    for name in set(NAMES) - {"learned mask"}:
        at_once = compared[name].choose(compared[name].measure(whole), 20 / 390)
        assert units.jaccard(at_once, found[name].choose(20 / 390)) > 0.9, name


def test_agreement_is_the_overlap_of_the_sets_of_two_halves(with_units, intact, found):
    compared = rivals.all_finders(evidence_of(with_units, intact), 3)
    halves = finders.disjoint_halves(8, 8).values()
    for name in ("variance x norm", "refusal direction"):
        pair = [compared[name].choose(compared[name].measure(half), 3 / 390) for half in halves]
        chance = units.chance_jaccard(*pair)
        expected = (units.jaccard(*pair) - chance) / (1 - chance)
        assert found[name].agreement_of_halves == pytest.approx(expected)


def test_seconds_count_what_was_measured_before(found):
    for name in ("variance x norm", "WIFN", "set difference"):
        assert 2.0 < found[name].seconds < 60
    assert found["refusal direction"].seconds > 0


def test_too_few_requests_are_refused_in_one_line(intact):
    compared = rivals.all_finders(evidence_of(intact, None), 3)
    with pytest.raises(ValueError, match="at least 4 requests of each kind"):
        rivals.find_all(compared, 3, 8, 0.01)


# ------------------------------------------------------------------------------------ what they see


def test_changes_are_mean_squares_of_differences_on_the_same_texts(with_units, intact):
    batches = evidence_of(with_units, intact).batches(Subset([0, 3, 4], [1]))["harmful"]
    found = activations.mean_squared_changes(with_units, intact, batches)
    for kind in KINDS:
        for layer in range(3):
            seen = []
            for model in (with_units, intact):
                own = []
                handle = writers_by_name(model, kind)[layer].register_forward_pre_hook(
                    lambda module, args, own=own: own.append(args[0][0])
                )
                for row in (0, 3, 4):
                    example = EXAMPLES["harmful"][row]
                    start = rivals.n_prompt(example) - 1
                    with torch.no_grad():
                        model(torch.tensor([example["input_ids"]]))
                    own[-1] = own[-1][start:-1]
                handle.remove()
                seen.append(torch.cat(own).double())
            expected = (seen[0] - seen[1]).square().mean(0)
            torch.testing.assert_close(found[kind][layer], expected, rtol=1e-3, atol=1e-6)


def test_models_of_different_shapes_are_not_compared(intact):
    batches = evidence_of(intact, None).batches(Subset([0], [0]))["harmful"]
    with pytest.raises(ValueError, match="different shapes"):
        activations.mean_squared_changes(intact, tiny_model("qwen2"), batches)
    empty = [batch | {"positions": batch["positions"] & False} for batch in batches]
    with pytest.raises(ValueError, match="mark no position"):
        activations.mean_squared_changes(intact, intact, empty)


def test_what_units_add_along_a_direction_is_all_that_tells_the_requests_apart(intact):
    """Summed over all units it is the distance of the means."""
    evidence = evidence_of(intact, None, TEMPLATED)
    batches = evidence.last_positions(Subset(range(8), range(8)))
    means, states = {}, {}
    for side in rivals.SIDES:
        means[side] = activations.channel_moments(intact, batches[side]).mean
        states[side] = activations.marked_states(intact, batches[side])[:, -1].mean(0).double()
    direction = torch.randn(42, generator=torch.Generator().manual_seed(2)).double()
    along = weights.columns_along(intact, direction)
    found = finders.by_direction(along, means).flatten().sum()
    distance = states["harmful"] - states["helpful"]  # the embedding of the last token is the same
    torch.testing.assert_close(found, distance @ direction, rtol=1e-4, atol=1e-4)


def test_the_widest_separation_is_where_classes_lie_apart_for_their_spread():
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(40, 10, 6, generator=generator) for _ in range(2)]
    states[0][:, 3, 2] += 5.0
    states[0][:, 6] *= 50  # far apart by chance, but wide
    states[0][:, 9, 0] += 90.0  # behind the depth that counts
    block, direction = scores.widest_separation(*states)
    assert block == 3 and float(direction.norm()) == pytest.approx(1)
    assert float(direction[2]) > 0.95
    assert scores.widest_separation(*states, depth=1.0)[0] == 9


def test_without_any_spread_the_largest_difference_counts():
    states = [torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)]
    states[0][:, 1, 0], states[0][:, 2, 0] = 1.0, 2.0
    block, direction = scores.widest_separation(*states)
    assert block == 2 and direction.tolist() == [1, 0, 0]
    nothing = scores.widest_separation(states[1], states[1])[1]
    assert not nothing.any()


def test_first_tokens_that_begin_both_sides_are_left_out():
    openings = {"refusal": [[1, 2], [3]], "compliance": [[1, 4], [5, 6]]}
    assert rivals.first_tokens(openings) == ([3], [5])
    with pytest.raises(ValueError, match="begin with the same tokens"):
        rivals.first_tokens({"refusal": [[1, 2]], "compliance": [[1], [5]]})


def test_a_request_is_cut_after_the_first_token_of_its_answer():
    opened = rivals.opened({"input_ids": [4, 5, 6, 7], "labels": [-100, -100, 6, 7]})
    assert opened == {"input_ids": [4, 5, 6], "labels": [-100, -100, 6]}


def test_mask_steps_take_every_request_in_turn_with_openings_in_turn(intact):
    evidence = evidence_of(intact, None, n_steps=4, n_rows=2)
    steps = rivals.mask_steps(evidence, Subset([0, 2, 4, 6], [1, 3]))
    asked = []
    for number, step in enumerate(steps):
        for row, (ids, marked) in enumerate(
            zip(step.refusing["input_ids"], step.refusing["positions"], strict=True)
        ):
            places = marked.nonzero().flatten()
            opening = OPENINGS["refusal"][number % 2]
            assert ids[places + 1].tolist() == opening
            prompt = ids[: int(places[0]) + 1].tolist()
            asked.append(prompt)
            assert step.complying["input_ids"][row][: len(prompt)].tolist() == prompt
    expected = [
        EXAMPLES["harmful"][row]["input_ids"][: rivals.n_prompt(EXAMPLES["harmful"][row])]
        for row in (0, 2, 4, 6)
    ]
    assert sorted(asked) == sorted(2 * expected), "each request twice in eight places"
    again = rivals.mask_steps(evidence, Subset([0, 2, 4, 6], [1, 3]))
    same = [
        torch.equal(one.refusing["input_ids"], other.refusing["input_ids"])
        for one, other in zip(steps, again, strict=True)
    ]
    assert all(same)
    assert np.isfinite(evidence.price)
