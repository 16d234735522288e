"""A checking worker's side of `eval/workers.py`: it takes chunks of items, and sends a message for each item done.

It sends (kind, value, seconds of processor time that it has used). The kinds are "ready" once, after its imports; then
for each chunk (function, items) "started" and for each item "value" with the result or "exception" with a line; or
"unloadable" with a line where the chunk cannot be unpickled.
"""

import os
import pickle
import resource
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection

from eval.verify import check_answer
from sft_core.run.parent import die_with_parent


def main() -> None:
    """Arguments: descriptor of the socket, the parent's process id, memory limit in bytes (0: none)."""
    descriptor, parent, memory_limit = map(int, sys.argv[1:])
    die_with_parent(parent)  # a fork of it may hold the socket open
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if memory_limit and (hard == resource.RLIM_INFINITY or memory_limit < hard):
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, hard))
    check_answer("1", "the answer is $1$, 1")  # compiles math-verify's expressions, so that no item pays for them
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # until here the user should see what goes wrong

    connection.send_bytes(pickle.dumps(("ready", None, 0.0)))
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        try:
            function, items = pickle.loads(message)
        except BaseException as error:
            connection.send_bytes(pickle.dumps(("unloadable", _one_line(error), 0.0)))
            continue
        connection.send_bytes(pickle.dumps(("started", None, time.process_time())))
        for item in items:
            try:
                answer = pickle.dumps(("value", function(item), time.process_time()))
            except BaseException as error:  # a SystemExit of a check is that check's failure too
                answer = pickle.dumps(("exception", _one_line(error), time.process_time()))
            connection.send_bytes(answer)


def _one_line(error: BaseException) -> str:
    return " ".join(traceback.format_exception_only(error)[-1].split())[:500]


if __name__ == "__main__":
    main()
