"""Hand the notebooks of a sweep to Snakemake as jobs, and say what becomes of each.

Every sweep has a folder of its own, so that nothing has to be unlocked or cleaned after a kill:
Snakemake decides what runs when and where, the stamps decide what is done. Knows commands, exit
codes and files; knows no notebook, no model and no parameter.
"""

import contextlib
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ssah_utils.pipeline import schedule
from ssah_utils.pipeline.status import clock

SNAKEFILE = Path(__file__).with_name("Snakefile")
BUILT_IN = ("local",)
PLUGIN = "snakemake_executor_plugin_"
LOG = "snakemake.log"
SECONDS = 0.5  # between two looks at what became of the jobs
# What Slurm calls the end of a job that it did not leave to the job, and what it means.
ENDED_BY_SLURM = {
    "OUT_OF_MEMORY": "it took more memory than it was given",
    "TIMEOUT": "it took more time than it was given",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "another job took its place",
    "CANCELLED": "somebody cancelled it",
    "DEADLINE": "its deadline passed",
}
OUT_OF_MEMORY = re.compile(r"slurmstepd.*(memory limit|oom.kill|out of memory)", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """One notebook of one run, as a shell command.

    ``name``: unique, ``RUN/NOTEBOOK`` with a RUN of letters, digits and ``.=@-_``; ``label``: for
    people; ``needs``: names of the jobs that have to be done before; ``threads``: cores that it is
    given; ``seconds``: what it is expected to take with them, 0 where nobody knows.
    """

    name: str
    label: str
    command: str
    needs: tuple[str, ...] = ()
    threads: int = 1
    seconds: float = 0.0

    @property
    def notebook(self) -> str:
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class Engine:
    """How Snakemake is told to work. ``executor``: one of its plugins. ``profile``: a folder."""

    executor: str = "local"
    jobs: int = 1
    threads: int = 1
    profile: Path | None = None

    def words(self, folder: Path) -> list[str]:
        """Snakemake's options for the jobs whose files are in ``folder``."""
        many = ["--jobs", str(self.jobs)]
        if self.executor == "local":
            many = ["--cores", str(self.jobs * self.threads)]
        given = ["--workflow-profile", str(self.profile) if self.profile else "none"]
        if self.executor == "slurm":  # a job that lost a step for want of memory may count as done
            given += ["--slurm-keep-successful-logs"]
        return [
            *("--snakefile", str(SNAKEFILE), "--configfile", str(folder / "jobs.json")),
            *("--directory", str(folder), "--executor", self.executor, *many, *given),
            # what one run has failed at is nothing to the others
            *("--keep-going", "--scheduler", "greedy", "--nocolor"),
            *("--latency-wait", "60"),  # seconds that a file may need to be seen from elsewhere
        ]


def installed_executors() -> list[str]:
    """Names that ``--executor`` takes here."""
    found = set()
    for place in filter(os.path.isdir, sys.path):
        names = [name for name in os.listdir(place) if name.startswith(PLUGIN)]
        found |= {name.removeprefix(PLUGIN) for name in names if name.isidentifier()}
    inner = {name for name in found if name.endswith("_jobstep")}  # run by another executor
    return [*BUILT_IN, *sorted(name.replace("_", "-") for name in found - inner)]


def check_executor(name: str) -> None:
    """``ValueError`` for an executor that cannot be had here: its plugin, or what it submits to."""
    there = installed_executors()
    if name not in there:
        near = difflib.get_close_matches(name, there, n=1, cutoff=0)[0]
        nearest = f"nearest is '{near}' (installed: {', '.join(there)})"
        install = "pip install snakemake-executor-plugin-NAME brings others"
        raise ValueError(f"executor '{name}' is not installed; {nearest}; {install}")
    if name == "slurm" and not shutil.which("sbatch"):
        raise ValueError("executor 'slurm' needs sbatch: run where jobs are submitted from")


# ------------------------------------------------------------------------------------ what became


@dataclass
class Progress:
    """What became of the jobs so far, read from what each writes before and after its command."""

    folder: Path
    jobs: list[Job]
    at_a_time: int = 1  # 0 where nobody knows how long jobs take
    started: dict[str, float] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)  # seconds of those that have ended
    told: float = field(default_factory=time.monotonic)  # when `line` was shown last

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.name in self.started and job.name not in self.codes]

    def left(self) -> float:
        """Seconds to the end of all jobs, 0 where nobody knows.

        They are taken to be as much faster or slower than expected as those that are done.
        """
        if not self.at_a_time:
            return 0.0
        now = time.monotonic()
        done = {name for name, code in self.codes.items() if code == 0}
        expected = sum(job.seconds for job in self.jobs if job.name in done)
        pace = sum(self.took[name] for name in done) / expected if expected else 1.0
        return schedule.seconds_left(
            {job.name: job.needs for job in self.jobs},
            {job.name: pace * job.seconds for job in self.jobs},
            {job.name: now - self.started[job.name] for job in self.running},
            done,
            self.at_a_time,
            frozenset(self.codes) - done,
        )

    def line(self) -> str:
        """What is running and how far it is, and how long is left."""
        parts = []
        for job in self.running:
            far = said_last(self.log(job)).rpartition(" · ")  # as the runner's line of a notebook
            elapsed = clock(time.monotonic() - self.started[job.name])
            parts.append(f"{job.label} {elapsed}{f' ({far[2]})' if far[0] else ''}")
        left = self.left()
        return ", ".join(parts) + (f"; about {clock(left)} left in all" if left else "")

    def look(self) -> Iterator[Job]:
        """Jobs that have started or ended since the last look.

        One that failed may start anew: a profile of Snakemake may ask for retries.
        """
        for job in self.jobs:
            before = self.codes.get(job.name)
            if before == 0:
                continue
            lines = self.state(job)
            code = int(lines[1]) if len(lines) > 1 else None
            if lines and (job.name not in self.started or before not in (None, code)):
                self.started[job.name] = time.monotonic()
                self.codes.pop(job.name, None)
                yield job
            if code is not None and job.name not in self.codes:
                self.codes[job.name] = code
                self.took[job.name] = time.monotonic() - self.started[job.name]
                yield job

    def state(self, job: Job) -> list[str]:
        """Host and Slurm's number of a job that started, then the exit code of one that ended."""
        try:
            text = (self.folder / f"{job.name}.state").read_text(encoding="utf-8")
        except OSError:
            return []
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def log(self, job: Job) -> Path:
        return self.folder / f"{job.name}.log"

    def reason(self, job: Job) -> str:
        """Why a job that started is not done, in one line."""
        lines, code = self.state(job), self.codes.get(job.name)
        number = lines[0].split()[1:]  # empty where no Slurm is at work
        state = self.slurm_end(number[0]) if number else ""
        if state in ENDED_BY_SLURM:
            return f"was ended by Slurm, {state}: {ENDED_BY_SLURM[state]} (Slurm job {number[0]})"
        if code is None and state:
            return f"was killed with all that belongs to it (Slurm job {number[0]}: {state})"
        if code is None:
            return "was killed with all that belongs to it, or is still running"
        if code > 128:
            name = signal.Signals(code - 128).name
            what = " (for want of memory?)" if name == "SIGKILL" else ""
            return f"was killed by signal {code - 128}, {name}{what}"
        return said_last(self.log(job)) or f"ended with exit code {code}"

    def slurm_end(self, number: str) -> str:
        """What Slurm calls the end of a job.

        Where it looks at memory from time to time only, it tells no more than the job's log that a
        step had too much, and that the job has failed.
        """
        state = slurm_state(number)
        for log in (self.folder / ".snakemake").rglob(f"{number}.log"):
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                if state not in ENDED_BY_SLURM and OUT_OF_MEMORY.match(line):
                    return "OUT_OF_MEMORY"
        return state


def said_last(log: Path) -> str:
    """The last line in which a command says what went wrong, else its last line."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


def slurm_state(number: str) -> str:
    """What Slurm says of a job: of one that ended lately by squeue, else from its accounting."""
    queue = ["squeue", "--jobs", number, "--states", "all", "--noheader", "--format", "%T"]
    account = ["sacct", "--jobs", number, "--allocations", "--noheader", "--format", "State%20"]
    for command in (queue, account):
        with contextlib.suppress(OSError):
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            if words := said.split():  # accounting adds by whom a job was cancelled
                return words[0].rstrip("+")
    return ""


# --------------------------------------------------------------------------------------- execution


def run_jobs(jobs: list[Job], engine: Engine, folder: Path) -> list[str]:
    """Run the jobs in order of their needs; one line for each that failed, none where all are done.

    ``folder``: new, for the files of this sweep. A ``KeyboardInterrupt``, which a SIGTERM to this
    process raises, too, is passed on to Snakemake and to all jobs that run on this machine; Slurm's
    are cancelled. Where this process is killed outright, Snakemake ends the jobs that run and
    starts no more.
    """
    write_jobs(jobs, folder)
    progress = Progress(folder, jobs, engine.jobs if engine.executor == "local" else 0)
    with ended_by(signal.SIGTERM), _snakemake(engine, folder) as process:
        try:
            while process.poll() is None:
                tell(progress)
                time.sleep(SECONDS)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise
        finally:
            print(cleared(), end="", flush=True)
    tell(progress)
    return failures(progress, process.returncode)


def write_jobs(jobs: list[Job], folder: Path) -> None:
    """What the Snakefile reads.

    Snakemake takes priorities by rule: a notebook's is that of its most urgent job.
    """
    folder.mkdir(parents=True)
    needs = {job.name: job.needs for job in jobs}
    urgency = schedule.urgency(needs, {job.name: job.seconds for job in jobs})
    priorities: dict[str, int] = {}
    for job in jobs:
        priorities[job.notebook] = max(priorities.get(job.notebook, 0), round(urgency[job.name]))
    content = {
        "priorities": priorities,
        "jobs": {
            job.name: {"command": job.command, "needs": list(job.needs), "threads": job.threads}
            for job in jobs
        },
    }
    (folder / "jobs.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


@contextlib.contextmanager
def ended_by(number: signal.Signals) -> Iterator[None]:
    """Inside the block the signal interrupts, as Ctrl-C does."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def _snakemake(engine: Engine, folder: Path) -> Iterator[subprocess.Popen]:
    """Snakemake, with a pipe by which it is told of the end of this process, however it ends."""
    reading, writing = os.pipe()
    with (folder / LOG).open("w") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ssah_utils.pipeline.engine",
                str(reading),
                *engine.words(folder),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[reading],
            start_new_session=True,  # so that an interrupt comes once, from here
        )
    os.close(reading)
    try:
        yield process
    finally:
        os.close(writing)


def tell(progress: Progress) -> None:
    """Print a line for each job that has started or ended since the last time.

    On a terminal the last line says what is running; in a log a line a minute does.
    """
    live, clear = sys.stdout.isatty(), cleared()
    for job in progress.look():
        code = progress.codes.get(job.name)
        n_ended = f"({len(progress.codes)} of {len(progress.jobs)})"
        if code is None:
            left = progress.left()
            said = f"started{f', about {clock(left)} to the end of all' if left else ''}"
        elif code == 0:
            said = f"done in {clock(progress.took[job.name])} {n_ended}"
        else:
            said = f"failed {n_ended}"
        print(f"{clear}{job.label}  {said}", flush=True)
    now = time.monotonic()
    if progress.running and now - progress.told >= (1 if live else 60):
        progress.told = now
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be cleared
        line = progress.line()
        print(f"{clear}{line[:width] if live else line}", end="" if live else "\n", flush=True)


def cleared() -> str:
    """What clears the last line of a terminal; nothing in a log."""
    return "\r\033[K" if sys.stdout.isatty() else ""


def failures(progress: Progress, code: int) -> list[str]:
    """One line for each job that is not done, but for those that waited for such a one."""
    undone = [job for job in progress.jobs if progress.codes.get(job.name) != 0]
    names = {job.name for job in undone}
    found = [f"Snakemake was killed by signal {-code}"] if code < 0 else []
    found += [f"{job.label} {progress.reason(job)}" for job in undone if progress.state(job)]
    waiting = [job for job in undone if not progress.state(job)]
    unsubmitted = [job for job in waiting if not names & set(job.needs)]
    if unsubmitted:
        log = progress.folder / LOG
        said = refusal(log) or f"Snakemake ended with {code}"
        found.append(f"{unsubmitted[0].label} did not start: {said} (all it says: {log})")
    if waiting and found:
        found.append(f"{len(waiting)} of {len(progress.jobs)} notebooks have not run")
    return found


def refusal(log: Path) -> str:
    """What Snakemake, or what it submits to, gives as the reason why it starts nothing."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if found := re.search(r"The error message was '(.+?)'", text):
        return found[1]
    lines = [line.strip() for line in text.splitlines()]
    is_error = [bool(re.match(r"\w*(Error|Exception)\b|.*\berror: ", line)) for line in lines]
    place = is_error.index(True) if True in is_error else len(lines)
    return " ".join(lines[place : place + 3])


# ------------------------------------------------------------------------- in Snakemake's process


def main(words: list[str]) -> None:
    """Snakemake with these options; without its parent it ends what runs and starts no more."""
    from snakemake.cli import main as snakemake

    def watch(pipe: int) -> None:
        os.read(pipe, 1)  # nothing is ever written: it ends with the other end
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, args=[int(words[0])], daemon=True).start()
    snakemake(words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
