"""A keyed permutation of any size in constant memory: the order of an epoch without an index."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6


def _mix(value: int) -> int:
    """splitmix64's step: spreads every input bit over 64 output bits."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """A 64-bit key that depends on every part and on their order."""
    key = 0
    for part in parts:
        key = _mix(key ^ _mix(part & _MASK))
    return key


class KeyedPermutation:
    """A bijection of [0, size), chosen by `key`.

    A balanced Feistel network (Luby and Rackoff, 1988) permutes the next even power of two; outcomes outside the range
    are permuted again until they fall inside (cycle walking), under four times on average.
    """

    def __init__(self, size: int, key: int) -> None:
        """`size` >= 0; an empty permutation has no index to call it with."""
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._round_keys = tuple(derive_key(key, round_number) for round_number in range(_ROUNDS))

    def __call__(self, index: int) -> int:
        """Where `index` goes. Raises IndexError outside [0, size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside a permutation of {self.size}")
        while True:
            left, right = index >> self._half_bits, index & self._half_mask
            for round_key in self._round_keys:
                left, right = right, left ^ (_mix(right ^ round_key) & self._half_mask)
            index = left << self._half_bits | right
            if index < self.size:
                return index
