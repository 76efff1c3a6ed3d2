"""The open turn's tokens: a sequence that never changes and is cheap to lengthen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.column import Column


@given(st.data())
def test_columns_made_of_one_another_are_as_tuples_are(data: st.DataObject) -> None:
    known: list[tuple[Column[int], tuple[int, ...]]] = [(Column(), ())]
    for more in data.draw(st.lists(st.lists(st.integers(), max_size=3).map(tuple), max_size=8)):
        column, same = data.draw(st.sampled_from(known))
        count = data.draw(st.integers(0, len(same) + 1))
        known += [(column + more, same + more), (column.first(count) + more, same[:count] + more)]
    before = (0,)
    for column, same in known:
        assert column == same
        assert same == column
        assert (len(column), tuple(column), (0, *same)) == (len(same), same, before + column)
        for index in range(-len(same), len(same)):
            assert column[index] == same[index]
        assert (column[1:], column[-2:], column[::-1]) == (same[1:], same[-2:], same[::-1])
        with pytest.raises(IndexError):
            column[len(same)]


def test_columns_that_differ_are_not_equal() -> None:
    assert Column((1, 2)) != Column((1, 3))
    assert Column((1, 2)).first(1) == Column((1,))
    assert Column((1,)) != "1"


def test_what_is_added_to_the_newest_column_moves_nothing() -> None:
    column: Column[int] = Column((1,))
    storage, more = column._items, (2, 3)
    for _ in range(100):
        column = column + more
    assert column._items is storage
