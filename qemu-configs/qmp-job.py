#!/usr/bin/env python3
"""Runs one long command of a QEMU over its QMP socket and waits for its end. Use it under frozen.sh.

qmp-job.py SOCKET savevm TAG NODE      snapshot of memory and of block node NODE, kept in NODE (qcow2)
qmp-job.py SOCKET loadvm TAG NODE      back to it
qmp-job.py SOCKET migrate URI          migration, e.g. to tcp:host:4444 or file:/path; ends when it is complete
qmp-job.py SOCKET wait-incoming        waits for the end of a migration into this QEMU (-incoming)

Ends with 0 when it is done, else with 1 and QEMU's reason.
"""
import json
import socket
import sys
import time


class Monitor:
    """A QMP connection; events are left out, all that is waited for can be asked."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.lines = self.socket.makefile("r")
        self.lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command, **arguments):
        message = {"execute": command, "arguments": arguments}
        self.socket.sendall(json.dumps(message).encode() + b"\n")
        for line in self.lines:
            answer = json.loads(line)
            if "error" in answer:
                sys.exit(f"qmp-job.py: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        sys.exit(f"qmp-job.py: {command}: QEMU closed its monitor")


def snapshot(monitor, command, tag, node):
    job = f"vmgmt-{command}"
    monitor.execute(command, tag=tag, vmstate=node, devices=[node], **{"job-id": job})
    while True:
        [state] = [found for found in monitor.execute("query-jobs") if found["id"] == job]
        if state["status"] == "concluded":
            monitor.execute("job-dismiss", id=job)
            if "error" in state:
                sys.exit(f"qmp-job.py: {command}: {state['error']}")
            return
        time.sleep(0.05)


def migration(monitor):
    while True:
        state = monitor.execute("query-migrate")
        status = state.get("status", "none")
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            sys.exit(f"qmp-job.py: migration {status}: {state.get('error-desc', 'no reason given')}")
        time.sleep(0.05)


def main(words):
    match words:
        case [path, "savevm", tag, node]:
            snapshot(Monitor(path), "snapshot-save", tag, node)
        case [path, "loadvm", tag, node]:
            snapshot(Monitor(path), "snapshot-load", tag, node)
        case [path, "migrate", uri]:
            monitor = Monitor(path)
            monitor.execute("migrate", uri=uri)
            migration(monitor)
        case [path, "wait-incoming"]:
            migration(Monitor(path))
        case _:
            sys.exit(__doc__)


main(sys.argv[1:])
