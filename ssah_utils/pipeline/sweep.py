"""Sweeps: the same notebooks for many seeds, models and values of parameters, as jobs.

    ssah sweep --profile laptop --seeds 0:10 --jobs 4
    ssah sweep --profile laptop --seeds 0:3 --models a,b --set steps=[10] --set steps=[20]
    ssah sweep --profile llama2-7b --seeds 0:10 --jobs 20 --executor slurm

Every job is ``ssah run --only NOTEBOOK`` of one run folder, so a sweep leaves what single runs
leave, and what they left counts as done. Knows runs and stages; which job runs when and where is
the engine's business.
"""

import hashlib
import itertools
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from ssah_utils.files import cache_dir, installed_versions
from ssah_utils.locks import InUse, Lock, locked
from ssah_utils.pipeline import engine, run, schedule
from ssah_utils.pipeline.runs import run_lock
from ssah_utils.pipeline.stamps import Stage, read_stamp
from ssah_utils.pipeline.status import clock
from ssah_utils.pipeline.stored import runs_root
from ssah_utils.room import GIB

CHOSEN = {"profile": "--profile", "model": "--models", "seed": "--seeds"}  # not by --set
PROFILE_FILE = re.compile(r"config(?:\.v(\d+)\+)?\.yaml")  # of Snakemake, maybe for a version
LONGEST = 80  # letters of a folder's name
# With half of the cores a notebook takes 1.5 times as long: training waits for memory, and the work
# between its steps uses one core anyway.
SHARING = 0.6
RUNNER = 3 * GIB // 4  # bytes of the process that runs a notebook, beside its kernel


@dataclass(frozen=True)
class Member:
    """One run of a sweep: a model, a seed, and a value of every parameter.

    ``varied``: the assignments of what is swept over; ``root``: the folder that SSAH_RUNS names for
    them; ``selected``: the stages that are to be done; ``command``: what ``ssah run`` is called
    with, but for the notebook.
    """

    varied: tuple[str, ...]
    root: Path
    stages: list[Stage]
    selected: list[Stage]
    command: tuple[str, ...]

    @property
    def folder(self) -> Path:
        with runs_in(self.root):
            return self.stages[0].folder.parent

    @property
    def label(self) -> str:
        seed = f"seed {self.stages[0].parameters['seed']}"
        return " · ".join([self.folder.parent.name, seed, *self.varied])

    def due(self, alone: bool) -> list[Stage]:
        """What a single run would execute."""
        with runs_in(self.root):
            return run.due(self.stages, self.selected, alone, force=False)


@contextmanager
def runs_in(root: Path) -> Iterator[None]:
    """Inside the block run folders are those in ``root``."""
    before = os.environ.get("SSAH_RUNS")
    os.environ["SSAH_RUNS"] = str(root)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SSAH_RUNS"]
        else:
            os.environ["SSAH_RUNS"] = before


# ----------------------------------------------------------------------------------------- planning


def seeds_of(text: str) -> list[int]:
    """The seeds that ``0:10`` (10 is none of them), ``3`` or ``0,4:6`` means, in that order."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?::(\d+))?\s*", part)
        if not match:
            raise ValueError(f"'{part}' is no range of seeds: 0:10 means 0 to 9, 0,3 means two")
        first, end = int(match[1]), int(match[2] or int(match[1]) + 1)
        if first >= end:
            raise ValueError(f"'{part}' holds no seed: the second number is the first left out")
        found += range(first, end)
    return list(dict.fromkeys(found))


def values_of(assignments: list[str]) -> dict[str, list[str]]:
    """All values that are assigned to a parameter, by its name; more than one are swept over."""
    found: dict[str, list[str]] = {}
    for name, value in map(run.split_assignment, assignments):
        if name in CHOSEN:
            raise ValueError(f"the {name} of a sweep is chosen by {CHOSEN[name]}, not by --set")
        found.setdefault(name, []).append(value)
    return {name: list(dict.fromkeys(values)) for name, values in found.items()}


def members(
    profile: str,
    seeds: list[int],
    models: list[str],
    assignments: list[str],
    only: str = "",
    here: bool = True,
) -> list[Member]:
    """All runs of a sweep. Raises what ``run.plan`` raises, before anything is executed.

    ``models``: none means the profile's own. Runs with another value of a parameter that has more
    than one stand in a folder of their own inside that of the runs. ``here``: whether jobs run on
    this machine; the memory of another is asked for there, as each starts.
    """
    values = values_of(assignments)
    swept = [name for name, several in values.items() if len(several) > 1]
    found: dict[Path, Member] = {}
    for model, *chosen in itertools.product(models or [""], *values.values()):
        pairs = list(zip(values, chosen, strict=True))
        words = [f"{name}={value}" for name, value in pairs]
        own = [f"model={model}"] if model else []
        stages = run.plan(profile, [*own, *words], only, here=here)
        varied = [f"{name}={value}" for name, value in pairs if name in swept]
        root = runs_root() / folder_name(",".join(varied)) if varied else runs_root()
        model = stages[0].parameters["model"]  # with its commit, so that all jobs mean the same one
        for seed in seeds:
            seeded = [replace(one, parameters=one.parameters | {"seed": seed}) for one in stages]
            member = Member(
                varied=tuple(varied),
                root=root,
                stages=seeded,
                selected=run.selected_of(seeded, only),
                command=command(profile, model, seed, words, only),
            )
            found.setdefault(member.folder, member)  # a model may have been named twice
    return list(found.values())


def folder_name(text: str) -> str:
    """A name for a folder that tells ``text`` from all others, and shows it as far as it can."""
    plain = re.sub(r"[^\w.,=@+-]", "-", text)
    if plain == text and len(text) <= LONGEST:
        return text
    return f"{plain[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def command(profile: str, model: str, seed: int, words: list[str], only: str) -> tuple[str, ...]:
    """``ssah run`` for one notebook of a run; the notebook's name is to be put last.

    It plans the run as a whole, and waits where a job of an earlier sweep is still at work.
    """
    assigned = [f"model={model}", f"seed={seed}", *words]
    return (
        *(sys.executable, "-m", "ssah_utils.pipeline.cli", "run", "--profile", profile),
        *(word for one in assigned for word in ("--set", one)),
        *("--wait", "--as-in", only or run.EVERY, "--only"),
    )


def jobs_of(found: list[Member], executor: str, only: str = "") -> list[engine.Job]:
    """What is not up to date, with what has to be done before, and what it takes with all cores: on
    this machine, or where nobody knows it, on the one of pipeline.yaml.

    A notebook that reads the results of other seeds waits for theirs; where they are made anew, so
    is it.
    """
    due = {member.folder: {one.name for one in member.due(bool(only))} for member in found}
    keys = {member.folder: key_of(member, k) for k, member in enumerate(found)}
    jobs, stages, last = [], [], []
    for member in found:
        beside = [other for other in due if other.parent == member.folder.parent]
        for stage in member.selected:
            folders = beside if stage.every_seed else [member.folder]
            needs = [(one, name) for one in folders for name in stage.inputs if name in due[one]]
            if stage.name in due[member.folder] or (stage.every_seed and needs):
                job = engine.Job(
                    name=f"{keys[member.folder]}/{stage.name}",
                    label=f"{member.label} · {stage.name}",
                    command=shell(member, stage),
                    needs=tuple(f"{keys[one]}/{name}" for one, name in needs),
                )
                jobs.append(job)
                stages.append(stage)
                with runs_in(member.root):
                    last.append(with_all_cores(read_stamp(stage)))
    took = run.expected_seconds(stages, last, here=executor == "local")
    return [replace(job, seconds=seconds) for job, seconds in zip(jobs, took, strict=True)]


def with_all_cores(stamp: dict) -> float | None:
    """What a notebook would have taken with all cores; None where it never ran here."""
    share = min(1.0, stamp.get("threads", math.inf) / torch.get_num_threads())
    return stamp["seconds"] * share**SHARING if "seconds" in stamp else None


def with_shares(jobs: list[engine.Job], how: engine.Engine) -> list[engine.Job]:
    """The jobs with their share of the cores, and what they take with it.

    A job that can have no other beside it on this machine is given the cores of all.
    """
    if how.executor != "local":
        return [replace(job, threads=how.threads) for job in jobs]
    alone = schedule.alone({job.name: job.needs for job in jobs})
    return [
        replace(job, threads=how.threads * how.jobs)
        if job.name in alone
        else replace(job, threads=how.threads, seconds=job.seconds * how.jobs**SHARING)
        for job in jobs
    ]


def expected(entries: list[dict], at_a_time: int) -> float:
    """Minutes of ``make reproduce`` on the machine of pipeline.yaml. ``entries``: its notebooks."""
    jobs = [
        engine.Job(
            *(entry["name"], entry["name"], ""),
            needs=tuple(entry["inputs"]),
            seconds=60 * entry["minutes"]["brief"],
        )
        for entry in entries
    ]
    return seconds_of(with_shares(jobs, engine.Engine(jobs=at_a_time)), at_a_time) / 60


def seconds_of(jobs: list[engine.Job], at_a_time: int) -> float:
    """What jobs of which none has started will take."""
    needs = {job.name: job.needs for job in jobs}
    seconds = {job.name: job.seconds for job in jobs}
    return schedule.seconds_left(needs, seconds, {}, set(), at_a_time)


def key_of(member: Member, k: int) -> str:
    """A name for the k-th run that Snakemake takes in a path."""
    return f"{k:03d}-{re.sub(r'[^a-zA-Z0-9.=@_]+', '-', member.label)[:LONGEST]}"


def shell(member: Member, stage: Stage) -> str:
    """A job's command as a shell takes it, from wherever it is started."""
    places = {"SSAH_RUNS": str(member.root), "SSAH_CACHE": str(cache_dir())}
    told = " ".join(f"{name}={shlex.quote(place)}" for name, place in places.items())
    call = shlex.join([*member.command, stage.name])
    return f"cd {shlex.quote(str(Path.cwd()))} && {told} {call}"


# ------------------------------------------------------------------------------------------- engine


def read_workflow_profile(folder: Path | None) -> dict:
    """A Snakemake profile, empty for no folder; ``ValueError`` or ``OSError`` in one line where it
    is none.

    Of several files in it, the one that Snakemake itself takes: config.v8+.yaml is for version 8
    and newer ones, and comes before config.yaml there.
    """
    if folder is None:
        return {}
    ours = int(installed_versions(["snakemake"])["snakemake"].partition(".")[0] or 0)
    by_version = {}
    for path in folder.glob("config*.yaml"):
        match = PROFILE_FILE.fullmatch(path.name)
        if match and (version := int(match[1] or 0)) <= ours:
            by_version[version] = path
    if not by_version:
        raise FileNotFoundError(f"{folder} is no profile of Snakemake: it has no config.yaml")
    file = by_version[max(by_version)]
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must map options of Snakemake to values")
    return content


def executor_of(asked: str, content: dict) -> str:
    """What runs the jobs: what was asked for, else what a profile of Snakemake says."""
    return asked or content.get("executor") or "local"


def engine_for(
    executor: str,
    jobs: int,
    threads: int,
    profile: Path | None,
    fits: Callable[[int], int] = lambda asked: asked or 1,
) -> engine.Engine:
    """How Snakemake is to work: by what was asked for, else by the profile; 0 and '' ask nothing.

    ``fits``: given how many jobs at a time these ask of this machine, says how many it shall be.
    ``ValueError`` for an executor that is not installed, ``OSError`` for a profile without a file.
    """
    content = read_workflow_profile(profile)
    executor = executor_of(executor, content)
    engine.check_executor(executor)
    jobs = jobs or content.get("jobs") or 0
    if type(jobs) is not int or jobs < 0 or threads < 0:
        raise ValueError(f"--jobs is {jobs} and --threads {threads}, but at least 1 is needed")
    jobs = fits(jobs) if executor == "local" else jobs or 1
    shared = max(1, n_cores() // jobs) if executor == "local" else 1
    folder = profile.resolve() if profile else None
    return engine.Engine(executor, jobs, threads or shared, folder)


def n_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_a_time_by_cores() -> int:
    """How many notebooks to run at a time as far as cores and GPUs say."""
    return 1 if n_cores() < 2 or torch.cuda.is_available() else 2


def at_a_time(found: list[Member], asked: int = 0, only: str = "") -> int:
    """How many notebooks to run at a time: what was asked for, if anything was, with a word where
    memory may not be enough for so many. Else two, where this machine has the cores and the memory
    for both and no GPU that they would have to share.
    """
    wanted, otherwise = asked or at_a_time_by_cores(), asked or 1
    if wanted == 1 or torch.cuda.is_available():  # how jobs share a GPU is not planned
        return wanted
    try:
        beside = min(wanted, sum(len(member.due(bool(only))) for member in found))
        if beside < 2:
            return otherwise
        from ssah_utils.pipeline import memory_plan  # it imports much that is of use only here

        here = memory_plan.Machine.named("", None)
        needed = 0
        for member in {member.folder.parent: member for member in found}.values():
            with runs_in(member.root):
                taken = memory_plan.largest_process(member.selected, here)
            needed = max(needed, taken)
    except (ValueError, OSError):  # inputs that are not there; a model whose memory is not planned
        return otherwise
    needed = beside * (needed + RUNNER)
    if needed <= here.cpu:
        return wanted
    said = (
        f"{beside} at a time may take {needed / GIB:.1f} GiB,"
        if asked
        else "one notebook at a time:"
    )
    print(f"{said} {here.cpu / GIB:.1f} GiB of memory are free", flush=True)
    return otherwise


def sweep(found: list[Member], how: engine.Engine, only: str = "") -> list[str]:
    """Do what is not up to date; one line for each thing that went wrong.

    Raises ``InUse`` where another sweep is at work on one of the models.
    """
    with ExitStack() as held:
        for folder in sorted({member.folder.parent for member in found}):
            held.enter_context(locked(Lock(folder / ".sweep.lock")))
        jobs = with_shares(jobs_of(found, how.executor, only), how)
        print(shown_plan(found, jobs, how)[-1], flush=True)
        if not jobs:
            return []
        tell_of_others(found)
        folder = runs_root() / ".sweeps" / time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")
        began = time.monotonic()
        problems = engine.run_jobs(jobs, how, folder)
        if not problems:
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{len(jobs)} notebooks executed in {clock(time.monotonic() - began)}")
        return problems


def tell_of_others(found: list[Member]) -> None:
    """Say where a run is at work already, as a job of a sweep that was killed may be."""
    for member in found:
        try:
            with locked(run_lock(member.folder)):
                pass
        except InUse as error:
            print(f"{member.label}  waits: {error}", flush=True)


def shown_plan(found: list[Member], jobs: list[engine.Job], how: engine.Engine) -> list[str]:
    """What a sweep would do: a line each run, and one in all."""
    lines = []
    for k, member in enumerate(found):
        due = [job.notebook for job in jobs if job.name.startswith(f"{key_of(member, k)}/")]
        lines.append(f"{run.shown(member.folder)}  {', '.join(due) or 'up to date'}")
    by = f"{how.jobs} at a time ({how.executor})"
    left = seconds_of(jobs, how.jobs) if how.executor == "local" else 0.0
    about = f", about {clock(left)}" if left else ""
    return [*lines, f"{len(jobs)} notebooks to execute in {len(found)} runs, {by}{about}"]
