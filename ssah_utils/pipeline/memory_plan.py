"""What a profile needs of memory, notebook by notebook, and where it would fit.

Everything is computed: weights from the shapes of the model, work by ``memory`` at the batches and
lengths of the profile's own data. Reads configurations, tokenizers and data sets; no weights.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from ssah_utils import embedded, loading, memory, precision, prompt_cache, room
from ssah_utils.pipeline.parameters import trained_model
from ssah_utils.pipeline.stamps import Stage
from ssah_utils.prompts import chat, datasets
from ssah_utils.quantisers import keeps_codes

GIB = room.GIB
# Batches of the library, by what is done: of evaluation, tokens and benchmarks.
BATCHES = {"answer": 64, "nll": 16, "openings": 32, "score": 16, "choose": 64, "follow": 64}
IN_FLOAT32 = ("03_units", "A3_finders")  # scored in float32, whatever answers
WITH_BASE = ("04_ablation", "06_freezing", "A2_stepwise", "A3_finders")


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
            if not (parts := re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", gpus)) or not int(parts[1]):
                raise ValueError(f"--gpus takes NUMBERxGIB, such as 1x24 or 4x80, not '{gpus}'")
            found = (int(float(parts[2]) * GIB),) * int(parts[1])
        elif cpu is None and torch.cuda.is_available():
            numbers = range(torch.cuda.device_count())
            found = tuple(torch.cuda.get_device_properties(n).total_memory for n in numbers)
        if cpu is not None and cpu <= 0:
            raise ValueError(f"--cpu takes GiB of memory, such as 24, not {cpu:g}")
        return cls(found, int(cpu * GIB) if cpu is not None else room.free_memory() or 0)

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def __str__(self) -> str:
        gpus = f"{len(self.gpus)} GPUs of {self.gpus[0] / GIB:.0f} GiB, " if self.gpus else ""
        return f"{gpus}{self.cpu / GIB:.0f} GiB of memory"


@dataclass(frozen=True)
class Need:
    """What the largest step of a notebook takes, in bytes: ``weights`` of all models that are held,
    ``state`` of an optimizer, and ``work``: activations, gradients, KV cache and logits.
    """

    stage: str
    step: str
    weights: int
    state: int
    work: int
    is_training: bool = False

    @property
    def total(self) -> int:
        return self.weights + self.state + self.work


@dataclass(frozen=True)
class Planned:
    """A notebook's model and data, as far as its memory depends on them."""

    stage: Stage
    machine: Machine

    @property
    def values(self) -> dict:
        return self.stage.parameters

    @cached_property
    def config(self) -> PretrainedConfig:
        return configuration(self.values["model"])

    @cached_property
    def dtype(self) -> precision.Precision:
        asked = self.values.get("dtype", "auto")
        if self.machine.device == "cuda" and asked == "auto":
            return torch.bfloat16  # native on any GPU of that size
        return precision.dtype_named(asked, "cpu")

    @cached_property
    def tokenizer(self):
        tokenizer = loading.load_tokenizer(self.values["model"])
        chat.set_chat_template(
            tokenizer, self.values["chat_template"], self.values["system_prompt"]
        )
        return tokenizer

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of the requests that are held out, and of those that units are found from."""
        names = ("harmful_data", "other_harmful_data", "helpful_data")
        splits = datasets.study_splits(*(self.values[name] for name in names))
        asked: list[str] = []
        for part in ("evaluation", "calibration"):
            for name, table in splits[part].items():
                limit = self.limit(part, name)
                asked += table["prompt"].tolist()[:limit]
        rendered = chat.render(self.tokenizer, asked, self.values["system_prompt"])
        return sorted(len(ids) for ids in prompt_cache.token_ids(self.tokenizer, rendered))

    def limit(self, part: str, name: str) -> int:
        """How many requests of a set a notebook takes at most."""
        if part == "calibration":
            return self.values.get("n_calibration", 0)
        by_name = self.values.get(f"n_{name}") if name != "other_harmful" else None
        fallbacks = ("n_evaluation", "n_queries", "n_stepwise", "n_variant", "n_harmful")
        others = [self.values[one] for one in fallbacks if one in self.values]
        if "n_evaluation" in self.values:  # 01, whose n_harmful is what it is trained on
            return self.values["n_evaluation"]
        return by_name or (others[0] if others else 0)

    def largest(self, kind: str) -> tuple[int, int]:
        """The largest batch of requests: how many, and the longest, in tokens."""
        longest = self.lengths[-BATCHES[kind] :]
        return len(longest), max(longest, default=1)

    def weights(self, dtype: precision.Precision) -> int:
        """Bytes of one copy of the model."""
        model = loading.without_weights(self.config)
        if isinstance(dtype, precision.Quantised):  # tables stay numbers
            tables = {
                id(t.weight): t.weight
                for t in (model.get_input_embeddings(), model.get_output_embeddings())
            }
            whole = sum(table.numel() for table in tables.values())
            rest = sum(one.numel() for one in model.parameters()) - whole
            return int(rest * dtype.itemsize + whole * dtype.dtype.itemsize)
        return sum(one.numel() for one in model.parameters()) * dtype.itemsize

    def n_models(self) -> int:
        """How many copies are held to be looked at: a base or an unaligned one beside the model."""
        is_ours = self.values["model"] in embedded.UNALIGNED
        n_others = is_ours and self.stage.name in WITH_BASE
        if self.stage.name in ("02_probing", "A2_stepwise"):
            n_others += is_ours
        if self.stage.name == "01_alignment":
            n_others = 2 * is_ours + bool(
                self.values["unaligned_model"] or self.values["twin_steps"]
            )
        return 1 + int(n_others)

    def needs(self) -> Iterator[Need]:
        """What each kind of step of the notebook takes."""
        if "dtype" not in self.values or self.values["model"] == embedded.TINY_RANDOM:
            return
        held = self.n_models() * self.weights(self.dtype)
        if self.stage.name in IN_FLOAT32 and self.dtype != torch.float32:
            held += self.weights(torch.float32)
        shapes = memory.Shapes(self.config, precision.computed_in(self.dtype))
        for step, work in self.works():
            yield Need(self.stage.name, step, held, 0, shapes.peak(work))
        if trained_model(self.values):
            yield self.training()

    def works(self) -> Iterator[tuple[str, memory.Work]]:
        """What the notebook does to a model without training it, each at its largest batch."""
        values, name = self.values, self.stage.name
        n_new = max(values.get(one, 0) for one in ("new_tokens", "answer_tokens"))
        if n_new:
            batch, length = self.largest("answer")
            yield (
                f"answers, {batch} x {length} tokens",
                memory.reading_prompts(batch, length, n_new),
            )
            batch, length = self.largest("nll")
            kept = min(length + n_new, 2 * n_new + 2)
            yield "answers' likelihood", memory.scoring_responses(batch, length + n_new, kept)
        if name in ("02_probing", "05_transfer", "06_freezing", "A2_stepwise", "A3_finders"):
            kind = "follow" if name == "A2_stepwise" else "openings"
            (batch, length), n_read = self.largest(kind), self.n_read()
            shown = f"{batch} x {n_read} tokens"
            yield f"openings side by side, {shown}", memory.reading_openings(batch, length, n_read)
        if name in ("03_units", "05_transfer", "07_redundant_units", "A3_finders"):
            batch, length = self.largest("score")
            length += values.get("answer_tokens", 0)
            marked = batch * max(1, values.get("answer_tokens", 1))
            yield "scoring", memory.taking_moments(batch, length, marked)
            if name == "A3_finders":
                yield "gradients", memory.taking_gradients(batch, length, marked)
        if "n_cloze" in values:
            batch, length = self.cloze()
            yield f"everyday knowledge, {batch} x {length}", memory.choosing(batch, length)

    def n_read(self) -> int:
        """Tokens of all openings that are read side by side."""
        openings, limit = datasets.load_refusals(), self.values.get("n_step_openings")
        texts = [
            text
            for side in ("refusal", "compliance")
            for text in openings[f"{side}_openings"][:limit]
        ]
        prompt = chat.render(self.tokenizer, ["Hello"], self.values["system_prompt"])
        return sum(len(ids) - 1 for ids in prompt_cache.opening_ids(self.tokenizer, prompt, texts))

    def cloze(self) -> tuple[int, int]:
        """The largest batch of the shipped task: texts, tokens of the longest."""
        import pandas as pd

        from ssah_utils.files import DATA

        table = pd.read_json(DATA / "utility_cloze.jsonl", lines=True)[: self.values["n_cloze"]]
        texts = [f"{row.context} {choice}" for row in table.itertuples() for choice in row.choices]
        longest = max(len(ids) for ids in prompt_cache.token_ids(self.tokenizer, texts))
        return min(BATCHES["choose"], len(texts)), longest

    def training(self) -> Need:
        """A step of the training of all parameters, which no training of units exceeds."""
        values, device = self.values, self.machine.device
        n = self.weights(torch.bfloat16) // torch.bfloat16.itemsize
        dtype = torch.float32
        if device == "cuda" and 1.3 * 16 * n > self.machine.gpus[0]:  # as precision.training_dtype
            dtype = torch.bfloat16
        length = self.lengths[-1] + values.get("response_tokens", values.get("answer_tokens", 16))
        batch = values["batch_size"]
        labels = batch * values.get("response_tokens", values.get("answer_tokens", 16))
        attention = "eager" if device == "cpu" else "sdpa"
        is_native = dtype == torch.float32 and precision.computed_in(self.dtype) == torch.bfloat16
        shapes = memory.Shapes(self.config, dtype, attention)
        work = shapes.peak(memory.training(batch, length, labels), is_autocast=is_native)
        work = max(work, n * dtype.itemsize)  # all gradients, at the end
        held = self.weights(self.dtype) + self.weights(dtype)
        state = memory.optimizer_bytes(n, dtype)
        step = f"training in {str(dtype).removeprefix('torch.')}, {batch} x {length} tokens"
        return Need(self.stage.name, step, held, state, work, is_training=True)


def configuration(name: str) -> PretrainedConfig:
    """The configuration of a model, also of one whose weights are not there.

    Raises what ``loading.resolve`` raises, ``ValueError`` for codes as they are stored.
    """
    config = AutoConfig.from_pretrained(loading.resolve(name), trust_remote_code=False)
    if keeps_codes(config):
        raise ValueError(f"'{name}' is stored as codes, whose memory is not planned")
    return config


def largest_needs(stages: list[Stage], machine: Machine) -> list[Need]:
    """The largest looking and the largest training step of every notebook that loads a model."""
    found = []
    for stage in stages:
        needs = list(Planned(stage, machine).needs()) if not stage.only_named else []
        for is_training in (False, True):
            kind = [need for need in needs if need.is_training == is_training]
            found += [max(kind, key=lambda need: need.total)] if kind else []
    return found


def advice(need: Need, machine: Machine, own: int) -> str:
    """Where a step fits, or what to change. ``own``: bytes that the process takes for itself."""
    total = need.total + own
    if not machine.gpus:
        if total <= machine.cpu:
            return "fits"
        rest = need.work + own
        if need.is_training:
            return "too large: leave it out by --only, or take a larger machine or a smaller model"
        return "device_map=auto keeps the rest on disk" if rest < machine.cpu else "a smaller batch"
    one, n = machine.gpus[0], len(machine.gpus)
    if total <= one:
        return "fits one GPU"
    if need.is_training:
        shared = (need.weights + need.state + need.work) / n + own
        if n > 1 and shared <= one:
            return "too large for one GPU: shard it over all of them (FSDP2)"
        return f"too large: one GPU of {total / GIB:.0f} GiB, batch_size below, or leave it out"
    if n > 1 and need.weights / n + need.work + own <= one:
        return f"device_map=auto, over {n} GPUs"
    if need.work + own < one and need.weights <= one * n + machine.cpu:
        return "device_map=auto, the rest in memory: slow; or dtype=nf4"
    if need.work + own < one:
        return "device_map=auto, the rest on disk: very slow; or dtype=nf4"
    return "too large: a smaller batch, or shorter data"


def plan_lines(stages: list[Stage], machine: Machine, own: int) -> list[str]:
    """What ``ssah plan`` prints: one line a step, in GiB."""
    needs = largest_needs(stages, machine)
    lines = [f"needed, in GiB, on {machine} (the process itself: {own / GIB:.1f})"]
    lines.append(f"{'notebook':20}{'weights':>9}{'state':>8}{'work':>8}{'total':>8}  largest step")
    for need in needs:
        parts = (need.weights, need.state, need.work, need.total + own)
        shown = "".join(f"{n / GIB:8.1f}" for n in parts)
        lines.append(f"{need.stage:21}{shown}  {need.step}: {advice(need, machine, own)}")
    return lines


def own_bytes() -> int:
    """What this process takes with the libraries that notebooks use, as Linux counts it."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 0
