"""A histogram of constant size and constant relative error, for latencies from 10 us to minutes.

Values below 128 have a bucket each; above, every doubling is cut into 64, so a percentile is at most 1.6 % too high.
(The bucketing of HdrHistogram, Gil Tene.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

_SUB_BITS = 6


def _bucket(value: int) -> int:
    shift = max(value.bit_length() - _SUB_BITS - 1, 0)
    return (shift << _SUB_BITS) + (value >> shift)


def _top(bucket: int) -> int:
    """The largest value that falls into this bucket."""
    shift = max((bucket >> _SUB_BITS) - 1, 0)
    return ((bucket - (shift << _SUB_BITS) + 1) << shift) - 1


class Histogram:
    """Counts non-negative integers, of whatever unit."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.largest = 0

    def add_all(self, values: Iterable[int]) -> None:
        counts = self._counts
        for value in values:
            bucket = _bucket(value)
            counts[bucket] = counts.get(bucket, 0) + 1
            self.count += 1
            self.largest = max(self.largest, value)

    def quantile(self, q: float) -> int:
        """The smallest bucket top that at least the share `q` of all values does not exceed; 0 when empty."""
        rank, seen = math.ceil(q * self.count), 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= rank:
                return min(_top(bucket), self.largest)
        return 0
