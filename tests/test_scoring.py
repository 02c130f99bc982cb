"""Scores and partitions of a model, against the formulas computed by hand in float64."""

import pytest
import torch

from ssah_utils import activations, fingerprints, models, per_unit, scoring, units
from ssah_utils.prompts import tokens
from tests.conftest import writers_by_name

FRACTIONS = {"safety_fraction": 0.1, "utility_fraction": 0.2, "redundant_fraction": 0.2}


def batches(seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (4, 9), generator=generator)
    positions = torch.ones_like(ids, dtype=torch.bool)
    positions[:, :4] = False
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "positions": positions}]


def by_hand(model, batch) -> dict[str, torch.Tensor]:
    """Standardised variance times squared norm, from activations caught by plain hooks."""
    found = {kind: [] for kind in per_unit.KINDS}
    for kind in per_unit.KINDS:
        for writer in writers_by_name(model, kind):
            caught = []
            handle = writer.register_forward_pre_hook(
                lambda module, args, caught=caught: caught.append(args[0].double())
            )
            with torch.no_grad():
                model(input_ids=batch["input_ids"])
            handle.remove()
            variance = caught[0][batch["positions"]].var(0)
            norm = models.column_weight(writer).detach().double().square().sum(0)
            score = variance * norm
            found[kind].append((score - score.mean()) / score.std())
    return {kind: torch.stack(rows) for kind, rows in found.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_are_those_computed_by_hand(tiny_models, name):
    model = tiny_models(name)
    z = scoring.standardised_scores(model, {"harmful": batches(0), "helpful": batches(1)})
    for which, seed in (("harmful", 0), ("helpful", 1)):
        expected = by_hand(model, batches(seed)[0])
        for kind in per_unit.KINDS:
            torch.testing.assert_close(z[which][kind], expected[kind], rtol=1e-4, atol=1e-5)


def test_a_partition_of_a_model_is_that_of_its_scores_and_knows_its_model(llama):
    data = {"harmful": batches(0), "helpful": batches(1)}
    partition, z = scoring.partition_model(llama, data, **FRACTIONS)
    expected = units.partition(z["harmful"], z["helpful"], **FRACTIONS)
    for group in units.GROUPS:
        assert partition.units(group).equals(expected.units(group))
    assert partition.fingerprint == fingerprints.fingerprint(llama)


def test_a_missing_data_set_is_said(llama):
    with pytest.raises(KeyError, match="helpful"):
        scoring.partition_model(llama, {"harmful": batches(0)}, **FRACTIONS)


def test_moments_of_single_requests_pool_to_those_of_all(llama):
    generator = torch.Generator().manual_seed(2)
    examples = []
    for length in (6, 9, 7):
        ids = torch.randint(3, 40, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [tokens.IGNORED] * 3 + ids[3:]})
    parts = scoring.moments_per_request(llama, examples)
    assert [part.count for part in parts] == [3, 6, 4]
    together = activations.channel_moments(llama, tokens.token_batches(examples))
    for kind in per_unit.KINDS:
        found = activations.pooled(parts)
        torch.testing.assert_close(found.variance[kind], together.variance[kind], rtol=1e-5, atol=0)
        torch.testing.assert_close(found.mean[kind], together.mean[kind], rtol=1e-5, atol=1e-7)
