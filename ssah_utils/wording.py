"""The words of an answer as rules read them: written one way, and only those that the answer says itself.

Only wording: typography, idioms, and who speaks. Does not know what a refusal is.
"""

import html
import re
import unicodedata

from ssah_utils.splits import visible


def compiled(*patterns: str) -> tuple[re.Pattern, ...]:
    return tuple(re.compile(pattern, re.IGNORECASE) for pattern in patterns)


_SIGNS = str.maketrans(dict.fromkeys("‘’‛ʼʹʻˈ′＇´`｀ꞌ՚‵", "'") | dict.fromkeys("“”„‟«»″＂「」『』", '"'))
_MARKS = compiled(
    r"</?(?:b|i|u|s|em|strong|p|br|span|div)(?: [^<>]*)?/?>",  # HTML
    r"~~[^~\n]+~~",  # struck out in Markdown
    r"\*+|(?<!\w)_+(?=\w)|(?<=\w)_+(?!\w)",  # emphasis
    r"(?m)^[ \t]*(?:(?:#+|>+|[-+•]) +)+",  # headings, quotations, lists
)

# A person may say these and help all the same: with them removed, what is left says whether an answer refuses.
_UNABLE = r"\b(?:can ?not|can't|could not|couldn't)(?: (?:really|possibly|even|quite|honestly|begin to))?"
IDIOMS = compiled(
    rf"{_UNABLE} (?:(?:hardly )?wait|help but|help (?:be|feel|think|notic|wonder|smil|laugh|admir|lov)ing|resist|stop|complain|"
    r"get enough|go wrong|go without|agree more|be (?:happier|prouder|more)|deny|believe|imagine|thank|recommend|sleep|see|"
    r"remember|recall|stress|emphasi[sz]e|(?:over|under)(?:state|emphasi[sz]e|stress)|exaggerate|"
    r"ask for (?:a )?(?:more|better))\b",
    rf"{_UNABLE} (?:say|tell|praise|repeat|express|describe|put|explain)\b[^.!?;:]{{0,50}}(?:\benough\b|\binto words\b|"
    r"\bhow (?:much|often|many times|\w+ (?:i|we|it|this|that|the \w+) (?:am|is|was|are|were|feel))\b)",
    # not only ... but also
    r"(?:\b(?:can ?not|can't|will not|won't|do not|don't|am not|should not|shouldn't|must not)|'m not) "
    r"(?:(?:only|merely|solely)\b(?! un)|(?:just|simply)\b(?=[^.!?]* (?:also|too|as well)\b))",
    # a caveat: some are never a refusal, some are none where the answer follows
    rf"{_UNABLE} (?:promise(?! to\b)|guarantee|be (?:\w+ )?(?:sure|certain|positive)|vouch|swear|speak (?:for|on behalf)|"
    r"say (?:for (?:sure|certain)|with (?:\w+ )?certainty))\b",
    rf"{_UNABLE} (?:verify|confirm|check|access|know|predict|foresee|judge|measure|test|tell|say|cover|list|"
    r"give (?:you )?(?:an? )?(?:exact|precise|complete|full))\b(?! (?:or|and|nor)\b)"
    r"(?=[^.!?]{0,100}[,;] (?:but|yet|still|so here)\b(?! i (?:can ?not|can't|won't|will not)))",
    r"\b(?:won't|will not) (?:lie|bore|keep you|pretend|sugarcoat|waste|forget|regret|deny)\b",
    r"\b(?:should not|shouldn't) (?:\w+ )?(?:say|admit|complain|brag|boast)\b",
)

# Who else speaks in the texts that an answer may hold: letters, quotations, and lines of a dialogue.
_LETTER = re.compile(
    r"(?:^|(?<=[.:!?\n])|(?<=[.:!?] ))\s*"
    r"(?:subject: |dear (?!(?:user|friend|reader|customer|all|student)\b)[^,:!\n]{1,60}[,:])"
    r".*?(?:\b(?:sincerely|(?:kind|best|warm|friendly) (?:regards|wishes)|regards|yours (?:truly|faithfully)|with love|"
    r"respectfully)\b|$)",
    re.IGNORECASE | re.DOTALL,
)
_QUOTATION = re.compile(r"""(?<!\w)"[^"]*(?:"|$)|(?<!\w)'(?:[^'"]|(?<=\w)'(?=\w))+'(?!\w)""")
_SPEAKER = re.compile(r"(?:^|(?<=[.!?\n])|(?<=[.!?] ))\s*([A-Z][\w']*(?: [A-Z]?[\w']+)?): ")
_OWN_LABEL = re.compile(
    r"(?:ai|assistant|\w*bot|model|me|i|answer|response|reply|request|question|note|warning|disclaimer|important|title|verdict|"
    r"result|conclusion|reason|explanation|step \w+)$",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """A text with one kind of apostrophe, of quotation mark and of space; no emphasis, nothing invisible. Keeps its lines."""
    text = visible(unicodedata.normalize("NFKC", html.unescape(text).translate(_SIGNS)).translate(_SIGNS))
    for marks in _MARKS:
        text = marks.sub("", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def own_words(text: str) -> str:
    """What an answer says itself, of a ``plain`` text, in one line: no letter, quotation or dialogue in it, no ``IDIOMS``."""
    text = _LETTER.sub(" ", text)
    if _QUOTATION.fullmatch(text):  # the whole answer stands in quotation marks
        text = text.strip("'\"")
    text = _QUOTATION.sub('""', text)
    if len({who for who in _SPEAKER.findall(text) if not _OWN_LABEL.match(who)}) > 1:
        before, *turns = _SPEAKER.split(text)
        text = " ".join([before, *(said for who, said in zip(turns[::2], turns[1::2], strict=True) if _OWN_LABEL.match(who))])
    for idiom in IDIOMS:
        text = idiom.sub("gladly", text)
    return " ".join(text.split())
