#!/usr/bin/env python3
"""Runs one long command of a QEMU over its QMP socket and waits for its end. Use it under frozen.sh.

qmp-job.py SOCKET savevm TAG NODE      snapshot of memory and of block node NODE, kept in NODE (qcow2)
qmp-job.py SOCKET loadvm TAG NODE      back to it
qmp-job.py SOCKET migrate URI          migration, e.g. to tcp:host:4444 or file:/path; ends when it is complete
qmp-job.py SOCKET wait-incoming        waits for the end of a migration into this QEMU (-incoming)
qmp-job.py SOCKET cancel               cancels what a killed qmp-job.py has left behind, and waits for its end

Ends with 0 when it is done, with 1 and QEMU's reason when it is not. INT, TERM and HUP have QEMU cancel it; this ends only when QEMU's
work has ended, with 128 and the signal's number where it was cancelled. 76: QEMU still copies memory, or cannot be asked whether it does.
"""
import json
import os
import signal
import socket
import sys
import time

# Nothing of QEMU's goes on, and it was not done.
FAILED = 1
# QEMU's work goes on, or may.
GOES_ON = 76
# How long QEMU may take to greet, where nothing is known of what it does.
GREETING_SECONDS = 10
JOBS = ("vmgmt-snapshot-save", "vmgmt-snapshot-load")
# What query-migrate says where no memory is copied.
MIGRATION_ENDED = ("none", "completed", "failed", "cancelled")


class Refused(Exception):
    """QEMU answers with an error."""


class Signals:
    """INT, TERM and HUP: before the work has begun they end this at once, then they are only remembered, however many come."""

    def __init__(self):
        self.begun = False
        self.number = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.heard)

    def heard(self, number, _frame):
        if not self.begun:
            os._exit(128 + number)
        self.number = self.number or number


def end(status, words):
    try:
        print("qmp-job.py:", words, file=sys.stderr)
    except OSError:
        # Nobody reads any more; the status counts.
        pass
    sys.exit(status)


class Monitor:
    """A QMP connection; events are left out, all that is waited for can be asked."""

    def __init__(self, path, greeting_seconds=None):
        self.path = path
        self.connect(greeting_seconds)

    def connect(self, greeting_seconds):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A QEMU that is busy, or has its monitor in use, accepts but does not greet.
        self.socket.settimeout(greeting_seconds)
        self.socket.connect(self.path)
        self.lines = self.socket.makefile("r")
        self.lines.readline()
        self.execute("qmp_capabilities")
        self.socket.settimeout(None)

    def execute(self, command, **arguments):
        message = {"execute": command, "arguments": arguments}
        self.socket.sendall(json.dumps(message).encode() + b"\n")
        for line in self.lines:
            answer = json.loads(line)
            if "error" in answer:
                raise Refused(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]
        raise ConnectionError("QEMU closed its monitor")

    def begin(self, command, **arguments):
        """Begins the work, or ends this because it was not begun."""
        try:
            self.execute(command, **arguments)
        except Refused as refused:
            end(FAILED, f"{command}: {refused}")
        except ConnectionError:
            self.ask("query-status")
            raise

    def ask(self, command, **arguments):
        """A question that changes nothing: a connection that broke is made again. Ends this where QEMU is gone: nothing goes on then."""
        try:
            return self.execute(command, **arguments)
        except ConnectionError:
            pass
        try:
            self.connect(GREETING_SECONDS)
        except (ConnectionRefusedError, FileNotFoundError):
            end(FAILED, f"{command}: QEMU has ended")
        return self.execute(command, **arguments)

    def tell(self, command, **arguments):
        """What may be too late."""
        try:
            self.execute(command, **arguments)
        except (Refused, ConnectionError):
            pass

    def job(self, name):
        """How a job of ours stands; None: there is none."""
        return next((job for job in self.ask("query-jobs") if job["id"] == name), None)


def job_end(monitor, name, wants_cancel):
    """Waits for a job's end and dismisses it; how it ended."""
    cancelled = False
    while (state := monitor.job(name)) is not None:
        if state["status"] == "concluded":
            monitor.tell("job-dismiss", id=name)
            return state
        if wants_cancel() and not cancelled:
            monitor.tell("job-cancel", id=name)
            cancelled = True
        time.sleep(0.05)
    return {"error": "somebody else dismissed the job: what came of it is not known"}


def migration_end(monitor, wants_cancel):
    """Waits for a migration's end; how it ended."""
    cancelled = False
    while True:
        state = monitor.ask("query-migrate")
        # Before the first one into this QEMU it says nothing.
        if state.get("status", "none") in MIGRATION_ENDED[1:]:
            return state
        if wants_cancel() and not cancelled:
            monitor.tell("migrate_cancel")
            cancelled = True
        time.sleep(0.05)


def snapshot(monitor, signals, command, tag, node):
    name = f"vmgmt-{command}"
    left = monitor.job(name)
    if left is not None and left["status"] == "concluded":
        # Of one that was killed.
        monitor.execute("job-dismiss", id=name)
    elif left is not None:
        goes_on(monitor, f"{command}: an earlier one is still {left['status']}")
    signals.begun = True
    monitor.begin(command, tag=tag, vmstate=node, devices=[node], **{"job-id": name})
    state = job_end(monitor, name, lambda: signals.number)
    if "error" in state:
        end(128 + signals.number if signals.number else FAILED, f"{command}: {state['error']}")


def migrate(monitor, signals, uri):
    status = monitor.ask("query-migrate").get("status", "none")
    if status not in MIGRATION_ENDED:
        goes_on(monitor, f"migrate: an earlier one is still {status}")
    signals.begun = True
    monitor.begin("migrate", uri=uri)
    state = migration_end(monitor, lambda: signals.number)
    if state["status"] != "completed":
        status = 128 + signals.number if signals.number else FAILED
        end(status, f"migration {state['status']}: {state.get('error-desc', 'no reason given')}")


def goes_on(monitor, what):
    end(GOES_ON, f"{what}: wait for its end, or run: qmp-job.py {monitor.path} cancel")


def cancel(monitor):
    for name in JOBS:
        if monitor.job(name) is not None:
            job_end(monitor, name, lambda: True)
    if monitor.ask("query-migrate").get("status", "none") not in MIGRATION_ENDED:
        migration_end(monitor, lambda: True)


def run(words, signals):
    match words:
        case [path, "savevm", tag, node]:
            snapshot(Monitor(path), signals, "snapshot-save", tag, node)
        case [path, "loadvm", tag, node]:
            snapshot(Monitor(path), signals, "snapshot-load", tag, node)
        case [path, "migrate", uri]:
            migrate(Monitor(path), signals, uri)
        case [path, "wait-incoming"]:
            state = migration_end(Monitor(path), lambda: False)
            if state["status"] != "completed":
                end(FAILED, f"migration {state['status']}: {state.get('error-desc', 'no reason given')}")
        case [path, "cancel"]:
            # What goes on is not known: only QEMU's word that it has ended counts.
            signals.begun = True
            try:
                monitor = Monitor(path, GREETING_SECONDS)
            except (ConnectionRefusedError, FileNotFoundError):
                end(0, f"no QEMU has its monitor at {path}: nothing to cancel")
            cancel(monitor)
        case _:
            sys.exit(__doc__)


def main(words):
    signals = Signals()
    try:
        run(words, signals)
    except Exception as error:
        reason = str(error) or type(error).__name__
        if signals.begun:
            end(GOES_ON, f"{' '.join(words[1:2])}: {reason}: whether QEMU still copies memory is not known")
        end(FAILED, f"{' '.join(words[1:2])}: {reason}")


main(sys.argv[1:])
