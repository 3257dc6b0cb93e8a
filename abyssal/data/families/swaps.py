"""Five letters and a list of neighbours to swap: tracking a state in S5, a group that constant depth cannot compose.

(Barrington 1989: products in S5 are complete for NC1.) "b a d c e:31" swaps places 3 and 4, then 1 and 2:
"b a c d e:1", then "a b c d e". A swap that has been made leaves the list.
"""

from __future__ import annotations

import random

from abyssal.data.families.instance import Instance
from abyssal.types import Language

WORDING: dict[Language, str] = {"en": "Swap neighbours in turn:", "zh": "依次交换相邻字母："}


def draw_swaps(rng: random.Random, level: int) -> Instance:
    """`level` swaps of neighbours, never the same one twice in a row; all 120 answers are equally likely."""
    letters = rng.sample("abcde", 5)
    places = [rng.randint(1, 4)]
    while len(places) < level:
        places.append(rng.choice([place for place in (1, 2, 3, 4) if place != places[-1]]))
    states = [written(letters, places)]
    for done, place in enumerate(places, start=1):
        letters[place - 1], letters[place] = letters[place], letters[place - 1]
        states.append(written(letters, places[done:]))
    return Instance(key=f"swaps|{states[0]}", state=states[0], steps=tuple(states[1:]), answer=states[-1])


def written(letters: list[str], places: list[int]) -> str:
    """Letters by single spaces, then the places still to be swapped; the colon goes with the last of them."""
    text = " ".join(letters)
    return text + ":" + "".join(map(str, places)) if places else text
