"""The other end of a bare pipe: sends back what it receives. Imports nothing heavy."""

import contextlib
import sys
from multiprocessing.connection import Connection

if __name__ == "__main__":
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError):
        while True:
            connection.send(connection.recv())
