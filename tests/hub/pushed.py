"""Pushes by processes that may die, and how far each has come."""

from dataclasses import dataclass
from pathlib import Path

from tests.faults.forks import Forks
from tests.hub.places import files_at
from tests.hub_server.repo import tree
from tests.hub_server.server import HubServer


@dataclass(frozen=True)
class World:
    """A Hub, processes that push to it, and what an undisturbed push leaves there."""

    hub: HubServer
    forks: Forks
    prior: Path
    moments: range  # calls of an undisturbed push that send something, from its first change on

    def push(self, repo_id: str) -> list[str]:
        return ["drift-prior", "push", str(self.prior), repo_id, "-q"]

    def hashes(self, repo_id: str = "org/whole") -> dict[str, tuple[object, ...]]:
        """What the Hub's API says of every file."""
        repo = self.hub.repos[repo_id]
        listed = tree(repo.commits[repo.refs["main"]])
        return {str(e["path"]): (e["size"], e["oid"], str(e.get("lfs"))) for e in listed}

    def stage_of(self, repo_id: str, code: int) -> str:
        """How far a killed push had come; an unfinished one has no card."""
        if code == 0:
            return "finished"
        if repo_id not in self.hub.repos:
            return "nothing"
        names, whole = files_at(self.hub, repo_id).keys(), self.hashes().keys()
        shards = {name for name in whole if name.endswith(".safetensors")}
        assert "README.md" not in names or names == whole
        assert "prior.json" not in names or shards <= names
        if "README.md" in names:
            return "all but the answer"
        return f"{len(names) - 1} files"

    def assert_whole(self, repo_id: str) -> None:
        """The files of an undisturbed push; the card says the name of its own repository."""
        ours, theirs = (
            files_at(self.hub, name)["README.md"].decode() for name in (repo_id, "org/whole")
        )
        assert ours.replace(repo_id, "org/whole") == theirs
        card = {"README.md": self.hashes(repo_id)["README.md"]}
        assert self.hashes(repo_id) == self.hashes() | card
