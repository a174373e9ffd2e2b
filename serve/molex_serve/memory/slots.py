"""Who has which rows of an arena: contiguous ranges, first fit."""

from bisect import bisect_left

Range = range  # neighbouring rows [start, stop)


class Ranges:
    """Rows 0 to size; what is taken starts and ends at multiples of align. Rows behind the last multiple are unused."""

    def __init__(self, size: int, align: int = 1):
        assert size >= 0, size
        assert align > 0, align
        self.align = align
        self._free = [range(0, size - size % align)] if size >= align else []  # ascending, never neighbours
        self._taken: dict[int, Range] = {}

    @property
    def free(self) -> int:
        """Rows that nobody has, wherever they lie."""
        return sum(map(len, self._free))

    def largest(self) -> int:
        """What `take` can give at most."""
        return max(map(len, self._free), default=0)

    def take(self, num_rows: int) -> Range | None:
        """At least so many rows, up to the next multiple of align; None where no gap is as large."""
        assert num_rows > 0, num_rows
        rounded = -(-num_rows // self.align) * self.align
        for index, gap in enumerate(self._free):
            if len(gap) >= rounded:
                found = range(gap.start, gap.start + rounded)
                rest = range(found.stop, gap.stop)
                self._free[index : index + 1] = [rest] if rest else []
                self._taken[found.start] = found
                return found
        return None

    def give(self, taken: Range) -> None:
        """What `take` gave, back."""
        assert self._taken.get(taken.start) == taken, f"{taken} is not taken"
        del self._taken[taken.start]
        index = bisect_left(self._free, taken.start, key=lambda gap: gap.start)
        start, stop = taken.start, taken.stop
        before, after = self._free[max(index - 1, 0) : index], self._free[index : index + 1]
        if before and before[0].stop == start:
            start, index = before[0].start, index - 1
        else:
            before = []
        if after and after[0].start == stop:
            stop = after[0].stop
        else:
            after = []
        self._free[index : index + len(before) + len(after)] = [range(start, stop)]
