"""Model judges, with tiny random models: what they read, and which models are turned away."""

import json
import math

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from ssah_utils.judge import model_judges
from ssah_utils.pipeline.parameters import check

GUARD = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}w5 safe or"
    " unsafe w6 "
)
CHAT = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}w7 "
REQUESTS, ANSWERS = ["w10 w11", "w12 w13 w14"], ["w20", "w21 w22 w23 w24"]


def classifier(folder, tokenizer, labels: list[str]) -> str:
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.BertForSequenceClassification(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("labels", "complied"),
    [(["normal", "REJECTION"], 0), (["safe", "unsafe"], 1), (["refusal", "other"], 1)],
)
def test_classifier_gives_the_probability_of_the_telling_label(
    tmp_path, tokenizer, labels, complied
):
    name = classifier(tmp_path / "judge", tokenizer, labels)
    found = model_judges.load_judge(name)(REQUESTS, ANSWERS)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(name).eval()
    for value, request, answer in zip(found, REQUESTS, ANSWERS, strict=True):
        pair = (request, answer) if "unsafe" in labels else (answer,)
        with torch.inference_mode():
            expected = (
                model(**tokenizer(*pair, return_tensors="pt"))
                .logits.softmax(-1)[0, complied]
                .item()
            )
        assert value == pytest.approx(expected, abs=1e-5)
    assert abs(found[0] - found[1]) > 1e-4, (
        "the answers must be told apart for this to mean something"
    )


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1"], ["harmful", "unsafe"]])
def test_labels_that_tell_nothing_are_refused_in_one_line(tmp_path, tokenizer, labels):
    name = classifier(tmp_path / "judge", tokenizer, labels)
    for attempt in (
        model_judges.load_judge,
        model_judges.check_judge,
        lambda n: check({"judge_model": n}),
    ):
        with pytest.raises(ValueError, match=f"has the labels {', '.join(labels)}") as error:
            attempt(name)
        assert "\n" not in str(error.value)


def test_a_classifier_of_a_single_label_is_refused_in_one_line(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="has a single label"):
        check({"judge_model": classifier(tmp_path / "judge", tokenizer, ["harmful"])})


def test_a_decoder_without_a_padding_token_judges_pairs_of_any_length(tmp_path, tokenizer):
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label={0: "safe", 1: "unsafe"},
        label2id={"safe": 0, "unsafe": 1},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    unpadded = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>"
    )
    unpadded.save_pretrained(tmp_path / "judge")
    ask = model_judges.load_judge(str(tmp_path / "judge"))
    alone = [
        ask([request], [answer]).item() for request, answer in zip(REQUESTS, ANSWERS, strict=True)
    ]
    assert (
        ask(REQUESTS, ANSWERS) == pytest.approx(alone, abs=1e-5) and abs(alone[0] - alone[1]) > 1e-5
    )


@pytest.mark.parametrize("pad_token_id", [None, 2, 10**6])
def test_a_decoder_reads_to_the_last_token_whatever_padding_is(tmp_path, tokenizer, pad_token_id):
    """Also where a text ends with the token that pads, and where nothing can pad; no tokenizer is
    changed.
    """
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label={0: "safe", 1: "unsafe"},
        label2id={"safe": 0, "unsafe": 1},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.LlamaForSequenceClassification(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.5)
    unpadded = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>"
    )
    unpadded.padding_side = "left"
    answers = ["w20 </s>", "w21 w22 w23 </s> </s>", "w5"]
    expected = []
    for request, answer in zip(["w10", "w11", "w12"], answers, strict=True):
        with torch.inference_mode():
            ids = unpadded(request, answer, return_tensors="pt").input_ids
            expected.append(
                model.model(ids)
                .last_hidden_state[0, -1]
                .matmul(model.score.weight.T)
                .softmax(-1)[1]
                .item()
            )
    model.config.pad_token_id = pad_token_id
    found = model_judges.probability_by_classifier(model, unpadded, ["w10", "w11", "w12"], answers)
    assert (
        found == pytest.approx(expected, abs=1e-5)
        and len({round(value, 4) for value in expected}) == 3
    )
    assert unpadded.pad_token is None and unpadded.padding_side == "left"


@pytest.mark.parametrize(
    ("kind", "positions", "n_read"), [("bert", 8, 8), ("roberta", 10, 8), ("xlm-roberta", 11, 8)]
)
def test_texts_are_read_as_far_as_the_classifier_can_and_cuts_are_said(
    tokenizer, kind, positions, n_read
):
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=97,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        pad_token_id=2 if kind == "xlm-roberta" else 1 if kind == "roberta" else 0,
        type_vocab_size=2,
        id2label={0: "normal", 1: "rejection"},
        label2id={"normal": 0, "rejection": 1},
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    whole, longer = (
        " ".join(f"w{index}" for index in range(5, 5 + n)) for n in (n_read, n_read + 3)
    )
    alone = model_judges.probability_by_classifier(model, tokenizer, ["w3"], [whole])
    with pytest.warns(
        UserWarning, match=f"1 of 2 texts are longer than the {n_read} tokens that judge"
    ):
        found = model_judges.probability_by_classifier(
            model, tokenizer, ["w3", "w3"], ["w4", longer]
        )
    assert found[1] == pytest.approx(alone[0], abs=1e-5)


def test_long_texts_within_a_classifier_s_positions_are_read_whole(tokenizer):
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=700,
        id2label={0: "normal", 1: "rejection"},
        label2id={"normal": 0, "rejection": 1},
    )
    model = transformers.BertForSequenceClassification(config).eval()
    text = " ".join(f"w{5 + index % 90}" for index in range(600))
    with torch.inference_mode():
        expected = 1 - model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1].item()
    assert model_judges.probability_by_classifier(model, tokenizer, ["w3"], [text])[
        0
    ] == pytest.approx(expected, abs=1e-5)


def chat_judge(folder, model, tokenizer, template: str | None) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copied = transformers.AutoTokenizer.from_pretrained(folder)
    copied.chat_template = template
    copied.save_pretrained(folder)
    return str(folder)


WORDS = ["Yes", "yes", "No", "no", "safe", "Safe", "unsafe", "Unsafe"]


@pytest.fixture
def wordy(tokenizer):
    """The words tokenizer with the judge's words as tokens of their own, in place of the last of
    its words.
    """
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = inner["model"]["vocab"]
    for position, word in enumerate(WORDS):
        vocabulary[word] = vocabulary.pop(f"w{96 - position}")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.mark.parametrize(
    ("template", "words"), [(GUARD, model_judges.GUARD_WORDS), (CHAT, model_judges.YES_WORDS)]
)
def test_chat_judge_reads_the_first_words_through_its_own_template(
    tmp_path, llama, wordy, template, words
):
    name = chat_judge(tmp_path / "judge", llama, wordy, template)
    found = model_judges.load_judge(name)(REQUESTS, ANSWERS)
    for value, request, answer in zip(found, REQUESTS, ANSWERS, strict=True):
        question = model_judges.QUESTION.format(request=request, answer=answer)
        text = (
            f"user {request} assistant {answer} w5 safe or unsafe w6 "
            if template == GUARD
            else f"{question} w7 "
        )
        ids = wordy(text, add_special_tokens=False).input_ids
        with torch.inference_mode():
            p = llama(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        yes, no = (
            sum(p[wordy(word, add_special_tokens=False).input_ids[0]].item() for word in part)
            for part in words
        )
        assert value == pytest.approx(yes / (yes + no), abs=1e-4)
        assert 0 < value < 1 and not math.isclose(value, 0.5, abs_tol=1e-6)


def test_chat_model_without_a_template_is_refused_in_one_line(tmp_path, llama, tokenizer):
    name = chat_judge(tmp_path / "judge", llama, tokenizer, None)
    with pytest.raises(ValueError, match="has no chat template") as error:
        check({"judge_model": name})
    assert "\n" not in str(error.value)


def test_model_without_a_head_is_refused_in_one_line(tmp_path, tokenizer):
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    with pytest.raises(ValueError, match=r"no head to judge with \(found: BertModel\)"):
        check({"judge_model": str(tmp_path / "judge")})


def test_judge_out_of_reach_or_misspelt_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(model_judges.hub, "answers", lambda: False)
    with pytest.raises(
        ConnectionError,
        match=r"judge model 'nobody/no-such-judge' is not in the local cache, .*or '': judge",
    ) as error:
        check({"judge_model": "nobody/no-such-judge"})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="unknown model 'guard'"):
        check({"judge_model": "guard"})
    check({"judge_model": ""})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            GUARD.replace("m['content']", "m['content'][:3]"),
            "leaves out or changes the request or the answer",
        ),
        (
            (
                "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}safe"
                " or unsafe?"
            ),
            "leaves out or changes the request or the answer",
        ),
        ("{{ raise_exception('unsafe roles') }}", "does not take this conversation: unsafe roles"),
        (
            (
                "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor"
                " %}<assistant><think>"
            ),
            "train of thought",
        ),
    ],
)
def test_a_judge_s_chat_template_is_probed_before_it_judges(
    tmp_path, llama, tokenizer, template, message
):
    name = chat_judge(tmp_path / "judge", llama, tokenizer, template)
    with pytest.raises(ValueError, match=message) as error:
        check({"judge_model": name})
    assert "\n" not in str(error.value)
