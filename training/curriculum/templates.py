"""Small Python functions, right and wrong, as data for the families `bug` and `writefn`.

A template is one function: `good` is its body, `bad` are bodies with one line wrong (the same line
of `good`), `says` describes the result after "returns" or "must return".  `{a}` and `{b}` stand for
the parameters, whose kinds are spelled by `kinds`: `L` a list of ints, `N` an int, `S` a word.

Which templates are here, and how often the checkpoint solves each: README.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """One function; without `bad` it is only written anew, without `says` only repaired."""

    stems: tuple[str, ...]
    kinds: str
    good: str
    bad: tuple[str, ...] = ()
    says: str = ""


TEMPLATES = (
    Template(("first", "head_of"), "L", "return {a}[0]", ("return {a}[1]", "return {a}"), "the first element of {a}"),
    Template(("last", "tail_of"), "L", "return {a}[-1]", ("return {a}[0]", "return {a}"), "the last element of {a}"),
    Template(("rect_area", "area"), "NN", "return {a} * {b}", ("return 2 * ({a} + {b})", "return {a} + {b}"), "{a} times {b}"),
    Template(("perimeter",), "NN", "return 2 * ({a} + {b})", ("return {a} * {b}", "return {a} + {b}"), "twice the sum of {a} and {b}"),
    Template(("square_all",), "L", "return [v * v for v in {a}]", ("return [v * 2 for v in {a}]",), "the squares of {a}"),
    Template(("double_all",), "L", "return [v * 2 for v in {a}]", ("return [v * v for v in {a}]", "return [v + 2 for v in {a}]"), "{a} with every element doubled"),
    Template(("spread", "value_range"), "L", "return max({a}) - min({a})", ("return max({a}) + min({a})",), "the difference of the largest and the smallest of {a}"),
    Template(("sum_all", "total_of"), "L", "return sum({a})", ("return len({a})", "return max({a})"), "the sum of {a}"),
    Template(("largest", "maximum"), "L", "return max({a})", ("return min({a})",), "the largest element of {a}"),
    Template(("smallest", "minimum"), "L", "return min({a})", ("return max({a})",), "the smallest element of {a}"),
    Template(("count_items", "size_of"), "L", "return len({a})", ("return len({a}) - 1", "return len({a}) + 1"), "the length of {a}"),
    Template(("average", "mean_of"), "L", "return sum({a}) / len({a})", ("return sum({a})", "return sum({a}) * len({a})"), "the average of {a}"),
    Template(("add", "plus"), "NN", "return {a} + {b}", ("return {a} - {b}", "return {a} * {b}"), "the sum of {a} and {b}"),
    Template(("subtract", "difference"), "NN", "return {a} - {b}", ("return {a} + {b}", "return {b} - {a}"), "{a} minus {b}"),
    Template(("multiply", "product"), "NN", "return {a} * {b}", ("return {a} + {b}",), "the product of {a} and {b}"),
    Template(("quotient", "divide"), "NN", "return {a} // {b}", ("return {a} % {b}", "return {a} * {b}"), "{a} divided by {b}, rounded down"),
    Template(("remainder",), "NN", "return {a} % {b}", ("return {a} // {b}",), "the remainder of {a} divided by {b}"),
    Template(("power",), "NN", "return {a} ** {b}", ("return {a} * {b}",), "{a} to the power of {b}"),
    Template(("double", "twice"), "N", "return {a} * 2", ("return {a} + 2", "return {a} ** 2"), "twice {a}"),
    Template(("triple",), "N", "return {a} * 3", ("return {a} + 3",), "three times {a}"),
    Template(("square",), "N", "return {a} * {a}", ("return {a} + {a}", "return {a} * 2"), "the square of {a}"),
    Template(("negate",), "N", "return -{a}", ("return {a}",), "{a} negated"),
    Template(("increment",), "N", "return {a} + 1", ("return {a} - 1",), "{a} plus 1"),
    Template(("is_even",), "N", "return {a} % 2 == 0", ("return {a} % 2 == 1",), "True if {a} is even"),
    Template(("is_odd",), "N", "return {a} % 2 == 1", ("return {a} % 2 == 0",), "True if {a} is odd"),
    Template(("is_positive",), "N", "return {a} > 0", ("return {a} < 0",), "True if {a} is positive"),
    Template(("same", "equal"), "NN", "return {a} == {b}", ("return {a} != {b}",), "True if {a} equals {b}"),
    Template(("larger", "bigger"), "NN", "return max({a}, {b})", ("return min({a}, {b})",), "the larger of {a} and {b}"),
    Template(("hello", "greeting"), "S", 'return "Hello, " + {a}', ('return "Hello " + {a}', 'return {a}'), '"Hello, " followed by {a}'),
    Template(("shout", "upper_case"), "S", "return {a}.upper()", ("return {a}.lower()",), "{a} in upper case"),
    Template(("text_length",), "S", "return len({a})", ("return len({a}) - 1",), "the length of {a}"),
    Template(("reverse_text",), "S", "return {a}[::-1]", ("return {a}",), "{a} reversed"),
    Template(("repeat_text",), "SN", "return {a} * {b}", ("return {a} + {a}",), "{a} repeated {b} times"),
    Template(("reverse_list",), "L", "return {a}[::-1]", ("return {a}", "return {a}[1:]"), "{a} reversed"),
    Template(("sorted_list",), "L", "return sorted({a})", ("return {a}",), "{a} sorted"),
    Template(("descending",), "L", "return sorted({a}, reverse=True)", ("return sorted({a})",), "{a} sorted from large to small"),
    Template(("unique",), "L", "return sorted(set({a}))", ("return sorted({a})",), "the sorted distinct elements of {a}"),
    Template(("evens", "even_numbers"), "L", "return [v for v in {a} if v % 2 == 0]", ("return [v for v in {a} if v % 2 == 1]",), "the even elements of {a}"),
    Template(("count_even",), "L", "return len([v for v in {a} if v % 2 == 0])", ("return len([v for v in {a} if v % 2 == 1])",), "the number of even elements of {a}"),
    Template(("multiply_all",), "L", "res = 1\nfor v in {a}:\n    res *= v\nreturn res", ("res = 0\nfor v in {a}:\n    res *= v\nreturn res", "res = 1\nfor v in {a}:\n    res += v\nreturn res"), "the product of {a}"),
    Template(("add_all",), "L", "res = 0\nfor v in {a}:\n    res += v\nreturn res", ("res = 1\nfor v in {a}:\n    res += v\nreturn res", "res = 0\nfor v in {a}:\n    res -= v\nreturn res"), "the sum of {a}"),
    Template(("contains",), "LN", "return {b} in {a}", ("return {b} not in {a}",), "True if {b} is in {a}"),
)
