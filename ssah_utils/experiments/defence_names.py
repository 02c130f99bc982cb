"""What the ways to fine-tune that are put side by side are called, and what each is compared with.

Imports no trainer, so that parameters are checked at once. ``defence_methods`` makes them.
"""

from ssah_utils.frozen_sets import RANDOM

FULL = "nothing"  # full fine-tuning, with no defence
COMBINED = "combination"
MIXED = "data"  # what the methods of ``mixed_names`` act on
SOME = "safety_some_complex"
NEED_UNALIGNED = ("vector", "vector_dare", "vector_random", "safe_lora")
ONLY_CONTROLS = (
    *(RANDOM + SOME, "pulled_random", "elastic_harmless", "constrained_evenly"),
    *("surgery_harmless", "vector_random"),
)
# By id: title, what it acts on (two of one kind are not combined), and the id of its control, which
# has as much of everything but the idea. {some} is the set that is frozen, {low_rate} a number.
NAMED = {
    FULL: ("full fine-tuning", "none", ""),
    "safety": ("frozen: safety", "units", RANDOM + SOME),
    SOME: ("frozen: {some}", "units", RANDOM + SOME),
    RANDOM + SOME: ("frozen: random units", "units", FULL),
    "middle_blocks": ("frozen: middle blocks", "units", RANDOM + SOME),
    "pulled_safety": ("L2, safety", "units", "pulled_random"),
    "pulled_some": ("L2, {some}", "units", "pulled_random"),
    "pulled_random": ("L2, random units", "units", FULL),
    "pulled": ("L2, all", "start", "lower_rate"),
    "elastic": ("EWC on refusals", "start", "elastic_harmless"),
    "elastic_harmless": ("EWC on harmless answers", "start", FULL),
    "constrained": ("constrained first tokens", "loss", "constrained_evenly"),
    "constrained_evenly": ("constrained, all tokens alike", "loss", FULL),
    "surgery": ("gradient surgery, refusals", "gradient", "surgery_harmless"),
    "surgery_harmless": ("gradient surgery, harmless", "gradient", FULL),
    "average": ("moving average", "kept", "lower_rate"),
    "lower_rate": ("learning rate x {low_rate:g}", "rate", FULL),
    "vector": ("RESTA", "kept", "vector_random"),
    "vector_dare": ("RESTA with DARE", "kept", "vector_random"),
    "vector_random": ("RESTA, random vector", "kept", FULL),
    "lora": ("LoRA", "adapter", FULL),
    "llama-adapter": ("LLaMA-Adapter", "adapter", FULL),
    "prefix": ("prefix tuning", "adapter", FULL),
    "safe_lora": ("SafeLoRA", "adapter", "lora"),
    "tuned": ("rate and stop by task loss", "rate", FULL),
}


def mixed_names(share: float) -> tuple[str, str]:
    """The ids of the method that mixes in a share of refusals, and of its control, which mixes in
    as many harmless examples: ``mixed_3`` and ``mixed_harmless_3`` for 0.03.
    """
    return f"mixed_{100 * share:g}", f"mixed_harmless_{100 * share:g}"
