"""Which of several processes this one is."""

import os

import pytest

from drift_merge.errors import RecipeError
from drift_merge.trainers.sft.ranks import adopt_mpi, local_processes, num_processes, rank

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
ADOPTED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "given",
    [
        OPEN_MPI,
        {n.replace("OMPI", "MV2"): value for n, value in OPEN_MPI.items()},
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    ],
)
def test_what_mpirun_says_is_said_as_torchrun_would(given):
    environment = dict(given)
    adopt_mpi(environment)
    assert environment == given | ADOPTED


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_alone_or_with_torchrun_nothing_is_changed(given):
    environment = dict(given)
    adopt_mpi(environment)
    assert environment == given


@pytest.mark.parametrize("found", ["", "two", "-1", "1.5", "\u0663", "%q{PMIX}"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("RANK", rank),
        ("WORLD_SIZE", num_processes),
        ("LOCAL_WORLD_SIZE", local_processes),
        ("PMI_SIZE", lambda: adopt_mpi({"PMI_SIZE": os.environ["PMI_SIZE"]})),
    ],
)
def test_what_is_no_number_is_refused_by_name(monkeypatch, name, read, found):
    monkeypatch.setenv(name, found)
    with pytest.raises(RecipeError, match=f"variable {name} is {found!r}"):
        read()


@pytest.mark.parametrize(
    ("name", "read"), [("WORLD_SIZE", num_processes), ("LOCAL_WORLD_SIZE", local_processes)]
)
def test_no_process_at_all_is_refused(monkeypatch, name, read):
    monkeypatch.setenv(name, "0")
    with pytest.raises(RecipeError, match=f"variable {name} is '0'.* whole number from 1"):
        read()
