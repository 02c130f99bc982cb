"""Every setting of transformers' and TRL's trainers on which a trained model depends, once.

A default may change with a library's version, so none is relied on: a test holds these tables
against the fields of the installed libraries. Knows names and values of settings. Does not know
data, sequences or units.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TrainingArguments

from ssah_utils import extras, precision

MAX_REPETITIONS = 1000  # of a training in one run, each with a seed of its own


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


def training_seed(run_seed: int, k: int) -> int:
    """Seed of the k-th repetition of a training, from 0, in a run with its own seed.

    No two runs share one, so that repetitions of several runs can be counted together. ``run_seed +
    k`` would count run 0, repetition 1 and run 1, repetition 0 as two. ``ValueError`` for more
    repetitions than there is room for.
    """
    if not 0 <= k < MAX_REPETITIONS:
        raise ValueError(f"repetition {k} of a training: one below {MAX_REPETITIONS} is needed")
    return MAX_REPETITIONS * run_seed + k


# Of ``TrainingArguments``, for supervised and for preference training.
COMMON = {
    # optimizer and schedule
    "optim": "adamw_torch_fused",
    "optim_args": None,
    "optim_target_modules": None,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": None,
    # the loss
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "liger_kernel_config": None,
    "average_tokens_across_devices": True,
    "label_names": None,
    "use_cache": False,
    # batches and their order
    "gradient_accumulation_steps": 1,
    "auto_find_batch_size": False,
    "data_seed": None,
    "full_determinism": False,
    "dataloader_drop_last": False,
    "dataloader_num_workers": 0,
    "dataloader_in_order": True,
    "remove_unused_columns": False,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
    "dataloader_multiprocessing_context": None,
    "accelerator_config": {
        "split_batches": False,
        "dispatch_batches": False,
        "even_batches": True,
        "use_seedable_sampler": True,
        "non_blocking": False,
        "gradient_accumulation_kwargs": None,
        "use_configured_state": False,
    },
    # precision and kernels
    "fp16": False,
    "tf32": False,
    "activation_checkpointing": False,
    "activation_checkpointing_kwargs": None,
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "torch_empty_cache_steps": None,
    # several processes: buffers, which frozen weights are, follow the first process
    "parallelism_config": None,
    "fsdp": None,
    "fsdp_config": None,
    "deepspeed": None,
    "ddp_find_unused_parameters": True,
    "ddp_broadcast_buffers": True,
    "ddp_static_graph": False,
    "ddp_bucket_cap_mb": None,
    "ddp_backend": None,
    # what is said and kept on the way
    "disable_tqdm": True,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "report_to": "none",
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
    "debug": "",
}

# Of ``TrainingArguments``, for supervised training alone.
SUPERVISED = {"train_sampling_strategy": "group_by_length", "length_column_name": "prompt_length"}

# Of TRL's ``DPOConfig``: the loss of Rafailov et al. (2023), and beside it the cross-entropy of the
# chosen answers. Token ids, padding and dropout are decided here, not there.
PREFERENCE = {
    "loss_type": ["sigmoid", "sft"],
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "discopop_tau": 0.05,
    "precompute_ref_log_probs": True,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "disable_dropout": False,
    "max_length": None,
    "truncation_mode": "keep_start",
    "padding_free": False,
    "pad_to_multiple_of": None,
    "pad_token": None,
    "dataset_num_proc": None,
    "router_aux_loss_coef": 0.0,
    "activation_offloading": False,
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "train_sampling_strategy": "random",
    "length_column_name": "length",
}

# Fields that are left to the libraries, each with the reason why no trained model depends on it.
_LEFT = {
    "deprecated names of what is set": "gradient_checkpointing gradient_checkpointing_kwargs",
    "what is printed and where": (
        "logging_first_step log_on_each_node include_num_input_tokens_seen log_level"
        " log_level_replica run_name project trackio_space_id trackio_bucket_id"
        " trackio_static_space_id skip_memory_metrics"
    ),
    "evaluation, which is off": (
        "eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start"
        " eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics"
        " batch_eval_metrics bf16_full_eval fp16_full_eval metric_for_best_model greater_is_better"
    ),
    "checkpoints on the way, which are off": (
        "save_only_model save_steps save_on_each_node save_total_limit enable_jit_checkpoint"
        " ignore_data_skip restore_callback_states_from_checkpoint"
    ),
    "the hub, to which nothing is pushed": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push"
        " hub_revision"
    ),
    "for scripts, read by no trainer": "do_train do_eval do_predict",
    "of the process, set by whoever starts it": "local_rank ddp_timeout",
}
LEFT_TO_LIBRARIES = {reason: tuple(names.split()) for reason, names in _LEFT.items()}


def common_arguments(folder: str, config: SFTConfig, model: nn.Module) -> dict:
    """Keyword arguments of ``TrainingArguments`` that both kinds of training share."""
    extras.require("train")  # accelerate, which ``TrainingArguments`` asks for
    device = model.device.type
    is_native = precision.preferred_dtype(device) == torch.bfloat16
    return COMMON | {
        "output_dir": folder,
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
        "bf16": model.dtype == torch.float32 and is_native,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
    }


def training_arguments(folder: str, config: SFTConfig, model: nn.Module) -> TrainingArguments:
    """Settings of a supervised training."""
    return TrainingArguments(**common_arguments(folder, config, model), **SUPERVISED)


def preference_arguments(
    folder: str, config: SFTConfig, model: nn.Module, beta: float, sft_weight: float
) -> TrainingArguments:
    """TRL's ``DPOConfig``; the reference is read in batches of the training's size.

    ``sft_weight`` is that of the chosen answers' cross-entropy beside the preference loss.
    """
    with extras.needed("train"):
        from trl import DPOConfig  # slow to import

    return DPOConfig(
        **common_arguments(folder, config, model),
        **PREFERENCE,
        beta=beta,
        loss_weights=[1.0, sft_weight],
        precompute_ref_batch_size=config.batch_size,
    )


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Inside the block accelerate's environment variables do not overrule the tables above.

    ``ACCELERATE_MIXED_PRECISION`` alone would train in another precision than a trained model's key
    says.
    """
    names = [name for name in os.environ if name.startswith("ACCELERATE_")]
    aside = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(aside)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing is dropped, also in training mode.

    Neither by modules nor by the rates that models hand to attention. So supervised training,
    preference training (whose reference is read without dropout) and the gradients of units all see
    the same function.
    """
    rates = []
    for module in model.modules():
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        for name, value in vars(module).items():
            is_rate = "drop" in name or (name == "p" and is_dropout)
            if is_rate and type(value) is float and value:
                rates.append((module, name, value))
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)
