"""Ranges against a bitmap that is searched row by row."""

import random

import pytest

from molex_serve.memory.slots import Ranges


class Bitmap:
    """The same promise, by brute force."""

    def __init__(self, size: int, align: int):
        self.size, self.align = size - size % align, align
        self.used = [False] * self.size

    def fits(self, start: int, rows: int) -> bool:
        return start + rows <= self.size and not any(self.used[start : start + rows])

    def take(self, num_rows: int) -> range | None:
        rows = -(-num_rows // self.align) * self.align
        for start in range(0, self.size, self.align):
            if self.fits(start, rows):
                self.used[start : start + rows] = [True] * rows
                return range(start, start + rows)
        return None

    def give(self, taken: range) -> None:
        self.used[taken.start : taken.stop] = [False] * len(taken)

    def largest(self) -> int:
        return max(rows for rows in range(self.size + 1) for start in range(self.size) if self.fits(start, rows))


@pytest.mark.parametrize("align", [1, 4, 8])
@pytest.mark.parametrize("size", [1, 7, 40, 64])
def test_against_a_bitmap(size: int, align: int) -> None:
    for seed in range(5):
        dice = random.Random(seed)
        ranges, bitmap, taken = Ranges(size, align), Bitmap(size, align), []
        for _ in range(120):
            if taken and dice.random() < 0.45:
                given = taken.pop(dice.randrange(len(taken)))
                ranges.give(given)
                bitmap.give(given)
            else:
                rows = dice.randint(1, max(1, size // 2))
                found = ranges.take(rows)
                assert found == bitmap.take(rows)
                taken += [found] if found else []
            assert ranges.free == bitmap.used.count(False)
            if size <= 40:
                assert ranges.largest() == (bitmap.largest() if bitmap.size else 0)


def test_neighbours_join_again() -> None:
    ranges = Ranges(24, 8)
    parts = [ranges.take(8) for _ in range(3)]
    assert ranges.take(1) is None
    for part in (parts[0], parts[2], parts[1]):
        assert part is not None
        ranges.give(part)
    assert ranges.take(24) == range(0, 24)


@pytest.mark.parametrize("wrong", [range(0, 8), range(8, 16), range(8, 24), range(12, 16)])
def test_only_what_is_taken_is_given_back(wrong: range) -> None:
    ranges = Ranges(32, 8)
    first, second = ranges.take(8), ranges.take(12)
    assert (first, second) == (range(0, 8), range(8, 24))
    ranges.give(range(0, 8))
    if wrong == second:
        ranges.give(wrong)
    with pytest.raises(AssertionError, match="is not taken"):
        ranges.give(wrong)
