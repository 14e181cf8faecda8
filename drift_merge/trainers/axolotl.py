"""Axolotl: a plugin, configured in its YAML.

plugins: [drift_merge.trainers.axolotl.DriftPlugin]
drift_prior: prior/
drift_alpha: 1.0            # also drift_rule, drift_modules, drift_layers, drift_schedule,
                            # drift_when, drift_weights, drift_device, drift_strict, drift_map_file
                            # and drift_tower
"""

from typing import Any

from drift_merge.errors import RecipeError
from drift_merge.trainers.hf import DriftCallback
from drift_merge.trainers.wiring import optional

_INSTALL = "pip install axolotl"
_integrations = optional("axolotl.integrations.base", install=_INSTALL)
_pydantic = optional("pydantic", install=_INSTALL)

PREFIX = "drift_"


class DriftArgs(_pydantic.BaseModel):  # type: ignore[misc, name-defined]
    """The keys of the YAML, as Axolotl checks them."""

    drift_prior: str | list[str] | None = None
    drift_alpha: float | dict[str, float] | None = None
    drift_rule: str | None = None
    drift_modules: str | None = None
    drift_layers: str | None = None
    drift_schedule: str | None = None
    drift_when: str | None = None
    drift_weights: list[float] | None = None
    drift_device: str | None = None
    drift_strict: bool | None = None
    drift_map_file: str | None = None
    drift_tower: str | None = None


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
