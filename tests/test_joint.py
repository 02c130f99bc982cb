"""What stands between a prompt and an answer: token ids of answers against those of the template's
own conversation.
"""

import copy

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ssah_utils import evaluation, prompt_cache, sequences
from ssah_utils.experiments import stepwise
from ssah_utils.prompts import chat, tokens

LOOP, ASK = "{% for m in messages %}", "{% if add_generation_prompt %}"
MARKED = (
    LOOP
    + "<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    + ASK
    + "<|assistant|>\n{% endif %}"
)
ROLES = (
    LOOP
    + "{{ 'User' if m.role == 'user' else 'Assistant' }}:JOINT{{ m.content }}{{ '</s>' if m.role =="
    " 'assistant' }}\n\n"
)
NAMED = ROLES + "{% endfor %}" + ASK + "Assistant:{% endif %}"
# template, what it puts between the opened turn and an answer
JOINTS = {
    "space": (NAMED.replace("JOINT", " "), " "),
    "line": (NAMED.replace("JOINT", "\n"), "\n"),
    "two lines": (NAMED.replace("JOINT", "\n\n"), "\n\n"),
    "none": (NAMED.replace("JOINT", ""), ""),
    "instruction": (
        LOOP
        + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>{%"
        " endif %}{% endfor %}",
        " ",
    ),
    "line opened": (MARKED, ""),
    "half opened": (MARKED.replace("<|assistant|>\n{% endif", "<|assistant|>{% endif"), "\n"),
    "more opened": (
        NAMED.replace("JOINT", "").replace("Assistant:{% endif", "Assistant: {% endif"),
        "",
    ),
    "thoughts closed": (
        MARKED.replace("<|assistant|>\n{%", "<|assistant|>\n<think>\n\n</think>\n\n{%"),
        "",
    ),
    "thoughts closed on the line": (
        MARKED.replace("<|assistant|>\n{%", "<|assistant|>\n<think></think>{%"),
        "",
    ),
}
WORDS = ["Why", "Who", "Sure", "I", "cannot", "help", "Assistant", "User", "INST"]


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes, and words with and without the space before them, as GPT-2, Llama 3 and DeepSeek have
    them.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = {sign: number for number, sign in enumerate(alphabet)}, []
    for word in [*WORDS, *(f"Ġ{word}" for word in WORDS), "ĊĊ"]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary[word[:end]] = len(vocabulary)
    inner = Tokenizer(token_models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return made(inner)


def sentencepiece(split: bool) -> PreTrainedTokenizerFast:
    """Pieces that begin with a mark for the space, which is also put before a text, as Llama 2 and
    Phi-3 have them.
    """
    signs = sorted(
        {sign for word in WORDS for sign in word}
        | set("▁\n:,.?!'<>|/[]{}\\\"&")
        | set("abcdefghijklmnopqrstuvwxyz")
    )
    pieces = [
        ("<unk>", 0.0),
        *((word, -2.0) for word in WORDS),
        *((f"▁{word}", -1.9) for word in WORDS),
    ]
    pieces += [(sign, -5.0) for sign in signs if sign not in dict(pieces)]
    inner = Tokenizer(token_models.Unigram(pieces, unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    return made(inner)


def made(inner: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.add_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in ("<|user|>", "<|assistant|>")]
    )
    return tokenizer


TOKENIZERS = {
    "bytes": byte_level(),
    "pieces": sentencepiece(False),
    "split pieces": sentencepiece(True),
}
ANSWERS = ["I cannot help", "Sure, I help", "cannot", "Sure"]


def with_template(kind: str, name: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(TOKENIZERS[kind])
    tokenizer.chat_template = JOINTS[name][0]
    return tokenizer


@pytest.mark.parametrize("name", JOINTS)
def test_the_joint_is_what_the_template_puts(name):
    tokenizer = with_template("bytes", name)
    chat.check_chat_template(tokenizer)
    assert chat.answer_separator(tokenizer) == JOINTS[name][1]


@pytest.mark.parametrize(
    "name", ["space", "line", "two lines", "none", "instruction", "line opened", "half opened"]
)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_has_the_tokens_of_the_template_s_own_conversation(kind, name):
    tokenizer = with_template(kind, name)
    talks = [
        [{"role": "user", "content": "Why"}, {"role": "assistant", "content": answer}]
        for answer in ANSWERS
    ]
    whole = [chat.rendered(tokenizer, talk, answer_follows=False) for talk in talks]
    examples = tokens.encode(tokenizer, chat.render(tokenizer, ["Why"] * len(ANSWERS)), ANSWERS, 99)
    for text, example in zip(whole, examples, strict=True):
        ids = prompt_cache.token_ids(tokenizer, [text.replace(" </s>", "</s>")])[0]
        assert example["input_ids"] == ids[: len(example["input_ids"])]
        assert example["labels"][-1] == tokenizer.eos_token_id
        assert not tokenizer.decode(ids[len(example["input_ids"]) :]).strip()


def tiny(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.3)
    return model


@torch.inference_mode()
def log_p(model, before: list[int], after: list[int]) -> float:
    said = (
        model(torch.tensor([before + after]), use_cache=False)
        .logits[0, len(before) - 1 : -1]
        .log_softmax(-1)
    )
    return float(said[range(len(after)), after].sum())


@pytest.mark.parametrize(
    ("kind", "name"), [("bytes", "space"), ("pieces", "line opened"), ("bytes", "two lines")]
)
def test_every_measure_reads_an_answer_where_the_template_puts_it(kind, name):
    tokenizer = with_template(kind, name)
    model, rendered = tiny(tokenizer), chat.render(tokenizer, ["Why", "Who"])
    before = prompt_cache.token_ids(tokenizer, rendered)
    ids = [
        row[len(before[0]) :]
        for row in prompt_cache.token_ids(
            tokenizer, [rendered[0] + JOINTS[name][1] + a for a in ANSWERS]
        )
    ]
    assert ids != prompt_cache.token_ids(tokenizer, ANSWERS), "otherwise the test would say nothing"
    expected = np.array([[log_p(model, start, row) for row in ids] for start in before])
    close = {"rtol": 1e-4, "atol": 1e-4}
    found = evaluation.opening_log_probabilities(model, tokenizer, rendered, ANSWERS)
    np.testing.assert_allclose(found, expected, **close)
    nll = evaluation.response_nll(model, tokenizer, [rendered[0]] * len(ANSWERS), ANSWERS)
    np.testing.assert_allclose(nll, -expected[0] / list(map(len, ids)), **close)
    forced = stepwise.prefills(model, tokenizer, rendered, ANSWERS[:2], max(map(len, ids)))
    assert [row[: len(own)] for row, own in zip(forced, ids, strict=False)] == ids[:2]
    trajectory = stepwise.generate_and_probe(
        model, tokenizer, rendered, {0: [[], []]}, 0, [0], (ANSWERS[:1], ANSWERS[1:2])
    )[0]
    np.testing.assert_allclose(trajectory.refusal[0], expected[:, 0], **close)
    pair = {"prompt": rendered[0], "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
    (row,) = sequences.tokens_of_pairs(model, tokenizer, [pair]).to_list()
    assert [row["chosen_ids"][:-1], row["rejected_ids"][:-1]] == ids[:2]


def test_in_mid_sentence_an_opening_keeps_the_tokens_that_it_has_after_the_prompt():
    """A limit of ``generate_and_probe``: a text would put a space there, which is another token."""
    tokenizer = with_template("bytes", "line opened")
    model, (rendered,) = tiny(tokenizer), chat.render(tokenizer, ["Why"])
    prompt, said = prompt_cache.token_ids(tokenizer, [rendered, "Sure"])
    trajectory = stepwise.generate_and_probe(
        model, tokenizer, [rendered], {"": [said]}, 0, [], (["I cannot"], ["Who"])
    )[""]
    step = len(said)
    after_prompt, in_sentence = prompt_cache.token_ids(tokenizer, ["I cannot", " I cannot"])
    found = trajectory.refusal[step][0]
    assert found == pytest.approx(log_p(model, prompt + said, after_prompt), rel=1e-4)
    assert found != pytest.approx(log_p(model, prompt + said, in_sentence), rel=1e-2)


def test_chat_batches_hold_what_rendering_encoding_and_batching_give_one_by_one():
    tokenizer = with_template("bytes", "line opened")
    requests, answers = ["Why", "Who help me"], ["I cannot help", ""]
    (batch,) = tokens.chat_batches(tokenizer, requests, answers, 2, end=False, sort=False)
    rendered = chat.render(tokenizer, requests)
    for row, (text, answer) in enumerate(zip(rendered, answers, strict=True)):
        alone = prompt_cache.token_ids(tokenizer, [text, answer])
        expected = alone[0] + alone[1][:2]
        n_read = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :n_read].tolist() == expected
        assert int(batch["positions"][row].sum()) == len(alone[1][:2])


def test_chat_examples_are_rendered_requests_and_answers_with_or_without_an_end():
    tokenizer = with_template("bytes", "line opened")
    requests, answers = ["Why", "Who help me"], ["I cannot help", "Sure"]
    rendered = chat.render(tokenizer, requests, "Who")
    last = chat.end_of_turn(tokenizer)
    for end in (True, False):
        found = tokens.chat_examples(tokenizer, requests, answers, 40, "Who", end)
        for example, text, answer in zip(found, rendered, answers, strict=True):
            prompt, said = prompt_cache.token_ids(tokenizer, [text, answer])
            said = said + [last] * end
            assert example["input_ids"] == prompt + said
            assert example["labels"] == [tokens.IGNORED] * len(prompt) + said


def test_an_answer_that_would_change_the_prompt_s_tokens_is_read_on_its_own():
    tokenizer = with_template("bytes", "line opened")
    (rendered,), answer = chat.render(tokenizer, ["Why"]), "\n\nSure"
    (example,) = tokens.encode(tokenizer, [rendered], [answer], 9, end=False)
    prompt, alone = prompt_cache.token_ids(tokenizer, [rendered, answer])
    assert (
        example["input_ids"]
        == prompt + alone
        != prompt_cache.token_ids(tokenizer, [rendered + answer])[0]
    )


def test_an_empty_answer_has_no_token_whatever_the_joint():
    tokenizer = with_template("bytes", "space")
    (example,) = tokens.encode(tokenizer, chat.render(tokenizer, ["Why"]), [""], 9, end=False)
    assert set(example["labels"]) == {tokens.IGNORED}


def test_openings_are_measured_on_prompts_that_end_alike():
    tokenizer = with_template("pieces", "line opened")
    with pytest.raises(ValueError, match="prompt 2 of 2 ends otherwise than the first") as error:
        prompt_cache.opening_ids(tokenizer, ["Why\n", "Why "], ["Sure"])
    assert "\n" not in str(error.value)
    assert prompt_cache.opening_ids(tokenizer, [], ["Sure"]) == prompt_cache.token_ids(
        tokenizer, ["Sure"]
    )


# --------------------------------------------------------------------------- special tokens as text

MARKS = ["<|user|>", "</s>", "<|assistant|>", "<|unused|>"]


@pytest.fixture
def marked() -> PreTrainedTokenizerFast:
    """One special token that the template does not write, and an end of turn that is an added token
    but not special.
    """
    tokenizer = with_template("bytes", "line opened")
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "<|over|>")
    tokenizer.add_tokens([AddedToken("<|unused|>", special=True, normalized=False)])
    tokenizer.add_tokens(["<|over|>"])
    return tokenizer


@pytest.mark.parametrize("mark", [*MARKS, "<|over|>"])
def test_special_tokens_as_text_are_refused_by_the_beginning_of_the_row(marked, mark):
    text, fine = f"Why do {mark} cats purr so", "Why do <|over cats / <user|> [x]"
    rendered = chat.render(marked, [fine], fine)
    pair = {"prompt": rendered[0], "chosen": fine, "rejected": text}
    for attempt, what in (
        (lambda: chat.render(marked, [fine, text]), "prompt 2 of 2 ('Why do"),
        (lambda: chat.render(marked, [fine], text), "system prompt 1 of 1 ('Why do"),
        (lambda: tokens.encode(marked, rendered * 2, [fine, text], 9), "response 2 of 2 ('Why do"),
        (
            lambda: sequences.tokens_of_pairs(tiny(marked), marked, [pair]),
            "response 1 of 1 ('Why do",
        ),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        assert (
            str(error.value).startswith(what)
            and f"holds {mark!r}" in str(error.value)
            and "\n" not in str(error.value)
        )


@pytest.mark.parametrize("mark", ["</s>", "<|unused|>", "<|over|>"])
def test_an_answer_never_holds_one_also_where_the_model_spells_it(marked, mark):
    half = len(mark) // 2
    for said in (f"I {mark}help", f"I {mark[:half]}{mark}{mark[half:]}help"):
        signs = [prompt_cache.token_ids(marked, [sign])[0] for sign in said]
        assert prompt_cache.decoded(marked, [token for row in signs for token in row]) == "I help"
