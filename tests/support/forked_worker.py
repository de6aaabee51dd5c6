"""In the place of a process: asks for a fork (see forked_workers.py and forked_builders.py), and ends as it ends.

Only the standard library, so that it starts at once. FD is what the fork gets besides both streams, and WORDS its arguments:

    python -S -E forked_worker.py SOCKET FD [WORDS…]
"""

import json
import os
import signal
import socket
import sys

path, channel, *words = sys.argv[1:]
end = socket.socket(socket.AF_UNIX)
end.connect(path)
message = json.dumps({"environment": dict(os.environ), "folder": os.getcwd(), "words": words}).encode()
socket.send_fds(end, [message], [1, 2, int(channel)])
os.close(int(channel))
signal.signal(signal.SIGINT, signal.SIG_IGN)
code = int(end.recv(16) or b"1")
if code < 0:
    if -code not in (signal.SIGKILL, signal.SIGSTOP):  # whose handling nobody may set
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
