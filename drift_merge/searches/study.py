"""The study: Optuna's storage is the journal of a search, its resume, and what joins processes.

A trial that counts has ended with values, was pruned, or has failed with an error that is recorded.
One that was interrupted, or whose process was killed, counts for nothing: its values are queued
and tried again by whoever is next. That a process on this machine is gone is seen by its lock, at
once; that one elsewhere is gone, by its heartbeat.
"""

import hashlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drift_merge.errors import RecipeError, one_of
from drift_merge.searches.parameters import Parameter
from drift_merge.searches.spaces import Space
from drift_merge.searches.storages import opened, quiet
from drift_merge.searches.workers import Workers

SAMPLERS = ("tpe", "nsga2", "random", "grid")
REDUCTION = 3  # of successive halving: about one trial in three goes on to the next rung
ERROR, RECIPE, WORKER, SECONDS, ITEMS = "error", "recipe", "worker", "seconds", "items"
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """How the study searches."""

    name: str
    storage: str | None  # URL; None: in memory
    goals: tuple[str, ...]  # "maximize" or "minimize", one per metric
    sampler: str | None  # of SAMPLERS; None: chosen by the space and the number of metrics
    seed: int
    trials: int
    rungs: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.sampler is not None:
            one_of("--sampler", self.sampler, SAMPLERS)
        if self.trials < 1:
            raise RecipeError("--trials is below 1.", remedy="Give the number of trials.")
        if self.rungs and len(self.goals) > 1:
            raise RecipeError(
                "--rungs prunes by one metric, and there are several.",
                remedy="Leave --rungs out, or give one --metric.",
            )

    def sampler_of(self, space: Space) -> str:
        """The sampler: as asked for, else by the space."""
        if self.sampler is not None:
            return self.sampler
        if len(self.goals) > 1:
            return "nsga2"
        return "grid" if len(space.parameters) == 1 else "tpe"


def require_optuna() -> Any:
    """Optuna, with its own messages off.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise RecipeError(
            f"a search needs Optuna, which cannot be imported: {error}.",
            remedy="Install it with: pip install 'drift_merge[search]'",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Study:
    """One study, as this process sees it."""

    def __init__(self, settings: StudySettings, space: Space, workers: Workers) -> None:
        self.settings, self.space, self._workers = settings, space, workers
        self._optuna = require_optuna()
        with workers.gate():  # two processes must not both make the tables
            self._study = self._optuna.create_study(
                study_name=settings.name,
                storage=opened(self._optuna, self.settings.storage, self._again),
                directions=list(settings.goals),
                load_if_exists=True,
            )
        self.sampler = settings.sampler_of(space)
        self._grid = self._make_grid() if self.sampler == "grid" else {}
        self._study.pruner = self._pruner()

    @property
    def optuna_study(self) -> Any:
        """Optuna's own."""
        return self._study

    @property
    def notes(self) -> Mapping[str, Any]:
        """What is kept with the study beside its trials."""
        found: Mapping[str, Any] = self._study.user_attrs
        return found

    def keep(self, name: str, value: Any) -> None:
        """Keep plain data with the study."""
        self._study.set_user_attr(name, value)

    @property
    def size(self) -> int:
        """The number of trials that there will be: as asked for, or fewer points of a grid."""
        if not self._grid:
            return self.settings.trials
        total = 1
        for points in self._grid.values():
            total *= len(points)
        return min(total, self.settings.trials)

    def trials(self) -> list[Any]:
        """The trials that count, in their order; with those that are under way."""
        waiting = self._optuna.trial.TrialState.WAITING
        found = self._study.get_trials(deepcopy=False)
        return [t for t in found if t.state != waiting and not self._is_left(t)]

    def _is_left(self, trial: Any) -> bool:
        return trial.state.name == "FAIL" and ERROR not in trial.user_attrs

    def num_left(self) -> int:
        """How many were interrupted and tried again."""
        return sum(self._is_left(t) for t in self._study.get_trials(deepcopy=False))

    def run(self, evaluate: Callable[["Draw"], Sequence[float]]) -> None:
        """Run trials until the study has all of its; wait for those of other processes.

        Args:
            evaluate: makes and evaluates a trial; `Failed` where it could not, `Pruned` where it
                was stopped early.
        """
        while True:
            self._recover()
            counted = self.trials()
            if len(counted) < self.size:
                self._step(evaluate)
            elif any(t.state.name == "RUNNING" for t in counted):
                time.sleep(_POLL_SECONDS)
            else:
                return

    def _step(self, evaluate: Callable[["Draw"], Sequence[float]]) -> None:
        def objective(trial: Any) -> Sequence[float]:
            trial.set_user_attr(WORKER, self._workers.name)
            place = [t.number for t in self.trials()].index(trial.number)
            if place >= self.size:
                raise Failed  # another process was quicker; without an error it counts for nothing
            draw = Draw(trial, self.space, len(self.settings.goals) == 1)
            try:
                return evaluate(draw)
            except (KeyboardInterrupt, SystemExit):
                self._again(self._study, trial)
                raise

        self._study.sampler = self._make_sampler()
        pruned = self._optuna.TrialPruned
        with quiet():
            self._study.optimize(objective, n_trials=1, catch=(Failed, pruned))

    def _recover(self) -> None:
        """Queue again what processes that are gone have left unfinished."""
        with quiet():
            self._optuna.storages.fail_stale_trials(self._study)
            for trial in self._study.get_trials(deepcopy=False):
                gone = self._workers.is_gone(str(trial.user_attrs.get(WORKER, "")))
                if trial.state.name == "RUNNING" and gone:
                    try:
                        self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
                    except ValueError:  # another process has found it too
                        continue
                    self._again(self._study, trial)

    def _again(self, study: Any, trial: Any) -> None:
        """Queue the values of a trial, and its point of a grid, which Optuna asks of every one."""
        found = study.get_trials(deepcopy=False)[trial.number]
        kept = {k: v for k, v in found.system_attrs.items() if k in ("grid_id", "search_space")}
        kept |= {"fixed_params": dict(found.params)} if found.params else {}
        if kept:
            trials, how = self._optuna.trial, {"user_attrs": {"again": trial.number}}
            waiting = trials.TrialState.WAITING
            study.add_trial(trials.create_trial(state=waiting, system_attrs=kept, **how))

    def _pruner(self) -> Any:
        if not self.settings.rungs:
            return self._optuna.pruners.NopPruner()
        return self._optuna.pruners.SuccessiveHalvingPruner(
            min_resource=1, reduction_factor=REDUCTION
        )

    def _make_sampler(self) -> Any:
        samplers, seed = self._optuna.samplers, self._seed()
        with quiet():
            if self.sampler == "grid":
                # One seed for all: it numbers the points, and visited ones are known by number.
                return samplers.GridSampler(self._grid, seed=self.settings.seed)
            if self.sampler == "random":
                return samplers.RandomSampler(seed=seed)
            if self.sampler == "nsga2":
                population = max(4, min(50, self.settings.trials // 5))
                return samplers.NSGAIISampler(population_size=population, seed=seed)
            startup = max(3, min(10, self.settings.trials // 4))
            return samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)

    def _seed(self) -> int:
        """Another one for each trial, and for each of several processes: they must not agree."""
        number = len(self._study.get_trials(deepcopy=False))
        is_local = self.settings.storage is None or self.settings.storage.startswith("sqlite")
        # Its number is among those of one folder: of a server's there may be several on a host.
        place = "" if is_local else f"{socket.gethostname()} {self._workers.folder}"
        text = f"{self.settings.seed} {number} {self._workers.index} {place}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)

    def _make_grid(self) -> dict[str, list[Any]]:
        """The points, the same for every process and every rerun."""
        kept: dict[str, list[Any]] | None = self.notes.get("grid")
        if kept is not None:
            return kept
        parameters = self.space.parameters
        is_uneven = len(self.space.methods) > 1 or any(d.method for d in self.space.dimensions)
        if is_uneven and len(parameters) > 1:
            raise RecipeError(
                "--sampler grid is for a space in which every trial has the same parameters.",
                remedy="Leave the methods out of the space, or use --sampler tpe.",
            )
        endless = [p.name for p in parameters if not _is_countable(p)]
        if endless and len(parameters) > 1:
            raise RecipeError(
                f"--sampler grid: {endless[0]} is a range without a step.",
                remedy="Give it one, as weight=0.05:0.3:0.05, or use --sampler tpe.",
            )
        grid = {p.name: p.points(self.settings.trials) for p in parameters}
        self.keep("grid", grid)
        return grid


class Failed(Exception):
    """A trial has ended without values; its error is recorded."""


class Draw:
    """One trial under way: its values, and what is recorded of it."""

    def __init__(self, trial: Any, space: Space, has_rungs: bool) -> None:
        self._trial, self._has_rungs = trial, has_rungs
        self.number: int = trial.number
        self.values = space.draw(self._suggest)

    def _suggest(self, parameter: Parameter) -> Any:
        if parameter.kind == "choice":
            return self._trial.suggest_categorical(parameter.name, parameter.choices)
        suggest = self._trial.suggest_int if parameter.kind == "int" else self._trial.suggest_float
        low, high = parameter.ends
        more: dict[str, Any] = {"log": parameter.is_log}
        if parameter.step is not None:
            more = {"step": int(parameter.step) if parameter.kind == "int" else parameter.step}
        return suggest(parameter.name, low, high, **more)

    def record(self, name: str, value: Any) -> None:
        """Keep plain data with the trial."""
        self._trial.set_user_attr(name, value)

    def is_hopeless(self, rung: int, value: float) -> bool:
        """Report the value at a rung; whether the trial is not among those that go on."""
        self.report(rung, value)
        return bool(self._trial.should_prune())

    def report(self, rung: int, value: float) -> None:
        """Report the value at a rung."""
        self._trial.report(value, step=REDUCTION**rung)

    def prune(self) -> None:
        """End the trial early."""
        raise require_optuna().TrialPruned


def _is_countable(one: Parameter) -> bool:
    return one.kind == "choice" or one.step is not None or (one.kind == "int" and not one.is_log)
