"""Axes that remember what is drawn on them."""

from typing import Any, ClassVar


class Axes:
    """The names, arguments and options of every call, in order; what is drawn is a line that may have a tip."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> list["Line"]:
            self.calls.append((name, arguments, options))
            return [Line()]

        return call

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments and options of the calls of one name."""
        return [(arguments, options) for called, arguments, options in self.calls if called == name]


class Line:
    """Takes the text that a browser shows over it."""

    tips: ClassVar[list[str]] = []

    def set_gid(self, text: str) -> None:
        self.tips.append(text)
