"""push and pull by servers that people really have, on this machine: OpenSSH's sftp, an S3 server, WebDAV.

Skipped for a protocol whose packages are not installed: `pip install paramiko s3fs 'moto[server]' webdav4 wsgidav`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builders import ROOT, Outcome, contents

ROUND, WEIGHTS = "exchange/round-0001", "adapter_model.safetensors"
NEEDS = {"sftp": ("paramiko",), "s3": ("s3fs", "moto", "flask"), "webdav": ("webdav4", "wsgidav", "cheroot")}
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
SLOW = """
import sys, time
from pathlib import Path
from stages.exchange.remote import Remote
write = Remote.write
def slowly(self, name, content):
    write(self, name, content)
    Path(sys.argv[1]).touch()
    time.sleep(30)
Remote.write = slowly
from fedcollm_cli.main import app
app(sys.argv[2:])
"""
Fedcollm = Callable[..., Outcome]
Settings = str
"""Lines of machine.toml under [exchange]."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server does not answer")


@contextmanager
def sftp(top: Path) -> Iterator[Settings]:
    """An sshd of our own, with keys of our own, that serves a folder below top."""
    port, share = free_port(), top / "share"
    share.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", top / name], check=True)
    shutil.copy(top / "user.pub", top / "authorized")
    kind, key = (top / "host.pub").read_text().split()[:2]
    (top / "known").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    (top / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {top}/host\nAuthorizedKeysFile {top}/authorized\n"
        "StrictModes no\nPasswordAuthentication no\nPidFile none\nSubsystem sftp internal-sftp\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD is not None
    server = subprocess.Popen([SSHD, "-D", "-f", top / "sshd_config", "-E", top / "log"])
    try:
        wait_for(port)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        options = f'{{key_filename = "{top}/user", known_hosts = "{top}/known"}}'
        yield f'remote = "sftp://{user}@127.0.0.1:{port}{share}"\noptions = {options}\n'
    finally:
        server.terminate()
        server.wait()


@contextmanager
def s3(top: Path) -> Iterator[Settings]:
    from moto.server import ThreadedMotoServer

    port = free_port()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    os.environ.update({"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"})
    try:
        import s3fs

        s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}").mkdir(f"study-{port}")
        yield f'remote = "s3://study-{port}/prefix"\noptions = {{endpoint_url = "http://127.0.0.1:{port}"}}\n'
    finally:
        server.stop()


@contextmanager
def webdav(top: Path) -> Iterator[Settings]:
    from cheroot import wsgi
    from wsgidav.wsgidav_app import WsgiDAVApp

    port, share = free_port(), top / "share"
    share.mkdir()
    served = {"provider_mapping": {"/": str(share)}, "simple_dc": {"user_mapping": {"*": True}}, "verbose": 0}
    server = wsgi.Server(("127.0.0.1", port), WsgiDAVApp(served | {"logging": {"enable": False}}))
    thread = threading.Thread(target=server.start, daemon=True)
    thread.start()
    try:
        wait_for(port)
        yield f'remote = "http+webdav://127.0.0.1:{port}/"\n'
    finally:
        server.stop()
        thread.join()


SERVERS = {"sftp": sftp, "s3": s3, "webdav": webdav}


@pytest.fixture(params=NEEDS)
def remote(request: pytest.FixtureRequest, tmp_path: Path, server: Path, answered: Path) -> Iterator[str]:
    """A server that both machines reach. Its protocol."""
    protocol = str(request.param)
    if absent := [name for name in NEEDS[protocol] if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{absent[0]} is not installed")
    if protocol == "sftp" and SSHD is None:
        pytest.skip("no sshd here")
    (tmp_path / "remote").mkdir()
    with SERVERS[protocol](tmp_path / "remote") as settings:
        for workspace in (server, answered):
            with (workspace / "machine.toml").open("a") as file:
                file.write(f"\n[exchange]\n{settings}")
        yield protocol


def moved(outcome: Outcome) -> list[str]:
    assert outcome.code == 0, outcome.err
    found: list[str] = json.loads(outcome.out)["moved"]
    return found


def test_what_one_party_pushes_another_pulls_byte_for_byte(
    remote: str, server: Path, answered: Path, fedcollm: Fedcollm
) -> None:
    push, pull = ("push", "--client", 2, "--json", "-w", answered), ("pull", "--server", "--json", "-w", server)
    assert moved(fedcollm(*pull)) == []
    assert moved(fedcollm(*push)) == ["round-0001/client-2"]
    assert moved(fedcollm(*push)) == []
    assert moved(fedcollm(*pull)) == ["round-0001/client-2"]
    assert contents(server / ROUND / "client-2") == contents(answered / ROUND / "client-2")
    assert moved(fedcollm("push", "--server", "--json", "-w", server)) == ["round-0001/broadcast"]


def test_killed_in_the_middle_nothing_counts_and_the_same_command_goes_on(
    remote: str, server: Path, answered: Path, tmp_path: Path, fedcollm: Fedcollm
) -> None:
    wrote = tmp_path / "wrote"
    words = [sys.executable, "-c", SLOW, str(wrote), "push", "--client", "2", "-w", str(answered)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": paths})
    while not wrote.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    pull = ("pull", "--server", "--json", "-w", server)
    assert moved(fedcollm(*pull)) == []
    assert not (server / ROUND / "client-2").exists()
    assert moved(fedcollm("push", "--client", 2, "--json", "-w", answered)) == ["round-0001/client-2"]
    assert moved(fedcollm(*pull)) == ["round-0001/client-2"]
    assert contents(server / ROUND / "client-2") == contents(answered / ROUND / "client-2")


def test_other_bytes_under_the_same_name_are_refused(
    remote: str, server: Path, answered: Path, fedcollm: Fedcollm
) -> None:
    push = ("push", "--client", 2, "-w", answered)
    assert fedcollm(*push).code == 0
    assert fedcollm("client-train", "--client", 2, "--round", 1, "--overwrite", "-w", answered).code == 0
    manifest = answered / ROUND / "client-2/manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    outcome = fedcollm(*push)
    assert outcome.code == 5
    assert "is there already, with other bytes" in outcome.err


@pytest.fixture
def full(tmp_path: Path, server: Path, answered: Path) -> Iterator[Path]:
    """An sftp server whose disk is smaller than an update: where it is mounted."""
    if SSHD is None or importlib.util.find_spec("paramiko") is None:
        pytest.skip("no sshd or no paramiko here")
    (tmp_path / "remote").mkdir()
    with sftp(tmp_path / "remote") as settings:
        disk = tmp_path / "remote/share"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        with (answered / "machine.toml").open("a") as file:
            file.write(f"\n[exchange]\n{settings}")
        try:
            yield disk
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_is_full_is_told_nothing_counts_and_with_room_it_goes_on(
    full: Path, answered: Path, fedcollm: Fedcollm
) -> None:
    push = ("push", "--client", 2, "--json", "-w", answered)
    outcome = fedcollm(*push)
    assert outcome.code == 3
    assert "then give the same command again" in outcome.err
    assert not (full / "round-0001/client-2/manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=10m", full], check=True)
    assert moved(fedcollm(*push)) == ["round-0001/client-2"]
    assert contents(full / "round-0001/client-2") == contents(answered / ROUND / "client-2")
