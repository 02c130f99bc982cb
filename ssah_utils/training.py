"""Supervised fine-tuning on prompt/response pairs with the Hugging Face ``Trainer``.

Knows models and token sequences. Does not know data sets, scores or notebooks.
"""

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ssah_utils import models
from ssah_utils.files import cache_dir, complete_only, require_space, sha256_of, sha256_of_file, write_json


@dataclass(frozen=True)
class SFTConfig:
    """Hyper-parameters of one fine-tuning; ``max_steps`` above 0 overrides ``epochs``."""

    learning_rate: float = 1.0e-4
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 8
    warmup_steps: int = 5
    weight_decay: float = 0.0
    seed: int = 0


class ResponseTrainer(Trainer):
    """``Trainer`` whose language-model head runs only where a label is; the loss is the same cross-entropy.

    TRL's SFTTrainer has this on Triton devices; on a CPU it scores every position and leaves ``forward`` patched.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        plain = self.accelerator.unwrap_model(model)
        labels = inputs["labels"][:, 1:]
        carries_loss = labels != -100
        with self.accelerator.autocast():  # the Trainer wraps model.forward only, which is bypassed here
            hidden = models.backbone_of(plain)(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).last_hidden_state[:, :-1]  # (B, T-1, d_model)
            logits = models.logits_of(plain, hidden[carries_loss])  # (n_labels, vocabulary)
        total = cross_entropy(logits.float(), labels[carries_loss], reduction="sum")
        return total / (carries_loss.sum() if num_items_in_batch is None else num_items_in_batch)


class StopOnNaN(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise FloatingPointError(f"loss is not finite at step {state.global_step}: lower the learning rate")


class ReportSteps(TrainerCallback):
    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.report = report

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.report(state.global_step, state.max_steps)


def fine_tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, list[int]]],
    config: SFTConfig,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> list[float]:
    """Train all parameters in place (float32 weights, bfloat16 autocast where native); returns the loss of every step."""
    if not examples:
        raise ValueError("nothing to train on: the list of examples is empty")
    device = next(model.parameters()).device.type
    attention = model.config._attn_implementation
    if device == "cpu":  # the backward pass of the fused kernel takes a quarter of a step at these lengths
        model.set_attn_implementation("eager")
    with tempfile.TemporaryDirectory() as folder:
        trainer = ResponseTrainer(
            model=model,
            args=training_arguments(folder, config, device),
            train_dataset=with_prompt_length(examples),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100),
            callbacks=[StopOnNaN(), *callbacks],
        )
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints its final log as a bare dict
                trainer.train()
        finally:
            model.set_attn_implementation(attention)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_prompt_length(examples: list[dict[str, list[int]]]) -> Dataset:
    """The examples with the length to group batches by: that of the prompt.

    Grouping by whole length would sort short refusals from long answers, and batches of nothing but refusals teach a model
    to refuse everything.
    """
    lengths = [sum(label == -100 for label in example["labels"]) for example in examples]
    return Dataset.from_list(examples).add_column("prompt_length", lengths)


def training_arguments(folder: str, config: SFTConfig, device: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        seed=config.seed,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        bf16=models.preferred_dtype(device) == torch.bfloat16,
        use_cpu=device == "cpu",
        train_sampling_strategy="group_by_length",
        length_column_name="prompt_length",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=device != "cpu",
    )


def fine_tuned(
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, list[int]]],
    config: SFTConfig,
    device: str = "cpu",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[nn.Module, Path, list[float]]:
    """Fine-tune a copy of model ``base``, or load it when the same base, examples and settings were trained before.

    ``report`` is called with the steps done and their number. Returns the float32 model, its folder in the cache (a
    normal Hugging Face checkpoint) and the loss curve.
    """
    model, _ = models.load(base, device=device)
    recipe = {"base": models.fingerprint(model), "examples": examples, "config": asdict(config)}
    recipe |= {"code": sha256_of_file(__file__), "torch": torch.__version__, "transformers": transformers.__version__}
    folder = cache_dir() / "trained" / sha256_of(recipe)[:16]
    if folder.exists():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(device).eval()
        return model, folder, json.loads((folder / "loss.json").read_text())
    require_space(folder.parent, 6 * sum(p.numel() for p in model.parameters()))
    losses = fine_tune(model, tokenizer, examples, config, (ReportSteps(report),))
    model.eval()
    with complete_only(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / "loss.json", losses)
    return model, folder, losses
