"""The ways to fine-tune that are put side by side, each with the control that must not do as well.

A *method* is what ``measured_training.FineTuning.follow`` takes: which units are frozen, by which
adapter, at which learning rate, with which defence. Knows sets of units, examples and defences.
Trains nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

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
from ssah_utils.experiments.defence_names import (
    COMBINED,
    FULL,
    MIXED,
    NAMED,
    NEED_UNALIGNED,
    ONLY_CONTROLS,
    SOME,
    mixed_names,
)
from ssah_utils.frozen_sets import RANDOM, middle_units
from ssah_utils.per_unit import PerUnit
from ssah_utils.sequences import Example


@dataclass(frozen=True)
class TrainingMethod:
    """One way to fine-tune.

    * ``mechanism``: what it acts on; two of the same kind are not combined.
    * ``control``: the id of a method that has as much of everything but its idea.
    * ``how``: arguments of ``FineTuning.follow``: factor, frozen, adapter, defence.
    * ``is_only_control``: whether nobody would use it but to compare.
    """

    id: str
    title: str
    mechanism: str
    control: str
    how: Mapping[str, object]
    is_only_control: bool = False


@dataclass(frozen=True)
class Strengths:
    """How strong every defence is.

    * ``mixed``: shares of the examples seen that are replaced by refusals.
    * ``low_rate``: a factor of the learning rate; ``adapters``: by adapter.
    * ``pull``, ``pull_units``: of L2 to the start, of all parameters and of units alone.
    * ``elastic``: of elastic weight consolidation. ``average``: the share of the newest weights.
    * ``vector``, ``drop``: of the safety vector, and what DARE drops. ``threshold``: of SafeLoRA.
    """

    mixed: Sequence[float]
    low_rate: float
    pull: float
    pull_units: float
    elastic: float
    average: float
    vector: float
    drop: float
    threshold: float
    adapters: Mapping[str, float]


def methods(
    sets: Mapping[str, PerUnit | None],
    refusals: list[Example],
    harmless: list[Example],
    unaligned: nn.Module | None,
    strengths: Strengths,
    some: str,
) -> dict[str, TrainingMethod]:
    """Every method by its id.

    * ``sets``: those of ``frozen_sets.frozen_sets``; ``some``: what its third is called.
    * ``refusals``, ``harmless``: examples to defend with, and harmless ones with the aligned
      model's own answers, for the controls.
    * ``unaligned``: a version of the model without its alignment. Without one, what needs it is
      left out.
    """
    own, random = sets[SOME], sets[RANDOM + SOME]
    given = {
        "pulled_safety": PulledToStart(strengths.pull_units, sets["safety"]),
        "pulled_some": PulledToStart(strengths.pull_units, own),
        "pulled_random": PulledToStart(strengths.pull_units, random),
        "pulled": PulledToStart(strengths.pull),
        "elastic": ElasticWeights(strengths.elastic, refusals),
        "elastic_harmless": ElasticWeights(strengths.elastic, harmless),
        "constrained": ConstrainedTokens(),
        "constrained_evenly": ConstrainedTokens(early=1.0, first=1.0),
        "surgery": GradientSurgery(refusals),
        "surgery_harmless": GradientSurgery(harmless),
        "average": MovingAverage(strengths.average),
    }
    frozen = {"safety": sets["safety"], SOME: own, RANDOM + SOME: random}
    frozen["middle_blocks"] = middle_units(own)
    how: dict[str, dict] = {FULL: {}, "lower_rate": {"factor": strengths.low_rate}}
    how |= {name: {"frozen": chosen} for name, chosen in frozen.items()}
    for name, factor in strengths.adapters.items():
        how[name] = {"factor": factor, "adapter": name}
    if unaligned is not None:
        vector = strengths.vector
        given["vector"] = SafetyVector(vector, unaligned)
        given["vector_dare"] = SafetyVector(vector, unaligned, drop=strengths.drop)
        given["vector_random"] = SafetyVector(vector, unaligned, is_random=True)
        if "lora" in how:
            given_lora = SafeLoRA(strengths.threshold, unaligned)
            how["safe_lora"] = how["lora"] | {"defence": given_lora}
    how |= {name: {"defence": defence} for name, defence in given.items()}
    words = {"some": some, "low_rate": strengths.low_rate}
    found = {name: _named(name, own_how, words) for name, own_how in how.items()}
    for share in strengths.mixed:
        name, control = mixed_names(share)
        for one, kind, examples, other in (
            (name, "refusals", refusals, control),
            (control, "harmless", harmless, FULL),
        ):
            title, how_mixed = (
                f"{100 * share:g}% {kind} mixed in",
                {"defence": Mixed(share, examples)},
            )
            found[one] = TrainingMethod(one, title, MIXED, other, how_mixed, one == control)
    return found


def _named(name: str, how: Mapping[str, object], words: Mapping[str, object]) -> TrainingMethod:
    title, mechanism, control = NAMED[name]
    is_control = name in ONLY_CONTROLS
    return TrainingMethod(name, title.format(**words), mechanism, control, how, is_control)


def tuned_method() -> TrainingMethod:
    """Full fine-tuning whose rate and stop were chosen; it is no training of its own."""
    return _named("tuned", {}, {})


def with_controls(names: Sequence[str], known: Mapping[str, TrainingMethod]) -> list[str]:
    """The methods of a comparison: full fine-tuning, those named, and the controls they need.

    ``KeyError`` for a name that is no method's. Those that need an unaligned version of the model
    are left out where there is none.
    """
    needed = [FULL]
    for name in names:
        if name in NEED_UNALIGNED and name not in known:
            continue
        if name not in known:
            raise KeyError(f"no method '{name}' (there are: {', '.join(known)})")
        needed += [name, known[name].control or FULL]
    return list(dict.fromkeys(needed))


def trained_together(one: TrainingMethod, other: TrainingMethod) -> TrainingMethod:
    """Both in one training; its control is the first of them."""
    given = [method.how["defence"] for method in (one, other) if "defence" in method.how]
    how = dict(one.how) | dict(other.how)
    if given:
        how["defence"] = given[0] if len(given) == 1 else Together(tuple(given))
    return TrainingMethod(COMBINED, f"{one.title} and {other.title}", "both", one.id, how)
