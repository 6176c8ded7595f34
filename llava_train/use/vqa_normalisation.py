"""How the VQA evaluation normalises an answer before it compares.

Source: https://visualqa.org/evaluation.html and `vqaEval.py` of github.com/GT-Vision-Lab/VQA, which LLaVA's
`m4c_evaluator.py` follows for TextVQA. The order of the steps, and what they do at their edges, are part of the
definition.
"""

from __future__ import annotations

import re
from functools import lru_cache

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
"""A period is part of a number only where a digit follows it."""

# Each is found without any one of its apostrophes. What is not here (she'll, we'd) is not in the original either, since
# without the apostrophe it is another word.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_MENDED = {
    word[:position] + word[position + 1 :]: word
    for word in _CONTRACTIONS.split()
    for position, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
"""The last one is the wrong way round in the original, and scores are to equal its scores."""


@lru_cache(maxsize=1 << 16)  # people mostly say yes, no and 2
def normalised(answer: str) -> str:
    """An answer as the VQA evaluation compares it: `Two dogs.` becomes `2 dogs`, `the cat` becomes `cat`.

    Lower case; punctuation becomes a space, or nothing where a space is beside that character anywhere in the answer or
    the answer holds a number with a comma; periods that are in no number go; number words up to ten become
    digits; articles go; contractions get the apostrophe that they lack.
    """
    text = stripped = answer.replace("\n", " ").replace("\t", " ").strip()
    has_number = _COMMA_IN_NUMBER.search(stripped) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in stripped or f" {mark}" in stripped
        text = text.replace(mark, "" if beside_space or has_number else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).lower().split())
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)
