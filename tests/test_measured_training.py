"""A measured training is training and measuring, nothing else: each part against the part alone."""

import contextlib
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import (
    adapters,
    benchmarks,
    defences,
    embedded,
    evaluation,
    fingerprints,
    hooked_training,
    loading,
    models,
    scoring,
    settings,
    training,
    unit_training,
    units,
)
from ssah_utils.experiments import measured_training, panel
from ssah_utils.experiments.measured_training import (
    FineTuning,
    MarginProbe,
    TaskProbe,
    TransferProbe,
)
from ssah_utils.per_unit import PerUnit
from ssah_utils.prompts import chat, tokens

STEPS = [1, 3]
CONFIG = training.SFTConfig(learning_rate=1e-3, max_steps=3, batch_size=2, warmup_steps=1)
FRACTIONS = {"safety_fraction": 0.1, "utility_fraction": 0.2, "redundant_fraction": 0.2}


@pytest.fixture(scope="module")
def loaded():
    return loading.load(embedded.TINY_RANDOM)


@pytest.fixture(scope="module")
def pairs():
    prompts = [f"Name a thing of kind {row}." for row in range(6)]
    responses = [f"a stone, number {row}" for row in range(6)]
    return pd.DataFrame({"prompt": prompts, "response": responses})


@pytest.fixture(scope="module")
def examples(loaded, pairs):
    rendered = chat.render(loaded[1], pairs["prompt"].tolist())
    return tokens.encode(loaded[1], rendered, pairs["response"].tolist(), 16)


@pytest.fixture(scope="module")
def probes(loaded, pairs):
    return (TaskProbe(loaded[1], pairs[4:]), MarginProbe(loaded[1], ["How?", "Why not?"]))


@pytest.fixture(scope="module")
def asked(loaded):
    rows = {"id": ["a", "b"], "category": "x", "prompt": ["How?", "Why not?"]}
    return panel.Panel(
        loaded[0], loaded[1], {"harmful": pd.DataFrame(rows)}, 3, "", {}, ("cloze",), 4
    )


@pytest.fixture
def trained(loaded, examples, probes):
    def run(**changes) -> list[dict]:
        arguments = {"steps": STEPS, "probes": probes, "config": CONFIG}
        arguments |= {"dtype": torch.float32} | changes
        return measured_training.train_and_measure(
            aligned=loaded[0],
            place=embedded.TINY_RANDOM,
            tokenizer=loaded[1],
            examples=examples,
            **arguments,
        )

    return run


def plainly_trained(examples, tokenizer, frozen=None, adapter="", n_steps=3):
    """The same training without anything that looks at it; what is not reached is not taken."""
    model, _ = loading.load(embedded.TINY_RANDOM)
    if adapter:
        model = adapters.with_adapter(model, adapter, tokenizer, CONFIG.seed)
    stop = training.AtSteps([n_steps], lambda step: seen.append(copy_of(model)))
    seen = []
    kept = unit_training.freezing(model, frozen) if frozen else contextlib.nullcontext()
    with kept:
        training.train_sft(model, tokenizer, examples, CONFIG, (stop,))
    return seen[0]


def copy_of(model):
    return training.evaluation_copy(model, torch.float32)


def chosen_units(model) -> PerUnit:
    shape = models.shape_of(model)
    sizes = {kind: (shape.n_layers, shape.n_channels(kind)) for kind in ("attention", "mlp")}
    generator = torch.Generator().manual_seed(0)
    values = {kind: torch.rand(size, generator=generator) for kind, size in sizes.items()}
    return PerUnit(values) < 0.5


@pytest.mark.parametrize("how", ["whole", "frozen", "lora"])
def test_rows_are_what_the_probes_find_in_the_model_trained_alone(
    how, trained, loaded, examples, probes
):
    frozen = chosen_units(loaded[0]) if how == "frozen" else None
    adapter = "lora" if how == "lora" else ""
    rows = trained(frozen=frozen, adapter=adapter)
    assert [row["step"] for row in rows] == STEPS
    for row in rows if how == "whole" else rows[-1:]:
        alone = plainly_trained(examples, loaded[1], frozen, adapter, row["step"])
        expected = measured_training.measure(alone, probes)
        assert row == {"step": row["step"]} | expected
    assert rows[0]["task_loss"] != rows[1]["task_loss"]
    if how != "whole":
        assert rows[-1]["task_loss"] != trained(steps=[3])[-1]["task_loss"]


@pytest.mark.parametrize("how", ["whole", "frozen"])
def test_below_float32_all_is_trained_as_where_some_units_are_frozen(
    how, trained, loaded, examples, probes
):
    """What units own is kept in float32, whether any of them is frozen or not."""
    frozen = chosen_units(loaded[0]) if how == "frozen" else None
    seen = []
    training_step = hooked_training.HookedTrainer.training_step

    def step(self, model, *args):
        seen.append({one.dtype for one in model.parameters() if one.ndim == 2})
        return training_step(self, model, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hooked_training.HookedTrainer, "training_step", step)
        rows = trained(frozen=frozen, dtype=torch.bfloat16)
    assert seen == [{torch.float32, torch.bfloat16}] * 3
    alone = loading.load(embedded.TINY_RANDOM, torch.bfloat16)[0]
    kept = unit_training.freezing(alone, frozen) if frozen else unit_training.training_all(alone)
    with kept:
        training.train_sft(alone, loaded[1], examples, CONFIG)
        expected = measured_training.measure(copy_of(alone), probes)
    assert rows[-1] == {"step": 3} | expected


def test_an_adapter_of_a_bfloat16_model_is_all_that_is_trained(trained):
    assert trained(adapter="lora", dtype=torch.bfloat16)[-1]["step"] == 3


def test_what_a_defence_keeps_is_measured_and_not_what_goes_on_training(
    trained, loaded, examples, probes
):
    unaligned, _ = loading.load(embedded.TINY_RANDOM)
    with torch.no_grad():
        unaligned.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    rows = trained(defence=defences.SafetyVector(0.5, unaligned))
    for row in rows:
        alone = plainly_trained(examples, loaded[1], n_steps=row["step"])
        with torch.no_grad():
            vector = -0.5 * loaded[0].model.layers[0].mlp.down_proj.weight
            alone.model.layers[0].mlp.down_proj.weight.add_(0.5 * vector)
        expected = measured_training.measure(alone, probes)
        assert row["task_loss"] == pytest.approx(expected["task_loss"], rel=1e-5)
        assert row["margin"] == pytest.approx(expected["margin"], rel=1e-3, abs=1e-4)
    assert rows[-1]["task_loss"] != trained()[-1]["task_loss"]


def test_a_defence_and_its_strength_are_part_of_the_key(tuning, examples, monkeypatch):
    weak, strong = defences.PulledToStart(0.1), defences.PulledToStart(50.0)
    rows = tuning.follow(examples, STEPS, defence=weak)
    assert tuning.follow(examples, STEPS, defence=defences.Together((strong,))) != rows

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train_sft", never)
    assert tuning.follow(examples, STEPS, defence=defences.PulledToStart(0.1)) == rows
    for other in (None, strong, defences.Together((weak,))):
        with pytest.raises(AssertionError, match="trained again"):
            tuning.follow(examples, STEPS, defence=other)


def test_margins_on_several_sources_have_names_of_their_own(loaded):
    margin = MarginProbe(loaded[1], ["How?", "Why not?"])
    fresh = MarginProbe(loaded[1], ["Where?"], name=measured_training.FRESH)
    found = measured_training.measure(loaded[0], (margin, fresh))
    assert list(found) == ["margin", "fresh_margin"]
    assert found["fresh_margin"] == evaluation.refusal_margin(*loaded, ["Where?"]).tolist()
    rows = [{"step": step, "task_loss": 2.0 - step} | found for step in (0, 1)]
    table = measured_training.path_table(rows)
    assert table.columns.tolist() == ["step", "task_loss", "margin", "fresh_margin"]
    path = measured_training.loss_path(rows, measured_training.FRESH)
    assert path.margins[0].tolist() == found["fresh_margin"]


def test_the_panel_is_asked_at_the_end_alone_and_keeps_what_was_judged(
    trained, asked, loaded, examples
):
    rows = trained(at_end=asked)
    assert "panel" not in rows[0]
    assert json.loads(json.dumps(rows)) == rows, "what the cache gives back is what was found"
    alone = plainly_trained(examples, loaded[1])
    answered = evaluation.answer_and_judge(
        alone, loaded[0], loaded[1], asked.requests["harmful"], 3
    )
    table = pd.DataFrame(rows[-1]["panel"])
    harmful = table[table["set"] == "harmful"]
    assert harmful["asr"].tolist() == answered["asr"].tolist()
    assert harmful["id"].tolist() == ["a", "b"]
    cloze = benchmarks.cloze(alone, loaded[1], 4)["correct"].tolist()
    assert table[table["set"] == "cloze"]["accuracy"].tolist() == cloze
    (kept,) = measured_training.panel_answers({("t",): rows}, ["task"]).tables
    assert kept["response"].tolist() == answered["response"].tolist()
    assert (kept["task"] == "t").all() and kept["verdict"].tolist() == answered["verdict"].tolist()
    rates = measured_training.panel_rates(rows, task="t", seed=2)
    assert (rates["task"] == "t").all() and (rates["seed"] == 2).all()
    asr = rates[(rates["set"] == "harmful") & (rates["metric"] == "asr")].iloc[0]
    assert asr["mean"] == answered["asr"].mean() and asr["n"] == 2


def test_the_task_probe_scores_held_out_responses(loaded, pairs):
    model, tokenizer = loaded
    rendered = chat.render(tokenizer, pairs["prompt"].tolist(), "be kind")
    nll = evaluation.response_nll(model, tokenizer, rendered, pairs["response"].tolist())
    probe = TaskProbe(tokenizer, pairs, "be kind")
    assert probe.measure(model) == {"task_loss": pytest.approx(nll.mean())}
    found = dataclasses.replace(probe, numeric=True).measure(model)["exact_match"]
    responses = pairs["response"].tolist()
    assert found == evaluation.exact_match(model, tokenizer, rendered, responses)


def test_the_transfer_probe_partitions_the_model_again(loaded, examples):
    model, _ = loaded
    batches = tokens.token_batches(examples[:3], "response"), tokens.token_batches(examples[3:])
    sample = dict(zip(("harmful", "helpful"), batches, strict=True))
    before, _ = scoring.partition_model(model, sample, **FRACTIONS)
    probe = TransferProbe(before, sample, FRACTIONS)
    unchanged = probe.measure(model)
    assert not any(unchanged["left"]) and len(unchanged["left"]) == before.units("safety").count()
    moved, _ = loading.load(embedded.TINY_RANDOM)
    with torch.no_grad():
        moved.model.layers[0].mlp.down_proj.weight.mul_(
            torch.linspace(0.01, 3, moved.config.intermediate_size)
        )
    found = probe.measure(moved)
    after, _ = scoring.partition_model(moved, sample, **FRACTIONS)
    assert pd.DataFrame(found["moves"]).equals(units.transition_table(before, after))
    stayed = (before.units("safety") & after.units("safety")).count()
    assert sum(found["left"]) == before.units("safety").count() - stayed > 0


def test_tables_of_a_run_hold_means_and_paths():
    rows = [
        {"step": 0, "task_loss": 3.0, "margin": [2.0, 4.0]},
        {"step": 5, "task_loss": 2.0, "margin": [0.0, 1.0], "exact_match": [True, False]},
    ]
    table = measured_training.path_table(rows, condition="nothing", seed=1)
    assert table.columns.tolist() == [
        "condition",
        "seed",
        "step",
        "task_loss",
        "margin",
        "exact_match",
    ]
    assert table["margin"].tolist() == [3.0, 0.5] and table["exact_match"].iloc[1] == 0.5
    path = measured_training.loss_path(rows)
    np.testing.assert_array_equal(path.margins_at(2.5), [1.0, 2.5])


@pytest.fixture
def tuning(loaded, probes, own_cache):
    recipe = dataclasses.replace(CONFIG, max_steps=-1, seed=2)
    return FineTuning(loaded[0], embedded.TINY_RANDOM, loaded[1], recipe, probes)


def test_a_fine_tuning_begins_untrained_and_goes_on_as_its_recipe_says(
    tuning, trained, loaded, probes, examples
):
    frozen = chosen_units(loaded[0])
    rows = tuning.follow(examples, STEPS, k=1, factor=0.5, frozen=frozen)
    assert rows[0] == {"step": 0} | measured_training.measure(loaded[0], probes)
    seed = settings.training_seed(2, 1)
    config = dataclasses.replace(CONFIG, learning_rate=0.5e-3, seed=seed)
    assert rows[1:] == trained(config=config, frozen=frozen)
    assert seed not in (2, 3), "what another run would take as its own"


def test_a_fine_tuning_that_was_followed_is_not_done_again(tuning, examples, monkeypatch):
    rows = tuning.follow(examples, STEPS)

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train_sft", never)
    assert tuning.follow(examples, STEPS) == rows
    with pytest.raises(AssertionError, match="trained again"):
        tuning.follow(examples, STEPS, k=1)


def test_first_gradients_are_those_of_the_untrained_model_on_the_first_examples(tuning, examples):
    model, _ = loading.load(embedded.TINY_RANDOM)
    ids, labels, mask = tokens.right_padded(examples[:4])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=tokens.IGNORED
    )
    loss.backward()
    layer = model.model.layers[0].mlp
    owned = (layer.down_proj.weight.grad.T, layer.gate_proj.weight.grad, layer.up_proj.weight.grad)
    expected = sum(part.double().square().sum(1) for part in owned).sqrt()
    found = tuning.first_gradients(examples, 4)["mlp"][0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_tables_of_several_runs_name_each_run_and_skip_what_was_not_trained():
    moves = [{"before": "safety", "after": "complex", "share": 0.5}]
    untrained = {"step": 0, "margin": [2.0, 4.0], "left": [False, False]}
    runs = {
        ("a", 0): [untrained, {"step": 5, "margin": [1.0, 3.0], "left": [True], "moves": moves}],
        ("a", 1): [untrained, {"step": 5, "margin": [0.0, 1.0], "left": [False], "moves": moves}],
        ("b", 0): [untrained, {"step": 5, "margin": [7.0, 9.0], "left": [True], "moves": moves}],
    }
    path = measured_training.stacked(measured_training.path_table, runs, ["data", "seed"])
    assert path[["data", "seed", "step"]].to_numpy().tolist() == [
        [*key, step] for key in runs for step in (0, 5)
    ]
    assert path["margin"].tolist() == [3.0, 2.0, 3.0, 0.5, 3.0, 8.0]
    table = measured_training.stacked(measured_training.moves_table, runs, ["data", "seed"])
    assert table.to_dict("records") == [
        moves[0] | {"data": data, "seed": seed, "step": 5} for data, seed in runs
    ]
    margins = measured_training.last_margins(runs)
    assert margins["a"].tolist() == [[1.0, 3.0], [0.0, 1.0]] and margins["b"].tolist() == [[7, 9]]


def test_what_makes_no_sense_is_refused_in_one_line(trained, loaded, tmp_path):
    with pytest.raises(ValueError, match="give frozen units or the adapter 'lora', not both"):
        trained(frozen=chosen_units(loaded[0]), adapter="lora")
    with pytest.raises(ValueError, match="steps end at 2, the training at 3"):
        trained(steps=[1, 2])
    other, tokenizer = loading.load(embedded.TINY_RANDOM)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"not {fingerprints.fingerprint(loaded[0])}: load both"):
        measured_training.train_and_measure(
            loaded[0], str(tmp_path), torch.float32, tokenizer, [], CONFIG, STEPS, ()
        )


def test_a_probe_from_elsewhere_is_refused_as_no_key_would_know_its_code(loaded):
    class Mine:
        def measure(self, model):
            return {"task_loss": 0.0}

    with pytest.raises(
        TypeError, match=r"a Mine is no probe: write it in ssah_utils\.experiments\.measured"
    ):
        measured_training.measure(loaded[0], (Mine(),))
