"""Words for people: nearest values, similar names, and numbers and durations in short form."""

import difflib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def counted(number: int, noun: str) -> str:
    """A number of things: 1 rank, 2 ranks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def divisors(number: int) -> list[int]:
    """All of them, smallest first."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def nearest(wanted: int, legal: list[int]) -> str:
    """The nearest legal values on both sides of `wanted`, as advice."""
    below = [value for value in legal if value <= wanted][-1:]
    above = [value for value in legal if value > wanted][:1]
    return " or ".join(map(str, below + above))


def near_divisors(wanted: int, number: int) -> str:
    """The nearest divisors of a number, as advice."""
    return nearest(wanted, divisors(number))


def multiples_near(number: int, unit: int, limit: float = math.inf) -> str:
    """The nearest multiples of a unit up to a limit, as advice."""
    below = number // unit * unit
    return nearest(number, [multiple for multiple in (below, below + unit) if 0 < multiple <= limit])


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` most likely means, or None."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def either(numbers: Iterable[int]) -> str:
    """Numbers in words: `32 or 1,024`."""
    return " or ".join(f"{number:,}" for number in numbers)


def humanise(value: float) -> str:
    """A number in three significant digits with k, M, B or T: 950, 12.3k, 1.20M. Below 1 in two decimals."""
    if not math.isfinite(value) or abs(value) < 1:
        return f"{value:.2f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    group = min(int(exponent) // 3, 4)
    shift = int(exponent) - 3 * group
    return f"{float(mantissa) * 10**shift:.{max(2 - shift, 0)}f}{('', 'k', 'M', 'B', 'T')[group]}"


def clock(seconds: float) -> str:
    """A duration as m:ss, from an hour on h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its type where it says nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
