"""A real Slurm with several nodes on this machine: loopback only, as root or not, and nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PLACES = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
STARTS_WITHIN_S = 60.0

CONFIGURATION = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerParameters=sched_min_interval=200000,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=6
KillWait=5
MinJobAge=3600
GresTypes=gpu
AccountingStorageType=accounting_storage/none
"""
# cred_expire: a requeued job waits this long. Nodes may declare more cores and memory than the host has. Listens on
# 127.0.0.1 alone. An srun that finds its node busy asks again after SlurmctldTimeout, at the earliest after a minute.
# A node that is not heard of for SlurmdTimeout is lost. Of jobs that have ended it tells for MinJobAge.


def absent() -> str:
    """Which of Slurm's programs are not installed here, for a reason to skip; "" if all are."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PLACES) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


class Cluster:
    """Nodes node1 to nodeN of so many cores and one pretended GPU each, whose daemons this process has started."""

    def __init__(self, folder: Path, *, nodes: int, cores: int = 1) -> None:
        self._folder, self._nodes = folder, nodes
        port = _free_ports(nodes + 1)
        lines = [CONFIGURATION.format(port=port, user=pwd.getpwuid(os.getuid()).pw_name, folder=folder).strip()]
        for number in range(1, nodes + 1):
            lines.append(
                f"NodeName=node{number} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port + number} "
                f"CPUs={cores} RealMemory=8000 Gres=gpu:1 State=UNKNOWN"
            )
            (folder / f"spool-node{number}").mkdir()
        lines.append(f"PartitionName=main Nodes=node[1-{nodes}] Default=YES MaxTime=INFINITE State=UP")
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (folder / "plugstack.conf").touch()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        self.environment = kept | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PLACES}

    # --- daemons

    def start(self) -> None:
        """Start every daemon, and wait until all nodes are idle."""
        at = self._folder
        places = [f"--{name}={at}/{file}" for name, file in (("key-file", "munge.key"), ("socket", "munge.sock"))]
        places += [f"--pid-file={at}/munged.pid", f"--log-file={at}/munged.log", f"--seed-file={at}/munge.seed"]
        self.call("munged", *places, "--force")
        self.start_controller()
        for number in range(1, self._nodes + 1):
            self.start_node(number)
        self.wait_until(lambda: self.idle() == self._nodes, within_s=STARTS_WITHIN_S)

    def start_controller(self) -> None:
        """Start slurmctld; what it has saved goes on."""
        self.call("slurmctld")
        self.wait_until(lambda: self._is_up("slurmctld"), within_s=STARTS_WITHIN_S)

    def start_node(self, number: int) -> None:
        """Start slurmd of a node."""
        self.call("slurmd", "-N", f"node{number}")

    def stop_controller(self) -> None:
        """End slurmctld; jobs go on running."""
        self._end("slurmctld")

    def cut_power(self, number: int) -> None:
        """Kill a node: its slurmd, the slurmstepds, which outlive it, and every process of its jobs."""
        for process in [*self._of_jobs(f"SLURMD_NODENAME=node{number}"), self._pid(f"slurmd-node{number}")]:
            _kill(process)
        (self._folder / f"slurmd-node{number}.pid").unlink()

    def stop(self) -> None:
        """Cancel what runs, and end every process that this cluster has started."""
        if self._is_up("slurmctld"):
            subprocess.run(["scancel", "--me"], env=self.environment, check=False, capture_output=True, timeout=30)
            with contextlib.suppress(AssertionError):
                self.wait_until(lambda: not self.queue(), within_s=20)
        names = [f"slurmd-node{number}" for number in range(1, self._nodes + 1)]
        for name in [*names, "slurmctld", "munged"]:
            self._end(name)
        for process in self._of_jobs():
            _kill(process)

    def _pid(self, name: str) -> int:
        """The process of a daemon, if it is one of ours; 0 if there is none."""
        path = self._folder / f"{name}.pid"
        with contextlib.suppress(OSError, ValueError):
            process = int(path.read_text())
            if Path(f"/proc/{process}/comm").read_text().strip() == name.partition("-")[0]:
                return process
        return 0

    def _is_up(self, name: str) -> bool:
        return self._pid(name) != 0

    def _end(self, name: str) -> None:
        process = self._pid(name)
        if not process:
            return
        os.kill(process, signal.SIGTERM)
        try:
            self.wait_until(lambda: not self._is_up(name), within_s=10)
        except AssertionError:
            _kill(process)

    def _of_jobs(self, mark: str = "") -> list[int]:
        """Processes of this cluster's jobs, found by their environment, and the slurmstepds above them."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                if f"SLURM_CONF={self._folder}/slurm.conf".encode() not in variables:
                    continue
                if b"SLURM_JOB_ID" not in b"".join(variables) or (mark and mark.encode() not in variables):
                    continue
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd":
                    found.append(parent)
                found.append(int(folder.name))
        return found

    # --- what users do

    def call(self, *words: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """Run a command with this cluster's settings, which must end well: its stdout."""
        command, variables = [str(word) for word in words], self.environment | dict(environment or {})
        output = self._folder / "call.log"  # no pipe: daemons keep theirs open
        with output.open("w+") as file:
            done = subprocess.run(command, cwd=cwd, env=variables, stdout=file, stderr=file, check=False, timeout=120)
            file.seek(0)
            text = file.read()
        assert done.returncode == 0, f"{command}: {done.returncode}: {text}"
        return text

    def queue(self, form: str = "%i %j %t %R") -> list[str]:
        """What is queued or runs, a line for each job or task."""
        return self.call("squeue", "--me", "--noheader", f"--format={form}").splitlines()

    def idle(self) -> int:
        """How many nodes are idle."""
        with contextlib.suppress(AssertionError):
            return self.call("sinfo", "--noheader", "--Node", "--format=%t").split().count("idle")
        return 0

    def wait_until(self, happened: Callable[[], bool], *, within_s: float) -> None:
        """Wait for something; AssertionError with the controller's last words if it does not come."""
        deadline = time.monotonic() + within_s
        while not happened():
            if time.monotonic() > deadline:
                logs = [path.read_text()[-3000:] for path in self._folder.glob("slurm*.log")]
                raise AssertionError("did not come to it\n" + "\n".join(logs))
            time.sleep(0.2)


@contextlib.contextmanager
def cluster(*, nodes: int, cores: int = 1) -> Iterator[Cluster]:
    """A running cluster, of which nothing is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
    found = Cluster(folder, nodes=nodes, cores=cores)
    try:
        found.start()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _free_ports(count: int) -> int:
    """The first of so many consecutive ports that nobody listens on."""
    for first in range(20000 + os.getpid() % 5000, 32000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise AssertionError("no free ports")
