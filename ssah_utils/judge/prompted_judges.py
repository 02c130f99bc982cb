"""Judges that are fine-tuned language models with a prompt of their own and no chat template.

HarmBench's classifiers (Mazeika et al. 2024, MIT) say yes or no; StrongREJECT's evaluator (Souly et
al. 2024, MIT), a LoRA on Gemma 2B, says a score of 1 to 5. Their prompts are data, in
``data/judge_prompts.yaml``, with source and licence.
"""

import difflib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ssah_utils import extras, hub, prompt_cache, wrappers
from ssah_utils.files import DATA
from ssah_utils.loading import whole_folder
from ssah_utils.precision import Precision, computed_in
from ssah_utils.prompts import chat

N_ANSWER_TOKENS = 512  # of an answer that is judged, as the authors of both judge
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class PromptedJudge:
    """How a judge is asked and what its first word is worth.

    * ``named``: how its name, or the name of its folder, ends
    * ``prompt``: with the fields ``request`` and ``answer``, by the names of its authors
    * ``values``: by word, 0 (refused) to 1 (complied); the judge's answer is their mean, weighted
      by the probabilities of these words among themselves
    * ``any_spelling``: a word counts in every spelling that is one token
    * ``marks``: texts that open or close the prompt, and so must not stand in what is judged
    """

    name: str
    named: str
    prompt: str
    request: str
    answer: str
    values: Mapping[str, float]
    any_spelling: bool
    marks: tuple[str, ...]

    def rendered(self, request: str, answer: str) -> str:
        """The prompt with a request and an answer in it."""
        return self.prompt.format(**{self.request: request, self.answer: answer})

    def word_tokens(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
        """By word, the tokens that say it; ``ValueError`` for a word that no token says."""
        found: dict[str, list[int]] = {word: [] for word in self.values}
        for token, index in tokenizer.get_vocab().items():
            word = token.strip(" \u2581\u0120").lower() if self.any_spelling else token
            if word in found:
                found[word].append(index)
        if unsaid := [word for word, tokens in found.items() if not tokens]:
            raise ValueError(
                f"judge model '{tokenizer.name_or_path}' has no token for '{unsaid[0]}', which the"
                f" form '{self.name}' reads: give the model that this form is made for"
            )
        return found


def _read() -> dict[str, PromptedJudge]:
    stored = yaml.safe_load((DATA / "judge_prompts.yaml").read_text(encoding="utf-8"))
    found = {}
    for name, entry in stored.items():
        kept = {key: value for key, value in entry.items() if key in _FIELDS}
        found[name] = PromptedJudge(name=name, **kept | {"marks": tuple(entry["marks"])})
    return found


_FIELDS = tuple(PromptedJudge.__dataclass_fields__)
PROMPTED_JUDGES = _read()


def form_and_place(name: str) -> tuple[PromptedJudge | None, str]:
    """What a judge's name says: its form, if it has a prompt of its own, and where the model is.

    A model is known by how its name ends; ``FORM:PLACE`` names the form of any other folder or
    repository. ``ValueError`` for an unknown form.

    >>> form, place = form_and_place("strongreject:models/merged")
    >>> form.name, place
    ('strongreject', 'models/merged')
    """
    form, colon, place = name.partition(":")
    # a drive is one letter
    if colon and len(form) > 1 and re.fullmatch(r"[\w.-]+", form) and not Path(name).exists():
        if form not in PROMPTED_JUDGES:
            near = difflib.get_close_matches(form, PROMPTED_JUDGES, n=1, cutoff=0)
            there = ", ".join(PROMPTED_JUDGES)
            raise ValueError(
                f"unknown form of a judge '{form}' in '{name}'; nearest is '{near[0]}' ({there})"
            )
        return PROMPTED_JUDGES[form], place
    last = (hub.split_name(name)[0] if hub.is_name(name) else name).rstrip("/\\")
    last = re.split(r"[/\\]", last)[-1].lower()
    fitting = (one for one in PROMPTED_JUDGES.values() if last.endswith(one.named))
    return next(fitting, None), name


# ---------------------------------------------------------------------------------------- adapters


def adapter_in(place: str) -> Path | None:
    """The folder of a LoRA adapter without its model; None for anything else.

    A name of the hub is looked up, without its weights.
    """
    folder = hub.folder(place) if hub.is_name(place) else Path(place)
    is_adapter = (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()
    return folder if is_adapter else None


def base_of(adapter: Path) -> str:
    """The name of the model that an adapter belongs to; ``ValueError`` unless it is a LoRA."""
    config = json.loads((adapter / ADAPTER).read_text(encoding="utf-8"))
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    if kind != "LORA" or not base:
        raise ValueError(
            f"judge adapter '{adapter}' is of kind {kind} on '{base}', which is not read:"
            " merge it into its model and give that folder"
        )
    return base


def load_language_model(place: str, dtype: Precision, device: str) -> nn.Module:
    """A judge's model in evaluation mode; a LoRA adapter is merged into its base.

    Reads safetensors only. ``ModuleNotFoundError`` names the extra that an adapter needs.
    """
    adapter = adapter_in(place)
    base = place if adapter is None else base_of(adapter)
    safely = {"use_safetensors": True, "trust_remote_code": False, "dtype": computed_in(dtype)}
    model = AutoModelForCausalLM.from_pretrained(whole_folder(base), **safely)
    if adapter is not None:
        with extras.needed("train"):
            import peft  # slow to import

        _require_weights(place, adapter)
        model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.to(device).eval()


def _require_weights(place: str, adapter: Path) -> None:
    """An adapter's weights beside its configuration; fetched where they are absent."""
    if hub.is_name(place):
        commit, repository = hub.commit_of(place), hub.split_name(place)[0]
        hub.fetch_file(repository, commit, ADAPTER_WEIGHTS, "model")
    elif not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"judge adapter '{adapter}' has no {ADAPTER_WEIGHTS}: save it as such")


# --------------------------------------------------------------------------------------- judgements


@torch.inference_mode()
def probability_by_prompt(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[str],
    answers: list[str],
    form: PromptedJudge,
    batch_size: int = 4,
) -> np.ndarray:
    """What a judge with a prompt of its own says: (n_answers,), 0 (refused) to 1 (complied).

    P(yes) of yes and no for HarmBench, the expected score from 0 to 1 for StrongREJECT. Answers are
    cut to ``N_ANSWER_TOKENS``, and a warning says how many. ``ValueError`` in one line for a
    request that does not fit.
    """
    words = form.word_tokens(tokenizer)
    asked = [_plain(tokenizer, text, form) for text in requests]
    said = _shortened(tokenizer, [_plain(tokenizer, text, form) for text in answers])
    texts = [form.rendered(*pair) for pair in zip(asked, said, strict=True)]
    prompt_cache.check_lengths(tokenizer, model.config, texts, 2)  # what opens a text, and a word
    as_trained = {"padding": False, "truncation": False, "verbose": False}
    sequences = tokenizer(texts, **as_trained).input_ids if texts else []
    found = np.zeros(len(texts))
    values = np.array(list(form.values.values()))
    for rows in prompt_cache.length_sorted(sequences, batch_size):
        with wrappers.evaluating(model):
            read = prompt_cache.read_prompts(model, [sequences[row] for row in rows])
        log_p = read.next_logits.log_softmax(-1)
        by_word = [log_p[:, tokens].logsumexp(1) for tokens in words.values()]
        shares = torch.stack(by_word, 1).softmax(1).cpu().numpy()
        found[rows] = shares @ values
    return found


def _plain(tokenizer: PreTrainedTokenizerBase, text: str, form: PromptedJudge) -> str:
    """A text without what a tokenizer or the prompt reads as more than text."""
    while True:
        plain = chat.without_special_tokens(tokenizer, text)
        for mark in form.marks:
            plain = plain.replace(mark, "")
        if plain == text:
            return plain
        text = plain


def _shortened(tokenizer: PreTrainedTokenizerBase, answers: list[str]) -> list[str]:
    ids = prompt_cache.token_ids(tokenizer, answers)
    n_cut = sum(len(one) > N_ANSWER_TOKENS for one in ids)
    if n_cut:
        warnings.warn(
            f"{n_cut} of {len(answers)} answers are longer than the {N_ANSWER_TOKENS} tokens that"
            f" judge '{tokenizer.name_or_path}' reads: their ends are cut",
            stacklevel=3,
        )
    return [
        text if len(one) <= N_ANSWER_TOKENS else tokenizer.decode(one[:N_ANSWER_TOKENS])
        for text, one in zip(answers, ids, strict=True)
    ]
