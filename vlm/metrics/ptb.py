"""Words of a caption as the Penn Treebank cuts them: what captions are scored on, without Java.

Caption scores are comparable only on the same words, and those of COCO's evaluation come from a Java program (CoreNLP
3.4.1's PTBTokenizer with `-preserveLines -lowerCase`, then a list of punctuation is dropped). `tokenize` gives the same
words. It was written from what the Treebank's conventions say and from what that program answers; the answers that it
was compared with are in tests/metrics. As there: letters are lower case; "don't" is `do n't`; brackets survive as
`-lrb-` and `-rrb-` though they are on the list of what is dropped, since they are lower case by then; a run of question
marks and a lone `&` survive; "…" is dropped; what has no place in any word (emoji) is dropped.

At each place the rule that matches most text wins, the earlier one of two that match as much.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from vlm.metrics.ptb_characters import DELETED, DIGITS, LETTERS, MARKS

DROPPED = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."])
"""What is not counted as a word. The brackets of the list never occur: see above."""

_TITLES = (
    "adj|adm|adv|alex|asst|atty|attys|ave|brig|capt|capts|cf|cie|cmdr|col|comdr|cpl|dept|det|dr|drs|elec|ens|ft|gen"
    "|gov|govs|hon|insp|invt|jos|lieut|lt|maj|mfg|mlle|mme|mr|mrs|ms|msgr|mt|mtg|natl|pfc|ph|pres|prof|profs|pvt|rep"
    "|reps|rev|sen|sens|sfc|sgt|spc|st|ste|supt|supts|treas|vs|wm"
)  # a name comes after them
_ENDINGS = (
    "al|ala|apr|ariz|assn|assoc|aug|bhd|bldg|blvd|bros|calif|co|colo|conn|corp|cos|ct|dak|dec|esq|est|etc|ext|feb|fla"
    "|fri|ga|inc|ind|intl|jan|jr|jul|jun|kan|kans|ky|ltd|mar|md|mich|minn|mo|mon|mont|neb|nev|nov|oct|okla|penn|plc"
    "|ppte|pptes|ppty|pptys|pte|ptes|pty|ptys|rd|rt|sep|sept|seq|sq|sr|sys|tel|tenn|thu|thurs|tue|tues|univ|va|vt|wed"
    "|wis|wisc|wyo"
)  # a sentence may end with them
_STATES = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"  # in small letters they are words
_NUMBERED = "art|ca|fig|figs|no|nos|op|pp|prop"  # only before a number

_FILE_ENDINGS = (
    "bat|bmp|c|cgi|class|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt"
    "|wav|x|xml|zip"
)
_SHORTENED = "nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l"
_OPENINGS = (
    "a|about|according|additionally|after|an|as|at|but|earlier|he|her|here|however|if|in|it|last|many|more|now|once|one"
    "|other|our|she|since|so|some|such|that|the|their|then|there|these|they|this|we|what|when|while|yet|you|mr\\."
)  # of sentences: a lone letter before one of them ends the sentence before it

_QUOTES = {
    **dict.fromkeys("\u0091\u2018\u201b\u2039", "`"),
    **dict.fromkeys("\u0092\u2019\u203a", "'"),
    **dict.fromkeys("\u0093\u00ab\u201c", "``"),
    **dict.fromkeys("\u0094\u00bb\u201d", "''"),
}
_APOSTROPHE = "['\u0092\u2019]"
_QUOTE = "['\u0092\u2019`\u0091\u2018\u201b]"  # whatever is written for an apostrophe
_LETTER = f"(?:[{LETTERS}{MARKS}\u00ad]|&(?:[aeiouAEIOU](?:acute|grave|uml));)"
_WORD_PART = f"{_LETTER}(?:{_LETTER}|[{DIGITS}])*"
_WORD = f"{_WORD_PART}(?:[.!?]{_WORD_PART})*"
_ALPHANUMERIC = f"[{LETTERS}{DIGITS}]"
_PART = f"(?:[dDoOlL]{_QUOTE}{_ALPHANUMERIC})?{_ALPHANUMERIC}+"
_AUXILIARY = f"{_APOSTROPHE}(?ai:[msd]|re|ve|ll)"
_NUMBER = f"[-+]?(?:[{DIGITS}]*(?:[.:,\u00ad\u066b\u066c][{DIGITS}]+)+|[{DIGITS}]+)"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])*"
_URL_END = r"[^ \t\n\"<>|.!?(){},-]"
_DOMAIN = r"[^ \t\n\"`'<>|.!?(){}$,-_]"  # from the comma to the line below: digits and capitals too
_PHONE = r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5}"
_TAG_NAME = r"[A-Za-z][A-Za-z0-9_:.\-]*"
_TAG_VALUE = r"(?: *= *(?:'[^']*'|\"[^\"]*\"))?"
_TAG = rf"(?:<[!?][A-Za-z\-][^>]*>|<{_TAG_NAME}(?: +{_TAG_NAME}{_TAG_VALUE})* */?>|</{_TAG_NAME} *>)"
_EMAIL = r"[A-Za-z0-9][^ \t\n\"<>|(){}\u00a0]*@(?:[^ \t\n\"<>|(){}.\u00a0]+\.)*[^ \t\n\"<>|(){}.\u00a0]+"


class _Rule(NamedTuple):
    pattern: re.Pattern[str]  # group 1 is the text of the token; what comes after it is only looked at, but counts
    write: Callable[[str], str]  # what the token reads


def _as_it_stands(text: str) -> str:
    return text


def _same(text: str) -> str:
    return text.replace("\u00ad", "") or "-"  # soft hyphens are not written


def _ascii_quotes(text: str) -> str:
    return re.sub("[\u0091\u2018\u201b]", "`", re.sub("[\u0092\u2019]", "'", text))


def _constant(text: str) -> Callable[[str], str]:
    return lambda _: text


def _bracketed(text: str) -> str:
    for sign, name in zip("[]{}", ("lsb", "rsb", "lcb", "rcb"), strict=True):
        text = text.replace(sign, f"-{name}-")
    return _with_parentheses_named(text)


def _with_parentheses_named(text: str) -> str:
    return text.replace("(", "-lrb-").replace(")", "-rrb-")


_RULES = [
    _Rule(re.compile(pattern), write)
    for pattern, write in (
        ("((?ai:can(?=not)|(?:gon|wan)(?=na)|got(?=ta)|lem(?=me)|gim(?=me)))(?ai:not|na|ta|me)", _same),
        ("('(?ai:t))(?ai:is|was)", _same),
        (f"({_TAG})", _same),
        (f"({_WORD}){_AUXILIARY}", _same),
        (f"([A-Za-z]*[A-MO-Za-mo-z])(?ai:n){_QUOTE}(?ai:t)", _same),
        (f"({_WORD})", _same),
        (f"({_APOSTROPHE}(?ai:n){_APOSTROPHE}?)", _same),
        (f"([A-HJ-XZn]{_QUOTE}[{LETTERS}]{{2,}}|[{LETTERS}]+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z][{LETTERS}]*)", _same),
        (
            f"((?ai:{_APOSTROPHE}(?:em|till?|cause)|[cn]{_APOSTROPHE}est|(?:[djl]|ol|dunkin|somethin){_APOSTROPHE}))",
            _same,
        ),
        (f"((?ai:{_SHORTENED})|[oO]{_QUOTE}[oO])", _same),
        (f"((?ai:y){_APOSTROPHE})[{LETTERS}]", _same),
        (f"({_APOSTROPHE}(?:[2-9]0s|[0-9][0-9](?=\\s)))", _same),
        (f'((?ai:https?)://[^ \\t\\n"<>|(){{}}]+{_URL_END})', _same),
        (r"((?ai:www)\.(?:[^ \t\n\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}(?:/[^ \t\n\"<>|()]+" + _URL_END + ")?)", _same),
        (f'((?:{_DOMAIN}+\\.)+(?ai:com|net|org|edu)(?:/[^ \\t\\n"<>|()]+{_URL_END})?)', _same),
        (f"((?:{_ALPHANUMERIC}+\\.)+(?ai:{_FILE_ENDINGS}))(?=[\\s.,!?])", _same),
        ("((?ai:anti|pro)-)[^A-Za-z0-9]", _same),
        (f"(<?{_EMAIL}>?)", _as_it_stands),
        (r"(@[A-Za-z_][A-Za-z_0-9]*)", _same),
        (f"(#{_LETTER}+)", _as_it_stands),
        (f"({_AUXILIARY})[^A-Za-z]", _ascii_quotes),
        (r"(')[A-Za-z]\S", _same),
        (f"({_AUXILIARY})", _ascii_quotes),
        (f"((?ai:n){_QUOTE}(?ai:t))", _ascii_quotes),
        (f"({_NUMBER})", _same),
        (r"([0-9]{1,2}[-/][0-9]{1,2}[-/][0-9]{2,4})", _same),
        ("([\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+))", _same),
        (r"((?:\d{1,4}[- \u00a0])?\d{1,4}\\?/\d{1,4})", _same),
        (f"({_PART}(?:[-_\u058a\u2010\u2011]{_PART})*)", _same),
        (f"((?ai:{_ENDINGS})\\.|(?:{_STATES})\\.|(?:{_STATES.upper()})\\.)(?s:..)?", _same),
        (r"([A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\u00ad]+))+)", _same),
        (r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})", _same),
        ("([A-Z]+(?:(?:[+&]|&(?ai:amp);)[A-Z]+)+)", lambda text: re.sub("&(?ai:amp);", "&", text)),
        (r"([cC]\+\+|[cCfF]#)", _same),
        (r"([A-Z]*\$)", _same),
        (f"([A-Za-z])\\.\\s+(?:(?=[A-Z])(?ai:{_OPENINGS})(?=\\s)|{_TAG})", _same),
        (f"({_ACRONYM}\\.)", _same),
        (f"((?:{_WORD}|{_PART}(?:[-_]{_PART})*)\\.)[,;:\u3001]", _same),
        (f"((?ai:(?:ph|ed)\\.d|{_TITLES})\\.)", _same),
        (f"((?ai:{_NUMBERED})\\.)\\s?[0-9]", _same),
        (f"({_PHONE})", _bracketed),
        (r"([<>]?[:;=]['o*-]?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _with_parentheses_named),
        ("([-^x=~<>']_[-^x=~<>'])", _same),
        (r"(\([-^x=~<>'][_.]?[-^x=~<>']\)|\([-^x=~<>']-[-^x=~<>'`]\))", _bracketed),
        ("(\u00bd)", _constant("1/2")),
        ("(\u00bc)", _constant("1/4")),
        ("(\u00be)", _constant("3/4")),
        ("(\u2153)", _constant("1/3")),
        ("(\u2154)", _constant("2/3")),
        ("(\u00a2)", _constant("cents")),
        ("([\u0080\u00a4\u20a0\u20ac])", _constant("$")),
        ("(\u00a3)", _constant("#")),
        (r"([\[\](){}])", _bracketed),
        (r"(-{5,})", _same),
        (r"(-{2,}|[\u0096\u0097\u2013-\u2015]|&(?:MD|mdash|ndash);)", _constant("--")),
        (r"(\.(?:\.{2,4}|(?: \.){2,4})|\u2026|\u0085)", _constant("...")),
        (r"([?!]+)", _same),
        (r"(\*+|(?:\\\*){1,3}|@{2,}|#{2,}|_+|<<|>>)", _same),
        (r"(\"|''|&quot;)", _constant("''")),
        (
            f"([`{''.join(_QUOTES)}\u201a\u201e\u201f]{{1,2}})",
            lambda text: "".join(_QUOTES.get(sign, sign) for sign in text),
        ),
        ("('|&apos;)", _constant("'")),
        (r"(&(?ai:amp);)", _constant("&")),
        (r"(&(?ai:lt);)", _constant("<")),
        (r"(&(?ai:gt);)", _constant(">")),
        (r"(&#\d+;)", _same),
        ("([\u058a\u2010\u2011])", _constant("-")),
    )
]
LINE_BREAKS = re.compile("[\\n\\r\\v\\f\\x1c-\\x1e\\x85\u2028\u2029]")
"""Of one caption on one line."""

_SPACE = re.compile(r"(?:\s|&(?ai:nbsp);)+")
_PLAIN = re.compile(r"[A-Za-z]+(?=[ \n])")  # nothing but letters up to the next space: most of any caption
_PLAIN_SPLIT = frozenset(("cannot", "gonna", "gotta", "lemme", "gimme", "wanna"))
_NO_WORD = re.compile(f"[{DELETED}\U00010000-\U0010ffff]")


def tokenize(text: str) -> list[str]:
    """The words of a caption: lower case, without punctuation.

    Text that holds no word (nothing, blanks, "...") gives an empty list. A word holds a blank in rare cases (`1 1/2`, a
    telephone number, `<a tag>`), which then is a no-break space: measures that cut at any blank see two words there.
    """
    words: list[str] = []
    text = LINE_BREAKS.sub(" ", text) + "\n"  # rules look at what comes after a token
    at = 0
    while at < len(text):
        if blank := _SPACE.match(text, at):
            at = blank.end()
            continue
        plain = _PLAIN.match(text, at)
        if plain and plain.group().lower() not in _PLAIN_SPLIT:
            words.append(plain.group().lower())
            at = plain.end()
            continue
        end, written = _longest(text, at)
        at = end
        if (word := written.lower()).strip() and word not in DROPPED:
            words.append(word.replace(" ", "\u00a0"))
    return words


def _longest(text: str, at: int) -> tuple[int, str]:
    """(where the token ends, what it reads) at a place that is no blank."""
    reach, best = at, None
    write: Callable[[str], str] = _same
    for rule in _RULES:
        match = rule.pattern.match(text, at)
        if match and match.end() > reach:
            reach, best, write = match.end(), match, rule.write
    if best is not None:
        return best.end(1), write(best.group(1))
    sign = text[at]
    return at + 1, " " if _NO_WORD.match(sign) else sign
