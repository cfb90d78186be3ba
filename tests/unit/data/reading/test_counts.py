import pytest

from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.errors import DataError


def tally(kept: int, bad: int, unused: int = 0) -> RowTally:
    rows = RowTally("set x", max_bad_share=0.2)
    rows.keep(kept)
    rows.drop_bad("empty", bad)
    rows.drop_unused("repeated", unused)
    return rows


def test_exactly_the_allowed_share_of_bad_rows_passes() -> None:
    assert tally(kept=8, bad=2).finish() == {"kept": 8, "empty": 2}


def test_too_many_bad_rows_are_an_error_with_the_numbers() -> None:
    with pytest.raises(DataError, match=r"set x: 3 of 10 rows are bad \(empty: 3\).*20%"):
        tally(kept=7, bad=3).finish()


def test_unused_rows_are_not_bad() -> None:
    assert tally(kept=1, bad=0, unused=9).finish() == {"kept": 1, "repeated": 9}


def test_the_remedy_for_overlong_rows_names_their_key() -> None:
    rows = tally(kept=1, bad=0)
    rows.drop_bad("overlong")
    with pytest.raises(DataError, match=r"set data\.overlong to truncate"):
        rows.finish()


def test_a_dataset_without_usable_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="none of 4 rows"):
        tally(kept=0, bad=0, unused=4).finish()
    with pytest.raises(DataError, match="none of 0 rows"):
        tally(kept=0, bad=0).finish()
