"""The launcher of a warm start: hands a step over to the warm server and ends with its exit code.

It runs for every step without site packages, so it imports next to nothing.
"""

import json
import os
import socket
import sys


def main() -> int:
    """Returns the exit code of the step."""
    _, address, *arguments = sys.argv
    request = {"arguments": arguments, "directory": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"0"], [0, 1, 2])
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        return (connection.recv(1) or b"\1")[0]


sys.exit(main())
