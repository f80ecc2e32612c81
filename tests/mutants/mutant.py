"""What a mutant is: a fault made by hand in our own code, and the tests that have to notice it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: ``old``, which occurs once in ``file``, becomes ``new``.

    ``breaks`` says what that breaks, ``tests`` (below tests/) are the narrowest ones that notice,
    and ``enacts`` names a fault or a loss of another system that is done again.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]
    enacts: str = ""

    @property
    def nodes(self) -> list[str]:
        """The tests as pytest takes them."""
        return [f"tests/{test}" for test in self.tests]

    def apply(self, tree: Path) -> str:
        """Break the copy of the sources below ``tree``; the file's text as it was.

        Raises
        ------
        ValueError
            if ``old`` does not occur exactly once.
        """
        path = tree / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: 'old' occurs {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return text


def table(mutants: tuple[Mutant, ...]) -> str:
    """The rows of docs/mutants.md."""
    lines = ["| mutant | what it breaks | killed by |", "|---|---|---|"]
    for one in mutants:
        tests = ", ".join(f"`{test}`" for test in one.tests)
        told = f" (as {one.enacts})" if one.enacts else ""
        lines.append(f"| {one.name} | {one.breaks}{told} | {tests} |")
    return "\n".join(lines) + "\n"
