"""Answers, verdicts, margin and utility: batched results against one-by-one computations."""

import copy
import json
import logging
import math

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.functional import log_softmax
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ssah_utils import benchmarks, evaluation, fingerprints, loading
from ssah_utils.experiments import stepwise
from ssah_utils.judge import decisions
from ssah_utils.prompts import chat, datasets, tokens

REQUESTS = [
    "Why?",
    "Tell me about the sea and all the animals that live in it, in as much detail as you can.",
    "List three colours.",
    "How do I fold a shirt so that it fits in a small suitcase?",
    "Hello there",
]


@pytest.fixture(scope="module")
def tiny():
    """The tiny random model, its matrices enlarged: as initialised, it hardly notices which tokens
    stand where.
    """
    model, tokenizer = loading.load("tiny-random-llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model, tokenizer


@pytest.fixture(scope="module")
def rendered(tiny) -> list[str]:
    return chat.render(tiny[1], REQUESTS)


@pytest.fixture
def table() -> pd.DataFrame:
    ids = [f"request-{n}" for n in range(len(REQUESTS))]
    return pd.DataFrame({"id": ids, "prompt": REQUESTS, "category": "any"}, index=[7, 3, 5, 1, 0])


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.inference_mode()
def continuation_log_probability(model, prompt_ids: list[int], next_ids: list[int]) -> float:
    """The definition: one forward pass over the whole text, no padding, no cache."""
    logits = model(torch.tensor([prompt_ids + next_ids]), use_cache=False).logits[0]
    log_p = log_softmax(logits, -1)
    return sum(log_p[len(prompt_ids) - 1 + n, token].item() for n, token in enumerate(next_ids))


# ------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batched_answers_equal_one_by_one_answers_in_their_order(tiny, rendered, batch_size):
    model, tokenizer = tiny
    expected = []
    for text in rendered:
        ids = torch.tensor([ids_of(tokenizer, text)])
        with torch.inference_mode():
            answer = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        expected.append(
            tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()
        )
    assert len(set(expected)) > 1, "the prompts must be told apart by their answers"
    assert evaluation.generate(model, tokenizer, rendered, 8, batch_size=batch_size) == expected


def test_answers_end_at_the_end_token(tiny, rendered):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    first = ids_of(tokenizer, rendered[0])
    with torch.inference_mode():
        likely = model(torch.tensor([first])).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = likely
    answers = evaluation.generate(model, tokenizer, rendered[:2], 8)
    assert answers[0] == "", "what ends an answer is no part of it"


@pytest.mark.parametrize("pad_token_id", [None, 10**6])
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_tokenizer_is_asked_to_pad_or_changed(tiny, rendered, pad_token_id, side):
    model, tokenizer = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[1])
    tokenizer.pad_token = None if pad_token_id is None else "<beyond>"
    tokenizer.padding_side = side
    model.generation_config.pad_token_id = model.config.pad_token_id = pad_token_id
    for measure in (
        lambda m, t: evaluation.generate(m, t, rendered, 4),
        lambda m, t: evaluation.response_nll(m, t, rendered, REQUESTS).tolist(),
        lambda m, t: evaluation.opening_log_probabilities(m, t, rendered, REQUESTS[:2]).tolist(),
        lambda m, t: benchmarks.utility(m, t, ["cloze"], limit=3)["correct"].tolist(),
    ):
        assert measure(model, tokenizer) == measure(*tiny)
    assert (
        tokenizer.pad_token == (None if pad_token_id is None else "<beyond>")
        and tokenizer.padding_side == side
    )


# An unusual value for fields whose type is not that of a number; the others are set to 3.
UNUSUAL = {
    "stop_strings": ["w"],
    "do_sample": True,
    "early_stopping": True,
    "use_mtp": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "repetition_penalty": 1.9,
    "encoder_repetition_penalty": 1.9,
    "temperature": 9.0,
    "top_p": 0.5,
    "min_p": 0.5,
    "top_h": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "max_time": 1e-9,
    "suppress_tokens": list(range(3, 80)),
    "begin_suppress_tokens": list(range(3, 80)),
    "bad_words_ids": [[5], [6], [7]],
    "sequence_bias": [[[5], 99.0]],
    "exponential_decay_length_penalty": (1, 9.0),
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 6,
    "watermarking_config": {"bias": 50.0},
    "compile_config": None,
    "assistant_early_exit": 1,
    "continuous_batching_config": None,
    "dola_layers": "high",
    "penalty_alpha": 0.6,
    "constraints": None,
    "force_words_ids": [[[5, 6]]],
    "num_assistant_tokens_schedule": "constant",
    "speculation_type": None,
    "guidance_scale": 3.0,
    "max_length": 1,
    "num_return_sequences": 2,
    "transformers_version": "4.0",
}
FIELDS = sorted(
    set(vars(GenerationConfig()))
    - {"eos_token_id"}
    - {name for name in vars(GenerationConfig()) if name[0] == "_"}
)


@torch.inference_mode()
def likeliest(model, prompt: list[int], n_tokens: int, end: int) -> list[int]:
    """The definition of greedy: the likeliest token after the whole text so far, read at once,
    until one ends it.
    """
    said = []
    while len(said) < n_tokens:
        token = model(torch.tensor([prompt + said]), use_cache=False).logits[0, -1].argmax().item()
        if token == end:
            break
        said.append(token)
    return said


def test_greedy_is_greedy_whatever_a_checkpoint_asks_for(llama, tokenizer):
    """Every field of the installed generation configuration; the prompt cache and the harness's
    generation agree.
    """
    texts = ["w5 w6 w7", "w9 w30"]
    ids = [ids_of(tokenizer, text) for text in texts]
    end = likeliest(llama, ids[0], 6, -1)[3]
    expected = [likeliest(llama, row, 6, end) for row in ids]
    assert len(expected[0]) <= 3 and len(expected[1]) == 6, "one ends early, one is cut"
    answers = [tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    kept = llama.generation_config
    for field in FIELDS:
        own = GenerationConfig(eos_token_id=end)
        setattr(own, field, UNUSUAL.get(field, 3))
        llama.generation_config = own
        assert evaluation.generate(llama, tokenizer, texts, 6) == answers, field
        trajectory = stepwise.generate_and_probe(
            llama, tokenizer, texts, {0: [[], []]}, 6, [0], (["w3"], ["w4"])
        )[0]
        assert trajectory.tokens == expected, field
        with benchmarks._plain_generation(llama, tokenizer):
            row = torch.tensor(ids[1:])
            said = llama.generate(
                row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
            )
        assert said[0, row.shape[1] :].tolist() == expected[1], field
        assert llama.generation_config is own, "a model is left as it was"
    llama.generation_config = kept


def test_generation_settings_in_an_old_config_file_change_no_answer(saved_llama, llama, tokenizer):
    texts = ["w5 w6 w7", "w9 w30"]
    path = saved_llama / "config.json"
    old = {
        "repetition_penalty": 1.9,
        "no_repeat_ngram_size": 1,
        "num_beams": 3,
        "do_sample": True,
        "suppress_tokens": [5, 6],
    }
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | old), encoding="utf-8"
    )
    (saved_llama / "generation_config.json").unlink()
    loaded, _ = loading.load(str(saved_llama))
    assert evaluation.generate(loaded, tokenizer, texts, 6) == evaluation.generate(
        llama, tokenizer, texts, 6
    )


def test_the_end_of_a_turn_ends_an_answer_and_what_is_learned(llama, tokenizer):
    """It is another token than the model's and the tokenizer's end."""
    spoken = copy.deepcopy(tokenizer)
    ids = ids_of(tokenizer, "w5 w6 w7")
    end = likeliest(llama, ids, 6, 2)[2]
    word = tokenizer.decode([end])
    spoken.add_special_tokens({"additional_special_tokens": [word]})
    spoken.chat_template = (
        "{% for m in messages %}w9 {{ m.content }} "
        + word
        + " {% endfor %}{% if add_generation_prompt %}w8 {% endif %}"
    )
    assert evaluation.generate(llama, spoken, ["w5 w6 w7"], 6) == [
        tokenizer.decode(likeliest(llama, ids, 6, end))
    ]
    assert tokens.encode(spoken, ["w5"], ["w6"], 4)[0]["labels"] == [tokens.IGNORED, 6, end]


def test_text_is_what_was_said_whatever_the_tokenizer_cleans_up(llama, tokenizer):
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    first = likeliest(llama, ids_of(tokenizer, "w5 w6 w7"), 4, 2)[1]
    words = vocabulary["model"]["vocab"]
    words["."] = words.pop(tokenizer.decode([first]))
    untidy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(vocabulary)),
        eos_token="</s>",
        clean_up_tokenization_spaces=True,
    )
    assert " ." in evaluation.generate(llama, untidy, ["w5 w6 w7"], 4)[0]


def test_prompts_that_leave_no_room_are_refused_before_anything_is_read(
    llama, tokenizer, monkeypatch
):
    long = " ".join(f"w{index}" for index in range(5, 67))  # 62 of 64 positions
    openings = (["w3 w4 w5"], ["w6"])
    monkeypatch.setattr(llama, "forward", lambda *args, **kwargs: pytest.fail("read"))
    for measure in (
        lambda: evaluation.generate(llama, tokenizer, ["w3", long], 3),
        lambda: evaluation.response_nll(llama, tokenizer, ["w3", long], ["w4", "w4 w5 w6"]),
        lambda: evaluation.opening_log_probabilities(llama, tokenizer, ["w3", long], openings[0]),
        lambda: stepwise.prefills(llama, tokenizer, ["w3", long], ["w4"], 3),
        lambda: stepwise.generate_and_probe(
            llama, tokenizer, ["w3", long], {0: [[], []]}, 0, [0], openings
        ),
        lambda: stepwise.generate_and_probe(
            llama, tokenizer, ["w3", long], {0: [[5, 6], [5, 6]]}, 1, [0], (["w3"], ["w4"])
        ),
    ):
        with pytest.raises(
            ValueError,
            match=r"prompt 2 of 2 \('w5 w6 w7 w8 \.\.\.'\) has 62 tokens, with 3 after it",
        ) as error:
            measure()
        assert "\n" not in str(error.value)


def test_own_answers_are_remembered_per_model_and_prompts(tiny, rendered, tmp_path, monkeypatch):
    monkeypatch.setenv("SSAH_CACHE", str(tmp_path))
    calls = []

    def fake(model, tokenizer, texts, max_new_tokens, progress):
        calls.append(texts)
        return [f"answer {len(calls)}"] * len(texts)

    monkeypatch.setattr(evaluation, "generate", fake)
    ask = lambda model, texts, n: evaluation.cached_answers(model, tiny[1], texts, n)  # noqa: E731
    model, other = tiny[0], copy.deepcopy(tiny[0])
    with torch.no_grad():
        other.get_input_embeddings().weight[3, 3] += 1
    assert ask(model, rendered, 4) == ask(model, rendered, 4) == ["answer 1"] * 5
    assert ask(other, rendered, 4) == ["answer 2"] * 5
    assert ask(model, rendered, 5) == ["answer 3"] * 5
    assert ask(model, rendered[:2], 4) == ["answer 4"] * 2
    assert ask(model, rendered, 4) == ["answer 1"] * 5
    with pytest.raises(ValueError, match="it was changed since"):
        evaluation.cached_answers(other, tiny[1], rendered, 4, fingerprints.fingerprint(model))


# ---------------------------------------------------------------------------------------------- nll

RESPONSES = [
    "Because of the light.",
    "",
    "Red, green, blue and a lot of other colours that I could name",
    "Lay it flat",
    "Hi",
]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_response_nll_equals_a_float64_computation_per_example(tiny, rendered, batch_size):
    model, tokenizer = tiny
    oracle = copy.deepcopy(model).double()
    found = evaluation.response_nll(model, tokenizer, rendered, RESPONSES, batch_size=batch_size)
    for text, response, value in zip(rendered, RESPONSES, found, strict=True):
        next_ids = ids_of(tokenizer, response)
        if not next_ids:
            assert math.isnan(value)
            continue
        expected = -continuation_log_probability(oracle, ids_of(tokenizer, text), next_ids) / len(
            next_ids
        )
        assert value == pytest.approx(expected, rel=1e-5)


def test_response_nll_counts_at_most_the_asked_tokens(tiny, rendered):
    model, tokenizer = tiny
    long = RESPONSES[2]
    cut = tokenizer.decode(ids_of(tokenizer, long)[:4])
    found = evaluation.response_nll(
        model, tokenizer, [rendered[0]] * 2, [long, cut], max_response_tokens=4
    )
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_response_nll_of_empty_responses_alone_is_nan(tiny, rendered):
    assert np.isnan(evaluation.response_nll(*tiny, rendered[:2], ["", ""])).all()


# ------------------------------------------------------------------------------------------- margin

OPENINGS = ["I'm sorry, but I can't", "Sure", "Of trajectory! Here"]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_opening_log_probabilities_equal_whole_forward_passes(tiny, rendered, batch_size):
    model, tokenizer = tiny
    found = evaluation.opening_log_probabilities(
        model, tokenizer, rendered, OPENINGS, batch_size=batch_size
    )
    expected = [
        [
            continuation_log_probability(model, ids_of(tokenizer, text), ids_of(tokenizer, opening))
            for opening in OPENINGS
        ]
        for text in rendered
    ]
    assert found.shape == (len(rendered), len(OPENINGS))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_refusal_margin_is_the_log_ratio_of_mean_probabilities(tiny, monkeypatch):
    model, tokenizer = tiny
    # unequal numbers
    openings = {"refusal_openings": OPENINGS[:1], "compliance_openings": OPENINGS[1:]}
    monkeypatch.setattr(evaluation, "load_refusals", lambda: openings)
    margin = evaluation.refusal_margin(model, tokenizer, REQUESTS[:3], "Be brief.")
    rendered = chat.render(tokenizer, REQUESTS[:3], "Be brief.")
    refusal, compliance = (
        np.exp(evaluation.opening_log_probabilities(model, tokenizer, rendered, part)).mean(1)
        for part in openings.values()
    )
    np.testing.assert_allclose(margin, np.log(refusal / compliance), rtol=1e-5)


def test_refusal_margin_of_the_first_openings_only(tiny, monkeypatch):
    shipped = datasets.load_refusals()
    few = evaluation.refusal_margin(*tiny, REQUESTS[:3], n_openings=2)
    assert not np.allclose(few, evaluation.refusal_margin(*tiny, REQUESTS[:3]))
    monkeypatch.setattr(
        evaluation, "load_refusals", lambda: {side: part[:2] for side, part in shipped.items()}
    )
    np.testing.assert_array_equal(few, evaluation.refusal_margin(*tiny, REQUESTS[:3]))


# ----------------------------------------------------------------------------------------- verdicts


def check_consistent(rows: pd.DataFrame, table: pd.DataFrame) -> None:
    assert (
        rows["id"].tolist() == table["id"].tolist()
        and rows["prompt"].tolist() == table["prompt"].tolist()
    )
    assert rows["verdict"].isin(decisions.VERDICTS).all()
    assert (rows["asr"] == ~rows["refused"]).all()
    assert (rows[["refused", "coherent_asr", "degenerate"]].sum(axis=1) == 1).all()
    assert (rows["asr"] == (rows["coherent_asr"] | rows["degenerate"])).all()


def test_judged_table_has_one_row_per_request_with_exactly_one_verdict(tiny, table):
    model, tokenizer = tiny
    rows = evaluation.answer_and_judge(model, model, tokenizer, table, max_new_tokens=6)
    check_consistent(rows, table)
    assert rows["response"].tolist() == evaluation.generate(
        model, tokenizer, chat.render(tokenizer, REQUESTS), 6
    )
    expected = evaluation.response_nll(
        model, tokenizer, chat.render(tokenizer, REQUESTS), rows["response"].tolist(), 6
    )
    np.testing.assert_allclose(rows["base_nll"], expected, rtol=1e-5)


def test_judge_asks_the_base_model_about_every_answer(tiny, table, monkeypatch):
    """Also about refusals: their verdict may be taken again under other rules."""
    answers = ["I can't help with that.", "Because it is so.", "", "a b " * 20, "zx qw vb nm"]
    nll = {
        "I can't help with that.": 0.3,
        "Because it is so.": 1.0,
        "": math.nan,
        "a b " * 20: 0.5,
        "zx qw vb nm": 8.0,
    }
    monkeypatch.setattr(evaluation, "generate", lambda *args, **kwargs: answers)
    monkeypatch.setattr(
        evaluation,
        "response_nll",
        lambda m, t, p, responses, n: np.array([nll[r] for r in responses]),
    )
    rows = evaluation.answer_and_judge(tiny[0], tiny[0], tiny[1], table)
    check_consistent(rows, table)
    assert rows["verdict"].tolist() == [
        "refused",
        "complied",
        "degenerate",
        "degenerate",
        "degenerate",
    ]
    np.testing.assert_array_equal(rows["base_nll"], [0.3, 1.0, math.nan, 0.5, 8.0])


def test_judge_accepts_a_model_that_refuses_everything(tiny, table, monkeypatch):
    monkeypatch.setattr(evaluation, "generate", lambda *args, **kwargs: ["No."] * len(REQUESTS))
    rows = evaluation.answer_and_judge(tiny[0], tiny[0], tiny[1], table)
    check_consistent(rows, table)
    assert rows["refused"].all()


# ------------------------------------------------------------------------------------------ utility

N_CLOZE = 10


@pytest.fixture(scope="module")
def cloze_rows(tiny) -> pd.DataFrame:
    return benchmarks.cloze(*tiny, limit=N_CLOZE)


def test_cloze_returns_ids_and_booleans_of_distinct_items(cloze_rows):
    assert list(cloze_rows.columns) == ["id", "correct"]
    assert len(cloze_rows) == cloze_rows["id"].nunique() == N_CLOZE
    assert cloze_rows["correct"].dtype == bool


def test_cloze_is_deterministic_whatever_the_batch_size(tiny, cloze_rows):
    pd.testing.assert_frame_equal(benchmarks.cloze(*tiny, limit=N_CLOZE, batch_size=3), cloze_rows)


def test_cloze_equals_log_likelihoods_divided_by_characters(tiny, cloze_rows):
    model, tokenizer = tiny
    items = {item["id"]: item for item in benchmarks.cloze_task()["custom_dataset"]()["test"]}
    expected = []
    for item in map(items.__getitem__, cloze_rows["id"]):
        context = ids_of(tokenizer, item["context"])
        scores = []
        for choice in item["choices"]:
            whole = ids_of(tokenizer, f"{item['context']} {choice}")
            assert whole[: len(context)] == context
            scores.append(
                continuation_log_probability(model, context, whole[len(context) :]) / len(choice)
            )
        expected.append(int(np.argmax(scores)) == item["answer"])
    assert cloze_rows["correct"].tolist() == expected
    assert 0 < sum(expected) < N_CLOZE, "items must differ for the comparison to mean something"


def test_cloze_leaves_the_log_level_and_the_model_as_they_were(tiny):
    before, training = logging.getLogger("lm_eval").level, tiny[0].training
    benchmarks.cloze(*tiny, limit=2)
    assert logging.getLogger("lm_eval").level == before and tiny[0].training == training


def test_limited_cloze_is_the_beginning_of_the_whole_shuffled_set(cloze_rows):
    items = benchmarks.cloze_task()["custom_dataset"]()["test"]
    assert cloze_rows["id"].tolist() == items["id"][:N_CLOZE]
    assert len(set(items["topic"][:100])) >= 5


def test_utility_joins_tasks_and_names_them(tiny, cloze_rows):
    rows = benchmarks.utility(*tiny, ["cloze", "cloze"], limit=N_CLOZE)
    assert (
        list(rows.columns) == ["task", "id", "correct"]
        and set(rows["task"]) == {"cloze"}
        and len(rows) == 2 * N_CLOZE
    )
    pd.testing.assert_frame_equal(rows[["id", "correct"]][:N_CLOZE], cloze_rows)


@pytest.mark.parametrize(
    ("sample", "right"),
    [
        ({"acc": 0.0, "acc_norm": 1.0}, True),
        ({"acc": 1.0, "acc_norm": 0.0}, False),
        ({"acc": True}, True),
        ({"exact_match": 0.0}, False),
        ({"exact_match": 1}, True),
    ],
)
def test_an_item_counts_by_the_first_metric_its_task_reports(sample, right):
    assert benchmarks._is_right(sample) is right


def test_a_task_without_an_accuracy_is_no_utility():
    with pytest.raises(ValueError, match="acc_norm, acc, exact_match"):
        benchmarks._is_right({"perplexity": 3.0})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("hellaswagg", "hellaswag"), ("arc_chalenge", "arc_challenge"), ("clozee", "cloze")],
)
def test_unknown_task_names_the_nearest_in_one_line(name, nearest):
    with pytest.raises(
        ValueError, match=f"unknown utility task '{name}'; nearest are .*{nearest}"
    ) as error:
        benchmarks.load_task(name)
    assert "\n" not in str(error.value)


def test_the_papers_tasks_are_the_harness_s():
    from lm_eval.tasks import TaskManager

    assert set(benchmarks.PAPER_TASKS) <= set(TaskManager().all_tasks)


def test_a_task_without_a_hub_says_so_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks.hub, "answers", lambda: False)
    monkeypatch.setattr(benchmarks.datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConnectionError, match="data of utility task 'openbookqa'") as error:
        benchmarks.load_task("openbookqa")
    assert "\n" not in str(error.value)


def few_shot_task():
    from lm_eval.api.task import ConfigurableTask

    documents = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(30)]
    parts = {part: benchmarks.datasets.Dataset.from_list(documents) for part in ("train", "test")}
    return ConfigurableTask(
        config={
            "task": "few",
            "custom_dataset": lambda **_: parts,
            "training_split": "train",
            "test_split": "test",
            "num_fewshot": 3,
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2},
            "metric_list": [{"metric": "exact_match"}],
        }
    )


def test_few_shot_examples_are_the_same_each_time_also_in_groups():
    contexts = []
    for _ in range(3):
        task = few_shot_task()
        benchmarks._seeded({"group": {"few": task}})
        contexts.append([task.fewshot_context(doc, 3) for doc in list(task.test_docs())[:4]])
    assert contexts[0] == contexts[1] == contexts[2] and len(set(contexts[0])) == 4


def test_the_harness_says_what_it_cuts_and_generates_greedily(tiny, monkeypatch):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    monkeypatch.setattr(
        benchmarks, "load_task", lambda name: benchmarks._seeded({"few": few_shot_task()})
    )
    expected = benchmarks.utility(model, tokenizer, ["few"], limit=3)
    model.generation_config = GenerationConfig(
        num_beams=3, repetition_penalty=5.0, eos_token_id=0, max_time=1e-9
    )
    own = model.generation_config
    pd.testing.assert_frame_equal(benchmarks.utility(model, tokenizer, ["few"], limit=3), expected)
    assert model.generation_config is own
    model.config.max_position_embeddings = 12
    with pytest.warns(
        UserWarning, match="utility task 'few': . texts or batches were cut to fit the model"
    ):
        benchmarks.utility(model, tokenizer, ["few"], limit=3)
