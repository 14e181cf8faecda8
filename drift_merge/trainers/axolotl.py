"""Axolotl: a plugin, configured in its YAML.

plugins: [drift_merge.trainers.axolotl.DriftPlugin]
drift_prior: prior/
drift_alpha: 1.0            # also drift_negate, drift_rule, drift_until, drift_control,
                            # drift_modules, drift_layers, drift_schedule, drift_when,
                            # drift_weights, drift_device, drift_strict, drift_map_file
                            # and drift_tower
"""

from typing import Any, Literal

from drift_merge.errors import RecipeError
from drift_merge.maths.methods.options import Option
from drift_merge.trainers.hf import DriftCallback
from drift_merge.trainers.wiring import optional
from drift_merge.training.options import ATTACH_OPTIONS

_INSTALL = "pip install axolotl"
_integrations = optional("axolotl.integrations.base", install=_INSTALL)
_pydantic = optional("pydantic", install=_INSTALL)

PREFIX = "drift_"


def _kind(option: Option) -> Any:
    """How a YAML writes a value: alpha also by module or name, what may repeat as a list."""
    if option.choices:
        return Literal[option.choices] | None
    if option.name == "alpha":  # a number, or one by module
        return float | dict[str, float] | str | None
    return (list[option.kind] if option.is_many else option.kind) | None  # type: ignore[name-defined]


# The keys of the YAML, as Axolotl checks them: the options of attach(), and what they are.
DriftArgs: Any = _pydantic.create_model(
    "DriftArgs",
    __module__=__name__,
    drift_prior=(str | list[str] | None, None),
    **{PREFIX + name: (_kind(option), None) for name, (option, _) in ATTACH_OPTIONS.items()},
)


class DriftPlugin(_integrations.BasePlugin):  # type: ignore[misc, name-defined]
    """Adds a DriftCallback to Axolotl's trainer."""

    def get_input_args(self) -> str:
        """The dotted name of the class that checks our keys."""
        return f"{__name__}.{DriftArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[DriftCallback]:
        """The callback that the YAML asks for.

        Raises:
            RecipeError: there is no `drift_prior`.
        """
        given = {name.removeprefix(PREFIX): cfg.get(name) for name in DriftArgs.model_fields}
        options = {name: value for name, value in given.items() if value is not None}
        if "prior" not in options:
            raise RecipeError(
                "the YAML names DriftPlugin but no prior.",
                remedy="Add a line: drift_prior: prior/   (or take the plugin out)",
            )
        return [DriftCallback(options.pop("prior"), **options)]
