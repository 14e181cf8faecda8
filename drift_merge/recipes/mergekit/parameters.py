"""mergekit's parameters, with filters and gradients, as weights and options of ours.

Written from mergekit 0.1.5's behavior: a parameter is looked up in the model's settings, then in
those of the slice, then in the global ones; a filter is a part of the tensor's name, and the first
that fits wins; a gradient runs over the layers, and tensors outside of them are at its start.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_merge.errors import RecipeError, nearest
from drift_merge.recipes.yaml import Entries

Scopes = Sequence[Entries]  # settings by parameter, the first one wins
# Tensors after the layers: ours has them at the end of a gradient, mergekit at its start.
_AFTER = ("norm", "lm_head")


@dataclass(frozen=True, slots=True)
class ParameterCase:
    """A value, or the points of a gradient, for the tensors that a filter takes."""

    filter: str | None  # None: every tensor
    values: tuple[Any, ...]  # text or bool, as the YAML has it; several: a gradient
    line: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """Reads parameters out of the scopes of one file."""

    file: Path

    def refuse(self, line: int | None, key: str, why: str, remedy: str) -> RecipeError:
        """The error for a key that cannot be translated."""
        where = f"{self.file}, line {line}" if line else str(self.file)
        return RecipeError(f"{where}: mergekit's {key}: {why}.", remedy=remedy)

    def check_names(self, scopes: Scopes, known: Sequence[str], method: str) -> None:
        """Refuse a parameter that the method does not have; mergekit would ignore it.

        Raises:
            RecipeError: naming the nearest that it has.
        """
        for scope in scopes:
            for name in scope:
                if name not in known:
                    raise self.refuse(
                        scope.lines[name],
                        name,
                        f"{method} has no such parameter.{nearest(name, known)}".rstrip("."),
                        f"Its parameters: {', '.join(known) or 'none'}.",
                    )

    def cases(self, name: str, scopes: Scopes) -> list[ParameterCase]:
        """All that is said of a parameter, in the order in which it is tried."""
        found: list[ParameterCase] = []
        for scope in scopes:
            if scope.get(name) is None:
                continue
            found += self._cases(name, scope[name], scope.lines[name])
            if any(case.filter is None for case in found):
                break
        first = next((i for i, case in enumerate(found) if case.filter is None), len(found))
        return found[: first + 1]

    def _cases(self, name: str, setting: Any, line: int) -> list[ParameterCase]:
        listed = setting if isinstance(setting, list) else [setting]
        if not any(isinstance(item, Mapping) for item in listed):
            return [ParameterCase(None, tuple(listed), line)]
        cases = []
        for item in listed:
            if not isinstance(item, Entries) or "value" not in item:
                raise self.refuse(line, name, f"{item!r} is no filter", "Write {filter:, value:}.")
            text, value = item.get("filter"), item["value"]
            points = tuple(value) if isinstance(value, list) else (value,)
            where = item.lines["value"]
            cases.append(ParameterCase(None if text in (None, "*") else str(text), points, where))
        return cases

    def weight(
        self,
        name: str,
        scopes: Scopes,
        *,
        of: str,
        change: Callable[[float], float] = lambda value: value,
    ) -> float | str:
        """A parameter as a weight of ours.

        Args:
            name: of the parameter; it must be given for every tensor that is selected.
            scopes: of one model.
            of: what it belongs to, for the message.
            change: applied to each number, such as 1 - t.

        Raises:
            RecipeError: it is missing, no number, or its filter cannot be written in ours.
        """
        cases = self.cases(name, scopes)
        if not cases:
            raise self.refuse(
                None, name, f"it is missing for {of}", f"Add parameters: {name}: NUMBER to {of}."
            )
        terms: dict[str, str] = {}
        for case in cases:
            points = [change(self._float(name, value, case.line)) for value in case.values]
            for key, value in self._terms(name, case, points):
                terms.setdefault(key, value)
        if list(terms) == [""] and len(cases[0].values) == 1:
            return change(self._float(name, cases[0].values[0], cases[0].line))
        return ",".join(f"{key}={value}" if key else value for key, value in terms.items())

    def _terms(self, name: str, case: ParameterCase, points: list[float]) -> list[tuple[str, str]]:
        """A case as terms of a weight of ours: (key, value); the key is "" for all others."""
        pattern = self._pattern(name, case)
        shown = [repr(point) for point in points]
        if len(points) == 1:
            return [(f"re:{pattern}" if pattern else "", shown[0])]
        terms = [
            (f"re:^{after}\\.", shown[0])
            for after in _AFTER
            if points[0] != points[-1] and re.search(pattern, f"{after}.weight")
        ]
        return [*terms, (f"re:{pattern}" if pattern else "", f"[{','.join(shown)}]")]

    def _pattern(self, name: str, case: ParameterCase) -> str:
        """The regular expression on canonical names that is a filter on mergekit's names."""
        text = case.filter or ""
        if re.search(r"[,=()\[\]]", text):
            raise self.refuse(
                case.line, name, f"the filter {text!r} has one of , = ( ) [ ]", "Write --weight."
            )
        # mergekit's names begin with "model.", canonical names do not.
        start = "^" if text.startswith("model.") else ""
        return start + re.escape(text.removeprefix("model."))

    def one(self, name: str, scopes: Scopes, default: float | bool) -> float | bool:
        """A parameter that must be one number, or one flag, for all tensors.

        Raises:
            RecipeError: it has filters or a gradient, or is of another kind than the default.
        """
        cases = self.cases(name, scopes)
        if not cases:
            return default
        if cases[0].filter is not None or len(cases[0].values) != 1:
            raise self.refuse(
                cases[0].line,
                name,
                "filters and gradients are for weights and slerp's t alone",
                "Give one value for all tensors, or make several merges with --modules.",
            )
        value = cases[0].values[0]
        if isinstance(default, bool):
            if not isinstance(value, bool) and value not in ("0", "1"):
                raise self.refuse(cases[0].line, name, f"{value!r} is no flag", "Write true.")
            return value if isinstance(value, bool) else value == "1"
        return self._float(name, value, cases[0].line)

    def shared(self, name: str, models: Mapping[str, Scopes], default: float) -> float:
        """A parameter that mergekit has per model and we have once.

        Raises:
            RecipeError: models differ in it.
        """
        found = {model: self.one(name, scopes, default) for model, scopes in models.items()}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{value:g} for {model}" for model, value in found.items())
            lines = [case.line for scopes in models.values() for case in self.cases(name, scopes)]
            raise self.refuse(
                max(lines, default=0),
                name,
                f"it differs between the models ({listed})",
                f"Give all models one {name}: here it is one number for the whole merge.",
            )
        return float(next(iter(found.values())))

    def _float(self, name: str, value: Any, line: int) -> float:
        try:
            return float(str(value))
        except ValueError as error:
            raise self.refuse(line, name, f"{value!r} is no number", "Write a number.") from error
