"""Plain-text tables."""

from vit_convert.core.text_table import text_table


def test_the_first_column_to_the_left_and_the_others_to_the_right():
    assert text_table(("name", "n"), [["a", "10"], ["long", "7"]]) == "name   n\na     10\nlong   7"


def test_columns_are_as_wide_as_their_widest_cell_and_nothing_trails():
    rows = [["a", "", "x"], ["bb", "123", ""]]
    assert text_table(("", "column", "z"), rows) == "    column  z\na           x\nbb     123"


def test_a_header_alone():
    assert text_table(("name", "n"), []) == "name  n"
    assert text_table(("n",), [["1"]]) == "n\n1"
