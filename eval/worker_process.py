"""The worker's side of `eval/workers.py`: a worker receives chunks of items and sends a message for each finished item.

A message is (kind, value, seconds of CPU time used so far). The worker sends "ready" once, after its imports. For each
chunk (function, items) it sends "started", and then for each item "value" with the result or "exception" with an error
line. If the chunk cannot be unpickled, it sends "unloadable" with an error line.
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
    """Arguments: file descriptor of the socket, the parent's process id, memory limit in bytes (0: none)."""
    descriptor, parent, memory_limit = map(int, sys.argv[1:])
    die_with_parent(parent)  # closing the socket is not enough: a fork of the parent may keep it open
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if memory_limit and (hard == resource.RLIM_INFINITY or memory_limit < hard):
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, hard))
    check_answer("1", "the answer is $1$, 1")  # compiles math-verify's patterns before the first item
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # errors up to here are shown to the user

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
            except BaseException as error:  # a check that raises SystemExit has failed, too
                answer = pickle.dumps(("exception", _one_line(error), time.process_time()))
            connection.send_bytes(answer)


def _one_line(error: BaseException) -> str:
    return " ".join(traceback.format_exception_only(error)[-1].split())[:500]


if __name__ == "__main__":
    main()
