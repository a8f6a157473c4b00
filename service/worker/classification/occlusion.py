"""What each token does for a label, by hiding it: Zeiler and Fergus 2014, section 4; Li et al. 2016. Pure lists.

A variant keeps the length and every other token: one token is replaced by the blank, so that positions stay and all
variants run in one batch. Special tokens are the frame that the model was trained in, and are never hidden.
"""

from collections.abc import Mapping, Sequence


def hidden_one_by_one(ids: Sequence[int], is_special: Sequence[bool], blank_id: int) -> dict[int, list[int]]:
    """Place of a token -> all ids with the blank there, for each token that is not special."""
    return {
        place: [*ids[:place], blank_id, *ids[place + 1 :]] for place, special in enumerate(is_special) if not special
    }


def falls(score: float, hidden: Mapping[int, float], num_tokens: int) -> list[float]:
    """For each token how much lower than `score` the score is with it hidden; 0 for those that were not."""
    return [score - hidden[place] if place in hidden else 0.0 for place in range(num_tokens)]
