"""The reference of the package as Markdown, from its docstrings: docs/api.md.

python -m tools.api
"""

from __future__ import annotations

import enum
import inspect
import types
from pathlib import Path
from typing import Any

import pcdeq_zoo
from pcdeq_zoo.files import replace_file

FILE = Path(__file__).parents[1] / "docs" / "api.md"

_HEAD = """# Reference

What `import pcdeq_zoo` gives, from the docstrings, by `python -m tools.api`. The models themselves are created by
`timm.create_model(name, ...)`, which takes the arguments of `PcDEQ`; for their names see
[README.md](../README.md#models).
"""


def entry(name: str, value: Any) -> str:
    """A section on a function or class, with public methods and properties that are its own or of a private base."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return f"## `{name}`\n\n{_described(value)}\n"
    parts = [f"## `{name}`\n\n{_block(name, value)}\n"]
    if inspect.isclass(value) and not issubclass(value, Exception | tuple):
        for key, member in _members(value).items():
            if key.startswith("_") or not getattr(member, "__doc__", None):
                continue
            if isinstance(member, property):
                parts.append(f"`{name}.{key}`\n\n```text\n{inspect.getdoc(member)}\n```\n")
            elif isinstance(member, types.FunctionType):
                parts.append(f"{_block(f'{name}.{key}', member)}\n")
    return "\n".join(parts)


def _members(value: type) -> dict[str, Any]:
    """What a class has of its own, and of its private bases in this package."""
    own = [base for base in value.__mro__ if base is value or _is_private(base)]
    return {key: member for base in reversed(own) for key, member in vars(base).items()}


def _is_private(base: type) -> bool:
    return base.__module__.startswith("pcdeq_zoo") and base.__name__.startswith("_")


def _block(name: str, value: Any) -> str:
    return f"```text\n{name}{_signature(value)}\n\n{inspect.getdoc(value)}\n```"


def _signature(value: Any) -> str:
    """With annotations as they are written; the members of an enumeration; nothing for an exception."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return ""
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        return ": " + ", ".join(f"{member.name} = {member.value}" for member in value)
    signature = inspect.signature(value)
    written = [p.replace(annotation=_written(p.annotation)) for p in signature.parameters.values()]
    return str(signature.replace(parameters=written, return_annotation=_written(signature.return_annotation)))


class _Unquoted(str):
    """A text that shows itself without quotes."""

    __repr__ = str.__str__


def _written(annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return annotation
    text = getattr(annotation, "__forward_arg__", annotation)
    return _Unquoted(text if isinstance(text, str) else inspect.formatannotation(text))


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"A dict of {len(value)} `{type(next(iter(value.values()))).__name__}`, from `{next(iter(value))!r}` on."
    return f"`{value!r}`"


def reference() -> str:
    """All of it."""
    names = sorted(pcdeq_zoo.__all__, key=lambda name: (name.lower(), name))
    return "\n".join([_HEAD, *(entry(name, getattr(pcdeq_zoo, name)) for name in names)])


if __name__ == "__main__":
    replace_file(FILE, reference())
