"""What a model does with requests: batched answers and their verdicts, the refusal margin, utility.

Returns tidy tables, one row per request. Knows language models through their Hugging Face interface and fingerprint: no
units, no module names. What makes an answer a refusal or gibberish is decided in ``judge``.
"""

import contextlib
import copy
import difflib
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import pandas as pd
import torch
import yaml
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ssah_utils import models, reading
from ssah_utils.arithmetic import is_correct
from ssah_utils.assets import hub_answers
from ssah_utils.cache import remembered
from ssah_utils.chat import end_tokens
from ssah_utils.judge import is_refusal as is_refusal
from ssah_utils.judge import rejudged
from ssah_utils.prompts import DATA, IGNORED, encode, load_refusals, render, right_padded

Progress = Callable[[list, str], Iterator]


def _silent(items: list, label: str) -> Iterator:
    return iter(items)


# ---------------------------------------------------------------------------------------------------------- answers


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Progress = _silent,
) -> list[str]:
    """Greedy answers to rendered prompts, in their order; run in batches of similar length.

    The likeliest token each time, whatever the checkpoint's generation configuration asks for. ``ValueError`` in one line
    for a prompt that leaves no room for its answer.
    """
    model = models.without_wrappers(model)
    reading.check_lengths(tokenizer, model.config, prompts, max_new_tokens)
    texts, sequences, ends = [""] * len(prompts), reading.token_ids(tokenizer, prompts), end_tokens(model, tokenizer)
    for rows in progress(reading.length_sorted(sequences, batch_size), "answers"):
        answers = reading.Reader(model, [sequences[row] for row in rows]).answer(max_new_tokens, ends)
        for row, ids in zip(rows, answers, strict=True):
            texts[row] = reading.decoded(tokenizer, ids).strip()
    return texts


def own_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int, fingerprint: str = "",
    progress: Progress = _silent,
) -> list[str]:  # fmt: skip
    """``generate``, remembered in the cache; ``ValueError`` where the model is not the one of ``fingerprint``, if given."""
    if fingerprint and fingerprint != (found := models.fingerprint(model)):
        raise ValueError(f"the model has fingerprint {found}, not {fingerprint}: it was changed since, or is another one")
    return remembered(
        _answers, model=model, tokenizer=tokenizer, prompts=prompts, max_new_tokens=max_new_tokens, progress=progress
    )


def _answers(model, tokenizer, prompts, max_new_tokens, progress) -> list[str]:
    return generate(model, tokenizer, prompts, max_new_tokens, progress=progress)


@torch.inference_mode()
def response_nll(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], responses: list[str],
    max_response_tokens: int = 64, batch_size: int = 16,
) -> np.ndarray:  # fmt: skip
    """Mean negative log-likelihood per token (nats) of each response after its rendered prompt; NaN if it has no token."""
    model = models.without_wrappers(model)
    examples = encode(tokenizer, prompts, responses, max_response_tokens, end=False)
    n_said = [sum(label != IGNORED for label in example["labels"]) for example in examples]
    reading.check_lengths(tokenizer, model.config, prompts, n_said)
    nll = np.full(len(examples), np.nan)
    for rows in reading.length_sorted([example["input_ids"] for example in examples], batch_size):
        ids, labels, mask = right_padded([examples[row] for row in rows])
        n_kept = int((labels != IGNORED).flip(1).cumsum(1).argmax(1).max()) + 2  # from the earliest response token on
        with models.evaluating(model):
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False,
                           logits_to_keep=n_kept).logits[:, :-1].cpu()  # fmt: skip
        targets = labels[:, -logits.shape[1] :]
        marked = targets != IGNORED
        loss = torch.zeros(targets.shape)
        loss[marked] = nn.functional.cross_entropy(logits[marked].float(), targets[marked], reduction="none")
        n_tokens = marked.sum(1)
        nll[rows] = torch.where(n_tokens > 0, loss.sum(1) / n_tokens, torch.nan).numpy()
    return nll


# --------------------------------------------------------------------------------------------------------- verdicts


def judge(
    model: nn.Module,
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    table: pd.DataFrame,
    max_new_tokens: int = 24,
    system_prompt: str = "",
    progress: Progress = _silent,
) -> pd.DataFrame:
    """Answer every request of a data set and judge it.

    Columns: id, category, prompt, response, base_nll (of every answer, so that ``judge.rejudged`` can decide again under
    other rules), verdict, and as True/False: refused, asr (the paper's: not refused), coherent_asr (complied), degenerate.
    """
    rendered = render(tokenizer, table["prompt"].tolist(), system_prompt)
    responses = generate(model, tokenizer, rendered, max_new_tokens, progress=progress)
    base_nll = response_nll(base, tokenizer, rendered, responses, max_new_tokens)
    return rejudged(table[["id", "category", "prompt"]].assign(response=responses, base_nll=base_nll))


# ------------------------------------------------------------------------------------------------------------ margin


@torch.inference_mode()
def opening_log_probabilities(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], openings: list[str], batch_size: int = 32
) -> np.ndarray:
    """log P(opening | rendered prompt) in nats: (n_prompts, n_openings).

    Each prompt is read once; then all openings are, side by side in one pass, none seeing another.
    """
    model = models.without_wrappers(model)
    prompt_ids, opening_ids = reading.token_ids(tokenizer, prompts), reading.opening_ids(tokenizer, prompts, openings)
    reading.check_lengths(tokenizer, model.config, prompts, max(map(len, opening_ids)))
    scores = np.zeros((len(prompts), len(openings)))
    for rows in reading.length_sorted(prompt_ids, batch_size):
        reader = reading.Reader(model, [prompt_ids[row] for row in rows])
        scores[rows] = reader.log_probabilities(opening_ids, reader.last).cpu().numpy()
    return scores


def refusal_margin(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    system_prompt: str = "",
    n_openings: int | None = None,
) -> np.ndarray:
    """log P(refusal openings) - log P(compliance openings) per request, each the mean probability of its openings (nats).

    ``n_openings`` takes the first few of either side only, where many sets are compared; margins of different numbers of
    openings are not on one scale.
    """
    openings = load_refusals()
    rendered = render(tokenizer, prompts, system_prompt)
    refusal, compliance = (openings[f"{side}_openings"][:n_openings] for side in ("refusal", "compliance"))
    log_p = opening_log_probabilities(model, tokenizer, rendered, refusal + compliance)
    log_mean = lambda part: np.logaddexp.reduce(part, axis=1) - np.log(part.shape[1])  # noqa: E731
    return log_mean(log_p[:, : len(refusal)]) - log_mean(log_p[:, len(refusal) :])


# ----------------------------------------------------------------------------------------------------------- utility


def cloze(model: nn.Module, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, batch_size: int = 64) -> pd.DataFrame:
    """Four-choice completions of data/utility_cloze.jsonl by lm-evaluation-harness: id, correct (length-normalised)."""
    return utility(model, tokenizer, ["cloze"], limit, batch_size)[["id", "correct"]]


def utility(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: list[str], limit: int | None = None, batch_size: int = 64
) -> pd.DataFrame:
    """Tasks by lm-evaluation-harness on a model in memory, ``limit`` items of each (of each subtask): task, id, correct.

    ``tasks``: "cloze" (shipped), or any of the harness's, such as those of ``PAPER_TASKS``. An item counts by the first of
    ``METRICS`` that its task reports, under the first of its answer filters; subtasks of a group count under its name.
    """
    import lm_eval  # slow to import
    from lm_eval.models.huggingface import HFLM

    model, frames = models.without_wrappers(model), []
    with contextlib.redirect_stderr(io.StringIO()), _quiet("lm_eval") as warned, _plain_generation(model, tokenizer):
        # one progress bar per call is too many; the harness sets a padding token where there is none, so it has its own copy
        harness = HFLM(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, truncation=False, logits_cache=True,
            max_length=reading.n_positions(model.config), softmax_dtype=torch.float32, add_bos_token=None,  # as it was trained
        )  # fmt: skip
        for task in tasks:
            outcome = lm_eval.evaluate(
                harness, load_task(task), limit=limit, bootstrap_iters=0, log_samples=True, cache_requests=False,
                apply_chat_template=False, system_instruction=None, fewshot_as_multiturn=False,
            )  # fmt: skip
            if cut := [message for message in warned if "truncat" in message.lower()]:
                warnings.warn(f"utility task '{task}': {len(cut)} texts or batches were cut to fit the model", stacklevel=2)
                warned.clear()
            for name, samples in outcome["samples"].items():
                first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
                ids = [sample["doc"].get("id", f"{name}-{sample['doc_id']}") for sample in first]
                frames.append(pd.DataFrame({"task": task, "id": ids, "correct": [_is_right(sample) for sample in first]}))
    return pd.concat(frames, ignore_index=True)


@contextlib.contextmanager
def _plain_generation(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Others that let the model generate get only what they ask for: nothing of what the checkpoint asks for but its ends.

    And no dropout.
    """
    inner = models.without_wrappers(model.get_base_model()) if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig(eos_token_id=end_tokens(model, tokenizer) or None)
    try:
        with models.evaluating(model):
            yield
    finally:
        inner.generation_config = own


PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_challenge", "openbookqa", "mmlu", "gsm8k")
METRICS = ("acc_norm", "acc", "exact_match")


def _is_right(sample: dict) -> bool:
    metric = next((metric for metric in METRICS if metric in sample), None)
    if metric is None:
        raise ValueError(f"a task that reports none of {', '.join(METRICS)} is not supported as utility")
    return float(sample[metric]) == 1.0


def load_task(name: str) -> dict:
    """What the harness evaluates under a task's name, its documents loaded.

    ``ValueError`` names the nearest tasks when there is none of that name, ``ConnectionError`` says that its data are out of
    reach.
    """
    from lm_eval.api.task import ConfigurableTask  # slow to import
    from lm_eval.tasks import TaskManager, get_task_dict

    with _quiet("lm_eval"):
        if name == "cloze":
            task = ConfigurableTask(config=cloze_task())
            return _seeded({task.config.task: task})
        manager = TaskManager()
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, ["cloze", *manager.all_tasks], n=3, cutoff=0)
            raise ValueError(
                f"unknown utility task '{name}'; nearest are {', '.join(near)} (or: cloze, {', '.join(PAPER_TASKS)})"
            )
        datasets.config.HF_HUB_OFFLINE = not hub_answers()  # then the local cache is all there is
        try:
            return _seeded(get_task_dict([name], manager))
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise ConnectionError(
                f"cannot load the data of utility task '{name}' from the Hugging Face hub or its cache; a task that needs no "
                "hub: cloze"
            ) from error
        except (ImportError, RuntimeError) as error:  # a package that one task needs; data that come as a script
            raise ValueError(f"utility task '{name}' does not load here: {' '.join(str(error).split())}") from error


FEW_SHOT_SEED = 1234  # the harness's own, which it sets only when it loads the model, too


def _seeded(tasks: dict) -> dict:
    """Tasks whose few-shot examples are the same each time; of a group, those of every subtask."""
    for task in tasks.values():
        if isinstance(task, dict):
            _seeded(task)
        else:
            task.set_fewshot_seed(FEW_SHOT_SEED)
    return tasks


def exact_match(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rendered: list[str], responses: list[str], max_new_tokens: int = 24
) -> list[bool]:
    """Whether each greedy answer ends in the number its reference response ends in."""
    answers = generate(model, tokenizer, rendered, max_new_tokens)
    return [is_correct(answer, response) for answer, response in zip(answers, responses, strict=True)]


def cloze_task() -> dict:
    """Configuration of data/utility_cloze.yaml with the documents in memory, shuffled once so that a limit is fair."""
    task = yaml.safe_load((DATA / "utility_cloze.yaml").read_text(encoding="utf-8"))
    documents = pd.read_json(DATA / "utility_cloze.jsonl", lines=True).sample(frac=1, random_state=0).to_dict("records")
    by_path = ("dataset_path", "dataset_kwargs")  # relative to the repository, for the harness's own command line
    return {key: value for key, value in task.items() if key not in by_path} | {
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)}
    }


class _Listener(logging.Handler):
    """Keeps what a library warns about; its errors are shown as ever."""

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
    """A library says errors only; what it warns about is yielded as it comes."""
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
