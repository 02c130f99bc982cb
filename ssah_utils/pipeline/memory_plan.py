"""What the work of a profile takes of memory, kind by kind, and where it fits.

Everything is computed: weights, gradients and optimizer from the shapes of the model, activations
by ``memory`` at the batches and lengths of the profile's own data. Which notebook does what is said
in pipeline.yaml (``work``). Reads configurations, tokenizers and data sets; no weights.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from transformers import PretrainedConfig

from ssah_utils import benchmarks, evaluation, loading, precision, prompt_cache, room
from ssah_utils.files import DATA, REFERENCE
from ssah_utils.pipeline import across_models, memory
from ssah_utils.pipeline.stamps import Stage
from ssah_utils.prompts import chat, datasets, tokens
from ssah_utils.quantisers import keeps_codes

GIB = room.GIB
LOOKING = ("answers", "openings", "scores", "gradients", "choices")
TRAINING = ("all", "freezing", "redundant")
TITLES = {
    "answers": "answers and their likelihood",
    "openings": "openings after requests",
    "scores": "scores of units, in float32",
    "gradients": "scores by gradients, in float32",
    "choices": "four-choice items",
    "all": "training all",
    "freezing": "training all but {frozen:.1%} of the units",
    "redundant": "training {trained:.0%} of the units",
}


@dataclass(frozen=True)
class Machine:
    """Where a plan is to fit: bytes of each GPU, and of the computer's memory."""

    gpus: tuple[int, ...]
    cpu: int

    @classmethod
    def named(cls, gpus: str, cpu: float | None) -> "Machine":
        """``gpus`` as ``4x80``, in GiB; empty: those that are there. ``ValueError`` for others."""
        found: tuple[int, ...] = ()
        if gpus:
            parts = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", gpus)
            if not parts or not int(parts[1]) or not float(parts[2]):
                raise ValueError(f"--gpus takes NUMBERxGIB, such as 1x24 or 4x80, not '{gpus}'")
            found = (int(float(parts[2]) * GIB),) * int(parts[1])
        elif cpu is None and torch.cuda.is_available():
            numbers = range(torch.cuda.device_count())
            found = tuple(torch.cuda.get_device_properties(n).total_memory for n in numbers)
        if cpu is not None and not cpu > 0:
            raise ValueError(f"--cpu takes GiB of memory, such as 24, not {cpu:g}")
        return cls(found, int(cpu * GIB) if cpu is not None else room.free_memory() or 0)

    @property
    def native(self) -> torch.dtype:
        """The precision of ``dtype=auto``; on a GPU that is only named, that of any of today's."""
        if not self.gpus or torch.cuda.is_available():
            return precision.native_dtype("cuda" if self.gpus else "cpu")
        return torch.bfloat16

    def __str__(self) -> str:
        memory_ = f"{self.cpu / GIB:.0f} GiB of memory"
        if not self.gpus:
            return f"no GPU, {memory_}"
        gpus = "GPU" if len(self.gpus) == 1 else "GPUs"
        return f"{len(self.gpus)} {gpus} of {min(self.gpus) / GIB:g} GiB, {memory_}"


@dataclass(frozen=True)
class Need:
    """What one kind of work takes, in bytes.

    * ``weights``: of the model; ``state``: gradients and AdamW's moments, at their most.
    * ``work``: activations, KV cache and logits.
    * ``peak``: the most of all these together.
    """

    kind: str
    title: str
    sizes: str
    notebooks: tuple[str, ...]
    weights: int
    state: int
    work: int
    peak: int


@dataclass(frozen=True)
class Planned:
    """A profile's notebooks, as far as memory depends on them."""

    stages: list[Stage]
    machine: Machine

    @cached_property
    def values(self) -> dict[str, list]:
        """All values that the notebooks that do some work give to a parameter, by its name."""
        found: dict[str, list] = {}
        for stage in self.stages:
            for name, value in stage.parameters.items() if stage.work else ():
                found.setdefault(name, []).append(value)
        return found

    def largest(self, *names: str) -> int:
        """The largest number that some notebook gives to one of these parameters."""
        return max(value for name in names for value in self.values.get(name, [0]))

    @cached_property
    def model(self) -> str:
        return self.stages[0].parameters["model"]

    @cached_property
    def config(self) -> PretrainedConfig:
        """Raises what ``loading.config_of`` raises, ``ValueError`` for codes as they are stored."""
        config = loading.config_of(self.model)
        if keeps_codes(config):
            raise ValueError(f"'{self.model}' is stored as codes, whose memory is not planned")
        return config

    @cached_property
    def dtype(self) -> precision.Precision:
        asked = self.values["dtype"][0]
        if asked in precision.CODES:
            return precision.Quantised(asked, self.machine.native)
        return self.machine.native if asked == "auto" else getattr(torch, asked)

    @cached_property
    def tokenizer(self):
        tokenizer = loading.load_tokenizer(self.model)
        first = self.stages[0].parameters
        chat.set_chat_template(tokenizer, first["chat_template"], first["system_prompt"])
        return tokenizer

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest request of the study, rendered."""
        first = self.stages[0].parameters
        names = ("harmful_data", "other_harmful_data", "helpful_data")
        splits = datasets.study_splits(*(first[name] for name in names))
        asked = [
            text for part in splits.values() for one in part.values() for text in one["prompt"]
        ]
        return self._longest_of(chat.render(self.tokenizer, asked, first["system_prompt"]))

    def _longest_of(self, texts: list[str]) -> int:
        return max(map(len, prompt_cache.token_ids(self.tokenizer, texts)))

    @cached_property
    def n_opening_tokens(self) -> int:
        """Tokens of all openings that are read side by side, but for the last of each."""
        openings, first = datasets.load_refusals(), self.stages[0].parameters
        texts = [*openings["refusal_openings"], *openings["compliance_openings"]]
        prompt = chat.render(self.tokenizer, ["Hello"], first["system_prompt"])
        return sum(len(ids) - 1 for ids in prompt_cache.opening_ids(self.tokenizer, prompt, texts))

    @cached_property
    def longest_choice(self) -> int:
        """Tokens of the longest item of everyday knowledge, with its answer."""
        table = pd.read_json(DATA / "utility_cloze.jsonl", lines=True)
        rows = table.itertuples()
        return self._longest_of([f"{row.context} {one}" for row in rows for one in row.choices])

    # ---------------------------------------------------------------------------------------- needs

    def needs(self) -> Iterator[Need]:
        """What each kind of work takes that some notebook of the profile does."""
        for kind in (*LOOKING, *TRAINING):
            notebooks = tuple(stage.name for stage in self.stages if kind in stage.work)
            if notebooks:
                yield (self._looking if kind in LOOKING else self._training)(kind, notebooks)

    def _looking(self, kind: str, notebooks: tuple[str, ...]) -> Need:
        dtype = torch.float32 if "float32" in TITLES[kind] else self.dtype
        shapes = memory.Shapes(self.config, precision.computed_in(dtype))
        sizes, works = self._works(kind)
        weights, work = weight_bytes(self.config, dtype), max(map(shapes.peak, works))
        return Need(kind, TITLES[kind], sizes, notebooks, weights, 0, work, weights + work)

    def _works(self, kind: str) -> tuple[str, list[memory.Work]]:
        """The sizes of a kind of work that trains nothing, and the work itself."""
        longest, n_new = self.longest, self.largest("new_tokens", "answer_tokens")
        if kind == "answers":
            n, n_read = batch_of(evaluation.generate), batch_of(evaluation.response_nll)
            answering = memory.reading_prompts(n, longest, n_new)
            reading = memory.scoring_responses(n_read, longest + n_new, n_new + 2)
            return f"{n} x {longest} + {n_new} tokens", [answering, reading]
        if kind == "openings":
            n, n_read = batch_of(evaluation.opening_log_probabilities), self.n_opening_tokens
            sizes = f"{n} x {longest} + {n_read} tokens"
            return sizes, [memory.reading_openings(n, longest, n_read)]
        if kind == "choices":
            n, length = batch_of(benchmarks.cloze), self.longest_choice
            return f"{n} x {length} tokens", [memory.choosing(n, length)]
        n, length = batch_of(tokens.token_batches), longest + self.largest("answer_tokens")
        n_marked = n * self.largest("answer_tokens")
        make = memory.taking_moments if kind == "scores" else memory.taking_gradients
        return f"{n} x {length} tokens", [make(n, length, n_marked)]

    def _training(self, kind: str, notebooks: tuple[str, ...]) -> Need:
        frozen, trained = self.frozen_fraction, self.largest("trained_fraction")
        n = memory.n_numbers(self.config)
        dtype = torch.float32
        if self.machine.gpus and not precision.trains_in_float32(n, self.machine.gpus[0]):
            dtype = torch.bfloat16
        shares = {"all": 1.0, "freezing": 1 - frozen, "redundant": trained}
        trains_rest = kind != "redundant"
        held = memory.Trained.units_of(self.config, shares[kind], trains_rest, dtype)
        batch, length = self.largest("batch_size"), self.longest + self.n_response_tokens
        attention = "" if self.machine.gpus else "eager"  # as training.train_sft sets it
        is_autocast = dtype == torch.float32 and self.machine.native == torch.bfloat16
        shapes = memory.Shapes(self.config, dtype, attention)
        work = memory.training(batch, length, batch * self.n_response_tokens, trains_rest)
        activations = shapes.peak(work, is_autocast)
        state = held.moments + held.gradients
        title = TITLES[kind].format(frozen=frozen, trained=trained)
        sizes = f"{batch} x {length} tokens, {str(dtype).removeprefix('torch.')}"
        return Need(
            kind, title, sizes, notebooks, held.weights, state, activations, held.peak(activations)
        )

    @property
    def n_response_tokens(self) -> int:
        return self.largest("response_tokens", "answer_tokens")

    @property
    def frozen_fraction(self) -> float:
        """Of the units that are frozen most in 06: safety units and the complex ones beside."""
        return self.largest("safety_fraction") + self.largest("complex_fraction")


def batch_of(function: Callable) -> int:
    """How many rows a function of the library takes at a time."""
    return inspect.signature(function).parameters["batch_size"].default


def weight_bytes(config: PretrainedConfig, dtype: precision.Precision) -> int:
    """Bytes of a model's weights; tables stay numbers where matrices are codes."""
    if isinstance(dtype, torch.dtype):
        return memory.n_numbers(config) * dtype.itemsize
    model = loading.without_weights(config)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    n_table = sum(table.numel() for table in {id(one): one for one in tables}.values())
    n_matrix = memory.n_numbers(config) - n_table
    return int(n_matrix * dtype.itemsize + n_table * dtype.dtype.itemsize)


def advice(need: Need, machine: Machine) -> str:
    """Where a kind of work fits, or what to change."""
    is_training = need.kind in TRAINING
    if not machine.gpus:
        if need.peak <= machine.cpu:
            return "fits"
        if is_training:
            return "does not fit: leave it out by --only, or take a smaller batch_size or model"
        if need.work < machine.cpu:
            return "device_map=auto: the rest on disk, slow"
        return "does not fit: take a smaller model"
    one, n = min(machine.gpus), len(machine.gpus)
    if need.peak <= one:
        return "fits on one GPU"
    if is_training:
        on_each = (need.weights + need.state) / n + need.work
        if n > 1 and on_each <= one:
            return f"does not fit on one GPU; your own Trainer shards it over {n} by FSDP2"
        return f"does not fit: one GPU of {need.peak / GIB:.0f} GiB, or a smaller batch_size"
    if n > 1 and need.weights / n + need.work <= one:
        return f"device_map=auto: over {n} GPUs"
    if need.work < one:
        place = "in memory" if need.weights <= one * n + machine.cpu else "on disk"
        return f"device_map=auto: the rest {place}, slow; or dtype=nf4"
    return "does not fit: shorter requests or a smaller model"


def largest_process(stages: list[Stage], machine: Machine) -> int:
    """Bytes that one of these notebooks may take, with all that ``plan_lines`` only mentions.

    What is kept of freed memory is counted as another ``work``: copies that are measured while a
    training goes on are in no line. Where one of them has run before and took more, that.
    ``ValueError`` where nothing is known of their work.
    """
    planned = Planned([stage for stage in stages if stage.work], machine)
    if not planned.stages:
        raise ValueError("none of the notebooks says what takes memory in it")
    largest = max(need.peak + need.work for need in planned.needs())
    largest += weight_bytes(planned.config, planned.dtype) + GIB
    return max([largest, *(taken_before(stage) for stage in stages)])


def taken_before(stage: Stage) -> int:
    """Bytes that a notebook took at most when it ran last; 0 where it never did here.

    A result that comes with the project counts where it is of the same profile and model.
    """
    place = across_models.model_folder(REFERENCE, stage.parameters["model"])
    for folder in (stage.folder, place / stage.name):
        try:
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if all(
            result["parameters"][name] == stage.parameters[name] for name in ("model", "profile")
        ):
            return int(GIB * (result.get("peak_memory_gib") or 0))
    return 0


def plan_lines(stages: list[Stage], machine: Machine) -> list[str]:
    """What ``ssah plan`` prints: one line a kind of work, in GiB."""
    planned = Planned([stage for stage in stages if not stage.only_named], machine)
    billions = memory.n_numbers(planned.config) / 1e9
    needs = list(planned.needs())
    width = max(len(need.title) for need in needs)
    head = (
        f"{planned.model}: {billions:.2f} billion parameters, {_name_of(planned.dtype)}; {machine}"
    )
    lines = [head, "", f"{'in GiB':{width}}  weights   state    work    peak"]
    for need in needs:
        parts = (need.weights, need.state, need.work, need.peak)
        shown = "".join(f"{n / GIB:8.1f}" for n in parts)
        lines.append(f"{need.title:{width}} {shown}  {advice(need, machine)}")
        lines.append(f"{'':{width}}   {need.sizes}: {', '.join(need.notebooks)}")
    another = weight_bytes(planned.config, planned.dtype) / GIB
    return [
        *lines,
        "",
        "Another version of the model that is looked at beside it (its base, an unaligned twin,"
        f" what training began with) takes {another:.1f} GiB more.",
        "Not counted: what Python and CUDA take for themselves (about 1 GiB), and freed memory that"
        " the allocator keeps (of glibc, up to half of `work`).",
    ]


def _name_of(dtype: precision.Precision) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype.codes
