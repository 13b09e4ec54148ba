"""Reads a `.bin`/`.idx` pair from the byte layout alone: shares no code with the project."""

import struct
from itertools import chain, pairwise
from pathlib import Path


def read_independently(prefix: Path) -> list[list[int]]:
    """The documents of a pair, from the byte layout alone."""
    index, stream = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, entries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    kind = {4: "i", 8: "H"}[code]
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    documents = struct.unpack_from(f"<{entries}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * entries
    assert len(stream) == sum(lengths) * struct.calcsize(kind)
    read = [list(struct.unpack_from(f"<{n}{kind}", stream, at)) for n, at in zip(lengths, pointers, strict=True)]
    return [list(chain.from_iterable(read[a:b])) for a, b in pairwise(documents)]
