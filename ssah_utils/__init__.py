"""Find the units of a language model that carry safety, switch them off, or freeze them.

What most users need, by what it is for; everything else stands in the modules. Each name is
imported when it is first asked for, so that ``import ssah_utils`` costs nothing.

Look at a model and ask it

- ``load``: a model and its tokenizer, by name, folder or hub id
- ``load_dataset``: a table of requests, by name or from a file
- ``generate``: greedy answers to rendered prompts
- ``refusal_margin``: how much likelier than complying refusing is, per request
- ``fingerprint``: what tells one model from another

Find units

- ``channel_moments``: mean and variance of every unit's activation
- ``variance_norm``: the score of the paper, from variances and weights
- ``zscore_per_module``: scores made comparable between modules
- ``partition``: every unit as safety, utility, complex or redundant
- ``top_units``: the units with the highest scores
- ``random_units``: a control set, as many units in every module
- ``PerUnit``: one value per unit, and sets of units, with arithmetic
- ``load_set``: a set of units from a file
- ``save_set``: a set of units into a file

Change a model

- ``ablated``: inside the block, units are held at zero
- ``without_units``: a smaller model from which units are gone
- ``freezing``: inside the block, all but these units are trained
- ``training_only``: inside the block, these units alone are trained
"""

import importlib
import importlib.util
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same once more, for type checkers and editors
    from ssah_utils.activations import channel_moments
    from ssah_utils.evaluation import generate, refusal_margin
    from ssah_utils.fingerprints import fingerprint
    from ssah_utils.interventions import ablated, without_units
    from ssah_utils.loading import load
    from ssah_utils.per_unit import PerUnit
    from ssah_utils.prompts.datasets import load_dataset
    from ssah_utils.scores import variance_norm, zscore_per_module
    from ssah_utils.unit_files import load_set, save_set
    from ssah_utils.unit_training import freezing, training_only
    from ssah_utils.units import partition, random_units, top_units

# Where a processor has bfloat16 it asks for a package, at every import of transformers' trainer, to
# fetch code from the hub with. Nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = [
    "PerUnit",
    "ablated",
    "channel_moments",
    "fingerprint",
    "freezing",
    "generate",
    "load",
    "load_dataset",
    "load_set",
    "partition",
    "random_units",
    "refusal_margin",
    "save_set",
    "top_units",
    "training_only",
    "variance_norm",
    "without_units",
    "zscore_per_module",
]

_HOMES = {
    "activations": ("channel_moments",),
    "evaluation": ("generate", "refusal_margin"),
    "fingerprints": ("fingerprint",),
    "interventions": ("ablated", "without_units"),
    "loading": ("load",),
    "per_unit": ("PerUnit",),
    "prompts.datasets": ("load_dataset",),
    "scores": ("variance_norm", "zscore_per_module"),
    "unit_training": ("freezing", "training_only"),
    "unit_files": ("load_set", "save_set"),
    "units": ("partition", "random_units", "top_units"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        found = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = found  # so that it is asked for here once
        return found
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"ssah_utils has no '{name}' (there are: {', '.join(__all__)})")


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__"]
