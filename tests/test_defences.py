"""Every defence against its definition, written down once more in another way; at strength 0, each
is the ordinary training.
"""

import contextlib
import copy
import functools
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from ssah_utils import adapters, defences, hooked_training, models, precision, training
from ssah_utils.defences import (
    ConstrainedTokens,
    ElasticWeights,
    GradientSurgery,
    Mixed,
    MovingAverage,
    PulledToStart,
    SafeLoRA,
    SafetyVector,
    Together,
)
from ssah_utils.per_unit import PerUnit
from ssah_utils.prompts.tokens import right_padded
from ssah_utils.unit_training import freezing, training_all
from ssah_utils.weights import unit_entries
from tests.conftest import parameters_of, same_parameters, tiny_model
from tests.test_training import batch_of, examples_of

CONFIG = training.SFTConfig(learning_rate=3e-3, max_steps=4, batch_size=3, warmup_steps=1, seed=5)
DATA, REFUSALS = examples_of(20), examples_of(4, seed=9)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: torch.float32)


def trained(tokenizer, defence=None, model=None, callbacks=(), config=CONFIG, frozen=None):
    """A model trained with a defence, and a copy that holds what is kept of it."""
    model = tiny_model("llama") if model is None else model
    keep = freezing(model, frozen) if frozen is not None else contextlib.nullcontext()
    with keep:
        hooks = defences.hooks_of(defence, model, DATA, config)
        made = functools.partial(hooked_training.HookedTrainer, hooks)
        training.train_sft(model, tokenizer, DATA, config, callbacks, made)
        fast = training.evaluation_copy(model, torch.float32)
        with hooked_training.with_kept_weights(fast, model, hooks):
            kept = {name: one.clone() for name, one in fast.state_dict().items()}
    return model, kept


def plainly_trained(tokenizer, model=None):
    model = tiny_model("llama") if model is None else model
    training.train_sft(model, tokenizer, DATA, CONFIG)
    return model


def some_units(model, share=0.4, seed=0) -> PerUnit:
    shape = models.shape_of(model)
    generator = torch.Generator().manual_seed(seed)
    sizes = {kind: (shape.n_layers, shape.n_channels(kind)) for kind in ("attention", "mlp")}
    drawn = {kind: torch.rand(size, generator=generator) for kind, size in sizes.items()}
    return PerUnit(drawn) < share


def other_model() -> nn.Module:
    """An unaligned version: every weight moved a little."""
    model, generator = tiny_model("llama"), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def owned_by(model, units: PerUnit) -> dict[str, Tensor]:
    """Which entries units own, by walking over a Llama's modules: (shape of the parameter) bool."""
    found = {
        name: torch.zeros(one.shape, dtype=torch.bool) for name, one in model.named_parameters()
    }
    shape = models.shape_of(model)
    group, size = shape.n_heads // shape.n_kv_heads, shape.head_dim
    for layer in range(shape.n_layers):
        block = f"model.layers.{layer}"
        for channel in units["mlp"][layer].nonzero().flatten().tolist():
            found[f"{block}.mlp.down_proj.weight"][:, channel] = True
            found[f"{block}.mlp.gate_proj.weight"][channel] = True
            found[f"{block}.mlp.up_proj.weight"][channel] = True
        for channel in units["attention"][layer].nonzero().flatten().tolist():
            found[f"{block}.self_attn.o_proj.weight"][:, channel] = True
            row = (channel // size // group) * size + channel % size
            found[f"{block}.self_attn.v_proj.weight"][row] = True
    return found


# --------------------------------------------------------------------------------------- strength 0


@pytest.mark.parametrize(
    "defence",
    [
        None,
        Mixed(0.0, REFUSALS),
        ConstrainedTokens(0.0),
        PulledToStart(0.0),
        ElasticWeights(0.0, REFUSALS),
        GradientSurgery(REFUSALS, batch_size=0),
        MovingAverage(1.0),
        SafetyVector(0.0, other_model()),
        Together(()),
        Together((PulledToStart(0.0), MovingAverage(1.0))),
    ],
    ids=lambda one: type(one).__name__,
)
def test_at_strength_0_it_is_the_ordinary_training_bit_by_bit(tokenizer, defence):
    plain = plainly_trained(tokenizer)
    model, kept = trained(tokenizer, defence)
    assert same_parameters(model, parameters_of(plain))
    assert not same_parameters(model, parameters_of(tiny_model("llama"))), "it has learned"
    assert all(torch.equal(kept[name], one) for name, one in plain.state_dict().items())


def test_at_strength_0_units_are_not_pulled(tokenizer):
    model, _ = trained(tokenizer, PulledToStart(0.0, some_units(tiny_model("llama"))))
    assert same_parameters(model, parameters_of(plainly_trained(tokenizer)))


# --------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("share", "n"), [(0.01, 1), (0.1, 1), (0.25, 3), (0.5, 6), (1.0, 12), (0.0, 0)]
)
def test_so_many_examples_are_seen_as_before_and_a_share_of_them_are_others(share, n):
    ordinary = [{"input_ids": [row], "labels": [row]} for row in range(20)]
    others = [{"input_ids": [-row], "labels": [-row]} for row in (1, 2)]
    mix = Mixed(share, others).hooks(nn.Linear(1, 1), ordinary, CONFIG).batch
    batches = [ordinary[start : start + 3] for start in range(0, 12, 3)]
    found = [one for batch in batches for one in mix(batch)]
    assert [len(mix(batch)) for batch in batches] == [3] * 4
    replaced = [number for number, one in enumerate(found) if one != ordinary[number]]
    assert len(replaced) == n and len(found) == 12
    assert [found[number] for number in replaced] == [others[row % 2] for row in range(n)]
    if 1 < n < 12:
        gaps = {after - before for before, after in itertools.pairwise(replaced)}
        assert max(gaps) - min(gaps) <= 1, "evenly spread"


def test_the_trainer_takes_as_many_steps_with_mixed_data_and_sees_the_others(tokenizer):
    seen: list[list[int]] = []

    class Looking(Mixed):
        def hooks(self, *arguments):
            mix = super().hooks(*arguments).batch

            def batch(examples):
                found = mix(examples)
                seen.extend(one["input_ids"] for one in found)
                return found

            return hooked_training.Hooks(batch=batch)

    steps: list[int] = []
    report = training.ReportSteps(lambda done, total: steps.append(done))
    model, _ = trained(tokenizer, Looking(0.25, REFUSALS), callbacks=(report,))
    assert steps == [1, 2, 3, 4]
    refusals = [one["input_ids"] for one in REFUSALS]
    assert sum(ids in refusals for ids in seen[:12]) == 3
    assert not same_parameters(model, parameters_of(plainly_trained(tokenizer)))


def test_how_many_examples_are_seen_counts_the_short_last_batch():
    def counted(n, **changes):
        return defences.n_seen(n, training.SFTConfig(batch_size=4, **changes))

    assert counted(100, max_steps=15) == 60
    assert counted(10, max_steps=3) == 10
    assert counted(10, max_steps=4) == 14, "after 4 + 4 + 2 comes a whole batch"
    assert counted(10, epochs=2.5) == 25


# --------------------------------------------------------------------------------------------- loss


def constrained_loss(now: Tensor, before: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Token by token, of logits at all positions; the weights take no gradient."""
    total, n_tokens = torch.zeros(()), 0
    for row, labels in enumerate(batch["labels"]):
        number = 0
        for place in range(1, len(labels)):
            if labels[place] == -100:
                continue
            log_p, log_p0 = (
                log_softmax(logits[row, place - 1].float(), -1)[labels[place]]
                for logits in (now, before)
            )
            b = 0.1 * (5 if number == 0 else 20 if number < 5 else 1)
            weight = max(2 * (1 - float(torch.sigmoid(b * (log_p - log_p0)))), 1e-3)
            total = total - weight * log_p
            number, n_tokens = number + 1, n_tokens + 1
    return total / n_tokens


class PlainlyConstrained(training.ResponseTrainer):
    def __init__(self, before: nn.Module, **arguments) -> None:
        self.before = before
        super().__init__(**arguments)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            before = self.before(**read).logits
        return constrained_loss(model(**read).logits, before, inputs)


def test_constrained_tokens_train_like_a_plain_loop_over_logits(tokenizer):
    expected = tiny_model("llama")
    made = functools.partial(PlainlyConstrained, copy.deepcopy(expected))
    training.train_sft(expected, tokenizer, DATA, CONFIG, (), made)
    model, _ = trained(tokenizer, ConstrainedTokens())
    for (name, one), (_, other) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5, msg=name)
    moved = max(
        float((one - other).abs().max())
        for one, other in zip(
            model.parameters(), plainly_trained(tokenizer).parameters(), strict=True
        )
    )
    assert moved > 1e-3, "and not like the ordinary loss"


def test_a_token_that_has_become_likelier_is_pulled_less_and_never_by_nothing():
    risen = torch.tensor([-3.0, 0.0, 2.0, 500.0])
    weights = defences.token_weight(torch.full((4,), 2.0), risen)
    expected = 2 * (1 - torch.sigmoid(2.0 * risen))
    torch.testing.assert_close(weights[:3], expected[:3])
    assert weights[3] == pytest.approx(1e-3) and weights[1] == 1


def test_tokens_are_counted_from_the_beginning_of_their_response():
    _, labels, _ = right_padded(
        [
            {"input_ids": [7] * 4, "labels": [-100, -100, 7, 7]},
            {"input_ids": [7] * 8, "labels": [-100] + [7] * 7},
        ]
    )
    assert defences.token_numbers(labels).tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 6]
    strengths = ConstrainedTokens().strengths(torch.arange(7))
    torch.testing.assert_close(strengths, torch.tensor([0.5, 2, 2, 2, 2, 0.1, 0.1]))


# ----------------------------------------------------------------------------------------- gradient


class WithPenalty(training.ResponseTrainer):
    """The penalty in the loss, where autograd takes its gradient."""

    def __init__(self, penalty, **arguments) -> None:
        self.penalty = penalty
        super().__init__(**arguments)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss + self.penalty(model)


def trained_with_penalty(tokenizer, importance: dict[str, Tensor], strength: float) -> nn.Module:
    model = tiny_model("llama")
    start = parameters_of(model)

    def penalty(trained_model):
        parts = [
            (importance[name] * (one - start[name]).square()).sum()
            for name, one in trained_model.named_parameters()
        ]
        return strength / 2 * sum(parts)

    training.train_sft(model, tokenizer, DATA, CONFIG, (), functools.partial(WithPenalty, penalty))
    return model


def assert_alike(model: nn.Module, other: nn.Module) -> None:
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=5e-5, msg=name)


def apart(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((one - two).abs().max()) for one, two in pairs)


def test_pulling_all_to_the_start_is_a_square_in_the_loss(tokenizer):
    ones = {name: torch.ones_like(one) for name, one in tiny_model("llama").named_parameters()}
    model, _ = trained(tokenizer, PulledToStart(20.0))
    assert_alike(model, trained_with_penalty(tokenizer, ones, 20.0))
    assert apart(model, plainly_trained(tokenizer)) > 1e-3


def test_pulling_units_is_a_square_over_the_entries_that_they_own(tokenizer):
    units = some_units(tiny_model("llama"))
    owned = {name: one.float() for name, one in owned_by(tiny_model("llama"), units).items()}
    assert sum(float(one.sum()) for one in owned.values()) > 0
    model, _ = trained(tokenizer, PulledToStart(50.0, units))
    assert_alike(model, trained_with_penalty(tokenizer, owned, 50.0))
    assert apart(model, plainly_trained(tokenizer)) > 1e-3


def test_a_shared_value_row_is_pulled_once(tokenizer):
    model = tiny_model("llama")
    every = some_units(model).map(torch.ones_like)
    hooks = PulledToStart(2.0, every).hooks(model, DATA, CONFIG)
    value = model.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        value.add_(0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hooks.gradient(None)
    torch.testing.assert_close(value.grad, torch.ones_like(value))
    assert not model.model.embed_tokens.weight.grad.any(), "belongs to no unit"


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "gpt_oss"])
def test_units_are_pulled_where_all_is_trained_below_float32(name):
    """There, what they own is held in another place and another precision, but is the same."""
    model = tiny_model(name).bfloat16()
    units = some_units(model)
    expected = [view(one)[places].float() for one, view, places in unit_entries(model, units)]
    with training_all(model):
        hooks = PulledToStart(2.0, units).hooks(model, DATA, CONFIG)
        entries = list(unit_entries(model, units))
        assert {one.dtype for one, _, _ in entries} == {torch.float32}
        for (parameter, view, places), before in zip(entries, expected, strict=True):
            assert torch.equal(view(parameter.detach())[places], before)
            parameter.data.add_(0.5)
            parameter.grad = torch.zeros_like(parameter)
        hooks.gradient(None)
        for parameter, view, places in entries:
            assert (view(parameter.grad)[places] == 1).all()
            owned = view(parameter.grad)[places].numel()
            assert parameter.grad.count_nonzero() == owned, "and nothing else is pulled"


def fisher_by_hand(model: nn.Module) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    for example in REFUSALS:
        model.zero_grad()
        batch = batch_of([example])
        logits = model(input_ids=batch["input_ids"]).logits[0]
        log_p = log_softmax(logits, -1)
        total = sum(
            log_p[place - 1, token]
            for place, token in enumerate(example["labels"])
            if token != -100
        )
        total.backward()
        for name, one in model.named_parameters():
            found[name] += one.grad.square() / len(REFUSALS)
    model.zero_grad()
    return found


def test_elastic_weights_are_a_square_weighed_by_the_fisher_information(tokenizer):
    model = tiny_model("llama")
    by_hand = fisher_by_hand(model)
    found = defences.fisher(model, REFUSALS)
    for one, expected in zip(found, by_hand.values(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-8)
    mean = torch.cat([one.flatten() for one in by_hand.values()]).mean()
    scaled = {name: one / mean for name, one in by_hand.items()}
    elastic, _ = trained(tokenizer, ElasticWeights(20.0, REFUSALS))
    assert_alike(elastic, trained_with_penalty(tokenizer, scaled, 20.0))
    pulled, _ = trained(tokenizer, PulledToStart(20.0))
    assert apart(elastic, pulled) > 1e-3, "it matters which entries"


def test_where_all_information_is_equal_elastic_weights_are_pulled_weights(tokenizer, monkeypatch):
    monkeypatch.setattr(
        defences, "fisher", lambda model, _: [torch.full_like(p, 4.0) for p in model.parameters()]
    )
    elastic, _ = trained(tokenizer, ElasticWeights(20.0, REFUSALS))
    pulled, _ = trained(tokenizer, PulledToStart(20.0))
    assert same_parameters(elastic, parameters_of(pulled))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_what_works_against_refusing_is_taken_out_of_the_gradient(sign, monkeypatch):
    monkeypatch.setattr(defences, "PIECE", 5)  # so that there are several, and a last one
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 4), (5,), (2, 2)]
    trained_parts = [nn.Parameter(torch.zeros(size)) for size in sizes]
    safe = [torch.randn(size, generator=generator) for size in sizes]
    noise = [0.1 * torch.randn(size, generator=generator) for size in sizes]
    task = [sign * one + other for one, other in zip(safe, noise, strict=True)]
    for parameter, gradient in zip(trained_parts, safe, strict=True):
        parameter.grad = gradient.clone()
    defences.without_conflict(trained_parts, [one.clone() for one in task])
    flat = [torch.cat([one.flatten() for one in part]) for part in (task, safe)]
    found = torch.cat([one.grad.flatten() for one in trained_parts])
    product = flat[0] @ flat[1]
    expected = flat[0] if product >= 0 else flat[0] - product / (flat[1] @ flat[1]) * flat[1]
    torch.testing.assert_close(found, expected)
    assert found @ flat[1] > -1e-5 and (sign > 0) == torch.equal(found, flat[0])


def test_surgery_in_a_training_sees_both_gradients(tokenizer):
    """One step of plain gradients: what is in the gradient when the hook has been asked."""
    config = training.SFTConfig(learning_rate=0.0, max_steps=1, batch_size=20, warmup_steps=0)
    model, seen = tiny_model("llama"), []
    surgery = GradientSurgery(REFUSALS, 4)
    hooks = surgery.hooks(model, DATA, config)
    inner = hooks.gradient

    def looked(trainer):
        inner(trainer)
        seen.extend(one.grad.clone() for one in model.parameters())

    hooks.gradient = looked
    made = functools.partial(hooked_training.HookedTrainer, [hooks])
    training.train_sft(model, tokenizer, DATA, config, (), made)

    def gradient_of(examples):
        fresh = tiny_model("llama")
        fresh(**batch_of(examples)).loss.backward()
        return [one.grad for one in fresh.parameters()]

    task, safe = gradient_of(DATA), gradient_of(REFUSALS)
    product = sum((one * two).sum() for one, two in zip(task, safe, strict=True))
    squared = sum(one.square().sum() for one in safe)
    for found, one, two in zip(seen, task, safe, strict=True):
        expected = one - min(product, torch.zeros(())) / squared * two
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


# ----------------------------------------------------------------------------------- what is kept


def test_the_moving_average_is_the_one_of_a_loop_over_the_weights_after_every_step(tokenizer):
    snapshots: list[dict[str, Tensor]] = []
    model = tiny_model("llama")
    expected = parameters_of(model)
    look = training.AtSteps([1, 2, 3, 4], lambda step: snapshots.append(parameters_of(model)))
    _, kept = trained(tokenizer, MovingAverage(0.3), model, (look,))
    for snapshot in snapshots:
        expected = {name: 0.3 * snapshot[name] + 0.7 * one for name, one in expected.items()}
    assert len(snapshots) == 4
    for name, one in expected.items():
        torch.testing.assert_close(kept[name], one)
    assert same_parameters(model, snapshots[-1]), "what is trained on is not the average"


def test_the_safety_vector_is_added_exactly_and_the_training_goes_on_without_it(tokenizer):
    unaligned, start = other_model(), parameters_of(tiny_model("llama"))
    model, kept = trained(tokenizer, SafetyVector(0.5, unaligned))
    plain = parameters_of(plainly_trained(tokenizer))
    assert same_parameters(model, plain)
    for name, other in unaligned.named_parameters():
        assert torch.equal(kept[name], plain[name] + 0.5 * (start[name] - other))


def test_dare_drops_entries_of_what_was_learned_and_scales_the_others(tokenizer):
    unaligned, start = other_model(), parameters_of(tiny_model("llama"))
    model, kept = trained(tokenizer, SafetyVector(0.5, unaligned, drop=0.75))
    n_dropped = n_entries = 0
    for name, parameter in model.named_parameters():
        safety = 0.5 * (start[name] - dict(unaligned.named_parameters())[name])
        learned = (kept[name] - safety - start[name]) / (parameter - start[name])
        moved = (parameter - start[name]).abs() > 1e-4
        dropped = learned[moved].abs() < 0.05
        torch.testing.assert_close(
            learned[moved][~dropped],
            torch.full_like(learned[moved][~dropped], 4),
            rtol=0.05,
            atol=0,
        )
        n_dropped, n_entries = n_dropped + int(dropped.sum()), n_entries + len(dropped)
    assert n_dropped / n_entries == pytest.approx(0.75, abs=0.02)


def test_the_random_vector_has_the_same_entries_in_other_places(tokenizer):
    unaligned, start = other_model(), parameters_of(tiny_model("llama"))
    model, kept = trained(tokenizer, SafetyVector(1.0, unaligned, is_random=True))
    for name, parameter in model.named_parameters():
        added = kept[name] - parameter.detach()
        safety = start[name] - dict(unaligned.named_parameters())[name].detach()
        torch.testing.assert_close(
            added.flatten().sort().values, safety.flatten().sort().values, rtol=0, atol=1e-5
        )
        assert not torch.allclose(added, safety, atol=1e-4)


def test_an_unaligned_version_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"the unaligned version has no 'model\.embed_tokens"):
        SafetyVector(1.0, tiny_model("gpt2")).hooks(tiny_model("llama"), DATA, CONFIG)


def test_safe_lora_projects_by_dense_algebra_and_its_p_is_no_projection():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator) for size in ((2, 5), (6, 2)))
    vector = torch.randn(6, 5, generator=generator)
    p = vector @ vector.T / vector.square().sum().sqrt()
    assert not torch.allclose(p @ p, p, atol=0.1), "as published it is not idempotent"
    update, projected = b @ a, p @ b @ a
    cosine = float((update * projected).sum() / update.norm() / projected.norm())
    torch.testing.assert_close(defences.safe_b(b, a, vector, cosine + 0.01), p @ b)
    assert torch.equal(defences.safe_b(b, a, vector, cosine - 0.01), b)


def with_lora(tokenizer) -> nn.Module:
    return adapters.with_adapter(tiny_model("llama"), "lora", tokenizer, CONFIG.seed)


@pytest.mark.parametrize(("threshold", "is_changed"), [(-1.1, False), (1.1, True)])
def test_safe_lora_changes_what_is_kept_of_every_layer_or_of_none(tokenizer, threshold, is_changed):
    unaligned = other_model()
    model, kept = trained(tokenizer, SafeLoRA(threshold, unaligned), with_lora(tokenizer))
    state, start = model.state_dict(), tiny_model("llama").state_dict()
    layers = [name for name in state if "lora_B" in name]
    assert layers and all(state[name].any() for name in layers), "it has learned"
    for name in layers:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight")
        vector = start[f"{layer}.weight"] - unaligned.state_dict()[f"{layer}.weight"]
        p = vector @ vector.T / vector.square().sum().sqrt()
        expected = p @ state[name] if is_changed else state[name]
        torch.testing.assert_close(kept[name], expected, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(kept[name], one) for name, one in state.items() if name not in layers)


def test_what_is_kept_is_only_looked_at():
    model, fast = tiny_model("llama"), tiny_model("llama")
    name = "model.norm.weight"
    hooks = [hooked_training.Hooks(weights=lambda state: {name: 0 * state[name]})]
    before = parameters_of(model)
    for one in (fast, model):  # off the CPU, it is the model itself
        with hooked_training.with_kept_weights(one, model, hooks):
            assert not one.model.norm.weight.any()
        assert same_parameters(one, before)


# -------------------------------------------------------------------------------------- with others


@pytest.mark.parametrize(
    "defence",
    [
        Mixed(0.5, REFUSALS),
        ConstrainedTokens(),
        PulledToStart(5.0),
        ElasticWeights(5.0, REFUSALS),
        GradientSurgery(REFUSALS),
        MovingAverage(0.3),
    ],
    ids=lambda one: type(one).__name__,
)
def test_frozen_units_stay_bit_identical_under_every_defence(tokenizer, defence):
    model = tiny_model("llama")
    start, frozen = parameters_of(model), some_units(model, 0.3)
    alone, _ = trained(tokenizer, None, tiny_model("llama"), frozen=frozen)
    model, kept = trained(tokenizer, defence, model, frozen=frozen)
    for layer, chosen in enumerate(frozen["mlp"]):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert torch.equal(kept[name][:, chosen], start[name][:, chosen])
        assert not torch.equal(kept[name][:, ~chosen], start[name][:, ~chosen])
    is_other = any(not torch.equal(kept[name], one) for name, one in alone.named_parameters())
    assert is_other, "the defence does something"


def test_a_safety_vector_reaches_frozen_units_as_well(tokenizer):
    model, unaligned = tiny_model("llama"), other_model()
    start, frozen = parameters_of(model), some_units(model, 0.3)
    model, kept = trained(tokenizer, SafetyVector(0.5, unaligned), model, frozen=frozen)
    for name, parameter in model.named_parameters():
        safety = start[name] - dict(unaligned.named_parameters())[name]
        assert torch.equal(kept[name], parameter + 0.5 * safety)


def test_defences_together_do_what_each_does(tokenizer):
    both = Together((PulledToStart(20.0), MovingAverage(0.3)))
    _, kept = trained(tokenizer, both)
    pulled, _ = trained(tokenizer, PulledToStart(20.0))
    snapshots, model = [], tiny_model("llama")
    expected = parameters_of(model)
    look = training.AtSteps([1, 2, 3, 4], lambda step: snapshots.append(parameters_of(model)))
    trained(tokenizer, PulledToStart(20.0), model, (look,))
    for snapshot in snapshots:
        expected = {name: 0.3 * snapshot[name] + 0.7 * one for name, one in expected.items()}
    for name, one in expected.items():
        torch.testing.assert_close(kept[name], one)
    assert same_parameters(pulled, snapshots[-1])


def test_what_makes_no_sense_is_refused_in_one_line(tokenizer):
    class Mine:
        pass

    with pytest.raises(TypeError, match=r"a Mine is no defence: write it in ssah_utils\.defences"):
        defences.hooks_of(Mine(), tiny_model("llama"), DATA, CONFIG)
    with pytest.raises(ValueError, match="SafeLoRA needs a model with LoRA"):
        trained(tokenizer, SafeLoRA(0.5, other_model()))
    with pytest.raises(ValueError, match="the loss of tokens does not go with an adapter"):
        trained(tokenizer, ConstrainedTokens(), with_lora(tokenizer))
    model = tiny_model("llama")
    units = some_units(model)
    with pytest.raises(ValueError, match="freeze some of it or pull at all of it, not both"):
        trained(tokenizer, PulledToStart(1.0, units), model, frozen=units)
