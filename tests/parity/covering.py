"""A pairwise covering array (Mandl, 1985): few cases in which every two values that may stand together do."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]


def pairs(case: Case) -> set[tuple[str, Any, str, Any]]:
    """Every two values of a case, by the names of what they are values of."""
    return {(*one, *other) for one, other in combinations(sorted(case.items()), 2)}


def covering_array(
    rows: Sequence[Case], options: Mapping[str, Sequence[Any]], legal: Callable[[int, str], bool], seed: int
) -> list[tuple[int, Case]]:
    """Each row at least once, with options chosen so that all pairs occur; greedy, so small rather than smallest.

    Args:
        rows: cases that are fixed; each is used, some again where pairs are left.
        options: values that are free, by name.
        legal: whether the row of an index has an option.
        seed: decides between choices that are equally good.

    Returns the index of the row and the whole case, options included.
    """
    shuffle = random.Random(seed).shuffle
    candidates = []
    for index, row in enumerate(rows):
        names = [name for name in options if legal(index, name)]
        cases = [row | dict(zip(names, values, strict=True)) for values in product(*(options[name] for name in names))]
        shuffle(cases)
        candidates.append(cases)
    missing = set().union(*(pairs(case) for cases in candidates for case in cases))
    chosen: list[tuple[int, Case]] = []

    def take(indices: Sequence[int]) -> None:
        found = max(((index, case) for index in indices for case in candidates[index]), key=lambda x: gain(x[1]))
        chosen.append(found)
        missing.difference_update(pairs(found[1]))

    def gain(case: Case) -> int:
        return len(missing & pairs(case))

    for index in range(len(rows)):
        take([index])
    while missing:
        take(range(len(rows)))
    return chosen
