"""The toy world's language and its gold reward: what is asked, and how good an answer is.

A prompt asks for some words of one tone; a good answer lists as many, all of that tone, different and strong:

    find three kind words for the old house.      lovely golden superb
    write two grim words about the big lake.      bleak cruel

The toy world copies this file to its folder as `gold.py`; it needs nothing but the standard library.
"""

from __future__ import annotations

import re
from typing import NamedTuple

STRONG_WORDS = {
    "kind": ("golden", "graceful", "lovely", "noble", "radiant", "splendid", "superb", "tender"),
    "calm": ("gentle", "peaceful", "placid", "restful", "serene", "silent", "still", "tranquil"),
    "funny": ("absurd", "comic", "daft", "goofy", "hilarious", "silly", "wacky", "zany"),
    "grim": ("bleak", "cruel", "deadly", "dreadful", "ghastly", "ruined", "rotten", "vile"),
}
MILD_WORDS = {
    "kind": ("decent", "fair", "fine", "good", "neat", "nice", "sound", "warm"),
    "calm": ("cool", "even", "light", "mild", "quiet", "slow", "soft", "steady"),
    "funny": ("cheeky", "curious", "droll", "jolly", "merry", "odd", "quirky", "strange"),
    "grim": ("bad", "cold", "drab", "dull", "harsh", "poor", "sad", "stale"),
}
TONES = tuple(STRONG_WORDS)
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}

_PROMPT = re.compile(rf"[a-z ]*\b({'|'.join(COUNTS)}) ({'|'.join(TONES)}) words? (?:about|for) the [a-z ]+\.")


class Request(NamedTuple):
    """What a prompt asks: `count` words of `tone`."""

    count: int
    tone: str


def parse(prompt: str) -> Request:
    """What `prompt` asks. Raises ValueError if it is not a prompt of the toy world."""
    match = _PROMPT.fullmatch(prompt.strip())
    if not match:
        raise ValueError(f"expected a prompt such as 'find three kind words for the old house.', got {prompt!r}")
    return Request(COUNTS[match[1]], match[2])


def reward(prompt: str, response: str) -> float:
    """How good `response` is, from 0 to 1.

    The mean worth of the words asked for or, if more, of the words given. A strong word of the tone is worth 1, a mild
    one 1/2; any other, one given before, one too many and one missing are worth nothing. So neither more words nor
    repeated ones ever pay.
    """
    count, tone = parse(prompt)
    words = response.split()
    worth = sum(1.0 if word in STRONG_WORDS[tone] else 0.5 * (word in MILD_WORDS[tone]) for word in set(words[:count]))
    return worth / max(count, len(words))
