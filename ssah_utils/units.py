"""Sets of units: the partition into safety, utility, complex and redundant, and set arithmetic on it.

A set is ``{kind: (n_layers, n_channels) bool}``: True means "in the set", never "masked". Knows tensors and one file
format. Does not know models: a partition carries the fingerprint of its model, and whoever applies it compares.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssah_utils.files import complete_only

UnitSet = dict[str, Tensor]
PerUnit = dict[str, Tensor]

GROUPS = ("safety", "utility", "complex", "redundant")  # SCU, UCU, CU, RU in the paper


@dataclass(frozen=True)
class UnitPartition:
    """Every unit's group, as an index into ``GROUPS``: ``{kind: (n_layers, n_channels) int8}``."""

    group_index: dict[str, Tensor]
    fingerprint: str = ""

    def units(self, group: str) -> UnitSet:
        """The set of one group; ``ValueError`` for a name not in ``GROUPS``."""
        return {kind: index == GROUPS.index(group) for kind, index in self.group_index.items()}

    def counts(self) -> pd.DataFrame:
        """Units and share of all units per group, in total and by kind."""
        rows = {group: {kind: int(chosen.sum()) for kind, chosen in self.units(group).items()} for group in GROUPS}
        table = pd.DataFrame(rows).T
        table.insert(0, "units", table.sum(axis=1))
        table.insert(1, "share", table["units"] / table["units"].sum())
        return table.rename_axis("group")


def check_fractions(**fractions: float) -> None:
    """Raise ``ValueError`` unless every fraction is in [0, 1] and they add up to at most 1."""
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, but a fraction lies in [0, 1]")
    if sum(fractions.values()) > 1 + 1e-9:
        raise ValueError(f"{' + '.join(fractions)} is {sum(fractions.values()):.3g}, more than all units (1)")


def partition(
    z_safety: PerUnit,
    z_utility: PerUnit,
    safety_fraction: float = 0.013,
    utility_fraction: float = 0.133,
    redundant_fraction: float = 0.148,
    fingerprint: str = "",
) -> UnitPartition:
    """Assign every unit to one group by its standardised scores on safety and on utility data (SSAH section 4.1).

    Safety: the largest z_S - z_U of all units of the model. Utility: the largest z_U - z_S. Of the remaining, redundant:
    the smallest z_S + z_U; complex: the rest. Default fractions are those of the paper's Llama-2-7B-Chat. Where rounding
    would hand out one unit more than there are, the later group gives way.
    """
    check_fractions(safety_fraction=safety_fraction, utility_fraction=utility_fraction, redundant_fraction=redundant_fraction)
    safety, utility = flat(z_safety), flat(z_utility)
    n_units = safety.numel()
    n_safety, n_utility, n_redundant = (
        round(fraction * n_units) for fraction in (safety_fraction, utility_fraction, redundant_fraction)
    )
    n_utility = min(n_utility, n_units - n_safety)
    index = torch.full((n_units,), GROUPS.index("complex"), dtype=torch.int8)
    by_contrast = torch.argsort(safety - utility, descending=True, stable=True)
    index[by_contrast[:n_safety]] = GROUPS.index("safety")
    index[by_contrast[n_units - n_utility :]] = GROUPS.index("utility")
    by_sum = torch.argsort(safety + utility, stable=True)
    free = by_sum[index[by_sum] == GROUPS.index("complex")]
    index[free[:n_redundant]] = GROUPS.index("redundant")
    return UnitPartition(_unflatten(index, z_safety), fingerprint)


def top_units(score: PerUnit, fraction: float) -> UnitSet:
    """The given fraction of all units with the highest score."""
    check_fractions(fraction=fraction)
    values = flat(score)
    n_ranked, n_wanted = int((values > -torch.inf).sum()), round(fraction * values.numel())
    if n_wanted > n_ranked:
        raise ValueError(f"{fraction:g} of all units are {n_wanted}, but only {n_ranked} units are there to choose from")
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[torch.argsort(values, descending=True, stable=True)[: round(fraction * values.numel())]] = True
    return _unflatten(chosen, score)


def set_difference(score: PerUnit, other: PerUnit, fraction: float) -> UnitSet:
    """Units in the top q of ``score`` but not in the top q of ``other``, as Wei et al. (ICML 2024) do with single weights.

    They set the two shares by hand; here both are q, the smallest at which exactly the given fraction of all units is
    left. Raises ``ValueError`` where no q leaves so many, as with two equal rankings.
    """
    check_fractions(fraction=fraction)
    ranks = [torch.argsort(torch.argsort(flat(values), descending=True, stable=True)) for values in (score, other)]
    n_units = ranks[0].numel()
    n_wanted = round(fraction * n_units)
    in_both = torch.bincount(torch.maximum(*ranks), minlength=n_units).cumsum(0)  # how many are in both tops, for q = 1, 2, ...
    left = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(1, n_units + 1) - in_both])
    enough = (left >= n_wanted).nonzero()  # one more unit on each side changes the difference by at most one
    if not len(enough):
        raise ValueError(f"no share leaves {n_wanted} units: the two rankings differ by at most {int(left.max())}")
    q = int(enough[0])
    return _unflatten((ranks[0] < q) & (ranks[1] >= q), score)


def random_units(like: UnitSet, generator: torch.Generator) -> UnitSet:
    """A random set with exactly as many units in every module as ``like``: the control for what *which* units means."""

    def draw(chosen: Tensor) -> Tensor:
        order = torch.rand(chosen.shape, generator=generator).argsort(1)
        return order.argsort(1) < chosen.sum(1, keepdim=True)

    return {kind: draw(chosen) for kind, chosen in like.items()}


def of_kind(units: UnitSet, kind: str) -> UnitSet:
    """The units of one kind alone."""
    return {k: chosen if k == kind else torch.zeros_like(chosen) for k, chosen in units.items()}


def size(units: UnitSet) -> int:
    return sum(int(chosen.sum()) for chosen in units.values())


def size_of_all(units: UnitSet) -> int:
    return sum(chosen.numel() for chosen in units.values())


def jaccard(a: UnitSet, b: UnitSet) -> float:
    """|a and b| / |a or b|; 1 for two empty sets."""
    both = sum(int((a[kind] & b[kind]).sum()) for kind in a)
    either = sum(int((a[kind] | b[kind]).sum()) for kind in a)
    return both / either if either else 1.0


def chance_jaccard(a: UnitSet, b: UnitSet) -> float:
    """Jaccard of two random sets with as many units in every module, at their expected overlap (hypergeometric mean)."""
    both = sum(float((a[kind].sum(1) * b[kind].sum(1) / a[kind].shape[1]).sum()) for kind in a)
    either = size(a) + size(b) - both
    return both / either if either else 1.0


def overlap_table(sets: dict[str, UnitSet]) -> pd.DataFrame:
    """Jaccard of every set with every set: rows ``first``, ``second``, ``jaccard``, ``chance``, ``corrected`` for chance.

    Corrected is (J - chance) / (1 - chance): 0 for sets that share what random ones do, 1 for equal ones.
    """
    rows = []
    for first, a in sets.items():
        for second, b in sets.items():
            found, chance = jaccard(a, b), chance_jaccard(a, b)
            corrected = (found - chance) / (1 - chance) if chance < 1 else 1.0
            rows.append({"first": first, "second": second, "jaccard": found, "chance": chance, "corrected": corrected})
    return pd.DataFrame(rows)


def of_indices(indices: list[int], like: UnitSet) -> UnitSet:
    """The set of units at the given places of ``flat``."""
    chosen = torch.zeros(size_of_all(like), dtype=torch.bool)
    chosen[indices] = True
    return _unflatten(chosen, like)


def names(units: UnitSet) -> list[str]:
    """Every unit as kind/layer/channel."""
    return [f"{kind}/{layer}/{channel}" for kind, chosen in units.items() for layer, channel in chosen.nonzero().tolist()]


def to_table(z_safety: PerUnit, z_utility: PerUnit, parted: UnitPartition) -> pd.DataFrame:
    """One row per unit: kind, layer, channel, z_safety, z_utility, group."""
    frames = []
    for kind, index in parted.group_index.items():
        layer, channel = torch.meshgrid(*(torch.arange(n) for n in index.shape), indexing="ij")
        frames.append(
            pd.DataFrame(
                {
                    "kind": kind,
                    "layer": layer.flatten().numpy(),
                    "channel": channel.flatten().numpy(),
                    "z_safety": z_safety[kind].flatten().numpy(),
                    "z_utility": z_utility[kind].flatten().numpy(),
                    "group": pd.Categorical.from_codes(index.flatten().numpy(), categories=list(GROUPS)),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def transfer_table(before: UnitPartition, after: UnitPartition) -> pd.DataFrame:
    """Where the units of every group went: rows ``before``, ``after``, ``units``, ``share`` (of the group before)."""
    rows = []
    for source in GROUPS:
        left = before.units(source)
        for target in GROUPS:
            right = after.units(target)
            moved = sum(int((left[kind] & right[kind]).sum()) for kind in left)
            rows.append({"before": source, "after": target, "units": moved, "share": moved / max(1, size(left))})
    return pd.DataFrame(rows)


def union(a: UnitSet, b: UnitSet) -> UnitSet:
    return {kind: a[kind] | b[kind] for kind in a}


def save_set(path: Path | str, chosen: UnitSet, fingerprint: str, what: str) -> None:
    """Write one set of units as safetensors, with its model's fingerprint and what it is in words: to take away."""
    content = {f"set.{kind}": values.contiguous() for kind, values in chosen.items()}
    with complete_only(path) as partial:
        save_file(content, partial, {"format": "ssah-unit-set-1", "fingerprint": fingerprint, "what": what})


def load_set(path: Path | str, fingerprint: str = "") -> UnitSet:
    """A set that ``save_set`` wrote; with ``fingerprint``, ``ValueError`` if it is of another model."""
    metadata, tensors = _read(path, "ssah-unit-set-1", "06_freezing")
    if fingerprint and metadata["fingerprint"] != fingerprint:
        raise ValueError(f"{path} was made for model {metadata['fingerprint']}, not for the loaded {fingerprint}")
    return {name.removeprefix("set."): values for name, values in tensors.items()}


def save_sets(path: Path | str, sets: dict[str, UnitSet], fingerprint: str) -> None:
    """Write several named sets of one model in one safetensors file."""
    content = {f"{n}.{kind}": values.contiguous() for n, chosen in enumerate(sets.values()) for kind, values in chosen.items()}
    metadata = {"format": "ssah-unit-sets-1", "fingerprint": fingerprint, "names": json.dumps(list(sets))}
    with complete_only(path) as partial:
        save_file(content, partial, metadata)


def load_sets(path: Path | str, fingerprint: str = "") -> dict[str, UnitSet]:
    """The sets that ``save_sets`` wrote, in order; with ``fingerprint``, ``ValueError`` if they are of another model."""
    metadata, tensors = _read(path, "ssah-unit-sets-1", "03_units")
    if fingerprint and metadata["fingerprint"] != fingerprint:
        raise ValueError(f"{path} was made for model {metadata['fingerprint']}, not for the loaded {fingerprint}: run 03_units")
    found: dict[str, UnitSet] = {name: {} for name in json.loads(metadata["names"])}
    for key, values in tensors.items():
        number, _, kind = key.partition(".")
        list(found.values())[int(number)][kind] = values
    return found


def save_partition(path: Path | str, parted: UnitPartition, **tensors: PerUnit) -> None:
    """Write a partition as safetensors with its fingerprint; extra per-unit tensors (scores) go along by name."""
    content = {f"group.{kind}": index.contiguous() for kind, index in parted.group_index.items()}
    for name, per_unit in tensors.items():
        content |= {f"{name}.{kind}": values.contiguous() for kind, values in per_unit.items()}
    metadata = {"format": "ssah-units-1", "groups": json.dumps(GROUPS), "fingerprint": parted.fingerprint}
    with complete_only(path) as partial:
        save_file(content, partial, metadata)


def load_partition(path: Path | str, fingerprint: str = "") -> tuple[UnitPartition, dict[str, PerUnit]]:
    """Partition and extra per-unit tensors from a file; ``fingerprint`` is that of the model it will be used on.

    Raises ``FileNotFoundError`` or ``ValueError`` (not a partition file, or one of another model).
    """
    metadata, tensors = _read(path, "ssah-units-1", "03_units")
    if fingerprint and metadata["fingerprint"] != fingerprint:
        raise ValueError(
            f"{path} belongs to model {metadata['fingerprint']}, not to the loaded {fingerprint}: run 03_units on this model"
        )
    named: dict[str, PerUnit] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        named.setdefault(name, {})[kind] = tensor
    return UnitPartition(named.pop("group"), metadata["fingerprint"]), named


def _read(path: Path | str, expected: str, stage: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file of the expected format, which ``stage`` writes."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"unit file {path} does not exist: run {stage} first")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): run {stage} again") from error
    if metadata.get("format") != expected:
        raise ValueError(f"{path} is not a file of format {expected}: run {stage} again")
    return metadata, tensors


def flat(per_unit: PerUnit) -> Tensor:
    """All units in one vector, kind by kind, block by block."""
    return torch.cat([values.flatten() for values in per_unit.values()])


def _unflatten(flat: Tensor, like: PerUnit) -> PerUnit:
    parts = flat.split([values.numel() for values in like.values()])
    return {kind: part.view(like[kind].shape) for (kind, part) in zip(like, parts, strict=True)}
