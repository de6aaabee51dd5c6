"""In the place of a process: asks for a fork of what it would have run (see forked_processes.py), and ends as it ends.

Only the standard library, so that it starts at once. A worker or a session gets its channel FD, another kind its arguments:

    python -S -E forked_process.py SOCKET KIND [FD | WORDS…]
"""

import json
import os
import signal
import socket
import sys

path, kind, *words = sys.argv[1:]
channel = words if kind in ("worker", "session") else []
end = socket.socket(socket.AF_UNIX)
end.connect(path)
message = json.dumps({"kind": kind, "words": words, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
socket.send_fds(end, [message], [0, 1, 2, *map(int, channel)])
for number in (0, *map(int, channel)):
    os.close(number)
signal.signal(signal.SIGINT, signal.SIG_IGN)
code = int(end.recv(16) or b"1")
if code < 0:
    if -code not in (signal.SIGKILL, signal.SIGSTOP):  # whose handling nobody may set
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
