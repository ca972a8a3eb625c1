"""Which checks a method has to pass where, and how its declared gaps are held: strictly, in both directions."""

from __future__ import annotations

import inspect
import itertools
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from luthier.contract import resume
from luthier.contract.checks import ALWAYS, PROMISED, Subject
from luthier.contract.tiny import CONFIGS
from luthier.errors import UserError
from luthier.methods import registry
from luthier.methods.kinds import Method
from luthier.methods.stack import parse

ARCHITECTURES = tuple(CONFIGS)
RESUMED_ON = ("bert", "gpt2")  # every method is killed and resumed on the first of these that it works on


@dataclass(frozen=True)
class Outcome:
    """result: holds | fails | gap (declared, and it does fail) | closed (declared, and it holds)."""

    result: str
    reason: str = ""

    @property
    def good(self) -> bool:
        return self.result in ("holds", "gap")


@dataclass(frozen=True)
class Case:
    """One check of one stack of a method on one architecture."""

    method: str
    stack: str
    architecture: str
    check: str

    def __str__(self) -> str:
        return f"{self.stack}-{self.architecture}-{self.check}"

    @property
    def gap(self) -> str | None:
        """The declared reason why this is known not to hold; `check:architecture`, either of which may be `*`, or `stack` in place of the check."""
        gaps = registry.find(self.method).card.gaps
        keys = (f"{check}:{place}" for check in (self.check, self.stack, "*") for place in (self.architecture, "*"))
        return next((gaps[key] for key in keys if key in gaps), None)

    def outcome(self) -> Outcome:
        try:
            self._check()
        except (AssertionError, UserError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            return Outcome("gap", self.gap) if self.gap is not None else Outcome("fails", reason)
        except Exception as error:  # a slip in the method's code is told like the rest, and the other cases go on
            return Outcome("fails", f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]} ({_place(error, registry.find(self.method))})")
        return Outcome("closed", f"the gap {self.gap!r} holds no more: take it off the card") if self.gap is not None and self.check != "spells_itself" else Outcome("holds")

    def run(self) -> None:
        """Raises AssertionError with what does not hold."""
        found = self.outcome()
        assert found.good, f"{self}: {found.reason}"

    def _check(self) -> None:
        if self.check == "resumes_exactly":
            resume.check(self.stack, self.architecture)
        else:
            {f.__name__: f for f in ALWAYS}.get(self.check, PROMISED.get(self.check, _unknown))(Subject(self.stack, self.architecture))


def _unknown(subject: Subject) -> None:
    raise AssertionError("the card promises what the suite does not know")


def _place(error: Exception, method: type[Method]) -> str:
    """File and line of the method's own code where it went wrong, else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if frame.filename == inspect.getsourcefile(method)), frames[-1])
    return f"{Path(frame.filename).name}, line {frame.lineno}"


def cases(method: str | None = None, architectures: Iterable[str] = ARCHITECTURES, resumed: bool = True) -> list[Case]:
    """Every check of one method (or of all) on the architectures. Raises UserError for a card without examples, which nothing could be tried on."""
    chosen = [method] if method else list(registry.methods())
    made = []
    for name in chosen:
        card = registry.find(name).card
        if not card.examples:
            raise UserError(f"{name}: its card has no examples, so there is nothing to try. Give it the stacks that should be tested.")
        checks = [f.__name__ for f in ALWAYS] + [promise for promise in sorted(card.promises) if promise != "resumes_exactly"]
        for stack in card.examples:
            parse(stack)
            made += [Case(name, stack, architecture, check) for architecture in architectures for check in checks]
            places = [a for a in RESUMED_ON if Case(name, stack, a, "resumes_exactly").gap is None]
            if resumed and "resumes_exactly" in card.promises and places:
                made.append(Case(name, stack, places[0], "resumes_exactly"))
    return made


def run(method: str | None = None) -> int:
    """Run everything and print a table as it grows: stack, architecture, what holds. Returns 0 where all is well, else 1."""
    counts = []
    for (stack, architecture, killed), group in itertools.groupby(cases(method), key=lambda case: (case.stack, case.architecture, case.check == "resumes_exactly")):
        holds = gaps = fails = 0
        for case in group:
            found = case.outcome()
            holds, gaps, fails = holds + (found.result == "holds"), gaps + (found.result == "gap"), fails + (not found.good)
            if not found.good:
                print(f"FAILS  {case}: {found.reason}", flush=True)
        counts.append((holds, gaps, fails))
        notes = (f", {gaps} declared gaps" if gaps else "") + (f", {fails} FAIL" if fails else "") + (" (killed and resumed)" if killed else "")
        print(f"{stack:<60} {architecture:<11} {holds} hold{notes}", flush=True)
    total = [sum(column) for column in zip(*counts, strict=True)]
    print(f"{total[0]} hold, {total[1]} declared gaps, {total[2]} fail")
    return 1 if total[2] else 0
