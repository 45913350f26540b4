"""One job of a chain on a cluster: a script of slurm/ with its round, and one task for each client in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Script = Literal["broadcast", "server", "client", "distill", "average", "close", "reveal", "evaluate", "window"]


@dataclass(frozen=True)
class Job:
    """One job. round: the server's job, or with FedMKT its average, ends this round and opens the next.

    after: which jobs it waits for, in the words of sbatch, such as "aftercorr:distill/1"; None: for the one before.
    """

    script: Script
    round: int
    clients: tuple[int, ...] = ()
    after: tuple[str, ...] | None = None

    @property
    def tasks(self) -> str:
        """The clients as an array's tasks, such as 1-3,5; "" for a job of one task."""
        runs: list[list[int]] = []
        for client in self.clients:
            if runs and client == runs[-1][-1] + 1:
                runs[-1].append(client)
            else:
                runs.append([client])
        return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

    @property
    def line(self) -> str:
        """As submit.sh reads it: script, round and tasks; where it says so itself, also what it waits for."""
        if self.after is None:
            return f"{self.script} {self.round} {self.tasks}".rstrip()
        return " ".join([self.script, str(self.round), self.tasks or "-", *self.after])

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Chain:
    """The jobs in their order, and what has to arrive from elsewhere before there can be more; "" if nothing."""

    jobs: list[Job]
    waiting_for: str

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        return {"jobs": [job.as_json() for job in self.jobs], "waiting_for": self.waiting_for}
