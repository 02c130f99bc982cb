"""Fine-tuning that equals the plain Trainer's step by step, fails loudly, and is done once."""

import json
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from ssah_utils import models, training
from ssah_utils.training import ResponseTrainer, SFTConfig, fine_tune, fine_tuned, training_arguments
from tests.conftest import VOCABULARY, parameters_of, same_parameters, tiny_model

IGNORED = -100


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(models, "preferred_dtype", lambda device: torch.float32)


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
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(e[key]) for e in examples], True, value)

    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(e["labels"]), dtype=torch.int64) for e in examples], True)
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED), "attention_mask": mask}


class PlainTrainer(Trainer):
    """The Trainer as it is, but for columns that are not the model's."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        return super().compute_loss(model, kept, *args, **kwargs)


@pytest.fixture
def with_arguments(monkeypatch):
    """Change what ``training_arguments`` returns, as in ``with_arguments(train_sampling_strategy="sequential")``."""

    def change(**values) -> None:
        def changed(*args):
            arguments = training_arguments(*args)
            for name, value in values.items():
                assert hasattr(arguments, name)
                setattr(arguments, name, value)
            return arguments

        monkeypatch.setattr(training, "training_arguments", changed)

    return change


# ------------------------------------------------------------------------------------------------------------------ the loss


def test_loss_and_gradients_equal_the_models_own(any_model, tmp_path):
    any_model.set_attn_implementation("eager")
    batch = batch_of(examples_of(6))
    loss = any_model(**batch).loss
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in any_model.named_parameters()}
    any_model.zero_grad()

    trainer = ResponseTrainer(model=any_model, args=training_arguments(str(tmp_path), SFTConfig(), "cpu"))
    found = trainer.compute_loss(any_model, batch)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in any_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_loss_is_shared_among_the_tokens_of_the_whole_batch(llama, tmp_path):
    batch = batch_of(examples_of(6))
    trainer = ResponseTrainer(model=llama, args=training_arguments(str(tmp_path), SFTConfig(), "cpu"))
    n_items = torch.tensor(100)
    expected = llama(**batch, num_items_in_batch=n_items).loss.item()
    assert trainer.compute_loss(llama, batch, num_items_in_batch=n_items).item() == pytest.approx(expected, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- trajectories


@pytest.mark.parametrize("sampling", [None, "sequential", "random"])
def test_trajectory_equals_the_plain_trainers(llama, tokenizer, with_arguments, monkeypatch, sampling):
    if sampling:
        with_arguments(train_sampling_strategy=sampling)
    config, examples = SFTConfig(learning_rate=1e-2, max_steps=20, batch_size=4, seed=3), examples_of(24)
    found = fine_tune(llama, tokenizer, examples, config)

    reference = tiny_model("llama")
    monkeypatch.setattr(training, "ResponseTrainer", PlainTrainer)
    expected = fine_tune(reference, tokenizer, examples, config)
    assert len(found) == 20
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0] - 0.5  # it learned something, so the trajectories could have parted
    for a, b in zip(llama.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_trajectory_in_bfloat16_equals_the_plain_trainers(llama, tokenizer, monkeypatch):
    config, examples = SFTConfig(learning_rate=1e-2, max_steps=4, batch_size=4), examples_of(24)
    exact = fine_tune(tiny_model("llama"), tokenizer, examples, config)
    monkeypatch.setattr(models, "preferred_dtype", lambda device: torch.bfloat16)
    found = fine_tune(llama, tokenizer, examples, config)
    monkeypatch.setattr(training, "ResponseTrainer", PlainTrainer)
    expected = fine_tune(tiny_model("llama"), tokenizer, examples, config)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found != pytest.approx(exact, rel=1e-4)  # so autocast was on
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.float32}


def test_accumulated_gradients_equal_a_large_batch(llama, tokenizer, with_arguments):
    examples = examples_of(24)
    with_arguments(train_sampling_strategy="sequential")
    expected = fine_tune(tiny_model("llama"), tokenizer, examples, SFTConfig(learning_rate=1e-2, max_steps=5, batch_size=8))
    with_arguments(train_sampling_strategy="sequential", gradient_accumulation_steps=4)
    found = fine_tune(llama, tokenizer, examples, SFTConfig(learning_rate=1e-2, max_steps=5, batch_size=2))
    assert len(found) == 5
    assert found == pytest.approx(expected, abs=1e-5)


def test_training_repeats_with_the_seed(tokenizer):
    examples = examples_of(24)
    first, again, other = (
        fine_tune(tiny_model("llama"), tokenizer, examples, SFTConfig(max_steps=4, batch_size=4, seed=seed))
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(("config", "n_steps"), [(SFTConfig(batch_size=4), 3), (SFTConfig(batch_size=4, epochs=2), 6),
                                                 (SFTConfig(batch_size=4, epochs=9, max_steps=2), 2)])  # fmt: skip
def test_number_of_steps(llama, tokenizer, config, n_steps):
    assert len(fine_tune(llama, tokenizer, examples_of(10), config)) == n_steps


def test_loss_is_the_mean_over_response_tokens(llama, tokenizer):
    examples = examples_of(8)
    loss = fine_tune(llama, tokenizer, examples, SFTConfig(max_steps=1, batch_size=8))[0]
    reference = tiny_model("llama")
    with torch.no_grad():
        logits = [reference(torch.tensor([e["input_ids"]])).logits[0].log_softmax(-1) for e in examples]
    terms = [
        -row[place - 1, token].item()
        for row, example in zip(logits, examples, strict=True)
        for place, token in enumerate(example["labels"])
        if token != IGNORED
    ]
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------------ failures


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
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 4\b"):
        fine_tune(llama, tokenizer, examples_of(24), SFTConfig(max_steps=9, batch_size=4), (SpoilAfter(3),))


def test_nan_weight_stops_at_the_first_step(llama, tokenizer):
    spoil(llama)
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 1\b"):
        fine_tune(llama, tokenizer, examples_of(24), SFTConfig(max_steps=9, batch_size=4))


@pytest.mark.parametrize("fails", [False, True])
def test_attention_is_restored(llama, tokenizer, fails):
    assert llama.config._attn_implementation == "sdpa"
    if fails:
        spoil(llama)
        with pytest.raises(FloatingPointError):
            fine_tune(llama, tokenizer, examples_of(4), SFTConfig(max_steps=1))
    else:
        fine_tune(llama, tokenizer, examples_of(4), SFTConfig(max_steps=1))
    assert llama.config._attn_implementation == "sdpa"


def test_nothing_to_train_on_is_an_error(llama, tokenizer):
    before = parameters_of(llama)
    with pytest.raises(ValueError, match="nothing to train on"):
        fine_tune(llama, tokenizer, [], SFTConfig())
    assert same_parameters(llama, before)


# --------------------------------------------------------------------------------------------------------------------- cache

CONFIG = SFTConfig(learning_rate=1e-2, max_steps=3, batch_size=4)


def refuse_to_train(*args, **kwargs):
    raise AssertionError("trained again")


def test_second_call_does_not_train(own_cache, saved_llama, tokenizer, llama, token_ids, monkeypatch):
    reports: list[tuple[int, int]] = []
    first, folder, losses = fine_tuned(
        str(saved_llama), tokenizer, examples_of(12), CONFIG, report=lambda done, total: reports.append((done, total))
    )
    assert reports == [(1, 3), (2, 3), (3, 3)]
    assert folder.parent == own_cache / "trained"
    assert len(losses) == 3
    assert json.loads((folder / "loss.json").read_text()) == losses
    assert not first.training

    monkeypatch.setattr(training, "fine_tune", refuse_to_train)
    second, again, same_losses = fine_tuned(str(saved_llama), tokenizer, examples_of(12), CONFIG)
    assert again == folder
    assert same_losses == losses
    assert not second.training
    assert same_parameters(second, parameters_of(first))
    assert not same_parameters(second, parameters_of(llama))
    with torch.no_grad():
        torch.testing.assert_close(second(token_ids).logits, first(token_ids).logits, rtol=1e-5, atol=1e-5)


def test_cached_folder_is_a_normal_checkpoint(own_cache, saved_llama, tokenizer):
    model, folder, _ = fine_tuned(str(saved_llama), tokenizer, examples_of(12), CONFIG)
    assert same_parameters(AutoModelForCausalLM.from_pretrained(folder), parameters_of(model))
    assert models.load_tokenizer(str(folder))("w3 w9").input_ids == [3, 9]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("change", ["base", "examples", "seed", "learning_rate", "max_steps"])
def test_anything_else_is_trained_anew(own_cache, saved_llama, tokenizer, llama, monkeypatch, change):
    fine_tuned(str(saved_llama), tokenizer, examples_of(12), CONFIG)
    examples, config = examples_of(12), CONFIG
    if change == "base":
        with torch.no_grad():
            llama.lm_head.weight.add_(0.01)
        llama.save_pretrained(saved_llama)
    elif change == "examples":
        examples[5]["labels"][-1] += 1
    else:
        config = SFTConfig(**vars(config) | {change: getattr(config, change) * 2 + 1})
    monkeypatch.setattr(training, "fine_tune", refuse_to_train)
    with pytest.raises(AssertionError, match="trained again"):
        fine_tuned(str(saved_llama), tokenizer, examples, config)


@pytest.mark.parametrize("where", ["training", "saving"])
def test_failure_leaves_nothing_in_the_cache(own_cache, saved_llama, tokenizer, monkeypatch, where):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(training, *(("fine_tune", fail) if where == "training" else ("write_json", fail)))
    with pytest.raises(OSError, match="no space left"):
        fine_tuned(str(saved_llama), tokenizer, examples_of(12), CONFIG)
    assert not list((own_cache / "trained").glob("*"))


def test_embedded_tokenizer_and_the_tiny_random_model(own_cache, monkeypatch):
    tokenizer = models.load_tokenizer("tiny-random-llama")
    examples = []
    for prompt, response in [("How do I bake bread?", "With flour."), ("Say hello.", "Hello there!")] * 2:
        asked, answered = tokenizer(prompt).input_ids, tokenizer(response).input_ids
        examples.append({"input_ids": asked + answered, "labels": [IGNORED] * len(asked) + answered})
    config = SFTConfig(learning_rate=1e-2, max_steps=4, batch_size=4, warmup_steps=0)
    _, folder, losses = fine_tuned("tiny-random-llama", tokenizer, examples, config)
    assert losses[-1] < losses[0] - 0.1
    monkeypatch.setattr(training, "fine_tune", refuse_to_train)
    assert fine_tuned("tiny-random-llama", tokenizer, examples, config)[1:] == (folder, losses)
