"""The expressions of ``harness runs list --where``: comparisons of what is known of a run.

``valid/loss < 0.1 and (params.lr = 0.001 or not status = "failed")``. A name is a metric
(``valid/loss`` is its last value, ``valid/loss.min`` its lowest), ``params.lr``, ``tags.note``,
or a fact such as ``status``; in quotation marks if it has spaces or signs in it.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final

Facts = Mapping[str, Any]
"""What is known of a run, by name."""

Test = Callable[[Facts], bool]

_TOKEN: Final = re.compile(
    r"""\s*(?:(?P<text>"[^"]*"|'[^']*')|(?P<op><=|>=|==|!=|=|<|>)|(?P<paren>[()])|"""
    r"""(?P<word>[^\s()<>=!"']+))"""
)
_EXAMPLE: Final = (
    'Write for example: valid/loss < 0.1 and params.lr = 0.001 or name = "big".'
)
_OPERATORS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_ORDERS: Final = ("<", "<=", ">", ">=")
_TIMES: Final = ("created", "id")
"""Texts that begin with a time: their order is that of texts also beside ``2026``."""


def list_facts(summary: dict[str, Any]) -> dict[str, Any]:
    """Names and values that ``--where`` and ``--sort`` know, from ``summarize_run``."""
    facts: dict[str, Any] = {}
    for what in ("params", "tags"):
        facts |= {f"{what}.{name}": value for name, value in summary[what].items()}
    for name, values in summary["metrics"].items():
        facts[name] = values["last"]
        facts |= {f"{name}.{which}": values[which] for which in ("min", "max")}
    # Last, so that a metric named "status" does not take its place.
    return facts | {
        key: value for key, value in summary.items() if not isinstance(value, dict)
    }


def find_main_metric(names: Iterable[str]) -> str | None:
    """Metric that tells most of a run: a validation loss, else a loss, else the first."""
    names = list(names)
    losses = [name for name in names if name.rpartition("/")[2] == "loss"]
    for name in ("valid/loss", *(n for n in losses if n != "train/loss"), *losses):
        if name in names:
            return name
    return names[0] if names else None


class Query:
    """A parsed expression.

    Attributes
    ----------
    matches
        Returns whether a run has what the expression asks for.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split(text)
        self._comparisons: list[tuple[str, str, str]] = []
        try:
            self.matches: Test = self._parse_or()
        except RecursionError:
            raise self._error("fewer 'not' and '('", "very many") from None
        if self._tokens:
            raise self._error("'and' or 'or'", self._tokens[0][1])

    def check(self, facts: Collection[Facts], known: list[str]) -> None:
        """Refuse a name that no run has, and an order of numbers and a text."""
        for name, sign, text in self._comparisons:
            check_name("where", name, known)
            found = [one[name] for one in facts if one.get(name) is not None]
            is_order = sign in _ORDERS and as_number(text) is None
            if is_order and found and all(as_number(one) is not None for one in found):
                raise self._error(f"a number after {name} {sign}", text)

    def _split(self, text: str) -> list[tuple[str, str]]:
        found, place = [], 0
        while text[place:].strip():
            match = _TOKEN.match(text, place)
            if match is None:
                raise self._error(
                    "a name, a value or an operator", text[place:].strip()
                )
            assert match.lastgroup is not None
            found.append((match.lastgroup, match[match.lastgroup]))
            place = match.end()
        return found

    def _error(self, expected: str, got: str) -> ValueError:
        msg = f"where: expected {expected}, got {got!r} in {self._text!r:.200}."
        return ValueError(f"{msg} {_EXAMPLE}")

    def _take(self, *wanted: str) -> str | None:
        """Take the next token if it is one of these words; None otherwise."""
        if self._tokens and self._tokens[0][0] != "text":
            word = self._tokens[0][1]
            if word.lower() in wanted:
                self._tokens.pop(0)
                return word.lower()
        return None

    def _parse_or(self) -> Test:
        tests = [self._parse_and()]
        while self._take("or"):
            tests.append(self._parse_and())
        return lambda facts: any(test(facts) for test in tests)

    def _parse_and(self) -> Test:
        tests = [self._parse_not()]
        while self._take("and"):
            tests.append(self._parse_not())
        return lambda facts: all(test(facts) for test in tests)

    def _parse_not(self) -> Test:
        if self._take("not"):
            inner = self._parse_not()
            return lambda facts: not inner(facts)
        if self._take("("):
            inner = self._parse_or()
            if not self._take(")"):
                raise self._error("')'", self._tokens[0][1] if self._tokens else "")
            return inner
        return self._parse_comparison()

    def _parse_comparison(self) -> Test:
        name = self._take_word("a name")
        kind, sign = self._tokens.pop(0) if self._tokens else ("", "")
        if kind != "op":
            raise self._error(f"an operator after {name!r}", sign)
        value = self._take_word(f"a value after {name} {sign}")
        name = name.removeprefix("metrics.")
        self._comparisons.append((name, sign, value))
        if name in _TIMES:
            return lambda facts: _OPERATORS[sign](str(facts.get(name)), value)
        return lambda facts: compare(facts.get(name), sign, value)

    def _take_word(self, expected: str) -> str:
        """Take a name or a value, without its quotation marks."""
        kind, text = self._tokens.pop(0) if self._tokens else ("", "")
        if kind not in {"word", "text"}:
            raise self._error(expected, text)
        return text[1:-1] if kind == "text" else text


def check_name(place: str, name: str, known: list[str]) -> None:
    """Refuse a name that no run has."""
    if name in known:
        return
    near = [one for one in known if name and one.endswith((f".{name}", f"/{name}"))]
    near = near or difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    names = f" There are: {', '.join(known)}." if len(known) <= 20 else ""
    raise ValueError(
        f"{place}: expected a name that a run has, got {name!r}.{hint}{names}"
    )


def compare(found: Any, sign: str, text: str) -> bool:
    """Compare what a run has with a text: as numbers if both are, otherwise as texts.

    What a run does not have is unlike every value: only ``!=`` holds. A text is neither
    less nor more than a number.
    """
    if found is None:
        return sign == "!="
    left, right = as_number(found), as_number(text)
    if left is None or right is None:
        if sign in _ORDERS and (left is None) != (right is None):
            return False
        return _OPERATORS[sign](str(found), text)
    return _OPERATORS[sign](left, right)


def as_number(value: Any) -> float | None:
    """Return a number, or a text that is one, as a float; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # the last one of a long integer
        return None


def has_order(value: Any) -> bool:
    """Whether a value can be less or more than others: not if it is missing or NaN."""
    number = as_number(value)
    return value is not None and (number is None or not math.isnan(number))


def sort_key(value: Any) -> tuple[bool, float, str]:
    """Return a key that orders numbers before texts."""
    number = as_number(value)
    return (False, number, "") if number is not None else (True, 0.0, str(value))
