"""Numbers in messages: near a wrong one that would work, and with what they count."""

import math


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
