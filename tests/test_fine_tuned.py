"""The shared study of fine-tuning: nothing that is looked at was trained on or defended with."""

import pandas as pd
import pytest

from ssah_utils import embedded, loading
from ssah_utils.experiments.fine_tuned import N_OPENED, FineTuningStudy
from ssah_utils.experiments.measured_training import FRESH, SAFE
from ssah_utils.prompts import datasets
from ssah_utils.prompts.chat import render
from ssah_utils.prompts.tokens import IGNORED

PARAMETERS = {"learning_rate": 1e-3, "batch_size": 2, "seed": 3, "system_prompt": ""}
PARAMETERS |= {"response_tokens": 8, "new_tokens": 3, "n_task": 4, "n_margin": 3, "n_fresh": 2}
PARAMETERS |= {"n_harmful": 5, "n_cloze": 4}


def table(name: str, n: int) -> pd.DataFrame:
    ids = [f"{name}-{row}" for row in range(n)]
    prompts = [f"request {row} of {name}" for row in range(n)]
    return pd.DataFrame({"id": ids, "category": name, "prompt": prompts})


@pytest.fixture(scope="module")
def study() -> FineTuningStudy:
    model, tokenizer = loading.load(embedded.TINY_RANDOM)
    evaluated = {name: table(name, 9) for name in ("harmful", "other_harmful", "safe_twin")}
    calibrated = {"harmful": table("calibration", 90), "helpful": table("helpful", 6)}
    splits = {"evaluation": evaluated, "calibration": calibrated}
    return FineTuningStudy(model, embedded.TINY_RANDOM, tokenizer, model, splits, PARAMETERS)


def test_margins_are_followed_on_three_kinds_of_requests_and_others_are_answered(study):
    watched = study.watched
    assert {name: len(requests) for name, requests in watched.items()} == {
        "margin": 3,
        FRESH: 2,
        SAFE: 2,
    }
    assert watched[FRESH][-1] == "request 8 of other_harmful"
    assert watched[SAFE][-1] == "request 8 of safe_twin"
    asked = {name: requests["prompt"].tolist() for name, requests in study.panel().requests.items()}
    assert {name: len(requests) for name, requests in asked.items()} == {
        "harmful": 5,
        "other_harmful": 5,
    }
    assert not set(watched["margin"]) & set(asked["harmful"])


def test_the_recipe_is_that_of_the_parameters_and_the_task_is_held_out(study):
    tuning = study.tuning("arithmetic")
    assert (tuning.recipe.learning_rate, tuning.recipe.seed) == (1e-3, 3)
    task, *margins = tuning.probes
    assert task.numeric and len(task.pairs) == 4 and len(margins) == 3
    train, held_out = datasets.adaptation_split("arithmetic")
    assert task.pairs["prompt"].tolist() == held_out["prompt"].tolist()[:4]
    assert len(study.examples("arithmetic")) == len(train)
    assert not study.tuning("adaptation").probes[0].numeric


def decoded(study, example) -> str:
    return study.tokenizer.decode([one for one in example["labels"] if one != IGNORED])


def test_what_a_defence_looks_at_is_in_no_attack_and_refused(study):
    refusals, harmless = study.to_defend_with(6, 4, seed=1)
    assert len(refusals) == 6 and len(harmless) == 6
    known = datasets.load_refusals()["refusals"]
    end = study.tokenizer.decode([refusals[0]["labels"][-1]])
    assert all(decoded(study, one).removesuffix(end) in known for one in refusals)
    asked = study.splits["calibration"]["harmful"]["prompt"].tolist()
    (rendered,) = render(study.tokenizer, asked[N_OPENED : N_OPENED + 1])
    ids = study.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert refusals[0]["input_ids"][: len(ids)] == ids
    assert len(study.attacks()["openings only"]) == N_OPENED


def test_openings_teach_no_end_of_a_turn(study):
    attacks = study.attacks()
    openings = datasets.load_refusals()["compliance_openings"]
    first = decoded(study, attacks["openings only"][0])
    assert openings[0].startswith(first) and first
    assert len(attacks["identity shift"]) == len(datasets.load_pairs("identity-shift"))
