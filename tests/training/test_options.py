"""The table of attach()'s options is attach()'s own: names, defaults and choices."""

import inspect

from drift_merge.maths.injection import RULES
from drift_merge.trainers.sft.request import TrainingRequest
from drift_merge.training.attach import attach
from drift_merge.training.options import ATTACH_OPTIONS, RULE_NAMES
from drift_merge.training.schedules import factor_of

OBJECTS = {"optimizer", "total_steps", "state"}  # that no text can say


def test_every_option_of_attach_stands_in_the_table_with_its_default():
    parameters = inspect.signature(attach).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {name: default for name, (_, default) in ATTACH_OPTIONS.items()} == {
        name: default for name, default in own.items() if name not in OBJECTS
    }


def test_the_choices_are_what_exists():
    assert tuple(RULES) == RULE_NAMES
    for schedule in ATTACH_OPTIONS["schedule"][0].choices:
        assert factor_of(schedule, 10)(0) == 1.0


def test_a_training_request_has_the_same_defaults():
    for name in ("alpha", "rule", "modules", "layers", "schedule"):
        assert TrainingRequest.__dataclass_fields__[name].default == ATTACH_OPTIONS[name][1]
