"""Optional libraries: which extra of the package brings which, and one line that says so where one
is missing.

Ablating or freezing units and reading unit files needs none of them. Knows names of libraries only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

# By the names under which they are imported; pyproject.toml has the same by the names of packages.
EXTRAS = {
    "embedded": ("gguf",),
    "train": ("accelerate", "datasets", "peft", "trl"),
    "eval": ("datasets", "lm_eval", "pyarrow", "scipy", "sklearn"),
    "quantised": ("accelerate", "bitsandbytes"),
    "devices": ("accelerate",),
    "notebooks": (
        "ipykernel",
        "ipywidgets",
        "jupyterlab",
        "matplotlib",
        "nbconvert",
        "papermill",
        "seaborn",
    ),
    "sweep": ("snakemake", "snakemake_executor_plugin_slurm"),
}
# What every run of notebooks needs. Of the others, ``quantised`` is asked for where codes are.
NEEDED = ("embedded", "train", "eval", "devices", "notebooks")


def require(*extras: str) -> None:
    """``ModuleNotFoundError`` in one line for the first of these extras that is not installed.

    For libraries that are not imported here, but by those that are.
    """
    for extra in extras:
        for library in absent(extra):
            raise _missing(library, extra)


def absent(extra: str) -> list[str]:
    """Libraries of an extra that are not installed."""
    return [library for library in EXTRAS[extra] if find_spec(library) is None]


def how_to_install(extra: str) -> str:
    """The command that brings an extra."""
    return f'pip install "ssah-utils[{extra}]"'


@contextmanager
def needed(extra: str) -> Iterator[None]:
    """Inside the block, an import that fails for want of an extra says in one line which it is."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library in EXTRAS[extra]:
            raise _missing(library, extra) from None
        raise


def _missing(library: str, extra: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{library} is not installed: {how_to_install(extra)}", name=library)
