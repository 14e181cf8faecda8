"""What any Optuna is asked for a storage; servers are in test_processes."""

from types import SimpleNamespace

import pytest

from drift_merge.searches.storages import GRACE_SECONDS, HEARTBEAT_SECONDS, opened

EVERY = {"heartbeat_interval": HEARTBEAT_SECONDS, "grace_period": GRACE_SECONDS}


def before_4_9(url, engine_kwargs, *, heartbeat_interval, grace_period, failed_trial_callback=None):
    return dict(locals())


def since_4_9(
    url,
    engine_kwargs,
    *,
    heartbeat_interval,
    grace_period,
    heartbeat_stale_trial_callback=None,
    failed_trial_callback=None,
):
    return dict(locals())


@pytest.mark.parametrize(
    ("storage", "name"),
    [(before_4_9, "failed_trial_callback"), (since_4_9, "heartbeat_stale_trial_callback")],
)
def test_what_is_called_for_a_trial_without_heartbeat_has_the_name_that_this_optuna_knows(
    storage, name
):
    def again(study, trial):
        raise AssertionError

    optuna = SimpleNamespace(storages=SimpleNamespace(RDBStorage=storage))
    given = opened(optuna, "sqlite:///study.db", again)
    assert given["url"] == "sqlite:///study.db"
    assert EVERY.items() <= given.items()
    assert [key for key, value in given.items() if value is again] == [name]
