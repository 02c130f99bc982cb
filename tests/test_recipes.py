"""What a recipe puts before a model, which requests it is judged by, and what its units carry."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ssah_utils import cache, embedded, loading, settings
from ssah_utils.experiments import recipes
from ssah_utils.figures import recipes as figures
from ssah_utils.pipeline import parameters
from ssah_utils.prompts import chat, datasets
from ssah_utils.prompts.splits import near_duplicates
from ssah_utils.prompts.tokens import IGNORED

SOURCES = ("advbench", "harmbench", "helpful")


@pytest.fixture(scope="module")
def tiny():
    return loading.load(embedded.TINY_RANDOM)


@pytest.fixture(scope="module")
def parts():
    return recipes.development_splits(*SOURCES, "do-not-answer")


SMALL = recipes.Recipe(steps=2, batch_size=4, n_harmful=6, n_helpful=5, n_twins=3)


def test_nothing_that_is_looked_at_is_trained_on_or_evaluated(parts):
    trained_on, looked_at = parts
    evaluated = datasets.study_splits(*SOURCES)["evaluation"]
    asked = pd.concat(looked_at.values())["prompt"].tolist()
    assert all(len(rows) >= 30 for rows in looked_at.values())
    for others in (trained_on, evaluated):
        known = pd.concat(others.values())["prompt"].tolist()
        assert not set(asked) & set(known)
    other = looked_at["other_harmful"]["prompt"].tolist()
    known = evaluated["other_harmful"]["prompt"].tolist()
    assert not np.any(near_duplicates(other, known))


def test_twins_stay_together(parts):
    trained_on, looked_at = parts
    kept = set(trained_on["safe_twin"]["id"])
    assert not kept & set(looked_at["safe_twin"]["id"])
    assert set(trained_on["harmful_twin"]["id"]) <= kept
    assert set(looked_at["harmful_twin"]["id"]) <= set(looked_at["safe_twin"]["id"])


def learned(tokenizer, example: dict) -> str:
    return tokenizer.decode([token for token in example["labels"] if token != IGNORED])


def read(tokenizer, example: dict) -> str:
    n_learned = sum(token != IGNORED for token in example["labels"])
    return tokenizer.decode(example["input_ids"][: len(example["input_ids"]) - n_learned])


def test_a_recipe_says_what_is_learned(tiny, parts, own_cache):
    base, tokenizer = tiny
    examples = recipes.lesson(replace(SMALL, n_refusals=1), base, tokenizer, parts[0], 6)
    assert len(examples) == 5 + 3 + 6 + 3
    (only,) = datasets.load_refusals()["refusals"][:1]
    said = [learned(tokenizer, example) for example in examples]
    assert sum(text.startswith(only) for text in said) == 9
    without = recipes.lesson(replace(SMALL, n_twins=0), base, tokenizer, parts[0], 6)
    assert len(without) == 11


def test_recovery_reads_a_compliant_beginning_and_learns_the_refusal(tiny, parts, own_cache):
    base, tokenizer = tiny
    plain = recipes.lesson(SMALL, base, tokenizer, parts[0], 6, seed=3)
    found = recipes.lesson(replace(SMALL, recovery=0.5), base, tokenizer, parts[0], 6, seed=3)
    assert found[: len(plain)] == plain
    added = found[len(plain) :]
    assert len(added) == round(0.5 * 9)
    phrases = datasets.load_refusals()
    asked = chat.render(tokenizer, parts[0]["harmful"]["prompt"].tolist()[: len(added)])
    for example, prompt in zip(added, asked, strict=True):
        begun = read(tokenizer, example).removeprefix(prompt).strip()
        assert begun in phrases["compliance_openings"]
        assert learned(tokenizer, example).split("<|im_end|>")[0].strip() in phrases["refusals"]


def test_repetitions_draw_other_refusals(tiny, parts, own_cache):
    base, tokenizer = tiny
    one, same, other = (
        recipes.lesson(SMALL, base, tokenizer, parts[0], 6, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same != other


@pytest.fixture(scope="module")
def rows(tiny, parts, tmp_path_factory):
    """One training, looked at before and after."""
    base, tokenizer = tiny
    looked_at = {name: table[:4] for name, table in parts[1].items()}
    asked = {name: looked_at[name] for name in ("harmful", "helpful")}
    probe = recipes.EffectProbe(base, tokenizer, looked_at, asked, (0.05, 0.2), 4, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSAH_CACHE", str(tmp_path_factory.mktemp("cache")))
        examples = recipes.lesson(SMALL, base, tokenizer, parts[0], 6)
        config = settings.SFTConfig(1.0e-3, max_steps=2, batch_size=4)
        found = cache.cached(
            recipes.align_and_measure,
            base=base,
            place=embedded.TINY_RANDOM,
            tokenizer=tokenizer,
            examples=examples,
            config=config,
            steps=[0, 2],
            probe=probe,
        )
    return pd.DataFrame(found)


def test_every_condition_is_measured_at_every_step(rows):
    conditions = rows[["step", "switched_off", "fraction"]].drop_duplicates()
    assert len(conditions) == 2 * (1 + 2 * 2)
    intact = rows[rows["switched_off"] == recipes.INTACT]
    assert set(intact["set"]) >= {"harmful", "other_harmful", "helpful", "safe_twin"}
    ablated = rows[rows["switched_off"] != recipes.INTACT]
    assert set(ablated["set"]) == {"harmful"}
    margins = rows[rows["metric"] == "margin"]
    assert len(margins) == len(conditions) and np.isfinite(margins["mean"]).all()


def test_an_effect_is_what_switching_off_adds_in_points():
    def row(name: str, fraction: float, mean: float, step: int = 3) -> dict:
        keys = {"set": "harmful", "metric": "coherent_asr", "step": step, "recipe": "a"}
        return keys | {"switched_off": name, "fraction": fraction, "mean": mean}

    table = [row("nothing", 0.0, 0.1), row("safety", 0.1, 0.8), row("random", 0.1, 0.2)]
    table += [row("nothing", 0.0, 0.9, 0), row("safety", 0.1, 0.6, 0), row("random", 0.1, 0.9, 0)]
    found = recipes.effects(pd.DataFrame(table), ["recipe"]).set_index("step")
    columns = ["safety", "random", "above_random"]
    assert found.loc[3, columns].tolist() == pytest.approx([70, 10, 60])
    assert found.loc[0, columns].tolist() == pytest.approx([-30, 0, -30])


def test_figures_are_drawn_from_the_tables(rows):
    labelled = rows.assign(recipe="short", repetition=0)
    effects = recipes.effects(labelled, ["recipe", "repetition"])
    figure = figures.recipe_path({"path": labelled, "effects_path": effects})
    lines = figure.axes[1].get_lines()
    assert [line.get_label() for line in lines][:2] == ["safety 5.0%", "random 5.0%"]
    goals = labelled[(labelled["switched_off"] == "nothing") & (labelled["metric"] == "asr")]
    figure = figures.recipe_effects({"goals": goals, "effects": effects})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["short"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "at least one recipe"),
        ({"fast": {"stepz": 3}}, "'stepz'.*a recipe changes batch_size, learning_rate"),
        ({"fast": 3}, "3 under 'fast'"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_one_line(value, said):
    with pytest.raises(ValueError, match=said) as raised:
        parameters.check({"recipes": value})
    assert "\n" not in str(raised.value)
    parameters.check({"recipes": {"fast": {"steps": 3}}})
