"""The program `tersor` without its imports: each call is forked from a process that imported everything and computed nothing.

A test that starts `tersor` from a shell then pays for what the command does, and not for the seconds of importing PyTorch and
transformers. Exit status, streams, folder and environment are those of a program. Tests of imports, of signals and of memory
start `python -m tersor` itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Python's own modules only: it has to start at once.
PROGRAM = """#!{python} -ES
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as there:
    there.connect({address!r})
    call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(there, [len(call).to_bytes(8, "big")], [0, 1, 2])
    there.sendall(call)
    sys.exit(int.from_bytes(there.recv(1), "big"))
"""


@contextlib.contextmanager
def tersor_program(folder: Path) -> Iterator[None]:
    """Meanwhile `folder` holds a program `tersor`."""
    address = folder / "calls"
    server = subprocess.Popen([sys.executable, __file__, str(address)], stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()  # it listens
    program = folder / "tersor"
    program.write_text(PROGRAM.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def serve(address: str) -> None:
    """Answer one call after another."""
    import torch
    import transformers.modeling_utils  # noqa: F401

    from tersor.cli.main import main
    from tersor.methods.method import methods

    methods()
    torch.set_num_threads(1)
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(address)
        here.listen()
        print("listening", flush=True)
        while True:
            caller, _ = here.accept()
            size, streams, _, _ = socket.recv_fds(caller, 8, 3)
            call = b""
            while len(call) < int.from_bytes(size, "big"):
                call += caller.recv(1 << 16)
            if (child := os.fork()) == 0:
                arguments, folder, environment = json.loads(call)
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(environment)
                sys.argv = ["tersor", *arguments]
                main()
                sys.exit(0)
            for stream in streams:
                os.close(stream)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            caller.sendall((status if status >= 0 else 128 - status).to_bytes(1, "big"))
            caller.close()


if __name__ == "__main__":
    serve(sys.argv[1])
