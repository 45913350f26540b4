"""A program `fedcollm` for scripts, Snakemake and Slurm whose commands need not import the libraries anew.

It asks this process for a forked one that has them, with its own arguments, environment, folder and output. The two
live and die together: signals are handed on, the exit code comes back, and who kills the program has killed the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

from processes import begin

PROGRAM = """#!{python} -SE
import json, os, signal, socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(line, [len(request).to_bytes(4, "big")], [1, 2])
line.sendall(request)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: line.sendall(bytes([number])))
code = int(line.makefile().readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class _Line(socketserver.BaseRequestHandler):
    """One call of the program, from its first byte to its end."""

    request: socket.socket

    def handle(self) -> None:
        size, streams, *_ = socket.recv_fds(self.request, 4, 2)
        words, folder, environment = json.loads(self._read(int.from_bytes(size, "big")))
        out, err = (Connection(stream, readable=False) for stream in streams)
        process = begin(words, out, err=err, folder=folder, environment=environment)
        out.close()
        err.close()
        while process.sentinel not in wait([process.sentinel, self.request]):
            number = self.request.recv(1)
            if not number:  # the program was killed
                process.kill()
                break
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid or 0, number[0])
        process.join()
        with contextlib.suppress(BrokenPipeError):
            self.request.sendall(b"%d\n" % (process.exitcode or 0))

    def _read(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            found += self.request.recv(size - len(found))
        return found


class _Exchange(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    request_queue_size = 64


@contextlib.contextmanager
def forking_fedcollm() -> Iterator[Path]:
    """The program, in a folder of its own, for as long as this process answers it."""
    with tempfile.TemporaryDirectory(prefix="fedcollm-") as top:
        program, address = Path(top) / "fedcollm", str(Path(top) / "line")
        program.write_text(PROGRAM.format(python=sys.executable, address=address))
        program.chmod(0o755)
        with _Exchange(address, _Line) as exchange:
            threading.Thread(target=exchange.serve_forever, daemon=True).start()
            yield program
            exchange.shutdown()
