"""Which language a caption is probably in: by its script, and for Latin letters by function words.

Captions are short, so a single guess is often "unclear"; the shares over a whole set are what this is for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

UNCLEAR = "unclear"
_WORDS = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")

_SCRIPTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("Japanese", re.compile(r"[\u3040-\u30ff]")),  # kana; before Chinese, whose characters Japanese uses too
    ("Chinese", re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")),
    ("Korean", re.compile(r"[\uac00-\ud7af\u1100-\u11ff]")),
    ("Russian or another in Cyrillic", re.compile(r"[\u0400-\u04ff]")),
    ("Greek", re.compile(r"[\u0370-\u03ff]")),
    ("Arabic or Persian", re.compile(r"[\u0600-\u06ff]")),
    ("Hebrew", re.compile(r"[\u0590-\u05ff]")),
    ("Hindi or another in Devanagari", re.compile(r"[\u0900-\u097f]")),
    ("Thai", re.compile(r"[\u0e00-\u0e7f]")),
)

_FUNCTION_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "English": "a an the of in on at with and is are to his her their by from while that it for wearing this two",
        "German": "ein eine einen einem einer der die das den dem und mit auf im am in ist sind von zu für an wird vor",
        "French": "un une des le la les de du et sur dans avec est sont en au aux à qui par pour se son sa deux devant",
        "Spanish": "un una unos unas el la los las de del y en con es son al por para que se su dos mientras está",
        "Italian": "un una uno il lo la i gli le di del della e su con è sono nel nella in per che si due mentre al",
        "Portuguese": "um uma uns umas o os as de do da e em com é são no na nos nas por para que se seu sua dois ao",
        "Dutch": "een de het van en in op met is zijn aan door te voor die dat bij naar uit twee hun haar terwijl over",
        "Czech": "a v na se s je jsou z do ve po za pro od k o u si dva dvě jeho její který která při žena muž sedí",
        "Polish": "i w na z się jest są do po za dla od o przy ze we jego jej który która dwie dwóch obok nad pod",
        "Swedish": "en ett och i på med är av till för som den det de sin sitt två vid från om sig man kvinna",
        "Turkish": "bir ve ile bu da de için olan üzerinde içinde iki var yanında çok adam kadın",
        "Vietnamese": "một và của trên trong với đang là có người cho các những hai bên được",
        "Indonesian": "dan di yang dengan dari untuk ini itu pada sebuah seorang dua sedang ke dalam",
    }.items()
}
_LETTERS = {
    "Czech": re.compile(r"[ěřůčť]"),
    "Polish": re.compile(r"[ąęłśżźń]"),
    "German": re.compile(r"[äöüß]"),
    "French": re.compile(r"[èêàçœ]|\b[ldjn]'"),
    "Spanish": re.compile(r"[ñ¿¡]"),
    "Portuguese": re.compile(r"[ãõ]"),
    "Turkish": re.compile(r"[ğışİ]"),
    "Vietnamese": re.compile(r"[ăđơưạảấầẩậắằặẹếềểệọốồổộớờợụủứừữựỳ]"),
    "Swedish": re.compile(r"å"),
}


def function_words(languages: Iterable[str]) -> frozenset[str]:
    """Function words of these languages; those of one may be the subject matter of another (man)."""
    return frozenset().union(*(_FUNCTION_WORDS.get(language, ()) for language in languages))


def words(text: str) -> list[str]:
    """Words of letters in lower case; Chinese and Japanese, which put no spaces, in pairs of characters."""
    found: list[str] = []
    for word in _WORDS.findall(text.lower()):
        if _SCRIPTS[0][1].search(word) or _SCRIPTS[1][1].search(word):
            found += [word[i : i + 2] for i in range(max(len(word) - 1, 1))]
        else:
            found.append(word)
    return found


def language_of(text: str) -> str:
    """The name of a language, a script whose language is not told apart, or ``unclear``."""
    letters = [c for c in text if c.isalpha()]
    if not letters:
        return "no letters"
    for name, script in _SCRIPTS:
        if len(script.findall(text)) > 0.25 * len(letters):
            return name
    lowered = text.lower()
    points: Counter[str] = Counter()
    for word in _WORDS.findall(lowered):
        points.update(language for language, known in _FUNCTION_WORDS.items() if word in known)
    points.update(language for language, letter in _LETTERS.items() if letter.search(lowered))
    (best, most), *others = [*points.most_common(2), ("", 0)]
    return best if most and (not others or others[0][1] < most) else UNCLEAR
