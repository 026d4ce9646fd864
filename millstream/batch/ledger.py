"""A table of 64-bit numbers in 16 bytes a slot: what a batch of millions can afford to remember of each row. Pure.

Python's own dict takes about 150 bytes for each entry of two such numbers. Names are known by 64 bits of their digest:
among a million, two different ones are taken for the same with a probability of 3 in 100 million.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import Final

_FIRST_SLOTS: Final = 1024


def fingerprint(name: str) -> int:
    """64 bits that stand for a name; never 0."""
    return int.from_bytes(blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()) or 1


class Ledger:
    """Numbers by fingerprint, in a table that is probed in order and doubled when two thirds are taken."""

    def __init__(self) -> None:
        self._slots = _FIRST_SLOTS
        self._used = 0
        self._names, self._values = _zeros(_FIRST_SLOTS), _zeros(_FIRST_SLOTS)

    def __len__(self) -> int:
        return self._used

    def get(self, name: int) -> int:
        """What is noted under a fingerprint; 0 is nothing."""
        return self._values[self._slot(name)]

    def put(self, name: int, value: int) -> None:
        """Note a number below 2**64."""
        slot = self._slot(name)
        if not self._names[slot]:
            self._names[slot] = name
            self._used += 1
        self._values[slot] = value
        if 3 * self._used > 2 * self._slots:
            self._grow()

    def _slot(self, name: int) -> int:
        names, mask = self._names, self._slots - 1
        slot = name & mask
        while (found := names[slot]) and found != name:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        names, values = self._names, self._values
        self._slots *= 2
        self._names, self._values = _zeros(self._slots), _zeros(self._slots)
        for name, value in zip(names, values, strict=True):
            if name:
                slot = self._slot(name)
                self._names[slot], self._values[slot] = name, value


def _zeros(count: int) -> array[int]:
    return array("Q", bytes(8 * count))
