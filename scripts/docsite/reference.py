"""Signatures and docstrings as Markdown: the API reference and the heads of callbacks."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

SECTION = re.compile(r"^([A-Z][a-z]+(?: [A-Z][a-z]+)?)\n-{3,}\n", re.MULTILINE)
WIDTH = 79
#: Sections whose lines are names with an indented text each.
NAMED = ("Parameters", "Attributes", "Raises")
TITLES = {"References": "Source"}
#: Classes whose members have a page of their own, and base classes of callbacks.
WITHOUT_MEMBERS = ("Context", "FitContext", "EvaluateContext", "PredictContext")


# ------------------------------------------------------------------ one docstring


def code(text: str) -> str:
    """The text with Markdown quotes instead of reStructuredText quotes."""
    return text.replace("``", "`")


def prose(text: str) -> str:
    """A paragraph in one line, safe in Markdown: no tag outside of quotes."""
    parts = re.split(r"(`[^`]*`)", code(" ".join(text.split())))
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;") for part in parts
    )


def first_paragraph(thing: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return prose((inspect.getdoc(thing) or "").split("\n\n")[0])


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The sections of a NumPy docstring by title; the text before them has none."""
    found = SECTION.split(text)
    yield "", found[0].strip()
    for title, body in zip(found[1::2], found[2::2], strict=True):
        yield title, body.strip("\n")


def items(body: str) -> Iterator[tuple[str, str]]:
    """Each unindented line of a section with the indented text below it."""
    for item in re.split(r"\n(?=\S)", body.strip("\n")):
        head, _, text = item.partition("\n")
        yield head.strip(), text


def paragraphs(body: str) -> str:
    """Text and examples: each paragraph in one line, each example as code."""
    parts = []
    for part in re.split(r"\n\s*\n", inspect.cleandoc(body)):
        if part.startswith(">>>"):
            parts.append(f"```pycon\n{part}\n```")
        elif part.startswith("- "):
            parts.append("\n".join(f"- {prose(item[2:])}" for item in bullets(part)))
        else:
            parts.append(prose(part))
    return "\n\n".join(parts)


def bullets(text: str) -> list[str]:
    """The items of a list, each with its continued lines."""
    return re.split(r"\n(?=- )", text)


def named_item(head: str, text: str) -> str:
    """``name : form`` and its text as an item of a list."""
    name, _, form = head.partition(" : ")
    names = ", ".join(f"`{one.strip()}`" for one in name.split(","))
    shown = f"{names} ({prose(form)})" if form else names
    return f"- {shown}: {prose(text)}" if text.strip() else f"- {shown}"


def returned(body: str) -> str:
    """What a function returns, in one line; a list where the text is one."""
    head, text = next(items(body))
    if text.startswith(" "):
        return f"{prose(head)}: {prose(text)}"
    return paragraphs(body)


def section(title: str, body: str) -> str:
    """One section as Markdown."""
    if not title:
        return paragraphs(body)
    if title in NAMED:
        lines = "\n".join(named_item(head, text) for head, text in items(body))
        return f"**{title}**\n\n{lines}"
    text = returned(body) if title == "Returns" else paragraphs(body)
    if text.startswith("```"):
        return text
    return f"**{TITLES.get(title, title)}**: {text}"


def docstring(thing: Any) -> str:
    """A whole docstring as Markdown."""
    text = inspect.getdoc(thing) or ""
    return "\n\n".join(section(title, body) for title, body in sections(text) if body)


# ------------------------------------------------------------------ one signature


def parameter(one: inspect.Parameter) -> str:
    """A parameter as it is written: name, annotation, default."""
    stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
    has_default = one.default is not one.empty
    text = f"{stars}{one.name}"
    if one.annotation is not one.empty:
        text += f": {annotation(one.annotation)}"
    if not has_default:
        return text
    equal = " = " if one.annotation is not one.empty else "="
    return f"{text}{equal}{default(one.default)}"


def annotation(found: Any) -> str:
    """An annotation as written; the packages postpone its evaluation."""
    return found if isinstance(found, str) else getattr(found, "__name__", str(found))


def default(value: Any) -> str:
    """A default as it would be written."""
    if isinstance(value, str | int | float | bool | tuple | type(None)):
        return repr(value)
    return "..."


def signature(thing: Any, name: str) -> str:
    """A call of the function or class, one parameter a line if it is long."""
    if is_plain_exception(thing):
        return f"{name}(message)"
    found = inspect.signature(thing)
    shown = [
        one for one in found.parameters.values() if one.name not in ("self", "cls")
    ]
    parts, bare_star = [], False
    for one in shown:
        bare_star |= one.kind is one.VAR_POSITIONAL
        if one.kind is one.KEYWORD_ONLY and not bare_star:
            parts.append("*")
            bare_star = True
        parts.append(parameter(one))
    back = found.return_annotation
    is_class = inspect.isclass(thing) or back in (found.empty, "None")
    end = ")" if is_class else f") -> {annotation(back)}"
    line = f"{name}({', '.join(parts)}{end}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), end])


def is_plain_exception(thing: Any) -> bool:
    """Whether a class is an exception that is made as Python's own are.

    Versions of Python tell different signatures of those.
    """
    if not (inspect.isclass(thing) and issubclass(thing, BaseException)):
        return False
    return not any("__init__" in vars(one) for one in thing.__mro__ if is_ours(one))


def is_ours(owner: type) -> bool:
    """Whether a class is defined in one of the packages."""
    return owner.__module__.partition(".")[0] in ("harness", "tracking")


def signature_block(thing: Any, name: str) -> str:
    """The signature as code; `py` and not `python`, because it does not run."""
    return f"```py\n{signature(thing, name)}\n```"


# ---------------------------------------------------------------------- one page


def public(module: str) -> list[tuple[str, Any]]:
    """Public functions and classes of a package, in the order of the alphabet."""
    package = importlib.import_module(module)
    names = sorted(package.__all__, key=str.lower)
    return [(name, getattr(package, name)) for name in names if is_shown(package, name)]


def is_shown(package: Any, name: str) -> bool:
    """Whether a name is a function or class, and no package."""
    return callable(getattr(package, name))


def page(module: str, *, with_members: bool = True) -> str:
    """The reference of a package."""
    return "\n".join(
        entry(thing, f"{module}.{name}", with_members) for name, thing in public(module)
    )


def entry(thing: Any, name: str, with_members: bool) -> str:
    """Heading, signature, docstring and members of one public name."""
    parts = [f"## `{name}`"]
    if is_made_by_us(thing):
        parts.append("Its fields and methods: [The context](../context.md).")
    else:
        parts.append(signature_block(thing, name))
    parts.append(docstring(thing))
    if inspect.isclass(thing) and with_members and not is_made_by_us(thing):
        parts += [member_entry(name, *found) for found in members(thing)]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_made_by_us(thing: Any) -> bool:
    """Whether users get objects of the class and never make one: the contexts."""
    return getattr(thing, "__name__", "") in WITHOUT_MEMBERS


def members(thing: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that our own classes define, as they stand there."""
    seen: dict[str, Any] = {}
    for owner in reversed(thing.__mro__):
        if is_ours(owner):
            seen |= {
                name: found
                for name, found in vars(owner).items()
                if not name.startswith("_") and is_member(found)
            }
    yield from seen.items()


def is_member(found: Any) -> bool:
    """Whether an attribute of a class is a documented method or property."""
    is_kind = isinstance(found, property | classmethod | staticmethod)
    return (is_kind or inspect.isfunction(found)) and bool(inspect.getdoc(found))


def member_entry(owner: str, name: str, found: Any) -> str:
    """Heading, signature and docstring of a method or property."""
    short = owner.rpartition(".")[2]
    parts = [f"### `{short}.{name}`"]
    if not isinstance(found, property):
        function: Callable[..., Any] = getattr(found, "__func__", found)
        parts.append(signature_block(function, f"{short}.{name}"))
    return "\n\n".join([*parts, docstring(found)])


# -------------------------------------------------------------- heads of callbacks


def callback_head(name: str) -> str:
    """Signature, purpose and whether every fit has it."""
    package = importlib.import_module("harness.callbacks")
    thing = getattr(package, name)
    anchor = f"harnesscallbacks{name.lower()}"
    always = "**In every fit.** " if is_default(thing) else ""
    return (
        f"{signature_block(thing, name)}\n\n"
        f"{first_paragraph(thing)} {always}[Reference](api/callbacks.md#{anchor})\n"
    )


def is_default(thing: type) -> bool:
    """Whether fits have the callback without being given it."""
    defaults = importlib.import_module("harness.learner.start")
    given = defaults.default_callbacks(importlib.import_module("harness").MetricSet())
    return any(type(one) is thing for one in given)
