"""Chat templates in the style of the known families, in a few words of our own: what is taken, what
is refused, what ends.
"""

import copy
import datetime

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from ssah_utils.prompts import chat, tokens

LOOP = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = LOOP + TURN + "{% endfor %}" + ASK + "<|im_start|>assistant\n{% endif %}"
INST = (
    LOOP
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{"
    " m.content }} </s>{% else %}<<SYS>>{{ m.content }}<</SYS>>{% endif %}{% endfor %}"
)
MISTRAL = (
    LOOP + "{% if m.role == 'assistant' %}{{ m.content | trim }}</s>{% else %}[INST]{{ m.content"
    " }}[/INST]{% endif %}{% endfor %}"
)
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    + "<|start|>Today: {{ date_string }}"
    + LOOP
    + "<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + ASK
    + "<|start|>assistant<|stop|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%"
    " endif %}"
    + LOOP
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim"
    " }}<end_of_turn>\n{% endfor %}" + ASK + "<start_of_turn>model\n{% endif %}"
)
PHI = (
    LOOP
    + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    + ASK
    + "<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
SWITCH = (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
DROPS_THOUGHTS = CHATML.replace("m.content", "m.content.split('</think>')[-1].strip()")
QWEN3 = DROPS_THOUGHTS.replace("assistant\n{% endif %}", "assistant\n" + SWITCH + "{% endif %}")
CHANNELS = (
    LOOP + "<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>{{"
    " m.content }}<|end|>{% endfor %}"
)
USER_ONLY = "{% for m in messages if m.role == 'user' %}" + TURN + "{% endfor %}"
GOOD = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama2": (INST, "</s>"),
    "mistral": (MISTRAL, "</s>"),
    "llama3": (DATED, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "phi": (PHI, "<|end|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "always open": (LOOP + "[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]", "</s>"),
    "user only": (USER_ONLY + ASK + "<|im_start|>assistant\n{% endif %}", "</s>"),
    "closed unasked": (
        CHATML.replace("assistant\n{%", "assistant\n<reasoning></reasoning>{%"),
        "<|im_end|>",
    ),
    "straight to the final channel": (
        CHANNELS + ASK + "<|start|>assistant<|channel|>final<|message|>{% endif %}",
        "<|end|>",
    ),
}
OPENS = {
    tag: CHATML.replace("assistant\n{% endif", "assistant\n" + tag + "\n{% endif")
    for tag in (
        "<think>",
        "<thinking>",
        "<|thinking|>",
        "[THINK]",
        "<reasoning>",
        "<seed:think>",
        "<|begin_of_thought|>",
        "◁think▷",
        "<|START_THINKING|>",
        "<|channel|>analysis<|message|>",
    )
}
BAD = {tag: (template, "train of thought") for tag, template in OPENS.items()} | {
    "no header": (LOOP + TURN + "{% endfor %}", "does not open the assistant's turn"),
    "no roles": (LOOP + "{{ m.content }}\n{% endfor %}", "does not open the assistant's turn"),
    "no header, no answers": (USER_ONLY, "does not open the assistant's turn"),
    "half a header": (
        CHATML.replace(ASK + "<|im_start|>assistant\n", ASK + "<|im_start|>"),
        "not as far as 'assistant'",
    ),
    "channels": (
        CHANNELS + ASK + "<|start|>assistant{% endif %}",
        "not as far as '<|channel|>final<|message|>'",
    ),
    "words in its mouth": (
        CHATML.replace("assistant\n{% endif", "assistant\nSure!{% endif"),
        "puts 'Sure!' in",
    ),
    "a tag nobody knows": (
        CHATML.replace("assistant\n{% endif", "assistant\n<inner>\n{% endif"),
        "puts '<inner>' in",
    ),
    "another header": (
        CHATML.replace("assistant\n{% endif", "model\n{% endif"),
        "another text than",
    ),
    "always thinks": (DROPS_THOUGHTS, "thinks before it answers"),
    "no request": (
        CHATML.replace("{{ m.content }}", "{{ m.text }}"),
        "leaves out or changes the request",
    ),
    "escaped": (CHATML.replace("m.content", "m.content | e"), "leaves out or changes the request"),
    "lower": (
        CHATML.replace("m.content", "m.content | lower"),
        "leaves out or changes the request",
    ),
    "cut": (CHATML.replace("m.content", "m.content[:20]"), "leaves out or changes the request"),
    "cut late": (
        CHATML.replace("m.content", "m.content[:1500]"),
        "leaves out or changes the request",
    ),
    "one sign": (
        CHATML.replace("m.content", "m.content | replace('<', '&lt;')"),
        "leaves out or changes the request",
    ),
    "backslash": (
        CHATML.replace("m.content", "m.content | replace('\\\\', '/')"),
        "leaves out or changes the request",
    ),
    "braces": (
        CHATML.replace("m.content", "m.content | replace('{{', '')"),
        "leaves out or changes the request",
    ),
    "ascii": (
        CHATML.replace("m.content", "m.content | tojson"),
        "leaves out or changes the request",
    ),
    "lots": ("{{ ['a', 'b'] | random }}" + CHATML, "differently from time to time"),
    "filler": ("{{ lipsum(n=1) }}" + CHATML, "differently from time to time"),
    "no jinja": ("{% for %}", "does not take this conversation"),
    "raises": ("{{ messages[7].content + 1 }}", "does not take this conversation"),
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; so are the ends of all families, as added tokens, of which only eos is
    special.
    """
    ends = [
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<|end|>",
        "<|endoftext|>",
        "<|assistant|>",
    ]
    inner = Tokenizer(token_models.WordLevel({"<unk>": 0, "</s>": 1, "word": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # also between a word and a bracket
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    made.add_tokens(ends)
    return made


def use(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", GOOD)
def test_templates_of_the_known_families_are_taken_and_their_ends_learned(tokenizer, name):
    template, end = GOOD[name]
    chat.check_chat_template(use(tokenizer, template))
    assert chat.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    (example,) = tokens.encode(tokenizer, chat.render(tokenizer, ["word"]), ["word word"], 8)
    assert example["labels"][-3:] == [2, 2, tokenizer.convert_tokens_to_ids(end)]


@pytest.mark.parametrize("name", BAD)
def test_templates_that_mean_something_else_are_refused_in_one_line(tokenizer, name):
    template, message = BAD[name]
    with pytest.raises(ValueError, match=r"chat template of '") as error:
        chat.check_chat_template(use(tokenizer, template))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["chatml", "llama3", "gemma", "phi", "straight to the final channel"]
)
def test_turn_markers_that_the_tokenizer_does_not_have_are_refused(tokenizer, name):
    template, end = GOOD[name]
    use(tokenizer, template.replace(end, end.replace("e", "E", 1)))
    with pytest.raises(
        ValueError, match=r"ends an answer by '<.*, which is no token of this tokenizer"
    ) as error:
        chat.check_chat_template(tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("end", ["", "\n\n", "</s>", " </s>\n"])
def test_a_template_may_put_nothing_or_the_end_of_sequence_after_an_answer(tokenizer, end):
    chat.check_chat_template(use(tokenizer, CHATML.replace("<|im_end|>\n", end + "\n")))
    assert chat.end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_a_missing_template_is_refused_in_one_line_wherever_it_is_needed(tokenizer):
    for attempt in (
        lambda: chat.check_chat_template(tokenizer),
        lambda: chat.render(tokenizer, ["word"]),
    ):
        with pytest.raises(
            ValueError, match="has no chat template: set the parameter chat_template"
        ) as error:
            attempt()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", ["[:3000]", ".replace('w5', 'w6')", " | replace('~', '-')", ".split('|')[0]"]
)
def test_a_prompt_that_the_probe_did_not_foresee_is_looked_at_itself(tokenizer, change):
    use(tokenizer, CHATML.replace("m.content", "m.content" + change))
    chat.check_chat_template(tokenizer)
    assert chat.render(tokenizer, [" word\n"])[0].count("word") == 1
    with pytest.raises(
        ValueError, match=r"leaves out or changes prompt 2 of 2 \('w5 ~ \| word \.\.\.'\)"
    ) as error:
        chat.render(tokenizer, ["word", "w5 ~ | " + "word " * 700])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gemma", "user only"])
def test_a_system_prompt_that_is_refused_or_dropped_is_said_where_one_is_asked_for(tokenizer, name):
    use(tokenizer, GOOD[name][0])
    assert chat.render(tokenizer, ["word"])
    for attempt in (chat.check_chat_template, lambda t, system: chat.render(t, ["word"], system)):
        with pytest.raises(ValueError, match="leave the parameter system_prompt empty") as error:
            attempt(tokenizer, "Be brief.")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "phi", "qwen3"])
def test_a_system_prompt_that_is_written_is_taken(tokenizer, name):
    chat.check_chat_template(use(tokenizer, GOOD[name][0]), " Be brief.\nAlways.")


def test_thinking_models_are_asked_not_to(tokenizer):
    (text,) = chat.render(use(tokenizer, QWEN3), ["word"])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%H:%M:%S.%f", "%A %I %p %j", "%A, %-d %B"]
)
def test_the_clock_of_a_template_stands_still(tokenizer, monkeypatch, form):
    """Also one that is asked in a branch or a macro; and nothing else in the template is moved by
    it.
    """
    clock = (
        "\n  {% macro when(x) %}{{ strftime_now(x) }}{% endmacro %}  {% if strftime_now %}{{"
        " when('FORM') }}{% endif %}\n\n"
    )
    use(tokenizer, clock.replace("FORM", form) + CHATML)
    first = chat.render(tokenizer, ["word"])
    still = clock.replace("strftime_now(x)", "x").replace("strftime_now", "messages")
    assert (
        chat.render(
            use(tokenizer, still.replace("FORM", chat.TODAY.strftime(form)) + CHATML), ["word"]
        )
        == first
    )

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 3, 4, 5, 6, 7, 8)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    asks = {"chat_template": "{{ strftime_now('%Y') }}", "tokenize": False}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "word"}], **asks) == "2031"
    use(tokenizer, clock.replace("FORM", form) + CHATML)
    assert chat.render(tokenizer, ["word"]) == first
    chat.check_chat_template(tokenizer)


def test_the_day_is_llama_s_own_where_the_template_asks_for_a_date(tokenizer):
    assert "Today: 26 Jul 2024<" in chat.render(use(tokenizer, DATED), ["word"])[0]


class Model:
    def __init__(self, ends):
        self.generation_config = GenerationConfig(eos_token_id=ends)


@pytest.mark.parametrize(
    ("own", "expected"), [(0, [0, 1, 3]), ([5, 0], [0, 1, 3, 5]), (None, [1, 3]), ((3,), [1, 3])]
)
def test_an_answer_ends_where_model_tokenizer_or_template_say(tokenizer, own, expected):
    use(tokenizer, CHATML)
    model = Model(None)
    model.generation_config.eos_token_id = own
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 3
    assert chat.end_tokens(model, tokenizer) == expected
    tokenizer.eos_token = None
    assert chat.end_tokens(model, tokenizer) == [end for end in expected if end != 1]
    assert chat.end_tokens(object(), tokenizer) == [3]


def test_without_any_end_there_is_none_and_none_can_be_learned(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    assert chat.end_of_turn(bare) is None and chat.end_tokens(Model(None), bare) == []
    with pytest.raises(ValueError, match="no token that ends an answer"):
        tokens.encode(bare, ["word"], ["word"], 4)
    assert tokens.encode(bare, ["word"], ["word"], 4, end=False)[0]["input_ids"] == [2, 2]


def test_rendering_changes_no_tokenizer(tokenizer):
    use(tokenizer, DATED)
    before = copy.deepcopy(tokenizer.__dict__)
    chat.check_chat_template(tokenizer, "Be brief.")
    chat.end_of_turn(tokenizer)
    assert tokenizer.chat_template == before["chat_template"] and tokenizer.pad_token is None
