"""Utility: tasks of lm-evaluation-harness on a model in memory, as tidy rows.

Knows models through their Hugging Face interface only.
"""

import contextlib
import copy
import difflib
import functools
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
import yaml
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ssah_utils import extras, hub, prompt_cache, wrappers
from ssah_utils.files import DATA, cache_dir, write_json
from ssah_utils.prompts.chat import end_tokens

with extras.needed("eval"):
    import datasets

PAPER_TASKS = tuple("boolq rte hellaswag winogrande arc_challenge openbookqa mmlu gsm8k".split())
METRICS = ("acc_norm", "acc", "exact_match")  # what counts as correct: the first that a task has
BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # no data sets, but ways to read files
FEW_SHOT_SEED = 1234  # the harness's own, which it sets only where it loads the model, too


def cloze(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    batch_size: int = 64,
) -> pd.DataFrame:
    """The four-choice completions of data/utility_cloze.jsonl: id, correct (length-normalised)."""
    return utility(model, tokenizer, ["cloze"], limit, batch_size)[["id", "correct"]]


def utility(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    limit: int | None = None,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Tasks of lm-evaluation-harness on a model in memory: task, id, correct.

    ``tasks``: "cloze" (shipped), or any of the harness's, such as those of ``PAPER_TASKS``, each
    with ``@`` and the commit of its data where it is to be those of one commit (``pinned_task``).
    ``limit``: items of each task and subtask. An item counts by the first of ``METRICS`` that its
    task reports, under the first of its answer filters; subtasks of a group count under its name.
    """
    with extras.needed("eval"):
        import lm_eval  # slow to import
        from lm_eval.models.huggingface import HFLM

    model, frames = wrappers.without_wrappers(model), []
    with (
        contextlib.redirect_stderr(io.StringIO()),  # one progress bar per call is too many
        _quiet("lm_eval") as warned,
        _plain_generation(model, tokenizer),
    ):
        harness = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # the harness gives it a padding token
            batch_size=batch_size,
            truncation=False,
            logits_cache=True,
            max_length=prompt_cache.n_positions(model.config),  # as the model was trained
            softmax_dtype=torch.float32,
            add_bos_token=None,
        )
        for task in tasks:
            outcome = lm_eval.evaluate(
                harness,
                load_task(task),
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                cache_requests=False,
                apply_chat_template=False,
                system_instruction=None,
                fewshot_as_multiturn=False,
            )
            if cut := [message for message in warned if "truncat" in message.lower()]:
                warnings.warn(
                    f"utility task '{task}': {len(cut)} texts or batches were cut to fit the model",
                    stacklevel=2,
                )
                warned.clear()
            plain = hub.split_name(task)[0]
            for name, samples in outcome["samples"].items():
                first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
                ids = [sample["doc"].get("id", f"{name}-{sample['doc_id']}") for sample in first]
                correct = [_is_right(sample) for sample in first]
                frames.append(pd.DataFrame({"task": plain, "id": ids, "correct": correct}))
    return pd.concat(frames, ignore_index=True)


@contextlib.contextmanager
def _plain_generation(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Inside the block a model generates as its caller asks, without dropout.

    Of the checkpoint's own generation settings only the end tokens are kept.
    """
    has_adapter = hasattr(model, "get_base_model")
    inner = wrappers.without_wrappers(model.get_base_model()) if has_adapter else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig(eos_token_id=end_tokens(model, tokenizer) or None)
    try:
        with wrappers.evaluating(model):
            yield
    finally:
        inner.generation_config = own


def _is_right(sample: dict) -> bool:
    metric = next((metric for metric in METRICS if metric in sample), None)
    if metric is None:
        raise ValueError(
            f"a task that reports none of {', '.join(METRICS)} is not supported as utility"
        )
    return float(sample[metric]) == 1.0


def load_task(name: str) -> dict:
    """What the harness evaluates under a task's name, its documents loaded.

    They are those of the commits that the name carries, else of the newest. ``ValueError`` names
    the nearest tasks when there is none of that name; ``ConnectionError`` says that its data are
    out of reach.
    """
    return _loaded(name)[0]


@functools.cache
def pinned_task(name: str) -> str:
    """The name with the commits of the data that it means now, so that it means the same for ever.

    One commit for each data set on the hub that the task reads, in the order of reading, joined by
    ``+``. Loads the task, and raises as ``load_task`` does.
    """
    if name == "cloze" or hub.split_name(name)[1]:
        return name
    commits = _loaded(name)[1]
    found = f"{hub.split_name(name)[0]}@{'+'.join(commits)}" if commits else name
    write_json(_meant(name), found)
    return found


def pinned_task_here(name: str) -> str:
    """``pinned_task`` as it was last told on this machine, which asks nobody."""
    path = _meant(name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else name


def _meant(name: str) -> Path:
    return cache_dir() / "tasks" / f"{name}.json"


def _loaded(name: str) -> tuple[dict, list[str]]:
    """A task with its documents, and the commits of its data sets."""
    with extras.needed("eval"):
        from lm_eval.api.task import ConfigurableTask  # slow to import
        from lm_eval.tasks import get_task_dict

    plain, revision = hub.split_name(name)
    with _quiet("lm_eval"):
        if name == "cloze":
            task = ConfigurableTask(config=cloze_task())
            return _seeded({task.config.task: task}), []
        manager = _manager()
        if plain not in manager.all_tasks:
            near = difflib.get_close_matches(plain, ["cloze", *manager.all_tasks], n=3, cutoff=0)
            raise ValueError(
                f"unknown utility task '{name}'; nearest are {', '.join(near)}"
                f" (or: cloze, {', '.join(PAPER_TASKS)})"
            )
        datasets.config.HF_HUB_OFFLINE = not hub.answers()  # then the local cache is all there is
        try:
            with _at_commits(revision) as commits:
                task = get_task_dict([plain], manager)
            return _seeded(task), list(commits.values())
        except (OSError, datasets.exceptions.DatasetsError) as error:
            said = " ".join(str(error).split())
            raise ConnectionError(
                f"cannot load the data of utility task '{name}' from the Hugging Face hub"
                f" or its cache ({said}); a task that needs no hub: cloze"
            ) from error
        # a package that one task needs is missing, or its data come as a script or are not there
        except (ImportError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"utility task '{name}' does not load here: {reason}") from error


@contextlib.contextmanager
def _at_commits(revision: str) -> Iterator[dict[str, str]]:
    """Inside the block, data sets of the hub are loaded at commits; yields those, by data set.

    They are the ones that ``revision`` names, else what each data set is now. The harness itself
    asks for no commit.
    """
    wanted = iter(revision.split("+") if revision else [])
    found: dict[str, str] = {}

    def at_commit(path: str, *more, **options):
        if path in BUILDERS or Path(path).exists():  # files, which are in the harness
            return load(path, *more, **options)
        if path not in found:
            asked = next(wanted, "") or options.get("revision")
            found[path] = hub.commit_of(f"{path}@{asked}" if asked else path, "dataset")
        loaded = load(path, *more, **options | {"revision": found[path]})
        _check_commit(loaded, path, found[path])
        return loaded

    load, datasets.load_dataset = datasets.load_dataset, at_commit
    try:
        yield found
    finally:
        datasets.load_dataset = load


def _check_commit(loaded: dict, path: str, commit: str) -> None:
    """``ConnectionError`` for data of another commit: without a hub, the library takes what it
    cached last. It names the folder by the commit.
    """
    for part in loaded.values():
        for file in getattr(part, "cache_files", ()):  # what is streamed has none
            cached = Path(file["filename"]).parent.name
            if hub.COMMIT.fullmatch(cached) and cached != commit:
                raise ConnectionError(
                    f"the hub cannot be asked, and of '{path}' the cache has commit {cached[:12]},"
                    f" not {commit[:12]}"
                )


@functools.cache
def _manager():
    """The harness's index of its tasks: it reads thousands of files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _seeded(tasks: dict) -> dict:
    """Tasks whose few-shot examples are the same each time; of a group, those of every subtask."""
    for task in tasks.values():
        if isinstance(task, dict):
            _seeded(task)
        else:
            task.set_fewshot_seed(FEW_SHOT_SEED)
    return tasks


def cloze_task() -> dict:
    """Configuration of data/utility_cloze.yaml with the documents in memory.

    They are shuffled once, so that a limit takes a fair sample.
    """
    task = yaml.safe_load((DATA / "utility_cloze.yaml").read_text(encoding="utf-8"))
    table = pd.read_json(DATA / "utility_cloze.jsonl", lines=True)
    documents = table.sample(frac=1, random_state=0).to_dict("records")
    for key in ("dataset_path", "dataset_kwargs"):  # for the harness's own command line
        task.pop(key, None)
    in_memory = lambda **_: {"test": datasets.Dataset.from_list(documents)}  # noqa: E731
    return task | {"custom_dataset": in_memory}


class _Listener(logging.Handler):
    """Keeps a library's warnings; its errors are shown as ever."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warned: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            logging.getLogger().handle(record)
        else:
            self.warned.append(record.getMessage())


@contextlib.contextmanager
def _quiet(logger_name: str) -> Iterator[list[str]]:
    """Let a library say errors only; its warnings are collected in the list that is yielded."""
    logger, listener = logging.getLogger(logger_name), _Listener()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(listener)
    try:
        yield listener.warned
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(listener)
