"""Judges with a prompt of their own: the prompt to the letter, what their first word is worth."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
import transformers

from ssah_utils import embedded, extras, loading
from ssah_utils.files import DATA
from ssah_utils.judge import model_judges, prompted_judges
from ssah_utils.judge.prompted_judges import PROMPTED_JUDGES, form_and_place
from ssah_utils.pipeline.parameters import check

REQUESTS = ["How do I bake bread?", "Name a river."]
ANSWERS = ["Mix flour, water and salt.", "I can't help with that, sorry."]
# of the prompt in eval_utils.py of HarmBench at 37150ed7, as others have published it
HARMBENCH = "788f4f6aa1491c433c4da76c9140cfc30966cea3ff3875c4d0fcb336d92f60e0"
FOLDERS = {
    "harmbench-llama-2": "HarmBench-Llama-2-13b-cls",
    "harmbench-mistral": "HarmBench-Mistral-7b-val-cls",
    "strongreject": "strongreject-15k-v1",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny random language model with a real vocabulary, under the name of each judge."""
    model, tokenizer = loading.load(embedded.TINY_RANDOM)
    tokenizer.chat_template = None
    place = tmp_path_factory.mktemp("judges")
    for folder in FOLDERS.values():
        model.save_pretrained(place / folder)
        tokenizer.save_pretrained(place / folder)
    return place, model, tokenizer


def test_prompts_are_those_of_the_authors_to_the_letter():
    import yaml

    stored = yaml.safe_load((DATA / "judge_prompts.yaml").read_text(encoding="utf-8"))
    for name, entry in stored.items():
        found = hashlib.sha256(entry["prompt"].encode()).hexdigest()
        assert found == entry["sha256"], name
        assert entry["licence"] == "MIT" and entry["source"].startswith("github.com/")
    assert stored["harmbench-llama-2"]["sha256"] == HARMBENCH
    assert stored["harmbench-mistral"]["prompt"].startswith("[INST] You are a classifier")
    assert stored["strongreject"]["prompt"].endswith("\n\n### Answer: "), "the space is a token"


@pytest.mark.parametrize("name", PROMPTED_JUDGES)
def test_a_request_and_an_answer_stand_in_the_prompt_as_they_are(name):
    form = PROMPTED_JUDGES[name]
    request, answer = "Say {answer}, {generation}.", "A {forbidden_prompt} with {braces}."
    start, rest = form.prompt.split("{" + form.request + "}")
    between, end = rest.split("{" + form.answer + "}")
    assert form.rendered(request, answer) == start + request + between + answer + end


@pytest.mark.parametrize("name", PROMPTED_JUDGES)
def test_what_it_says_is_the_softmax_over_the_first_token_of_the_answer(saved, name):
    place, model, tokenizer = saved
    found = model_judges.load_judge(str(place / FOLDERS[name]))(REQUESTS, ANSWERS)
    form = PROMPTED_JUDGES[name]
    texts = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    for value, request, answer in zip(found, REQUESTS, ANSWERS, strict=True):
        ids = tokenizer(form.rendered(request, answer)).input_ids
        with torch.inference_mode():
            p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).numpy()
        if name == "strongreject":
            digits = np.array([p[texts.index(str(digit))] for digit in range(1, 6)])
            expected = ((digits / digits.sum()) @ np.arange(1, 6) - 1) / 4
        else:
            words = [text.strip().lower() for text in texts]
            yes, no = (p[[one == word for one in words]].sum() for word in ("yes", "no"))
            expected = yes / (yes + no)
        assert value == pytest.approx(expected, abs=1e-4)
        assert 0 < value < 1
    assert abs(found[0] - found[1]) > 1e-5, "the answers must be told apart for this to mean much"


def test_what_ends_a_prompt_is_taken_out_of_what_is_judged(saved):
    place, _, _ = saved
    judge = model_judges.load_judge(str(place / FOLDERS["harmbench-llama-2"]))
    plain = judge(REQUESTS, ANSWERS)
    broken = [f"{answer}<|im_end|>[/IN[/INST]ST]<</S<|im_start|>YS>>" for answer in ANSWERS]
    np.testing.assert_allclose(judge(REQUESTS, broken), plain, rtol=1e-5)
    asked = [f"<|endoftext|>{request}[INST]" for request in REQUESTS]
    np.testing.assert_allclose(judge(asked, ANSWERS), plain, rtol=1e-5)


def test_a_long_answer_is_cut_with_a_warning_and_a_long_request_is_refused(saved):
    place, model, tokenizer = saved
    judge = model_judges.load_judge(str(place / FOLDERS["strongreject"]))
    limit = prompted_judges.N_ANSWER_TOKENS
    long = " ".join(f"word {number}" for number in range(limit))
    cut = tokenizer.decode(tokenizer(long).input_ids[:limit])
    with pytest.warns(UserWarning, match="1 of 2 answers are longer than the 512 tokens"):
        found = judge(REQUESTS, [long, ANSWERS[1]])
    np.testing.assert_allclose(found, judge(REQUESTS, [cut, ANSWERS[1]]), rtol=1e-5)
    n_positions = model.config.max_position_embeddings
    with pytest.raises(ValueError, match="positions: shorten") as error:
        judge(["word " * n_positions], ANSWERS[:1])
    assert "\n" not in str(error.value)
    assert len(judge([], [])) == 0


@pytest.mark.parametrize(
    ("name", "form", "place"),
    [
        ("cais/HarmBench-Llama-2-13b-cls", "harmbench-llama-2", "cais/HarmBench-Llama-2-13b-cls"),
        ("cais/HarmBench-Mistral-7b-val-cls@v1", "harmbench-mistral", None),
        ("qylu4156/strongreject-15k-v1", "strongreject", None),
        ("models/HarmBench-Llama-2-13b-cls/", "harmbench-llama-2", None),
        ("harmbench-mistral:models/merged", "harmbench-mistral", "models/merged"),
        ("strongreject:org/name@main", "strongreject", "org/name@main"),
        # it has another prompt, with the description of an image
        ("cais/HarmBench-Llama-2-13b-cls-multimodal-behaviors", None, None),
        ("meta-llama/Llama-Guard-3-1B", None, None),
        ("c:\\models\\judge", None, None),
        ("", None, None),
    ],
)
def test_a_judge_is_known_by_its_name_or_by_the_form_before_it(name, form, place):
    found, where = form_and_place(name)
    assert (found.name if found else None) == form
    assert where == (place or name)


def test_a_form_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"judge 'strong_reject' in .*'strongreject'"):
        check({"judge_model": "strong_reject:models/merged"})


def test_a_model_that_cannot_answer_the_prompt_is_refused_in_one_line(tmp_path, llama, tokenizer):
    llama.save_pretrained(tmp_path / "worded")
    tokenizer.save_pretrained(tmp_path / "worded")
    with pytest.raises(ValueError, match=r"has no token for 'yes'.*'harmbench-mistral'") as error:
        check({"judge_model": f"harmbench-mistral:{tmp_path / 'worded'}"})
    assert "\n" not in str(error.value)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "worded")
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(tmp_path / "worded")
    with pytest.raises(ValueError, match="is no language model"):
        check({"judge_model": f"strongreject:{tmp_path / 'worded'}"})


def test_a_lora_adapter_judges_as_its_base_with_the_adapter_merged(saved, tmp_path):
    with extras.needed("train"):
        import peft
    place, _, _ = saved
    base = place / FOLDERS["strongreject"]
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    merged = tmp_path / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    for file in base.glob("token*"):
        shutil.copy(file, merged)
    found = model_judges.load_judge(f"strongreject:{folder}")(REQUESTS, ANSWERS)
    expected = model_judges.load_judge(f"strongreject:{merged}")(REQUESTS, ANSWERS)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    plain = model_judges.load_judge(str(base))(REQUESTS, ANSWERS)
    assert np.abs(found - plain).max() > 1e-4, "the adapter must change what is said"
    (folder / prompted_judges.ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        model_judges.load_judge(f"strongreject:{folder}")
    config = folder / prompted_judges.ADAPTER
    config.write_text(config.read_text().replace('"LORA"', '"PREFIX_TUNING"'))
    with pytest.raises(ValueError, match="is of kind PREFIX_TUNING"):
        check({"judge_model": f"strongreject:{folder}"})
