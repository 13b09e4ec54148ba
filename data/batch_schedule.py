"""The sizes of global batches as a function of the tokens consumed."""

import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

UNITS = (("", 1), ("k", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12))


@dataclass(frozen=True)
class BatchSchedule:
    """The size of every global batch of a run."""

    phases: tuple[tuple[int, int], ...]
    """(consumed tokens, samples): from so many tokens on the size holds; the first begins at 0, tokens ascend."""
    seq_length: int
    """Tokens a sample counts for."""

    @property
    def sizes(self) -> list[int]:
        """All that occur, in the order in which they first do."""
        return list(dict.fromkeys(size for _, size in self.phases))

    def size_at(self, consumed_samples: int) -> int:
        """Samples of the global batch that is taken after so many have been consumed."""
        consumed = consumed_samples * self.seq_length
        return next(size for tokens, size in reversed(self.phases) if tokens <= consumed)

    def consumed_after(self, steps: int, start: int = 0) -> int:
        """Samples consumed once `steps` more steps are taken after `start` samples."""
        consumed = start
        for (_, size), (end, _) in pairwise(self.phases):
            # Rounded up: the step that comes across the threshold is taken whole.
            until_end = -(-(end - consumed * self.seq_length) // (size * self.seq_length))
            taken = min(steps, max(0, until_end))
            consumed, steps = consumed + taken * size, steps - taken
        return consumed + steps * self.phases[-1][1]


def parse_batch_schedule(text: str, seq_length: int) -> BatchSchedule:
    """Read "0:32 1.5B:64", pairs of consumed tokens and samples. Raises ValueError saying what is wrong."""
    phases: list[tuple[int, int]] = []
    for pair in text.split():
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMBT]?):(\d+)", pair)
        if match is None or int(match[3]) == 0:
            raise ValueError(f"{pair} is not TOKENS:SAMPLES, such as 0:32, 500M:48 or 1.5B:64 (k, M, B or T)")
        tokens = int(Decimal(match[1]) * dict(UNITS)[match[2].replace("K", "k")])
        if phases and tokens <= phases[-1][0]:
            raise ValueError(f"tokens must ascend, but {pair} does not come after {phases[-1][0]:,} tokens")
        phases.append((tokens, int(match[3])))
    if not phases or phases[0][0]:
        raise ValueError(f"the first size must begin at 0 tokens; try {f'0:32 {text}'.strip()!r}")
    return BatchSchedule(tuple(phases), seq_length)
