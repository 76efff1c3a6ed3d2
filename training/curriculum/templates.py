"""Small Python functions, right and wrong, as data for the families `bug` and `writefn`.

A template is one function: `good` is its body, `bad` are bodies with one line wrong (the same line
of `good`), `says` describes the result after "returns" or "must return".  `{a}` and `{b}` stand for
the parameters, whose kinds are spelled by `kinds`: `L` a list of ints, `N` an int, `S` a word.

The checkpoint learnt bugs as templates, so only functions of a kind that it was seen to repair or
to write are here; what was left out, and the figures: README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

LISTS = ("items", "values", "nums")


@dataclass(frozen=True)
class Template:
    """One function; without `bad` it is only written anew, without `says` only repaired."""

    stems: tuple[str, ...]
    kinds: str
    good: str
    bad: tuple[str, ...] = ()
    says: str = ""
    lists: tuple[str, ...] = LISTS


_OF_LISTS = (
    Template(("first", "head_of"), "L", "return {a}[0]", ("return {a}[1]", "return {a}"), "the first element of {a}"),
    Template(("last", "tail_of"), "L", "return {a}[-1]", ("return {a}[0]", "return {a}"), "the last element of {a}"),
    Template(
        ("square_all",),
        "L",
        "return [v * v for v in {a}]",
        ("return [v * 2 for v in {a}]",),
        "the squares of {a}",
        lists=("values",),
    ),
    Template(
        ("double_all",),
        "L",
        "return [v * 2 for v in {a}]",
        ("return [v * v for v in {a}]", "return [v + 2 for v in {a}]"),
        "{a} with every element doubled",
        lists=("values",),
    ),
    Template(
        ("spread",),
        "L",
        "return max({a}) - min({a})",
        ("return max({a}) + min({a})",),
        "the difference of the largest and the smallest of {a}",
    ),
    Template(
        ("count_items", "size_of"),
        "L",
        "return len({a})",
        ("return len({a}) - 1", "return len({a}) + 1"),
        "the length of {a}",
    ),
    Template(("sum_all", "total_of"), "L", "return sum({a})", says="the sum of {a}"),
    Template(("evens",), "L", "return [v for v in {a} if v % 2 == 0]", says="the even elements of {a}"),
    Template(("multiply_all",), "L", "res = 1\nfor v in {a}:\n    res *= v\nreturn res", says="the product of {a}"),
    Template(("reverse_list",), "L", "return {a}[::-1]", says="{a} reversed"),
)
_OF_INTS = (
    Template(
        ("rect_area", "area"),
        "NN",
        "return {a} * {b}",
        ("return 2 * ({a} + {b})", "return {a} + {b}"),
        "{a} times {b}",
    ),
    Template(
        ("perimeter",),
        "NN",
        "return 2 * ({a} + {b})",
        ("return {a} * {b}", "return {a} + {b}"),
        "twice the sum of {a} and {b}",
    ),
    Template(
        ("add", "plus"),
        "NN",
        "return {a} + {b}",
        ("return {a} - {b}", "return {a} * {b}"),
        "the sum of {a} and {b}",
    ),
    Template(
        ("subtract", "difference"),
        "NN",
        "return {a} - {b}",
        ("return {a} + {b}", "return {b} - {a}"),
        "{a} minus {b}",
    ),
    Template(
        ("multiply", "product"),
        "NN",
        "return {a} * {b}",
        ("return {a} + {b}",),
        "the product of {a} and {b}",
    ),
    Template(("same", "equal"), "NN", "return {a} == {b}", ("return {a} != {b}",), "True if {a} equals {b}"),
    Template(("larger", "bigger"), "NN", "return max({a}, {b})", says="the larger of {a} and {b}"),
    Template(("double", "twice"), "N", "return {a} * 2", ("return {a} + 2",), "twice {a}"),
    Template(("square",), "N", "return {a} * {a}", ("return {a} + {a}", "return {a} * 2"), "the square of {a}"),
    Template(("negate",), "N", "return -{a}", ("return {a}",), "{a} negated"),
    Template(("increment",), "N", "return {a} + 1", ("return {a} - 1",), "{a} plus 1"),
    Template(("is_even",), "N", "return {a} % 2 == 0", ("return {a} % 2 == 1",), "True if {a} is even"),
    Template(("is_odd",), "N", "return {a} % 2 == 1", says="True if {a} is odd"),
)
_OF_WORDS = (
    Template(("hello", "greeting"), "S", 'return "Hello, " + {a}', ("return {a}",), '"Hello, " followed by {a}'),
    Template(
        ("shout", "upper"),
        "S",
        "return {a}.upper()",
        ("return {a}.lower()", "return {a}"),
        "{a} in upper case",
    ),
    Template(("reverse_text",), "S", "return {a}[::-1]", says="{a} reversed"),
)
TEMPLATES = (*_OF_LISTS, *_OF_INTS, *_OF_WORDS)
