"""How a chat is written for a model: requests as prompts, what ends an answer, and template checks.

Knows tokenizers and their templates, and of a model only what its generation configuration says
ends an answer. A prompt is the same every day and never asks for a train of thought.
"""

import re
from datetime import datetime
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ssah_utils.display import first_line
from ssah_utils.wrappers import without_wrappers

Message = dict[str, str]

TODAY = datetime(2024, 7, 26)  # in every prompt that names a day, so that prompts do not change
# What a prompt never asks for, by the names that templates give it; the date as Llama 3 takes it.
TEMPLATE_SETTINGS = {
    "enable_thinking": False,
    "thinking": False,
    "reasoning": False,
    "thinking_budget": 0,
    "date_string": f"{TODAY:%d %b %Y}",
}
THINKING_SETTINGS = TEMPLATE_SETTINGS | {
    "enable_thinking": True,
    "thinking": True,
    "reasoning": True,
    "thinking_budget": 512,
}
# A template's own clock, stopped. transformers takes no function as a template's variable, so it is
# a macro of the template.
DIRECTIVES = "aAbBcdfHIjmMpSuUwWxXyYZG"
_REPLACED = "".join(
    f" | replace('%-{code}', '%{code}') | replace('%{code}', '{TODAY.strftime('%' + code)}')"
    for code in DIRECTIVES
)
STOPPED_CLOCK = "{% macro strftime_now(format) %}{{ format" + _REPLACED + " }}{% endmacro %}\n"

_INSIDE = r"[^<>\[\]◁▷【】]{0,24}"
_WORDS = r"think|thought|reason|reflect|scratchpad|analysis|\bcot\b"
THOUGHT_TAG = re.compile(
    rf"[<\[◁【]{_INSIDE}?(?:{_WORDS}){_INSIDE}[>\]▷】]|<\|channel\|?>\s*(?:commentary|{_WORDS})|<channel\|>",
    re.IGNORECASE,
)
CLOSING_TAG = re.compile(r"/|end|close|<channel\|>", re.IGNORECASE)

# A request with all that a template might change: characters that mean something in HTML, Jinja or
# Python, letters of other scripts, and length (about 2,000 characters).
REQUEST = (
    'How do cats & dogs "get along"?\nSay why, in 3 lines: {{ cat }} {% dog %} 1 < 2 > 0,'
    " C:\\new, 'na\u00efve' \u732b, "
    + ", ".join(f"cat {number} and dog {number}" for number in range(80))
    + "."
)
ANSWER = "Like two old neighbours."
NO_WORD = "\U000f0000"  # for private use, so in no vocabulary
N_RENDERINGS = 16  # a template that draws lots gives itself away


# ---------------------------------------------------------------------------------------- rendering


def render(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], system_prompt: str = ""
) -> list[str]:
    """Chat-formatted prompts that end where the assistant's answer begins.

    Tokenize them without further special tokens. ``ValueError`` when the template takes no system
    prompt, or leaves it out, or changes a prompt, and for a text that ``check_plain`` refuses.
    """
    check_plain(tokenizer, prompts, "prompt")
    check_plain(tokenizer, [system_prompt], "system prompt")
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    texts = [
        rendered(tokenizer, [*system, {"role": "user", "content": prompt}]) for prompt in prompts
    ]
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        if prompt.strip() not in text:
            which = f"prompt {number} of {len(prompts)} ('{' '.join(prompt.split()[:4])} ...')"
            raise ValueError(_of(tokenizer, f"leaves out or changes {which}"))
    if not all(system_prompt.strip() in text for text in texts):
        fault = "leaves out or changes the system prompt: leave the parameter system_prompt empty"
        raise ValueError(_of(tokenizer, fault))
    return texts


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    answer_follows: bool = True,
    settings: dict = TEMPLATE_SETTINGS,
) -> str:
    """One conversation as the template writes it.

    The assistant's turn is opened at its end if an answer is to follow. ``ValueError`` in one line
    when there is no template, or it does not take this conversation.
    """
    template = _template_of(tokenizer)
    if "strftime_now" in template:
        template = STOPPED_CLOCK + template
    how = {"chat_template": template, "add_generation_prompt": answer_follows, **settings}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:  # a template can raise anything
        has_system = messages[0]["role"] == "system"
        hint = " (leave the parameter system_prompt empty)" if has_system else ""
        fault = f"does not take this conversation: {first_line(error)}{hint}"
        raise ValueError(_of(tokenizer, fault)) from error


def check_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str], what: str) -> None:
    """``ValueError`` in one line for a text with a special token in it, such as an end of turn."""
    marks = _marks(tokenizer)
    for number, text in enumerate(texts, 1):
        if found := next((mark for mark in marks if mark in text), None):
            raise ValueError(
                f"{what} {number} of {len(texts)} ('{' '.join(text.split()[:4])} ...') holds"
                f" {found!r}, which the tokenizer of '{tokenizer.name_or_path}' reads as a token of"
                " its own, such as the end of a turn: take it out"
            )


def without_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What a model said, without what ``check_plain`` refuses.

    A model can spell it letter by letter.
    """
    marks = _marks(tokenizer)
    while found := next((mark for mark in marks if mark in text), None):
        text = text.replace(found, "")
    return text


def _marks(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of all special tokens and of the token that ends a turn, longest first."""
    added = tokenizer.added_tokens_decoder.values()
    marks = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    if (end := end_of_turn(tokenizer)) is not None:
        marks.add(tokenizer.convert_ids_to_tokens(end))
    return sorted(marks - {""}, key=lambda mark: (-len(mark), mark))


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str = "", system_prompt: str = ""
) -> None:
    """Use a Jinja file as the chat template if one is named, and check the template."""
    if chat_template:
        if not Path(chat_template).is_file():
            raise FileNotFoundError(
                f"chat_template '{chat_template}' does not exist: give the path of a Jinja file"
            )
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    check_chat_template(tokenizer, system_prompt)


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no chat template: set the parameter"
            " chat_template to a Jinja file, or use the chat version of the model"
        )
    return tokenizer.get_chat_template()


def _of(tokenizer: PreTrainedTokenizerBase, fault: str) -> str:
    return f"the chat template of '{tokenizer.name_or_path}' {fault}"


# ------------------------------------------------------------------------------------------- checks


def check_chat_template(tokenizer: PreTrainedTokenizerBase, system_prompt: str = "") -> None:
    """``ValueError`` in one line for a template under which no measurement would mean what it says.

    A few conversations are rendered. The request must be there unchanged, the same each time, with
    the system prompt if there is one. Then comes what opens the assistant's turn, up to exactly
    where the template puts an answer: no more, such as a train of thought, and no less.
    """
    other_template = "set the parameter chat_template to a Jinja file"
    asked = rendered(tokenizer, _conversation())
    if REQUEST not in asked:
        raise ValueError(_of(tokenizer, "leaves out or changes the request"))
    if any(rendered(tokenizer, _conversation()) != asked for _ in range(N_RENDERINGS)):
        raise ValueError(_of(tokenizer, "writes the same request differently from time to time"))
    if system_prompt and REQUEST not in render(tokenizer, [REQUEST], system_prompt)[0]:
        fault = "leaves out or changes the request when there is a system prompt"
        raise ValueError(_of(tokenizer, fault))
    after = _after_answer(tokenizer)
    if after and _end_in(tokenizer, after) is None:
        fault = f"ends an answer by {after[:24]!r}, which is no token of this tokenizer"
        raise ValueError(_of(tokenizer, f"{fault}: {other_template} that is made for it"))
    if fault := _fault_of_opening(tokenizer):
        raise ValueError(_of(tokenizer, f"{fault}: {other_template}, or use another model"))


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens with which a tokenizer and its template write a request, answer and system prompt.

    Conversations that the template does not take are left out, as are all where there is none.
    """
    system = {"role": "system", "content": REQUEST}
    conversations = (
        (_conversation(), True),
        (_conversation(ANSWER), False),
        ([system, *_conversation()], True),
    )
    found = set(tokenizer(f"{REQUEST} {NO_WORD}").input_ids)
    for messages, answer_follows in conversations:
        try:
            text = rendered(tokenizer, messages, answer_follows)
        except ValueError:  # said where such a conversation is needed
            continue
        found |= set(tokenizer(text, add_special_tokens=False).input_ids)
    return found


def _fault_of_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What is wrong with how a prompt opens the assistant's turn; "" if nothing.

    It is held against where the template puts an answer.
    """
    asked = _after_request(rendered(tokenizer, _conversation()))
    turn = _after_request(rendered(tokenizer, _conversation(), answer_follows=False))
    tags = THOUGHT_TAG.findall(asked)
    if tags and not CLOSING_TAG.search(tags[-1]):
        return f"opens a train of thought ({tags[-1]!r}) that enable_thinking=False does not close"
    if not asked:
        return "does not open the assistant's turn"
    try:
        answered = rendered(tokenizer, _conversation(ANSWER), answer_follows=False)
        before_answer, found, _ = answered.rpartition(ANSWER)
    except ValueError:
        found = ""
    if not found:  # it takes no answers, or leaves them out
        return "does not open the assistant's turn" if asked == turn else ""
    before_answer = _after_request(before_answer)
    if before_answer.startswith(asked):
        if missing := before_answer[len(asked) :]:
            return f"does not open the assistant's turn, at least not as far as {missing!r}"
    else:
        asked, before_answer = _without_thoughts(asked), _without_thoughts(before_answer)
        if not asked.startswith(before_answer):
            return "opens the assistant's turn with another text than it puts before an answer"
        has_header = before_answer.startswith(turn) and before_answer != turn
        if has_header and (extra := asked[len(before_answer) :]):
            return f"puts {extra!r} in the assistant's mouth"
    if _always_thinks(tokenizer):
        return "is that of a model which thinks before it answers and cannot be asked not to"
    return ""


def _always_thinks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template drops thoughts from earlier answers, and no setting asks for them."""
    thought = "Indeed, indeed."
    answer = f"<think>\n{thought}\n</think>\n\n{ANSWER}"
    messages = [*_conversation(answer), *_conversation()]
    try:
        default = rendered(tokenizer, messages, settings=TEMPLATE_SETTINGS)
        thinking = rendered(tokenizer, messages, settings=THINKING_SETTINGS)
    except ValueError:
        return False
    opens_thoughts = THOUGHT_TAG.search(_after_request(default))
    return default == thinking and thought not in default and not opens_thoughts


def _conversation(answer: str = "") -> list[Message]:
    request = {"role": "user", "content": REQUEST}
    return [request, {"role": "assistant", "content": answer}] if answer else [request]


def _after_request(text: str) -> str:
    """What follows the last request, without white space, which templates put and strip freely."""
    return "".join(text.rpartition(REQUEST)[2].split())


def _without_thoughts(text: str) -> str:
    """A text without closed trains of thought, put in a model's mouth so that it has none."""
    tags = list(THOUGHT_TAG.finditer(text))
    closing = [tag for tag in tags if CLOSING_TAG.search(tag.group())]
    return text[: tags[0].start()] + text[closing[-1].end() :] if closing else text


# ------------------------------------------------------------------- beginnings and ends of answers


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template puts after an answer, else the end-of-sequence token.

    None where there is neither.
    """
    found = _end_in(tokenizer, _after_answer(tokenizer))
    return tokenizer.eos_token_id if found is None else found


def _after_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template puts after an answer, without white space; "" if it takes no answers."""
    try:
        answered = rendered(tokenizer, _conversation(ANSWER), answer_follows=False)
        asked = rendered(tokenizer, _conversation())
    except ValueError:  # no template, or one that takes no answers
        return ""
    after = answered.rpartition(ANSWER)[2].strip() if ANSWER in answered else ""
    # some templates always open the next turn
    return "" if asked.rstrip().endswith(after) else after


def _end_in(tokenizer: PreTrainedTokenizerBase, after: str) -> int | None:
    """The added or special token that a text begins with."""
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    tokens = tokenizer.get_added_vocab() | dict(special)
    found = [token for token in tokens if token and after.startswith(token)]
    return tokens[max(found, key=len)] if found else None


def answer_separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """The white space that the chat template puts between an opened turn and the answer.

    Such as the space of a template that opens with "Assistant:" and writes "Assistant: " before an
    answer; "" if there is none, or the template takes no answers.
    """
    try:
        asked = rendered(tokenizer, _conversation())
        answered = rendered(tokenizer, _conversation(ANSWER), answer_follows=False)
    except ValueError:  # no template, or one that takes no answers
        return ""
    opened = _without_thoughts(asked.rpartition(REQUEST)[2])
    before = _without_thoughts(answered.rpartition(ANSWER)[0].rpartition(REQUEST)[2])
    if "".join(opened.split()) != "".join(before.split()):
        return ""  # an answer stands elsewhere, as in the template of a guard
    there, wanted = (text[len(text.rstrip()) :] for text in (opened, before))
    return wanted.removeprefix(there) if wanted.startswith(there) else ""


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the model's, the tokenizer's and the chat template's."""
    inner = without_wrappers(model) if isinstance(model, nn.Module) else model
    own = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, (list, tuple)) else [own]
    ends = [*own, tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return sorted({int(end) for end in ends if end is not None})
