"""Fine-tuning that equals the plain Trainer's step by step, fails loudly, and is done once."""

import contextlib
import copy
import gc
import json
import math
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from ssah_utils import loading, precision, settings, training
from ssah_utils.adapters import PEFT_METHODS, with_adapter
from ssah_utils.attribution import unit_gradients
from ssah_utils.evaluation import generate, opening_log_probabilities
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.training import (
    AtSteps,
    ResponseTrainer,
    SFTConfig,
    evaluation_copy,
    load_or_train,
    train_dpo,
    train_sft,
    training_arguments,
)
from ssah_utils.unit_training import is_partial, training_only
from tests.conftest import VOCABULARY, parameters_of, same_parameters, tiny_model

IGNORED = -100


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: torch.float32)


def examples_of(n: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Prompts of 1-7 tokens without loss, responses of 1-9 tokens with it."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    examples = []
    for _ in range(n):
        n_prompt, n_response = between(1, 7), between(1, 9)
        ids = torch.randint(3, VOCABULARY, (n_prompt + n_response,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [IGNORED] * n_prompt + ids[n_prompt:]})
    return examples


def batch_of(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    def padded(key: str, value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(e[key]) for e in examples], True, value
        )

    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(e["labels"]), dtype=torch.int64) for e in examples], True
    )
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORED),
        "attention_mask": mask,
    }


class PlainTrainer(Trainer):
    """The Trainer as it is, but for columns that are not the model's."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        return super().compute_loss(model, kept, *args, **kwargs)


@pytest.fixture
def with_arguments(monkeypatch):
    """Change what ``training_arguments`` returns, as in
    ``with_arguments(train_sampling_strategy="sequential")``.
    """

    def change(**values) -> None:
        def changed(*args):
            arguments = training_arguments(*args)
            for name, value in values.items():
                assert hasattr(arguments, name)
                setattr(arguments, name, value)
            return arguments

        monkeypatch.setattr(training, "training_arguments", changed)

    return change


# ----------------------------------------------------------------------------------------- the loss


def test_loss_and_gradients_equal_the_models_own(any_model, tmp_path):
    any_model.set_attn_implementation("eager")
    batch = batch_of(examples_of(6))
    loss = any_model(**batch).loss
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in any_model.named_parameters()}
    any_model.zero_grad()

    trainer = ResponseTrainer(
        model=any_model, args=training_arguments(str(tmp_path), SFTConfig(), any_model)
    )
    found = trainer.compute_loss(any_model, batch)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in any_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_loss_is_shared_among_the_tokens_of_the_whole_batch(llama, tmp_path):
    batch = batch_of(examples_of(6))
    trainer = ResponseTrainer(
        model=llama, args=training_arguments(str(tmp_path), SFTConfig(), llama)
    )
    n_items = torch.tensor(100)
    expected = llama(**batch, num_items_in_batch=n_items).loss.item()
    assert trainer.compute_loss(llama, batch, num_items_in_batch=n_items).item() == pytest.approx(
        expected, rel=1e-5
    )


# ------------------------------------------------------------------------------------- trajectories


@pytest.mark.parametrize("sampling", [None, "sequential", "random"])
def test_trajectory_equals_the_plain_trainers(
    llama, tokenizer, with_arguments, monkeypatch, sampling
):
    if sampling:
        with_arguments(train_sampling_strategy=sampling)
    config = SFTConfig(learning_rate=1e-2, max_steps=20, batch_size=4, seed=3)
    examples = examples_of(24)
    found = train_sft(llama, tokenizer, examples, config)

    reference = tiny_model("llama")
    monkeypatch.setattr(training, "ResponseTrainer", PlainTrainer)
    expected = train_sft(reference, tokenizer, examples, config)
    assert len(found) == 20
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0] - 0.5  # it learned something, so the trajectories could have parted
    for a, b in zip(llama.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_trajectory_in_bfloat16_equals_the_plain_trainers(llama, tokenizer, monkeypatch):
    config, examples = SFTConfig(learning_rate=1e-2, max_steps=4, batch_size=4), examples_of(24)
    exact = train_sft(tiny_model("llama"), tokenizer, examples, config)
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: torch.bfloat16)
    found = train_sft(llama, tokenizer, examples, config)
    monkeypatch.setattr(training, "ResponseTrainer", PlainTrainer)
    expected = train_sft(tiny_model("llama"), tokenizer, examples, config)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(exact, rel=1e-4)  # so autocast was on
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.float32}


def test_accumulated_gradients_equal_a_large_batch(llama, tokenizer, with_arguments):
    examples = examples_of(24)
    with_arguments(train_sampling_strategy="sequential")
    expected = train_sft(
        tiny_model("llama"),
        tokenizer,
        examples,
        SFTConfig(learning_rate=1e-2, max_steps=5, batch_size=8),
    )
    with_arguments(train_sampling_strategy="sequential", gradient_accumulation_steps=4)
    found = train_sft(
        llama, tokenizer, examples, SFTConfig(learning_rate=1e-2, max_steps=5, batch_size=2)
    )
    assert len(found) == 5
    assert found == pytest.approx(expected, abs=1e-5)


def test_training_repeats_with_the_seed(tokenizer):
    examples = examples_of(24)
    first, again, other = (
        train_sft(
            tiny_model("llama"),
            tokenizer,
            examples,
            SFTConfig(max_steps=4, batch_size=4, seed=seed),
        )
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("config", "n_steps"),
    [
        (SFTConfig(batch_size=4), 3),
        (SFTConfig(batch_size=4, epochs=2), 6),
        (SFTConfig(batch_size=4, epochs=9, max_steps=2), 2),
    ],
)
def test_number_of_steps(llama, tokenizer, config, n_steps):
    assert len(train_sft(llama, tokenizer, examples_of(10), config)) == n_steps


def test_loss_is_the_mean_over_response_tokens(llama, tokenizer):
    examples = examples_of(8)
    loss = train_sft(llama, tokenizer, examples, SFTConfig(max_steps=1, batch_size=8))[0]
    reference = tiny_model("llama")
    with torch.no_grad():
        logits = [
            reference(torch.tensor([e["input_ids"]])).logits[0].log_softmax(-1) for e in examples
        ]
    terms = [
        -row[place - 1, token].item()
        for row, example in zip(logits, examples, strict=True)
        for place, token in enumerate(example["labels"])
        if token != IGNORED
    ]
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-5)


# ----------------------------------------------------------------------------------------- failures


class SpoilAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, model: nn.Module, **kwargs) -> None:
        if state.global_step == self.step:
            spoil(model)


@torch.no_grad()
def spoil(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan


def test_nan_loss_names_the_step(llama, tokenizer):
    with pytest.raises(
        FloatingPointError,
        match=r"loss is not finite at step 4\b.*\(the model is as after step 3\)",
    ):
        train_sft(
            llama,
            tokenizer,
            examples_of(24),
            SFTConfig(max_steps=9, batch_size=4),
            (SpoilAfter(3),),
        )


def test_nan_weight_stops_at_the_first_step(llama, tokenizer):
    spoil(llama)
    with pytest.raises(
        FloatingPointError,
        match=r"loss is not finite at step 1\b.*\(the model is as after step 0\)",
    ):
        train_sft(llama, tokenizer, examples_of(24), SFTConfig(max_steps=9, batch_size=4))


class Snapshots(TrainerCallback):
    """The parameters after every step; 0 is before the first."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs) -> None:
        self.after[0] = parameters_of(model)

    def on_step_end(self, args, state, control, model: nn.Module, **kwargs) -> None:
        self.after[state.global_step] = parameters_of(model)


def on_call(number: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What comes in as it is, but for the call of that number (from 1), which is changed."""
    n_calls = 0

    def called(value: Tensor) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        return change(value) if n_calls == number else value

    return called


def spoil_output(model: nn.Module, call: int, value: float) -> None:
    change = on_call(call, lambda output: output * value)
    model.model.norm.register_forward_hook(lambda module, args, output: change(output))


def spoil_one_gradient(model: nn.Module, call: int, value: float) -> None:
    def change(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed[3, 4] = value
        return changed

    model.model.layers[2].mlp.gate_proj.weight.register_hook(on_call(call, change))


SPOILS = {"loss": spoil_output, "gradient": spoil_one_gradient}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", SPOILS)
@pytest.mark.parametrize("step", [1, 3])
def test_what_is_not_finite_does_not_reach_the_parameters(
    llama, tokenizer, with_arguments, what, value, accumulation, step
):
    # with accumulation, the last part of the step is the bad one
    snapshots, n_micro = Snapshots(), step * accumulation
    with_arguments(gradient_accumulation_steps=accumulation)
    SPOILS[what](llama, n_micro, value)
    message = rf"{what} is not finite at step {step}\b.*\(the model is as after step {step - 1}\)"
    with pytest.raises(FloatingPointError, match=message):
        train_sft(
            llama,
            tokenizer,
            examples_of(40),
            SFTConfig(1e-2, max_steps=5, batch_size=4, warmup_steps=0),
            (snapshots,),
        )
    assert list(snapshots.after) == list(range(step))
    assert same_parameters(llama, snapshots.after[step - 1])
    assert step == 1 or not same_parameters(llama, snapshots.after[0])


def test_a_spoiled_example_stops_when_its_turn_comes(llama, tokenizer, with_arguments):
    """A token whose embedding is broken, in the ninth example alone."""
    examples, snapshots = examples_of(24), Snapshots()
    for example in examples:
        ids = example["input_ids"]
        ids[:] = [3 if token == VOCABULARY - 1 else token for token in ids]
    examples[8]["input_ids"][0] = VOCABULARY - 1
    with torch.no_grad():
        llama.model.embed_tokens.weight[VOCABULARY - 1] = math.nan
    with_arguments(train_sampling_strategy="sequential")
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 3\b"):
        train_sft(
            llama, tokenizer, examples, SFTConfig(1e-2, max_steps=6, batch_size=4), (snapshots,)
        )
    del snapshots.after[2]["model.embed_tokens.weight"]  # NaN is not equal to itself
    after = parameters_of(llama)
    assert not after.pop("model.embed_tokens.weight")[:-1].isnan().any()
    assert all(torch.equal(after[name], value) for name, value in snapshots.after[2].items())


@pytest.mark.parametrize("what", SPOILS)
def test_training_of_some_units_stops_before_the_step_too(llama, tokenizer, what):
    chosen = units_of()
    chosen["mlp"][2] = True  # so that there is a whole matrix to spoil the gradient of
    before = parameters_of(llama)
    SPOILS[what](llama, 1, math.inf)
    with (
        pytest.raises(FloatingPointError, match=f"{what} is not finite at step 1"),
        training_only(llama, chosen),
    ):
        train_sft(llama, tokenizer, examples_of(24), SFTConfig(max_steps=3, batch_size=4))
    assert same_parameters(llama, before)


@pytest.mark.parametrize("fails", [False, True])
def test_attention_is_restored(llama, tokenizer, fails):
    assert llama.config._attn_implementation == "sdpa"
    if fails:
        spoil(llama)
        with pytest.raises(FloatingPointError):
            train_sft(llama, tokenizer, examples_of(4), SFTConfig(max_steps=1))
    else:
        train_sft(llama, tokenizer, examples_of(4), SFTConfig(max_steps=1))
    assert llama.config._attn_implementation == "sdpa"


def test_nothing_to_train_on_is_an_error(llama, tokenizer):
    before = parameters_of(llama)
    with pytest.raises(ValueError, match="nothing to train on: the list of examples is empty"):
        train_sft(llama, tokenizer, [], SFTConfig())
    with pytest.raises(ValueError, match="nothing to train on: the list of pairs is empty"):
        train_dpo(llama, tokenizer, [], SFTConfig())
    assert same_parameters(llama, before)


def test_an_example_without_a_response_is_named(llama, tokenizer):
    before, examples = parameters_of(llama), examples_of(12)
    examples[7] = {"input_ids": [3, 9, 4], "labels": [IGNORED] * 3}
    with pytest.raises(ValueError, match="example 7 has no response token to learn: 'w3 w9 w4'"):
        train_sft(llama, tokenizer, examples, SFTConfig())
    assert same_parameters(llama, before)


@pytest.mark.parametrize("train", ["train_sft", "train_dpo"])
def test_nothing_is_printed(llama, tokenizer, capsys, train):
    data = {"train_sft": examples_of(8), "train_dpo": PAIRS}[train]
    getattr(training, train)(
        llama, copy.deepcopy(tokenizer), data, SFTConfig(max_steps=2, batch_size=4)
    )
    assert capsys.readouterr().out == ""


def output_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", ["train_sft", "train_dpo"])
def test_a_trained_model_is_as_good_as_a_loaded_one(
    llama, tokenizer, token_ids, monkeypatch, train, dtype
):
    """Trainers wrap ``forward`` (in autocast; TRL in a head of its own): copies would run the
    original.
    """
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: dtype)
    data = {"train_sft": examples_of(8), "train_dpo": PAIRS}[train]
    getattr(training, train)(
        llama, copy.deepcopy(tokenizer), data, SFTConfig(max_steps=2, batch_size=4)
    )
    llama.eval()
    loaded = tiny_model("llama")
    loaded.load_state_dict(llama.state_dict())
    clone = copy.deepcopy(llama)
    with torch.no_grad():
        clone.lm_head.weight.zero_()
    found = output_of(llama, token_ids), output_of(clone, token_ids)
    torch.testing.assert_close(found[0], output_of(loaded, token_ids), rtol=1e-5, atol=1e-5)
    assert not found[1].any()
    assert "forward" not in vars(llama)


# ----------------------------------------------------------------------------- measuring on the way


class Observe(TrainerCallback):
    """Whether the model is in training mode when other callbacks have had their turn."""

    def __init__(self) -> None:
        self.training: list[bool] = []

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs) -> None:
        self.training.append(model.training)

    def on_step_end(self, args, state, control, model: nn.Module, **kwargs) -> None:
        self.training.append(model.training)


@pytest.mark.parametrize("train", ["train_sft", "train_dpo"])
def test_measures_at_the_given_steps(llama, tokenizer, token_ids, train):
    data = {"train_sft": examples_of(24), "train_dpo": PAIRS}[train]
    before = output_of(llama, token_ids)
    found = {}
    modes = []
    observe = Observe()
    snapshots = Snapshots()

    def measure(step: int) -> None:
        found[step] = output_of(llama, token_ids)
        modes.append(any(module.training for module in llama.modules()))

    config = SFTConfig(learning_rate=1e-2, max_steps=4, batch_size=4, warmup_steps=0)
    callbacks = (AtSteps([0, 1, 3, 9], measure), observe, snapshots)
    getattr(training, train)(llama, copy.deepcopy(tokenizer), data, config, callbacks=callbacks)
    assert list(found) == [0, 1, 3]
    assert not any(modes)
    assert observe.training[0]
    assert all(observe.training)
    # training changes the attention kernel
    torch.testing.assert_close(found[0], before, rtol=1e-4, atol=1e-4)
    for step in (1, 3):
        reference = tiny_model("llama")
        reference.load_state_dict(snapshots.after[step])
        torch.testing.assert_close(
            found[step], output_of(reference, token_ids), rtol=1e-4, atol=1e-4
        )


def test_measuring_changes_nothing(tokenizer, token_ids):
    """GPT-2, as it has dropout: neither the mode nor the random numbers of a measurement reach the
    training.
    """
    config, examples = SFTConfig(learning_rate=1e-2, max_steps=6, batch_size=4), examples_of(24)
    plain, measured = tiny_model("gpt2"), tiny_model("gpt2")
    expected = train_sft(plain, tokenizer, examples, config)

    def measure(step: int) -> None:
        torch.manual_seed(step)
        torch.rand(100)
        output_of(measured, token_ids)

    found = train_sft(measured, tokenizer, examples, config, (AtSteps(range(6), measure),))
    assert found == expected
    assert same_parameters(measured, parameters_of(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_measured_while_some_units_are_trained(llama, tokenizer, monkeypatch, dtype):
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: dtype)
    answers: dict[int, list[str]] = {}

    def measure(step: int) -> None:
        answers[step] = generate(llama, tokenizer, ["w3 w4", "w5"], 4)

    with training_only(llama, units_of()):
        train_sft(
            llama,
            tokenizer,
            examples_of(24),
            SFTConfig(max_steps=2, batch_size=4),
            (AtSteps([0, 2], measure),),
        )
    assert list(answers) == [0, 2]


def test_measures_in_the_precision_of_the_model(llama, tokenizer, token_ids, monkeypatch):
    """What is measured at step 0 is the model as it came in, and at the last step as it goes
    out.
    """
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: torch.bfloat16)
    expected, found = output_of(llama, token_ids), []
    callback = AtSteps([0], lambda step: found.append(output_of(llama, token_ids)))
    train_sft(llama, tokenizer, examples_of(8), SFTConfig(max_steps=1, batch_size=4), (callback,))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", ["train_sft", "train_dpo"])
def test_a_trainer_does_not_outlive_its_training(llama, tokenizer, train, monkeypatch):
    """It would keep the model and the state of its optimizer. It is gone before freed memory is
    returned to the system: else that would have nothing to return.
    """

    def trainers() -> list:
        return [one for one in gc.get_objects() if issubclass(type(one), transformers.Trainer)]

    alive: list[int] = []
    monkeypatch.setattr(training, "return_freed_memory", lambda: alive.append(len(trainers())))
    data = {"train_sft": examples_of(8), "train_dpo": PAIRS}[train]
    getattr(training, train)(
        llama, copy.deepcopy(tokenizer), data, SFTConfig(max_steps=1, batch_size=4)
    )
    assert alive == [0]
    assert not trainers()


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("train", ["train_sft", "train_dpo"])
def test_a_copy_to_measure_on(llama, tokenizer, token_ids, monkeypatch, train, some):
    """Of a model in training under autocast: no part of the training, and what a loaded model would
    be.
    """
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: torch.bfloat16)
    data = {"train_sft": examples_of(24), "train_dpo": PAIRS}[train]
    config = SFTConfig(learning_rate=1e-2, max_steps=4, batch_size=4, warmup_steps=0)
    reference = tiny_model("llama")

    def context(model: nn.Module):
        return training_only(model, units_of()) if some else contextlib.nullcontext()

    with context(reference):
        expected = getattr(training, train)(reference, copy.deepcopy(tokenizer), data, config)
    found: dict[int, Tensor] = {}

    def measure(step: int) -> None:
        twin = evaluation_copy(llama, torch.float32)
        assert not twin.training
        found[step] = output_of(twin, token_ids)
        loaded = tiny_model("llama")
        loaded.load_state_dict(llama.state_dict())
        torch.testing.assert_close(found[step], output_of(loaded, token_ids), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for tensor in [*twin.parameters(), *twin.buffers()]:
                tensor.zero_()

    with context(llama):
        callback = AtSteps([0, 2, 4], measure)
        losses = getattr(training, train)(
            llama, copy.deepcopy(tokenizer), data, config, callbacks=(callback,)
        )
    assert losses == expected
    assert same_parameters(llama, parameters_of(reference))
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[2], found[4])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("some", [False, True])
def test_a_copy_in_bfloat16_is_what_is_loaded_in_bfloat16(
    tiny_models, token_ids, tmp_path, name, some
):
    model = tiny_models(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    chosen = {
        kind: torch.arange(3 * size).reshape(3, size) % 3 == 0
        for kind, size in (("attention", 42 if name == "gpt2" else 60), ("mlp", 70))
    }
    with training_only(model, chosen) if some else contextlib.nullcontext():
        twin = evaluation_copy(model, torch.bfloat16)
    assert twin.dtype == torch.bfloat16
    buffers, found = dict(loaded.named_buffers()), dict(twin.named_buffers())
    assert found.keys() == buffers.keys()
    for key, buffer in found.items():
        assert buffer.dtype == buffers[key].dtype, key
        assert torch.equal(buffer, buffers[key]), key
    assert not is_partial(twin)  # else every forward pass would put the matrices together
    torch.testing.assert_close(
        output_of(twin, token_ids), output_of(loaded, token_ids), rtol=0, atol=0
    )


# -------------------------------------------------------------------------------------- preferences

PAIRS = [
    {
        "prompt": f"w{i} w{i + 1} w{i + 2}",
        "chosen": f" w{i + 30} w{i + 31}",
        "rejected": f" w{i + 50} w{i + 51} w{i + 52}",
    }
    for i in range(3, 19)
]


def log_p(model: nn.Module, tokenizer, pairs: list[dict[str, str]], answer: str) -> Tensor:
    """log P(answer and end | prompt) of every pair, one by one."""
    sums = []
    for pair in pairs:
        prompt = tokenizer(pair["prompt"]).input_ids
        ids = [*prompt, *tokenizer(pair[answer]).input_ids, tokenizer.eos_token_id]
        rows = output_of(model, torch.tensor([ids]))[0].log_softmax(-1)
        sums.append(sum(rows[place - 1, ids[place]] for place in range(len(prompt), len(ids))))
    return torch.stack(sums)


def test_preferences_are_learned(llama, tokenizer):
    """The loss of the second step is -log sigmoid(beta * (how much the margin has grown)), by
    hand.
    """
    before, after_one = copy.deepcopy(llama), copy.deepcopy(llama)
    snapshots = Snapshots()
    config = SFTConfig(learning_rate=1e-2, max_steps=8, batch_size=len(PAIRS), warmup_steps=0)
    losses = train_dpo(
        llama, copy.deepcopy(tokenizer), PAIRS, config, beta=0.3, callbacks=(snapshots,)
    )
    assert len(losses) == 8
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the reference is the model itself
    assert losses[-1] < losses[1] < losses[0]
    after_one.load_state_dict(snapshots.after[1])

    def margin(model: nn.Module) -> Tensor:
        return log_p(model, tokenizer, PAIRS, "chosen") - log_p(model, tokenizer, PAIRS, "rejected")

    expected = (
        -torch.nn.functional.logsigmoid(0.3 * (margin(after_one) - margin(before))).mean().item()
    )
    assert losses[1] == pytest.approx(expected, abs=1e-4)
    assert (margin(llama) > margin(before)).all()
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("sft_weight", [0.0, 1.0, 0.25])
def test_chosen_answers_are_also_learned_as_examples(llama, tokenizer, sft_weight):
    """The first loss is log 2 and as many times the cross-entropy per chosen token, by hand."""
    before = copy.deepcopy(llama)
    config = SFTConfig(learning_rate=1e-2, max_steps=8, batch_size=len(PAIRS), warmup_steps=0)
    losses = train_dpo(
        llama, copy.deepcopy(tokenizer), PAIRS, config, beta=0.3, sft_weight=sft_weight
    )
    n_tokens = sum(len(tokenizer(pair["chosen"]).input_ids) + 1 for pair in PAIRS)
    cross_entropy = -log_p(before, tokenizer, PAIRS, "chosen").sum().item() / n_tokens
    assert losses[0] == pytest.approx(math.log(2) + sft_weight * cross_entropy, abs=1e-3)
    learned = log_p(llama, tokenizer, PAIRS, "chosen") - log_p(before, tokenizer, PAIRS, "chosen")
    if sft_weight:
        assert (learned > 0).all()


def test_preferences_in_a_bfloat16_model_are_trained_without_autocast(
    llama, tokenizer, monkeypatch
):
    monkeypatch.setattr(precision, "preferred_dtype", lambda device: torch.bfloat16)
    assert settings.common_arguments("", SFTConfig(), llama)["bf16"]
    llama.bfloat16()
    assert not settings.common_arguments("", SFTConfig(), llama)["bf16"]
    losses = train_dpo(
        llama,
        copy.deepcopy(tokenizer),
        PAIRS,
        SFTConfig(1e-2, max_steps=4, batch_size=8, warmup_steps=0),
    )
    assert losses[-1] < losses[0]
    assert llama.dtype == torch.bfloat16


def test_preference_training_stops_on_nan(llama, tokenizer):
    config = SFTConfig(max_steps=9, batch_size=4)
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 3\b"):
        train_dpo(llama, copy.deepcopy(tokenizer), PAIRS, config, callbacks=(SpoilAfter(2),))
    assert llama.config._attn_implementation == "sdpa"


# ----------------------------------------------------------------------------------------- adapters


def square_llama() -> nn.Module:
    """With as many channels in its heads as in its residual stream, which the llama-adapter
    needs.
    """
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=70,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_an_adapter_is_trained_and_nothing_else(tokenizer, method):
    model = square_llama()
    base = [
        (name, parameter, parameter.detach().clone())
        for name, parameter in model.named_parameters()
    ]
    wrapped = with_adapter(model, method, tokenizer)
    added = [
        (parameter, parameter.detach().clone())
        for parameter in wrapped.parameters()
        if parameter.requires_grad
    ]
    config = SFTConfig(learning_rate=1e-2, max_steps=8, batch_size=8, warmup_steps=0)
    losses = train_sft(wrapped, tokenizer, examples_of(8), config)
    assert losses[-1] < losses[0]
    for name, parameter, before in base:
        assert not parameter.requires_grad, name
        assert torch.equal(parameter, before), name
    assert any(not torch.equal(parameter, before) for parameter, before in added)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_an_adapted_model_is_measured_as_it_answers(tokenizer, method):
    """Openings and answers of different lengths in one batch, against one pass without a cache for
    each.
    """
    wrapped = with_adapter(square_llama(), method, tokenizer).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
                )
    texts, openings = ["w5 w6 w7 w8", "w9", "w4 w11 w3"], ["w3 w4 w5", "w6"]

    def log_p(ids: list[int]) -> Tensor:
        ids = torch.tensor([ids])
        return (
            wrapped(input_ids=ids, attention_mask=torch.ones_like(ids))
            .logits[0]
            .log_softmax(-1)
            .detach()
        )

    found = opening_log_probabilities(wrapped, tokenizer, texts, openings)
    for row, text in enumerate(texts):
        read = tokenizer(text).input_ids
        for column, opening in enumerate(openings):
            ids = tokenizer(opening).input_ids
            rows = log_p(read + ids)[-len(ids) - 1 : -1]
            assert found[row, column] == pytest.approx(
                float(rows[range(len(ids)), ids].sum()), abs=1e-4
            )
    for text, answer in zip(texts, generate(wrapped, tokenizer, texts, 5), strict=True):
        read, written = tokenizer(text).input_ids, []
        while len(written) < 5 and tokenizer.eos_token_id not in written:
            written.append(int(log_p(read + written)[-1].argmax()))
        assert answer == tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3", "gpt2"])
@pytest.mark.parametrize("method", ["llama-adapter", "dora"])
def test_an_adapter_that_cannot_be_had_names_those_that_can(tiny_models, tokenizer, name, method):
    model = tiny_models(name)
    if (name, method) == ("gpt2", "llama-adapter"):
        assert with_adapter(model, method, tokenizer).peft_config
        return
    there = "lora, llama-adapter, prefix" if name == "gpt2" else "lora, prefix"
    message = (
        rf"PEFT method '{method}' is not available for architecture '{name}' \(there: {there}\)"
    )
    with pytest.raises(ValueError, match=message):
        with_adapter(model, method, tokenizer)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_architecture_takes_the_methods_it_is_said_to(any_model, token_ids, tokenizer):
    model_type = any_model.config.model_type
    for method, types in PEFT_METHODS.items():
        if model_type in types and (method != "llama-adapter" or model_type == "gpt2"):
            wrapped = with_adapter(copy.deepcopy(any_model), method, tokenizer)
            wrapped(
                input_ids=token_ids, attention_mask=torch.ones_like(token_ids), labels=token_ids
            ).loss.backward()
            assert any(parameter.grad is not None for parameter in wrapped.parameters()), method


# -------------------------------------------------------------------------------------------- cache

CONFIG = SFTConfig(learning_rate=1e-2, max_steps=3, batch_size=4)


def units_of(seed: int = 0) -> PerUnit:
    """A third of the units of a tiny llama."""
    generator = torch.Generator().manual_seed(seed)
    return (
        PerUnit(
            {
                kind: torch.rand(3, size, generator=generator)
                for kind, size in (("attention", 60), ("mlp", 70))
            }
        )
        < 1 / 3
    )


def refuse_to_train(*args, **kwargs):
    raise AssertionError("trained again")


def test_second_call_does_not_train(
    own_cache, saved_llama, tokenizer, llama, token_ids, monkeypatch
):
    reports: list[tuple[int, int]] = []
    first, folder, losses = load_or_train(
        str(saved_llama),
        tokenizer,
        examples_of(12),
        CONFIG,
        report=lambda done, total: reports.append((done, total)),
    )
    assert reports == [(1, 3), (2, 3), (3, 3)]
    assert folder.parent == own_cache / "trained"
    assert len(losses) == 3
    assert json.loads((folder / "loss.json").read_text()) == losses
    assert not first.training

    monkeypatch.setattr(training, "train_sft", refuse_to_train)
    second, again, same_losses = load_or_train(str(saved_llama), tokenizer, examples_of(12), CONFIG)
    assert again == folder
    assert same_losses == losses
    assert not second.training
    assert same_parameters(second, parameters_of(first))
    assert not same_parameters(second, parameters_of(llama))
    with torch.no_grad():
        torch.testing.assert_close(
            second(token_ids).logits, first(token_ids).logits, rtol=1e-5, atol=1e-5
        )


def test_cached_folder_is_a_normal_checkpoint(own_cache, saved_llama, tokenizer):
    model, folder, _ = load_or_train(str(saved_llama), tokenizer, examples_of(12), CONFIG)
    assert same_parameters(AutoModelForCausalLM.from_pretrained(folder), parameters_of(model))
    assert loading.load_tokenizer(str(folder))("w3 w9").input_ids == [3, 9]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("change", ["base", "examples", "seed", "learning_rate", "max_steps"])
def test_anything_else_is_trained_anew(
    own_cache, saved_llama, tokenizer, llama, monkeypatch, change
):
    load_or_train(str(saved_llama), tokenizer, examples_of(12), CONFIG)
    examples, config = examples_of(12), CONFIG
    if change == "base":
        with torch.no_grad():
            llama.lm_head.weight.add_(0.01)
        llama.save_pretrained(saved_llama)
    elif change == "examples":
        examples[5]["labels"][-1] += 1
    else:
        config = SFTConfig(**vars(config) | {change: getattr(config, change) * 2 + 1})
    monkeypatch.setattr(training, "train_sft", refuse_to_train)
    with pytest.raises(AssertionError, match="trained again"):
        load_or_train(str(saved_llama), tokenizer, examples, config)


@pytest.mark.parametrize("where", ["training", "saving"])
def test_failure_leaves_nothing_in_the_cache(own_cache, saved_llama, tokenizer, monkeypatch, where):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(
        training, *(("train_sft", fail) if where == "training" else ("write_json", fail))
    )
    with pytest.raises(OSError, match="no space left"):
        load_or_train(str(saved_llama), tokenizer, examples_of(12), CONFIG)
    assert not list((own_cache / "trained").glob("*"))


def test_embedded_tokenizer_and_the_tiny_random_model(own_cache, monkeypatch):
    tokenizer = loading.load_tokenizer("tiny-random-llama")
    examples = []
    for prompt, response in [
        ("How do I bake bread?", "With flour."),
        ("Say hello.", "Hello there!"),
    ] * 2:
        asked, answered = tokenizer(prompt).input_ids, tokenizer(response).input_ids
        examples.append(
            {"input_ids": asked + answered, "labels": [IGNORED] * len(asked) + answered}
        )
    config = SFTConfig(learning_rate=1e-2, max_steps=4, batch_size=4, warmup_steps=0)
    _, folder, losses = load_or_train("tiny-random-llama", tokenizer, examples, config)
    assert losses[-1] < losses[0] - 0.1
    monkeypatch.setattr(training, "train_sft", refuse_to_train)
    assert load_or_train("tiny-random-llama", tokenizer, examples, config)[1:] == (folder, losses)


WAYS = {
    "plain": {},
    "units": {"only": units_of()},
    "other units": {"only": units_of(seed=1)},
    "units, bfloat16": {"only": units_of(), "dtype": torch.bfloat16},
    "dpo": {"method": "dpo"},
    "dpo, examples too": {"method": "dpo", "beta": 0.1, "sft_weight": 1.0},
    "dpo, units, bfloat16": {"method": "dpo", "only": units_of(), "dtype": torch.bfloat16},
}


def data_for(way: dict) -> list[dict]:
    return PAIRS if way.get("method") == "dpo" else examples_of(12)


def test_each_way_of_training_is_remembered_by_itself(
    own_cache, saved_llama, tokenizer, monkeypatch
):
    found = {}
    for name, way in WAYS.items():
        found[name] = load_or_train(
            str(saved_llama), copy.deepcopy(tokenizer), data_for(way), CONFIG, **way
        )
    assert len({folder for _, folder, _ in found.values()}) == len(WAYS)
    for train in ("train_sft", "train_dpo"):
        monkeypatch.setattr(training, train, refuse_to_train)
    for name, way in WAYS.items():
        model, folder, losses = load_or_train(
            str(saved_llama), tokenizer, data_for(way), CONFIG, **way
        )
        assert (folder, losses) == found[name][1:]
        assert same_parameters(model, parameters_of(found[name][0]))
        assert model.dtype == way.get("dtype", torch.float32)
        assert not model.training
    for other in (
        {"only": units_of(seed=2)},
        {"dtype": torch.bfloat16},
        {"method": "dpo"} | WAYS["units"],
    ):
        with pytest.raises(AssertionError, match="trained again"):
            load_or_train(str(saved_llama), tokenizer, data_for(other), CONFIG, **other)


def test_all_of_a_bfloat16_model_is_trained_as_units_of_it_are(own_cache, saved_llama, tokenizer):
    """In bfloat16 alone, no step of this size would move a weight by more than its own rounding."""
    config = SFTConfig(learning_rate=1e-5, max_steps=20, batch_size=4, warmup_steps=0)
    given = (str(saved_llama), tokenizer, examples_of(12), config)
    model, _, _ = load_or_train(*given, dtype=torch.bfloat16)
    start, plain = (loading.load(str(saved_llama), torch.bfloat16)[0] for _ in range(2))
    train_sft(plain, tokenizer, examples_of(12), config)

    def share_moved(trained: nn.Module) -> float:
        pairs = zip(trained.model.layers, start.model.layers, strict=True)
        moved = [(a.mlp.up_proj.weight != b.mlp.up_proj.weight).float().mean() for a, b in pairs]
        return float(torch.stack(moved).mean())

    assert model.dtype == torch.bfloat16
    assert share_moved(model) > 2 * share_moved(plain)


@pytest.mark.parametrize("way", [way for way in WAYS.values() if "only" in way])
def test_frozen_units_of_a_remembered_model_are_the_bases(
    own_cache, saved_llama, tokenizer, llama, way
):
    model, folder, losses = load_or_train(
        str(saved_llama), copy.deepcopy(tokenizer), data_for(way), CONFIG, **way
    )
    assert len(losses) == 3
    before = parameters_of(llama.to(model.dtype))
    for found in (model, loading.load(str(folder), model.dtype)[0]):
        for name, parameter in found.named_parameters():
            moved = parameter != before[name]
            layer = int(name.split(".")[2]) if "layers" in name else None
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                chosen = way["only"]["mlp" if "mlp" in name else "attention"][layer]
                assert torch.equal(moved.any(0), chosen)
            elif name.endswith(("gate_proj.weight", "up_proj.weight")):
                assert torch.equal(moved.any(1), way["only"]["mlp"][layer])
            elif not name.endswith("v_proj.weight"):
                assert not moved.any()


# ----------------------------------------------------------------------------------- unit gradients


def owned_by_hand(model: nn.Module, layer: int, kind: str, unit: int) -> list[Tensor]:
    """Gradients of the weight entries that a unit owns, by the names of the architecture's
    matrices.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    # value row: 6 query heads of 10 channels read 2 value heads
    shared = unit // 30 * 10 + unit % 10
    if model.config.model_type == "gpt2":  # stored (in, out)
        block = f"transformer.h.{layer}"
        if kind == "attention":
            writer = gradients[f"{block}.attn.c_proj.weight"]
            reader = f"{block}.attn.c_attn"
            row = 84 + unit
        else:
            writer, reader, row = gradients[f"{block}.mlp.c_proj.weight"], f"{block}.mlp.c_fc", unit
        return [
            writer[unit],
            gradients[f"{reader}.weight"][:, row],
            gradients[f"{reader}.bias"][row : row + 1],
        ]
    block = f"model.layers.{layer}"
    fused = model.config.model_type == "phi3"
    if kind == "attention":
        values = (
            gradients[f"{block}.self_attn.qkv_proj.weight"][80:]
            if fused
            else gradients[f"{block}.self_attn.v_proj.weight"]
        )
        return [gradients[f"{block}.self_attn.o_proj.weight"][:, unit], values[shared]]
    if fused:
        gate, up = gradients[f"{block}.mlp.gate_up_proj.weight"].chunk(2)
    else:
        gate = gradients[f"{block}.mlp.gate_proj.weight"]
        up = gradients[f"{block}.mlp.up_proj.weight"]
    return [gradients[f"{block}.mlp.down_proj.weight"][:, unit], gate[unit], up[unit]]


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2"])
def test_unit_gradients_equal_those_by_hand(tiny_models, name):
    model, examples = tiny_models(name), examples_of(10)
    before = parameters_of(model)
    # not to be counted
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    found = unit_gradients(model, [batch_of(examples[:3]), batch_of(examples[3:])])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same_parameters(model, before)
    model(**batch_of(examples)).loss.backward()  # the mean over all response tokens
    sizes = {"attention": 42 if name == "gpt2" else 60, "mlp": 70}
    assert {kind: values.shape for kind, values in found.items()} == {
        kind: (3, sizes[kind]) for kind in KINDS
    }
    for kind in KINDS:
        assert found[kind].dtype == torch.float64
        for layer in range(3):
            expected = [
                torch.cat(owned_by_hand(model, layer, kind, unit)).norm()
                for unit in range(sizes[kind])
            ]
            torch.testing.assert_close(
                found[kind][layer].float(), torch.stack(expected), rtol=1e-3, atol=1e-6
            )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unit_gradients_cover_what_training_only_trains(tiny_models, name):
    model, batch = tiny_models(name), batch_of(examples_of(10))
    found = unit_gradients(model, [batch])
    chosen = found.empty_set()
    chosen["mlp"][:, ::3] = True
    with training_only(model, chosen):
        model(**batch).loss.backward()
        total = sum(p.grad.double().square().sum() for p in model.parameters() if p.requires_grad)
    assert found["mlp"][chosen["mlp"]].square().sum().item() == pytest.approx(
        total.item(), rel=1e-4
    )


@pytest.mark.parametrize("batches", [[], [{"input_ids": [3, 4, 5], "labels": [IGNORED] * 3}]])
def test_unit_gradients_of_nothing_are_an_error(llama, batches):
    with pytest.raises(ValueError, match=r"no response token|nothing"):
        unit_gradients(llama, [batch_of([example]) for example in batches])
