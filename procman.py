#!/usr/bin/env python3
"""procman: durable multi-step background processes in one file, on SQLite.

A process is a list of named steps that pass a JSON object along.  It is queued
in one SQLite file and run by a runner: from cron, from Task Scheduler, or as a
daemon.  Whatever is killed, what was acknowledged is still there.

    from procman import ManagedProcess, ProcessManager

    manager = ProcessManager()
    pid = manager.start_process(
        ManagedProcess({"resize": "app.images:resize",
                        "upload": {"command": ["sh", "upload.sh"]}}),
        {"file": "cat.jpg"})

    $ python procman.py runner          # from cron, once a minute
    $ python procman.py status "$pid"

The file is a house of ten rooms; each uses only rooms above it (`grep '^# [0-9]'`):

     1 Vocabulary   defaults, errors, the JSON gate
     2 Model        states, options, step specs, records
     3 Time         pure functions of a given now
     4 Platform     what differs between systems
     5 Store        the only SQL, the one writer of status
     6 Steps        from a spec to execute(data)
     7 Worker       the child's side of the pipe
     8 Manager      what programs call
     9 Runner       the parent's side of the pipe
    10 Command line

Three sentences hold the design:

- The worker never opens the database; it gets its work and gives its results as
  frames, and only the runner writes what it has claimed.
- Only a transition changes a state, and only `Store.transition` makes one.
- Every write for a claimed process names the claim; a runner that lost it can no
  longer write.

Units: `*_at` is wall time in epoch seconds, `*_seconds` is a length.  Underscored
names stay in their room, plain names are for the rooms below, `__all__` is the
promise to users.  MIT licence.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import re
import sqlite3
import stat
import sys
import threading
import time
from collections import deque, namedtuple
from collections.abc import (
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from sqlite3 import Connection, Row

TYPE_CHECKING = False  # as in typing, whose import would cost each start 4 ms
if TYPE_CHECKING:
    import asyncio
    import logging
    import queue
    from typing import Any

    Json = dict[str, Any]

__version__ = "0.1.0"
__all__ = [
    "BadSpec",
    "BadType",
    "InterruptingProcessStep",
    "ManagedProcess",
    "NotFound",
    "NotUnique",
    "ProcessCancelled",
    "ProcessFailed",
    "ProcessInfo",
    "ProcessManager",
    "ProcessStep",
    "ProcmanError",
    "Runner",
    "StepError",
    "StepExecutor",
    "StorageError",
    "WaitTimeout",
    "WrongState",
    "current",
]

# ===========================================================================
# 1. Vocabulary: defaults with their reasons, errors, the JSON gate
# ===========================================================================
#
# Words and numbers that every room may use.  Knows no room.

BUSY_SECONDS = 10.0  # a command waits this long for the write lock, then exit 5
LOCK_SECONDS = 0.003  # a runner, which has workers to look after, so long at once
POLL_SECONDS = 1.0  # a runner looks this often, even if no doorbell rings
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
SPAWN_SECONDS = 60.0  # a worker that is not up by then is killed
LEAVE_SECONDS = 5.0  # a runner that ends waits so long for a busy database
KEEP_SECONDS = 30 * 86400.0  # final processes older than this are pruned
PRUNE_SECONDS = 3600.0  # ... by a waiting runner, this often
GROUP_SIZE = 64  # results that share one commit, and so one fsync
GROUP_SECONDS = 0.005  # ... and how late that may make the first of them
AHEAD_SECONDS = 0.02  # a worker is handed at most this much work at once
STALL_SECONDS = 0.05  # what waits behind a longer step is taken back
MIN_INTERVAL_SECONDS = 0.05  # from one run of a series to the next, at least
CLOCK_SECONDS = 1.0  # a clock that goes back further has been set: dues are recounted
MAX_DEDICATED = 64  # workers of their own that a runner has beside its pool
WORKER_SECONDS = 60.0  # a worker beyond the least number leaves when idle so long
MAX_CRASHES = 3  # a process that took so many runners along is an error
MAX_SPAWN_FAILURES = 5  # workers that never came up, in a row: the runner ends
MAX_STEPS = 10_000  # of one process
MAX_NAME = 200  # characters of a step's or a process's name
MAX_CRON = 1000  # characters; all minutes, hours and days in lists take 400
MAX_JSON_BYTES = 64 << 20  # of one process's data
MAX_JSON_DEPTH = 200  # of brackets; Python's own parser gives up near 1,000
MAX_FRAME_BYTES = MAX_JSON_BYTES + (16 << 20)  # of what a worker says at once
MAX_TRACEBACK = 16 << 10  # characters kept of one traceback
MAX_MESSAGE = 4 << 10  # characters kept of one error message
OUTPUT_HEAD_BYTES = 64 << 10  # what is kept of a process's output: the first ...
OUTPUT_TAIL_BYTES = 1 << 20  # ... and the last; the cut between is counted
OUTPUT_TRIM_BYTES = 4 << 20  # ... as soon as a running step's file is longer
WAL_BYTES = 4 << 20  # the write-ahead log is checkpointed when it is longer
WORKER_COMMAND = "worker"  # by which the runner starts a worker
GIVE_BACK = b'{"give_back":true}'  # what it says to have orders back
TOKEN_LENGTH = 16  # hex digits that name a runner's files
PID_LENGTH = 32  # hex digits of a pid ...
PID_PREFIX_LENGTH = 6  # ... and of the shortest prefix that may stand for it

# Exit codes of the command line, an interface.
DONE, FAILED, USAGE, NOT_FOUND, WRONG_STATE, STORAGE = 0, 1, 2, 3, 4, 5
INTERRUPTED_EXIT, TIMED_OUT_EXIT = 6, 124
BROKEN_PIPE_EXIT = 70  # of a worker that has lost its runner to a step


def _rebuild(kind: Any, args: Any, facts: Json) -> Exception:
    error: Exception = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class ProcmanError(Exception):
    """What procman refuses or reports; `exit_code` is the command line's."""

    exit_code = FAILED

    def __reduce__(self) -> Any:
        """For pickle: with its text and its facts, however it was made."""
        return _rebuild, (type(self), self.args, self.__dict__)


class BadSpec(ProcmanError, ValueError):
    """Steps, options or data that cannot be taken; the text names the place."""

    exit_code = USAGE


class BadType(BadSpec, TypeError):
    """The same, where the type is what is wrong."""


class NotFound(ProcmanError, LookupError):
    """No such process, or no database yet."""

    exit_code = NOT_FOUND


class WrongState(ProcmanError):
    """The process is not in a state from which this can happen."""

    exit_code = WRONG_STATE

    def __init__(self, pid: str, verb: str, status: str, sources: Iterable[str]):
        needs = " or ".join(sources)
        super().__init__(f"cannot {verb} process {pid}: it is {status}, needs {needs}")
        self.pid, self.verb, self.status = pid, verb, status


class NotUnique(WrongState):
    """There is an equal process already: `.pid`, of status `.status`."""

    def __init__(self, pid: str, status: str, reason: str):
        words = f"nothing started: {reason} {pid}, which is {status}"
        ProcmanError.__init__(self, words)
        self.pid, self.verb, self.status = pid, "start", status


class StorageError(ProcmanError):
    """The database is locked, full, damaged, replaced or not ours."""

    exit_code = STORAGE


class Busy(StorageError):
    """What may pass: another program holds the write lock, or the disk is full."""


class WaitTimeout(ProcmanError, TimeoutError):
    """The wait's own timeout passed; the process goes on."""

    exit_code = TIMED_OUT_EXIT


def shorten(text: str, limit: int) -> str:
    """`text` with its middle cut out when it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    half = max(1, limit // 2 - 8)
    return f"{text[:half]}[... {len(text) - 2 * half} cut ...]{text[-half:]}"


def quoted(value: Any) -> str:
    """A value from outside as it can stand in a message."""
    if isinstance(value, str):
        return repr(shorten(value, 60))
    try:
        return shorten(repr(value), 60)
    except Exception:  # a number of 5,000 digits, for one
        return f"this {type(value).__name__}"


def printable(text: str) -> str:
    """`text` with control characters escaped: output cannot steer a terminal."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda match: match.group().encode("unicode_escape").decode(),
        text.replace("\r\n", "\n"),
    )


def one_line(text: str) -> str:
    """The same, on one line: a message can forge no second one."""
    return printable(" ".join(text.splitlines()))


def _place(path: Any) -> str:
    """`data.rows[3].name`, from the linked pairs that `_check` hands down."""
    if isinstance(path, str):
        return path
    parent, key = path
    return _place(parent) + (
        f"[{key}]" if isinstance(key, int) else f".{shorten(key, 60)}"
    )


def _check(value: Any, path: Any, depth: int) -> None:
    """Refuse what JSON cannot carry from any system to any other and back."""
    if depth > MAX_JSON_DEPTH:
        raise BadSpec(f"{_place(path)[:99]} is nested deeper than {MAX_JSON_DEPTH}")
    if isinstance(value, str):
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise BadSpec(f"{_place(path)} has a lone surrogate: not valid Unicode")
    elif value is None or isinstance(value, bool):
        pass
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise BadSpec(f"{_place(path)} is an integer beyond 64 bits: use a string")
    elif isinstance(value, float):
        if not -1.8e308 < value < 1.8e308:
            raise BadSpec(f"{_place(path)} is {value}: JSON has no such number")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise BadType(f"{_place(path)} has the key {quoted(key)}: not a text")
            _check(key, (path, key), depth)
            _check(item, (path, key), depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, (path, index), depth + 1)
    else:
        kind = type(value).__name__
        raise BadType(f"{_place(path)} is a {kind}, which JSON cannot carry")


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(value: Any, where: str = "data") -> str:
    """The JSON text of `value`, or BadSpec/BadType naming the place in it.

    The one gate at every entrance: no NaN, no lone surrogates, no integer beyond
    64 bits, keys are strings, depth and size are bounded.
    """
    _check(value, where, 0)
    text = _encode(value)
    if len(text) * 4 > MAX_JSON_BYTES and len(text.encode()) > MAX_JSON_BYTES:
        raise BadSpec(f"{where} is larger than {MAX_JSON_BYTES >> 20} MiB")
    return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = iter(sorted(key for key, _ in pairs))
        before = next(names)
        for twice in names:
            if twice == before:
                break
            before = twice
        raise BadSpec(f"the key {quoted(twice)} stands twice in one object")
    return found


def from_json(text: str | bytes, where: str = "data") -> Any:
    """The value of a JSON text from outside, as strict as `to_json`."""
    try:
        if len(text) > MAX_JSON_BYTES:
            raise BadSpec(f"larger than {MAX_JSON_BYTES >> 20} MiB")
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise BadSpec(f"{where} is nested deeper than {MAX_JSON_DEPTH}") from None
    except ValueError as error:
        raise BadSpec(f"{where} is not valid JSON: {error}") from None
    _check(value, where, 0)
    return value


def expect(value: Any, where: str, kinds: Any, words: str) -> Any:
    """`value` if it is of these types (a bool is no number), else BadType."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise BadType(f"{where} must be {words}, not {type(value).__name__}")
    return value


def expect_object(value: Any, where: str = "data") -> Json:
    """`value` if it is a dict, which is what passes between steps."""
    found: Json = expect(value, where, dict, "a JSON object")
    return found


def expect_number(value: Any, where: str, low: float, high: float) -> Any:
    """`value` if it lies between the two; a whole number if `low` is one."""
    if isinstance(low, int):
        expect(value, where, int, "a whole number")
    if not low <= expect(value, where, (int, float), "a number") <= high:
        limits = " to ".join(
            f"{limit:g}" if isinstance(limit, float) else str(limit)
            for limit in (low, high)
        )
        raise BadSpec(f"{where} must be {limits}, not {quoted(value)}")
    return value


def expect_text(value: Any, where: str, limit: int = MAX_NAME) -> str:
    """`value` if it is a text that can stand on one line of a terminal."""
    text: str = expect(value, where, str, "a text")
    if not text or len(text) > limit or not text.isprintable():
        words = f"1 to {limit} printable characters"
        raise BadSpec(f"{where} must be {words}, not {quoted(text)}")
    return text


def timestamp(at: float | None) -> str | None:
    """Epoch seconds as 14 digits of UTC, `20220209125814`."""
    if at is None:
        return None
    try:
        return time.strftime("%Y%m%d%H%M%S", time.gmtime(at))
    except (ValueError, TypeError, OverflowError, OSError):  # no calendar has it
        return str(at)


def jitter() -> float:
    """From 0 to 1, another at each moment; the module `random` takes 1 ms to import."""
    return time.perf_counter_ns() % 997 / 997


def log() -> logging.Logger:
    """The logger of this library; what it shows is the application's choice."""
    import logging

    return logging.getLogger("procman")


# ===========================================================================
# 2. Model: states, transitions, options, step specs, records
# ===========================================================================
#
# Shapes and their checks.  No I/O, no clock.

QUEUED = "queued"
RUNNING = "running"
INTERRUPTED = "interrupted"
WAITING = "waiting"
FINISHED = "finished"
ERROR = "error"
TIMEOUT = "timeout"
CANCELLED = "cancelled"

OPEN_STATES = (QUEUED, RUNNING, INTERRUPTED, WAITING)
FINAL_STATES = (FINISHED, ERROR, TIMEOUT, CANCELLED)
STATES = OPEN_STATES + FINAL_STATES
STATE_GROUPS: dict[str, tuple[str, ...]] = {  # what a filter may name
    "open": OPEN_STATES,
    "final": FINAL_STATES,
    **{state: (state,) for state in STATES},
}

TRANSITIONS: dict[str, tuple[tuple[str, ...], str]] = {  # event: (from, to)
    "claim": ((QUEUED,), RUNNING),
    "give_back": ((RUNNING,), QUEUED),  # runner stopped: nothing charged
    "retry": ((RUNNING,), QUEUED),  # attempt + 1, due later
    "recover": ((RUNNING,), QUEUED),  # owner proved dead: crashes + 1
    "interrupt": ((RUNNING,), INTERRUPTED),
    "pause": ((RUNNING, QUEUED), INTERRUPTED),  # somebody asked for it
    "proceed": ((INTERRUPTED,), QUEUED),
    "finish": ((RUNNING, QUEUED, INTERRUPTED), FINISHED),  # no step left
    "fail": ((RUNNING, QUEUED), ERROR),  # queued: it can never be due
    "time_out": ((RUNNING,), TIMEOUT),
    "cancel": (OPEN_STATES, CANCELLED),
}

DEFAULT_QUEUE = "default"
_QUEUE = r"[A-Za-z0-9_.-]{1,64}"
_LENGTH = r"\s*([0-9]+(?:\.[0-9]+)?)([smhdw]?)\s*"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_MAX_LENGTH = 1e10  # seconds, 317 years: a longer one is a mistake
_SHORTEST = 0.001  # seconds that a timeout may be


def seconds(value: Any, where: str, least: float = 0.0) -> float:
    """A length in seconds, from a number or a text like `90s 5m 2h 1d`."""
    words = "seconds or a text like 90s, 5m, 2h, 1d"
    if isinstance(value, str):
        match = re.fullmatch(_LENGTH, value)
        if match is None:
            raise BadSpec(f"{where} must be {words}, not {quoted(value)}")
        value = float(match[1]) * _UNITS[match[2]]
    expect(value, where, (int, float), words)
    return float(expect_number(value, where, least, _MAX_LENGTH))


def check_concurrency(value: Any, where: str = "concurrency") -> dict[str, int]:
    """`{name: how many processes of that name may run at once}`."""
    for name, most in expect_object(value, where).items():
        expect_text(name, f"a name in {where}")
        expect_number(most, f"{where}.{quoted(name)}", 1, 2**31)
    if len(value) > 100:
        raise BadSpec(f"{where} has more than 100 names")
    return dict(value)


def check_queue(value: Any, where: str = "queue") -> str:
    """A queue's name: it becomes part of a file name, so it is kept plain."""
    if not re.fullmatch(_QUEUE, expect_text(value, where)):
        raise BadSpec(f"{where} may hold letters, digits and _.- only, not {value!r}")
    return str(value)


def _check_arguments(value: Any, where: str) -> Json:
    for key, item in expect_object(value, where).items():
        expect_text(key, f"a key of {where}")
        if isinstance(item, (dict, list, tuple)):
            raise BadType(f"{where}.{key} must be a text or a number")
    to_json(value, where)
    return dict(value)


def _choice(*words: str) -> Callable[[Any, str], str]:
    def check(value: Any, where: str) -> str:
        if value not in words:
            names = ", ".join(words)
            raise BadSpec(f"{where} must be one of {names}, not {quoted(value)}")
        return str(value)

    return check


def _between(low: float, high: float) -> Callable[[Any, str], Any]:
    return lambda value, where: expect_number(value, where, low, high)


def _check_timeout(value: Any, where: str) -> float:
    return seconds(value, where, _SHORTEST)


def _check_interval(value: Any, where: str) -> float:
    at_once = value in (-1, "-1") and not isinstance(value, bool)
    return -1.0 if at_once else seconds(value, where)


def _check_cron(value: Any, where: str) -> str:
    words = expect(value, where, str, "a text").split()  # a crontab may have tabs
    return expect_text(" ".join(words), where, MAX_CRON)


def _check_flag(value: Any, where: str) -> bool:
    return bool(expect(value, where, bool, "true or false"))


def check_new_pid(value: Any, where: str = "pid") -> str:
    """`value` if a new process may be named so."""
    text: str = expect(value, where, str, "a text")
    if not re.fullmatch(f"[0-9a-f]{{{PID_LENGTH}}}", text):
        words = f"{PID_LENGTH} lowercase hex digits"
        raise BadSpec(f"{where} must be {words}, not {quoted(value)}")
    return text


def _no_check(value: Any, where: str) -> Any:
    return value


class Option(namedtuple("Option", "default check shown help")):
    """One process option: its default (None: not set), the check that normalises it,
    and for the command line its metavar and help.
    """

    __slots__ = ()


OPTIONS: dict[str, Option] = {
    "name": Option(None, expect_text, "TEXT", "a name for people and filters"),
    "queue": Option(DEFAULT_QUEUE, check_queue, "NAME", "the queue it waits in"),
    "priority": Option(0, _between(-(2**31), 2**31), "N", "higher goes first"),
    "at": Option(  # read by `due_at`, which knows calendars
        None, _no_check, "TIME", "not before: epoch seconds, ISO 8601, 14 digits UTC"
    ),
    "delay": Option(None, seconds, "LENGTH", "not before so long from now"),
    "interval": Option(
        None, _check_interval, "LENGTH", "run again so long after; -1: at once"
    ),
    "interval_from": Option(
        "end", _choice("end", "start"), "end|start", "of the run before: what counts"
    ),
    # Both read by `next_cron`.
    "cron": Option(
        None, _check_cron, "TEXT", "run again whenever it says: five fields, @daily"
    ),
    "tz": Option("UTC", expect_text, "ZONE", "of cron, as in Europe/Berlin"),
    "timeout": Option(None, _check_timeout, "LENGTH", "end a longer attempt"),
    "retry": Option(0, _between(-1, 2**31), "N", "retries; -1: for ever"),
    "retry_interval": Option(300.0, seconds, "LENGTH", "before the first retry"),
    "backoff": Option(
        1.0, _between(1.0, 1000.0), "FACTOR", "each retry interval to the last"
    ),
    "on_lost": Option(
        "retry",
        _choice("retry", "ask", "error"),
        "retry|ask|error",
        "when the runner died in a step",
    ),
    "args": Option({}, _check_arguments, "JSON", "an object; --key value in sys.argv"),
    "dedicated": Option(False, _check_flag, "", "a worker of its own, beside the pool"),
    "once": Option(False, _check_flag, "", "an open equal one is returned instead"),
    "unique": Option(False, _check_flag, "", "an open equal one makes it an error"),
    "key": Option(None, expect_text, "TEXT", "once; equal is what has this key"),
    "pid": Option(None, check_new_pid, "PID", "32 hex digits, instead of chance"),
}
_DEFINING = (
    *("timeout", "retry", "retry_interval", "backoff", "on_lost", "args"),
    *("interval", "interval_from", "cron", "tz", "once", "unique"),
)
_WHEN = ("at", "delay")  # kept too where an equal one is looked for, to compare
OF_ONE_PROCESS = ("key", "pid")  # no defaults
EXCLUSIVE = (("at", "delay"), ("interval", "cron"), ("once", "unique"))


def check_options(options: Mapping[str, Any]) -> Json:
    """The options, normalised; None means not set.  Strict about names and types."""
    checked = {}
    for name, value in options.items():
        if name not in OPTIONS:
            known = ", ".join(sorted(OPTIONS))
            raise BadType(f"unknown option {quoted(name)}; known: {known}")
        if value is not None:
            checked[name] = OPTIONS[name].check(value, name)
    for pair in EXCLUSIVE:
        if all(checked.get(name, False) is not False for name in pair):
            raise BadSpec(f"give one of {' and '.join(pair)}, not both")
    return checked


def merge_options(defaults: Json, own: Json) -> Json:
    """The options of a process: its own, else the defaults; a value for each."""
    options = {**defaults, **own}
    for pair in EXCLUSIVE:
        for name, other in (pair, pair[::-1]):
            if own.get(name, False) is not False and other not in own:
                options[other] = OPTIONS[other].default
    if options["key"] is not None and not options["unique"]:
        options["once"] = True
    for name, needs in (("tz", "cron"), ("interval_from", "interval")):
        if name in own and options[needs] is None:
            raise BadSpec(f"{name} says nothing without {needs}")
    return options


def repeating(options: Mapping[str, Any]) -> bool:
    """Whether a run with these options is followed by another."""
    return any(options.get(name) is not None for name in ("interval", "cron"))


def check_defaults(options: Mapping[str, Any]) -> Json:
    """The same, of options for many processes."""
    expect(options, "defaults", Mapping, "a dict of options")
    for name in OF_ONE_PROCESS:
        if options.get(name) is not None:
            raise BadSpec(f"{name} names one process: it cannot be a default")
    return check_options(options)


_REFERENCE = r"(?s)(?:[^\W\d]\w*(?:\.[^\W\d]\w*)*|.+\.py):[^\W\d][\w.]*"


def check_reference(value: Any, where: str) -> None:
    """Refuse what cannot name code."""
    if not re.fullmatch(_REFERENCE, expect_text(value, where, 4096)):
        forms = "package.module:name or path/to/file.py:name"
        raise BadSpec(f"{where} must be {forms}, not {quoted(value)}")


def _check_string(value: Any, where: str) -> None:
    if "\0" in expect(value, where, str, "a text"):
        raise BadSpec(f"{where} has a NUL character")


def _check_strings(value: Any, where: str) -> None:
    for index, item in enumerate(
        expect(value, where, (list, tuple), "a list of texts")
    ):
        _check_string(item, f"{where}[{index}]")


def _check_command(value: Any, where: str) -> None:
    _check_strings(value, where)
    if not value or not value[0]:
        raise BadSpec(f"{where} is empty: name a program")


def _check_environment(value: Any, where: str) -> None:
    for name, item in expect_object(value, where).items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise BadSpec(f"{where} has {quoted(name)}: not a variable's name")
        if item is not None:
            _check_string(item, f"{where}.{name}")


_KEYS: dict[str, Callable[[Any, str], Any]] = {  # of step specs: their checks
    "class": check_reference,
    "factory": check_reference,
    "call": check_reference,
    "command": _check_command,
    "shell": _check_string,
    "args": lambda value, where: expect(value, where, (list, tuple), "a list"),
    "kwargs": expect_object,
    "services": _check_strings,
    "output": _choice("text", "json"),
    "timeout": _check_timeout,
    "interrupt": _check_flag,
    "env": _check_environment,
    "cwd": _check_string,
}
_COMMON = ("timeout", "interrupt", "env", "cwd")
_FORMS = {  # the key that names a form: what else it may have
    "class": ("args", "kwargs", "services", *_COMMON),
    "factory": ("args", "kwargs", "services", *_COMMON),
    "call": _COMMON,
    "command": ("output", *_COMMON),
    "shell": ("output", *_COMMON),
}


def check_step(spec: Any, where: str) -> None:
    """Refuse a bad step spec with its path in the JSON.

    Whether the code that it names exists is found when the step is reached.
    """
    if isinstance(spec, str):
        check_reference(spec, where)
        return
    if callable(spec):
        raise BadType(f"{where} must name its code, as in 'module:Name'")
    expect(spec, where, dict, "a text or a JSON object")
    forms = [key for key in spec if key in _FORMS]
    if len(forms) != 1:
        raise BadSpec(f"{where} needs exactly one of {', '.join(_FORMS)}")
    for key, value in spec.items():
        if key not in (forms[0], *_FORMS[forms[0]]):
            known = ", ".join(_FORMS[forms[0]])
            raise BadSpec(
                f"{where} has the unknown key {quoted(key)}; beside {forms[0]}: {known}"
            )
        _KEYS[key](value, f"{where}.{key}")


class ManagedProcess:
    """What to run: ordered named steps, and options (see OPTIONS).

    `steps` maps names to specs.  Bad ones raise BadSpec or BadType here, before
    anything is stored, with their path in the JSON.
    """

    def __init__(self, steps: Mapping[str, Any], **options: Any):
        expect_object(steps, "steps")
        if len(steps) > MAX_STEPS:
            raise BadSpec(f"steps has {len(steps)} steps, more than {MAX_STEPS}")
        for name, spec in steps.items():
            expect_text(name, "the name of a step")
            check_step(spec, f"steps.{name}")
        self.steps = dict(steps)
        self.text = to_json(self.steps, "steps")
        self.options = check_options(options)

    def __repr__(self) -> str:
        options = "".join(f", {name}={self.options[name]!r}" for name in self.options)
        return f"ManagedProcess({self.steps!r}{options})"


def ordered(text: str) -> str:
    """JSON text with the keys of all objects in order; 1 does not become 1.0."""
    return json.dumps(json.loads(text), sort_keys=True)


class Definition:
    """What stays the same over the life of a process, parsed once.

    `steps` is a list of (name, spec); `directory` is where `start` was called.
    """

    def __init__(self, text: str):
        content = json.loads(text)
        self.steps: list[tuple[str, Any]] = list(content["steps"].items())
        self.options: Json = content["options"]
        self.directory: str = content["directory"]
        self._orders: dict[int, str] = {}

    def check(self) -> None:
        """Refuse what nobody could have started: it was changed by hand."""
        check_options(expect_object(self.options, "options"))
        expect(self.directory, "directory", str, "a text")
        for name, spec in self.steps:
            check_step(spec, f"steps.{name}")

    @staticmethod
    def text(steps: str, options: Json, directory: str) -> str:
        """The text that is stored; equal processes share one.  `steps` is JSON text."""
        exclusive = options["once"] or options["unique"]
        kept = {
            name: options[name]
            for name in (*_DEFINING, *(_WHEN if exclusive else ()))
            if options[name] != OPTIONS[name].default
        }
        return (
            f'{{"steps":{steps},"options":{to_json(kept, "options")},'
            f'"directory":{to_json(directory, "the current directory")}}}'
        )

    def repeats(self) -> bool:
        """Whether a run is followed by another."""
        return repeating(self.options)

    def exclusive(self) -> bool:
        """Whether an equal process was looked for when it was started."""
        return "once" in self.options or "unique" in self.options

    def once_only(self) -> str:
        """The text of the same, but followed by no other run."""
        schedule = ("interval", "interval_from", "cron", "tz")
        options = {name: self.option(name) for name in OPTIONS}
        options.update((name, OPTIONS[name].default) for name in schedule)
        return self.text(to_json(dict(self.steps)), options, self.directory)

    def likeness(self) -> bytes:
        """The same bytes where the same steps, in order, run in the same directory."""
        return json.dumps([self.steps, self.directory], sort_keys=True).encode()

    def fingerprint(self, data: str) -> str:
        """What equal processes have in common where no key says so."""
        import hashlib

        content = self.likeness() + ordered(data).encode()
        return "=" + hashlib.sha256(content).hexdigest()

    def option(self, name: str) -> Any:
        """The value of an option, or its default."""
        return self.options.get(name, OPTIONS[name].default)

    def retry_left(self, attempt: int) -> int:
        """Retries that remain after `attempt`; -1: endless."""
        retry: int = self.option("retry")
        return retry if retry < 0 else max(0, retry - (attempt - 1))

    def step_name(self, index: int) -> str | None:
        """The name of a step, None past the last."""
        return self.steps[index][0] if 0 <= index < len(self.steps) else None

    def step_timeout(self, index: int) -> float | None:
        """Seconds that a step may take, None for any."""
        spec = self.steps[index][1]
        length = spec.get("timeout") if isinstance(spec, dict) else None
        return None if length is None else seconds(length, "timeout")

    def order(self, index: int) -> str:
        """What each order to run this step has in common, as JSON text."""
        if index not in self._orders:
            name, spec = self.steps[index]
            what = {"step": name, "index": index, "spec": spec}
            where = {"directory": self.directory, "args": self.option("args")}
            self._orders[index] = to_json({**what, **where})
        return self._orders[index]


KEY = "key "  # begins the `once_key` of what was started with a key


class Submission(
    namedtuple("Submission", "pid definition data options due_at due_from own once_key")
):
    """A process that is to be queued, checked: `definition` and `data` are texts.

    `due_from` is what `due_at` was counted from, None if it is a moment of the
    calendar; `own` are the options that are not defaults; `once_key` is what equal
    ones have too, None where it does not matter.
    """

    __slots__ = ()


class Demand(
    namedtuple(
        "Demand", "queues pid concurrency room dedicated most", defaults=(1, 1, None)
    )
):
    """What a runner would claim now.

    `room` processes for its pool, and `dedicated` that get a worker of their own, from
    these queues; or only `pid`; `most` in all, None for any.  `concurrency` maps names
    to how many may run at once.
    """

    __slots__ = ()

    def kinds(self) -> tuple[tuple[int, int], ...]:
        """(the column `dedicated`, how many) for both."""
        return (0, self.room), (1, self.dedicated)


class Held(
    namedtuple(
        "Held",
        "id pid claim attempt crashes step_index definition data deadline dedicated",
    )
):
    """A process as it was when this runner claimed it.

    `data` is the input of its step as JSON text; `deadline` is the monotonic time
    at which its timeout ends it, or None.
    """

    __slots__ = ()


class Outcome(
    namedtuple("Outcome", "ending data error printed", defaults=(None, None, None))
):
    """How one step ended, before anyone judged it.

    `ending` is done, interrupt, error, timeout, cancelled or stopped; `data` is JSON
    text, None to pass the input on; `printed` is a Printed, None for nothing.
    """

    __slots__ = ()


class Move(namedtuple("Move", "id columns claim", defaults=({}, None))):
    """What is to change in a process; `claim`: only if that is still its claim."""

    __slots__ = ()


class Settled(namedtuple("Settled", "held outcome event following")):
    """What an outcome has caused; `following` is what is to run now, or None."""

    __slots__ = ()


_FILTERS: dict[str, Callable[[Any, str], Any]] = {  # of what is listed: their checks
    "status": _choice(*STATE_GROUPS),
    "name": expect_text,
    "queue": expect_text,
    "since": _no_check,  # read by `parse_since`, which knows calendars
    "series": expect_text,
    "parent": expect_text,
}


def check_filters(filters: Mapping[str, Any]) -> Json:
    """Those that are given; raises BadType for one that does not exist."""
    for name in filters:
        if name not in _FILTERS:
            known = ", ".join(_FILTERS)
            raise BadType(f"unknown filter {quoted(name)}; known: {known}")
    return {
        name: _FILTERS[name](value, name)
        for name, value in filters.items()
        if value is not None
    }


def status_after(kind: str) -> str:
    """The status that an event of this kind leaves."""
    if kind in TRANSITIONS:
        return TRANSITIONS[kind][1]
    return QUEUED if kind == "start" else RUNNING


def event_record(row: Mapping[str, Any]) -> Json:
    """`{number, at, pid, kind, status, detail}` of a row of `event`."""
    kind, detail = row["kind"], row["detail"]
    if detail is not None and kind != "step":  # whose detail is the step's name
        detail = json.loads(detail)
    found = {name: row[name] for name in ("number", "at", "pid", "kind")}
    return {**found, "status": status_after(kind), "detail": detail}


def make_error(step: str | None, kind: str, message: str, **more: Any) -> Json:
    """A failure's record: `{step, type, message, traceback, exit_code, signal}`."""
    message = message.encode("utf-8", "backslashreplace").decode()
    record = {"step": step, "type": kind, "message": shorten(message, MAX_MESSAGE)}
    facts = ("traceback", "exit_code", "signal")
    return {**record, **{name: more.get(name) for name in facts}}


def read_progress(text: str | None) -> Json | None:
    """`{done, total, message}`, from the column."""
    if not text:
        return None
    found = expect_object(json.loads(text), "progress")
    for name in ("done", "total"):
        if found[name] is not None:
            expect_number(found[name], name, 0.0, 2**63)
    return {name: found[name] for name in ("done", "total", "message")}


_TIMES = ("created_at", "started_at", "finished_at", "due_at")


class ProcessInfo(
    namedtuple(
        "ProcessInfo",
        "pid name status created_at started_at finished_at due_at output error step"
        " steps progress attempt crashes retry_left queue priority timeout parent"
        " children series exit_code",
    )
):
    """A process as it was when it was read.

    Times are epoch seconds (in `to_json` 14 digits UTC), None before they happen.
    `output` is a dict once it is finished, and what waits while it is interrupted.
    `error` is `{step, type, message, traceback, exit_code, signal}`; `steps` maps
    each name to its state, in order (`queued`: not begun).
    """

    __slots__ = ()

    @classmethod
    def from_row(cls, row: Row, definition: Definition) -> ProcessInfo:
        """The record of a row of `process`, joined with its waiting data."""
        status, index = row["status"], row["step_index"]
        error = json.loads(row["error"]) if row["error"] else None
        states = [FINISHED] * index + [status]
        if status == INTERRUPTED and not error:  # the step before has been run
            states = [FINISHED] * (index - 1) + [INTERRUPTED] * min(index, 1)
        states += [QUEUED] * len(definition.steps)
        shows_data = status in (FINISHED, INTERRUPTED) and row["data"] is not None
        code = 0 if status == FINISHED else (error or {}).get("exit_code") or 1
        return cls(
            **{name: row[name] for name in ("pid", "name", "status", *_TIMES)},
            output=json.loads(row["data"]) if shows_data else None,
            error=error,
            step=definition.step_name(index),
            steps=dict(zip((name for name, _ in definition.steps), states)),
            progress=read_progress(row["progress"]),
            attempt=row["attempt"],
            crashes=row["crashes"],
            retry_left=definition.retry_left(row["attempt"]),
            queue=row["queue"],
            priority=row["priority"],
            timeout=definition.option("timeout"),
            parent=row["parent_pid"],
            children=None,
            series=row["series"],
            exit_code=code if status in FINAL_STATES else None,
        )

    def to_json(self) -> Json:
        """A dict for `json.dumps`, in the order that `status` prints."""
        return {
            **self._asdict(),
            **{name: timestamp(getattr(self, name)) for name in _TIMES},
        }


class ProcessFailed(ProcmanError):
    """A process that was waited for ended as error or timeout; see `.info`."""

    def __init__(self, info: ProcessInfo):
        error = info.error or {}
        super().__init__(
            f"process {info.pid} ended as {info.status} in step"
            f" {error.get('step')!r}: {error.get('type')}: {error.get('message')}"
        )
        self.info = info


class ProcessCancelled(ProcmanError):
    """A process that was waited for was cancelled; see `.info`."""

    def __init__(self, info: ProcessInfo):
        super().__init__(f"process {info.pid} was cancelled")
        self.info = info


def check_pid(pid: Any) -> str:
    """`pid` if it can be one, before it touches SQL or a path."""
    if not isinstance(pid, str):
        raise BadType(f"a pid must be a text, not {type(pid).__name__}")
    if not re.fullmatch(f"[0-9a-f]{{{PID_PREFIX_LENGTH},{PID_LENGTH}}}", pid):
        raise NotFound(
            f"no process {shorten(pid, 40)!r}: a pid is {PID_LENGTH} lowercase hex"
            f" digits, or {PID_PREFIX_LENGTH} and more of its first"
        )
    return pid


# ===========================================================================
# 3. Time: pure functions of a given now
# ===========================================================================
#
# When something is due, and what an outcome causes.  No clock, no chance, no I/O but
# the reading of time zone data.

_MAX_GROWN = 86400.0  # seconds
_CRON_YEARS = 41  # in which each date comes on each weekday, also around 2100
_CRON_END = 3e10  # epoch seconds, 2920: Windows knows no date after 3000


def parse_at(value: Any, where: str = "at") -> float:
    """Epoch seconds, from a number, ISO 8601 with zone, or 14 digits UTC."""
    import datetime

    if isinstance(value, (int, float)) and not isinstance(value, bool):
        moment = min(value, 1e300)
    elif isinstance(value, str):
        text = value.strip()
        # As seconds these would lie in 1970 or after the year 7000.
        if re.fullmatch("(19|2[0-9])([0-9]{6}|[0-9]{10})", text):
            raise BadSpec(
                f"{where} looks like a date of {len(text)} digits, {text}: write all"
                f" 14, as in {text:0<14}"
            )
        try:
            if re.fullmatch("[0-9]{14}", text):
                when = datetime.datetime.strptime(text + "+0000", "%Y%m%d%H%M%S%z")
            elif re.fullmatch(r"\d+(\.\d+)?", text):
                when = datetime.datetime.fromtimestamp(
                    float(text), datetime.timezone.utc
                )
            else:
                # Python reads a final Z from 3.11 on only.
                when = datetime.datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))
        except (ValueError, OverflowError, OSError):
            raise BadSpec(
                f"{where} must be epoch seconds, ISO 8601 with a zone or 14 digits"
                f" UTC, not {quoted(text)}"
            ) from None
        if when.tzinfo is None:
            form = text if len(text) > len("2022-02-09") else text + "T00:00"
            raise BadSpec(f"{where} has no time zone: write {form}Z or {form}+01:00")
        moment = when.timestamp()
    else:
        raise BadType(f"{where} must be a time, not {type(value).__name__}")
    if not 0 <= moment <= 253402300799:  # the last second with a four-digit year
        raise BadSpec(f"{where} must lie between 1970 and 9999, not {quoted(value)}")
    return float(moment)


# What matches, ascending, Sunday is 0; `meet` is what day-of-month and day-of-week
# must do together: all or any.
_Cron = namedtuple("_Cron", "minutes hours days months weekdays meet")
_Field = namedtuple("_Field", "name low high steps words")
_CRON_FIELDS = (
    _Field("minute", 0, 59, 60, ""),
    _Field("hour", 0, 23, 24, ""),
    _Field("day-of-month", 1, 31, 31, ""),
    _Field("month", 1, 12, 12, "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC"),
    _Field("day-of-week", 0, 7, 7, "SUN MON TUE WED THU FRI SAT"),
)
_CRON_PART = r"(?:\*|([0-9A-Za-z]+)(?:-([0-9A-Za-z]+))?)(?:/([0-9]+))?"
_CRON_NAMES = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0", "@daily": "0 0 * * *", "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}  # fmt: skip


def _cron_number(text: str, where: str, low: int, high: int, words: str = "") -> int:
    names = words.split()
    if text.upper() in names:
        return low + names.index(text.upper())
    if not re.fullmatch("[0-9]{1,2}", text) or not low <= int(text) <= high:
        limits = f"{low} to {high}" + (words and f" or {names[0]} to {names[-1]}")
        raise BadSpec(f"cron: {where} must be {limits}, not {quoted(text)}")
    return int(text)


def _cron_part(part: str, field: _Field) -> range:
    """The numbers of one part of a list: `*`, `5`, `1-5`, `*/2` or `1-5/2`."""
    name, low, high, steps, words = field
    match = re.fullmatch(_CRON_PART, part)
    if match is None:
        forms = "*, 5, 1-5, */2, 1-5/2 or a list of these with commas"
        raise BadSpec(f"cron: {name} must be {forms}, not {quoted(part)}")
    step = _cron_number(match[3] or "1", f"a step of {name}", 1, steps)
    if match[1] is None:
        return range(low, high + 1, step)
    first = last = _cron_number(match[1], name, low, high, words)
    if match[2]:
        last = _cron_number(match[2], name, low, high, words)
    elif match[3]:
        advice = f"{match[1]}-{high}/{match[3]}"
        raise BadSpec(f"cron: {name} {quoted(part)} has no range: write {advice}")
    if high == 7 and last == 0 < first:
        last = 7  # the Sunday that ends FRI-SUN
    if last < first:
        advice = f"{match[1]}-{high},{low}-{match[2]}"
        raise BadSpec(f"cron: {name} {quoted(part)} runs backwards: write {advice}")
    return range(first, last + 1, step)


def _cron_texts(expression: str) -> list[str]:
    if len(expect(expression, "cron", str, "a text")) > MAX_CRON:
        raise BadSpec(f"cron must be at most {MAX_CRON} characters long")
    texts = expression.split()
    if texts == ["@reboot"]:
        raise BadSpec("cron: '@reboot' is no time: have the system start procman")
    if texts and texts[0].startswith("@"):
        texts = _CRON_NAMES.get(" ".join(texts), "").split()
        if not texts:
            names = " ".join(_CRON_NAMES)
            raise BadSpec(f"cron must be one of {names}, not {quoted(expression)}")
    if len(texts) != len(_CRON_FIELDS):
        names = " ".join(field.name for field in _CRON_FIELDS)
        raise BadSpec(f"cron must have five fields ({names}), not {len(texts)}")
    return texts


def _read_cron(expression: str) -> _Cron:
    texts = _cron_texts(expression)
    minutes, hours, days, months, weekdays = (
        sorted({item for part in text.split(",") for item in _cron_part(part, field)})
        for text, field in zip(texts, _CRON_FIELDS)
    )
    # Vixie's cron looks at the first character alone: */2 and *,5 are stars, too.
    meet = all if "*" in (texts[2][0], texts[4][0]) else any
    return _Cron(minutes, hours, days, months, {day % 7 for day in weekdays}, meet)


def _zone(tz: Any) -> Any:
    """The tzinfo of an IANA name."""
    import datetime

    if tz is None or expect_text(tz, "tz") == "UTC":
        return datetime.timezone.utc
    import zoneinfo

    try:
        return zoneinfo.ZoneInfo(tz)
    except Exception:  # a KeyError, ValueError or OSError, by what bears that name
        raise BadSpec(
            f"tz: no data for the time zone {quoted(tz)}: install the package tzdata,"
            " or check the name"
        ) from None


def _cron_times(cron: _Cron, start: Any) -> Iterator[Any]:
    """The local times that match, ascending, from the day of `start` on."""
    from datetime import datetime

    years = range(start.year, start.year + _CRON_YEARS)
    for year, month in itertools.product(years, cron.months):
        first = datetime(year, month, 1).toordinal()
        end = datetime(year + month // 12, month % 12 + 1, 1).toordinal()
        for day in range(max(first, start.toordinal()), end):
            date = day - first + 1
            if not cron.meet((date in cron.days, day % 7 in cron.weekdays)):
                continue
            for hour, minute in itertools.product(cron.hours, cron.minutes):
                yield datetime(year, month, date, hour, minute)


def _local(at: float, zone: Any) -> Any:
    """What the clocks of a zone show, a datetime without zone."""
    from datetime import datetime

    return datetime.fromtimestamp(at, zone).replace(tzinfo=None)


def _instant(local: Any, zone: Any) -> float:
    """Epoch seconds at which clocks first show a local time, or leap over it."""
    early, late = (
        int(local.replace(tzinfo=zone, fold=fold).timestamp()) for fold in (1, 0)
    )
    if _local(late, zone) == local:
        return float(late)
    while late - early > 1:  # a gap: clocks show less at `early`, more at `late`
        middle = (early + late) // 2
        if _local(middle, zone) > local:
            late = middle
        else:
            early = middle
    return float(late)


def next_cron(expression: str, after: float, tz: str | None = None) -> float:
    """The first moment after `after` at which a cron expression is due.

    Both are epoch seconds; `tz` is an IANA name, None for UTC.  A local time that is
    left out when clocks go forward is due right after the gap; one that comes twice
    when they go back is due the first time.  Raises BadSpec or BadType.
    """
    cron, zone = _read_cron(expression), _zone(tz)
    expect_number(after, "after", 0.0, _CRON_END)
    start = _local(after, zone)
    # Instants ascend with local times, so what is earlier than `start` was due before.
    for local in _cron_times(cron, start):
        if local >= start and (at := _instant(local, zone)) > after:
            return at
    raise BadSpec(f"cron: {quoted(expression)} is never due")


def parse_since(value: Any, now: float) -> float:
    """Epoch seconds, from what `parse_at` reads or a text like `5m`: so long ago."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9.]+[smhdw]\s*", value):
        return now - seconds(value, "since")
    return parse_at(value, "since")


def first_due(options: Mapping[str, Any], now: float) -> tuple[float, float | None]:
    """From when on a new process may be claimed, and what that was counted from.

    None: from nothing, it is a moment of the calendar, and stays one whatever becomes
    of the clock.
    """
    at, cron = options["at"], options["cron"]
    due = now + (options["delay"] or 0) if at is None else parse_at(at)
    if cron is not None:  # what is due now and then is not due twice
        waits = at is not None or options["delay"] is not None
        start = max(now, due) - 0.001 if waits else due
        due = next_cron(cron, start, options["tz"])
    return due, now if at is None else None


def _cron_start(reached: float, now: float) -> float:
    """From when on to look for the next time, where a clock had `reached` a moment.

    What is set back by less than three hours makes no second run, as in Vixie's cron.
    """
    return reached if now < reached <= now + 3 * 3600 else now


def successor_due(
    option: Callable[[str], Any], now: float, started: float
) -> float:
    """When the run after one that has just ended is due: once, whatever was missed.

    `option` gives the options, `started` is when the run that ended was claimed.
    """
    if option("cron") is not None:
        after = _cron_start(started, now)
        return next_cron(option("cron"), after, option("tz"))
    interval: float = max(0.0, option("interval"))
    from_start = option("interval_from") == "start"
    then = started + interval if from_start else now + interval
    then = max(now, then, started + MIN_INTERVAL_SECONDS)
    return min(then, now + max(interval, MIN_INTERVAL_SECONDS))  # a clock set back


def counted_anew(
    option: Callable[[str], Any], row: Mapping[str, Any], now: float
) -> float:
    """When what is queued is due by a clock that has been set back to `now`."""
    if option("cron") is not None and row["started_at"] is None:
        after = _cron_start(row["due_from"], now)
        return next_cron(option("cron"), after, option("tz"))
    return now + max(0.0, float(row["due_at"] - row["due_from"]))


def retry_delay(attempt: int, interval: float, backoff: float, chance: float) -> float:
    """Seconds from the failure of `attempt` to the next; growth ends at a day.

    What grows gets up to a tenth more by `chance`, from 0 to 1, so that what failed
    together does not come again together.
    """
    if backoff == 1:
        return interval
    try:
        # As a float it ends in an OverflowError, as an int in no time that ends.
        grown = interval * float(backoff) ** (attempt - 1) * (1 + 0.1 * chance)
    except OverflowError:
        grown = _MAX_GROWN if interval else 0.0
    return max(interval, min(_MAX_GROWN, grown))


def event_after(ending: str, *, last: bool, retry_left: int) -> str:
    """What a step's ending causes: an event, or `step` where the process goes on."""
    if ending == "done":
        return "finish" if last else "step"
    if ending in ("error", "timeout") and retry_left:
        return "retry"
    return {
        "interrupt": "interrupt",
        "error": "fail",
        "timeout": "time_out",
        "cancelled": "cancel",
        "stopped": "give_back",
    }[ending]


def in_words(length: float) -> str:
    """A length for people: `42 s`, `5 min`, `3.5 h`, `2.1 days`."""
    for size, word in ((86400, "days"), (3600, "h")):
        if length >= 2 * size:
            return f"{length / size:.1f} {word}"
    return f"{length / 60:.0f} min" if length >= 120 else f"{length:.0f} s"


def poll_delay(waited: float) -> float:
    """Seconds before who has waited so long looks again: a sixteenth of that.

    So looking makes no wait much longer, nor costs much: 0.1 ms at first, 50 ms in
    the end.
    """
    return min(0.05, max(0.0001, waited / 16))


def lock_delay(tries: int, chance: float) -> float:
    """Seconds before the next try for a lock; `chance` from 0 to 1.

    SQLite's own busy handler sleeps ever longer and starves beside a busy writer: short
    sleeps of uneven length do not.  They grow from 0.2 to 8 ms, or fifty who wait would
    take the time of the one who writes.
    """
    return min(0.008, 0.0002 * 1.5 ** min(tries, 12)) * (0.5 + chance)


# ===========================================================================
# 4. Platform: what differs between systems
# ===========================================================================
#
# The only room that asks which system this is: locks, trees of processes, private
# files, signals.  Both sides of the fork have the same names in the same order.

TREE_VARIABLE = "PROCMAN_TREE"  # in the environment of all that a worker starts
PIPE_BYTES = 1 << 16  # read at once from a command's pipe
SILENCE_SECONDS = 0.2  # a pipe that outlives its command is left when it is silent ...
LINGER_SECONDS = 2.0  # ... and in the end whatever still comes
Sink = Callable[[bytes], None]

if sys.platform == "win32":
    import msvcrt

    def try_lock(fd: int) -> bool:
        """Lock an open file for this process's life, or say at once that it is held."""
        os.lseek(fd, 0, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def boot_id() -> str:
        """The same text until the machine starts anew."""
        import ctypes

        ticks = ctypes.windll.kernel32.GetTickCount64
        ticks.restype = ctypes.c_ulonglong
        return str(round(time.time() - ticks() / 1000, -2))

    def spawn_options() -> Json:
        """For a child that a Ctrl-C meant for its parent does not reach."""
        import subprocess

        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}

    def start_time(os_pid: int) -> str:
        """What tells a process from a later one with its number (not needed here)."""
        return ""

    def _kernel() -> Any:
        import ctypes
        from ctypes import wintypes

        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        for name in ("CreateJobObjectW", "OpenJobObjectW", "OpenProcess"):
            getattr(kernel, name).restype = wintypes.HANDLE
        return kernel

    def _active(job: Any) -> int:
        """How many processes a job object has."""
        import ctypes

        # JOBOBJECT_BASIC_ACCOUNTING_INFORMATION; ActiveProcesses lies 40 bytes in.
        counts = (ctypes.c_ulong * 12)()
        size = ctypes.sizeof(counts)
        _kernel().QueryInformationJobObject(job, 1, ctypes.byref(counts), size, None)
        return int(counts[10])

    class Tree:
        """A worker and all that it started: a job object that dies with its owner."""

        def __init__(self, os_pid: int, token: str):
            import ctypes
            from ctypes import wintypes

            kernel = _kernel()
            # JOBOBJECT_EXTENDED_LIMIT_INFORMATION, of which one flag matters here:
            # LimitFlags, 16 bytes in, gets JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE.
            limits = (ctypes.c_ulong * 36)()
            limits[4] = 0x2000
            size = ctypes.sizeof(limits)
            self._job: Any = wintypes.HANDLE(kernel.CreateJobObjectW(None, token))
            kernel.SetInformationJobObject(self._job, 9, ctypes.byref(limits), size)
            # PROCESS_SET_QUOTA and PROCESS_TERMINATE, as AssignProcess... wants.
            process = wintypes.HANDLE(kernel.OpenProcess(0x0101, False, os_pid))
            kernel.AssignProcessToJobObject(self._job, process)
            kernel.CloseHandle(process)

        def alive(self) -> bool:
            """Whether anything of it is left."""
            return _active(self._job) > 0

        def terminate(self) -> None:
            """Windows knows no polite request to a tree: the same as `kill`."""
            self.kill()

        def kill(self) -> None:
            """End all of it at once."""
            _kernel().TerminateJobObject(self._job, 1)

        def close(self) -> None:
            """Forget it; what is left of it ends."""
            _kernel().CloseHandle(self._job)

    def kill_stray(os_pid: int, born: str, token: str) -> None:
        """A dead runner's workers: its job objects have ended them already."""

    _own_job: tuple[Any, int] | None = None  # with as many processes as it began with

    def adopt_orphans() -> None:
        """Be able to see what is started below here: by the worker's job object."""
        global _own_job
        from ctypes import wintypes

        token = os.environ.get(TREE_VARIABLE)
        if token:
            job = wintypes.HANDLE(_kernel().OpenJobObjectW(0x0004, False, token))
            _own_job = (job, _active(job))

    def children_left() -> bool:
        """Whether this process has started what still runs."""
        return _own_job is not None and _active(_own_job[0]) > _own_job[1]

    def kill_children() -> None:
        """End what this process has started: its job object does, with the runner."""

    def private_file(path: str, flags: int) -> int:
        """Open a file that nobody else may read; return its descriptor."""
        if flags & os.O_APPEND:
            # The C library's O_APPEND is not the system's: a child would overwrite.
            import _winapi

            # FILE_APPEND_DATA and SYNCHRONIZE; shared for all; opened or made.
            handle = _winapi.CreateFile(path, 0x00100004, 7, 0, 4, 0x80, 0)
            return msvcrt.open_osfhandle(handle, os.O_APPEND | os.O_BINARY)
        return os.open(path, flags | os.O_BINARY | os.O_NOINHERIT, 0o600)

    def write_at(fd: int, content: bytes, offset: int) -> int:
        """Write there, wherever the file's own position is; how many bytes it took."""
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, content)

    def converse(child: Any, data: bytes, sinks: Iterable[Sink]) -> int:
        """Give a child its input, and each sink what comes from stdout and stderr.

        Returns the exit code.  Not to the end of the pipes, which a grandchild may
        hold open for ever: until the child has ended and no more comes for a while.
        """
        left = threading.Event()

        def feed() -> None:
            with contextlib.suppress(OSError, ValueError):  # it need not read it
                child.stdin.write(data)
                child.stdin.close()

        def listen(pipe: Any, sink: Sink, heard: threading.Event) -> None:
            with contextlib.suppress(OSError, ValueError), pipe:
                while chunk := os.read(pipe.fileno(), PIPE_BYTES):
                    if left.is_set():
                        break
                    sink(chunk)
                    heard.set()

        threading.Thread(target=feed, daemon=True).start()
        listeners = []
        for pipe, sink in zip((child.stdout, child.stderr), sinks):
            ends = (pipe, sink, threading.Event())
            thread = threading.Thread(target=listen, args=ends, daemon=True)
            thread.start()
            listeners.append((thread, ends[-1]))
        code: int = child.wait()
        leave_at = time.monotonic() + LINGER_SECONDS
        for thread, heard in listeners:
            while thread.is_alive() and time.monotonic() < leave_at:
                heard.clear()
                thread.join(SILENCE_SECONDS)
                if not heard.is_set():
                    break
        left.set()
        return code

    def unsafe(path: str, *, directory: bool = False) -> str | None:
        """Why this path must not be trusted, None if nothing speaks against it."""
        if os.path.islink(path):
            return "is a symbolic link"
        if not directory and os.path.exists(path) and not os.path.isfile(path):
            return "is not a regular file"
        return None

    def traces() -> Any:
        """What a step may leave in its worker that would harm the next one's."""
        import signal

        return signal.getsignal(signal.SIGTERM)

    def stop_signals() -> tuple[int, ...]:
        """The signals that ask a runner to stop."""
        import signal

        return (signal.SIGINT, signal.SIGBREAK, signal.SIGTERM)

    def enable_escapes() -> None:
        """Have the terminal understand escape sequences."""
        kernel = _kernel()
        # STD_OUTPUT_HANDLE; processed output and virtual terminal processing.
        kernel.SetConsoleMode(kernel.GetStdHandle(-11), 0x0005)

else:

    def try_lock(fd: int) -> bool:
        """Lock an open file for this process's life, or say at once that it is held."""
        import fcntl

        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def boot_id() -> str:
        """The same text until the machine starts anew."""
        try:
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                return file.read().strip()
        except OSError:
            return _ask("sysctl", "-n", "kern.bootsessionuuid")

    def spawn_options() -> Json:
        """For a child that leads a session of its own."""
        return {"start_new_session": True}

    def _ask(*command: str) -> str:
        """What a system's tool says, where there is no /proc."""
        import subprocess

        try:
            return subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "LC_ALL": "C", "TZ": "UTC0"},
                check=False,
            ).stdout.decode("utf-8", "replace")
        except OSError:
            return ""

    def _status_fields(os_pid: int) -> list[str]:
        """The third and later fields of /proc/PID/stat; [] if it is gone."""
        try:
            with open(f"/proc/{os_pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].decode().split()
        except OSError:
            return []

    def _processes() -> dict[int, tuple[int, int]]:
        """{os_pid: (parent, session or group)} of all that run here, less the dead."""
        found = {}
        if not os.path.isdir("/proc/self"):
            for line in _ask("ps", "-A", "-o", "pid=,ppid=,pgid=,stat=").splitlines():
                fields = line.split()
                if len(fields) == 4 and not fields[3].startswith("Z"):
                    found[int(fields[0])] = (int(fields[1]), int(fields[2]))
            return found
        for entry in os.listdir("/proc"):
            fields = _status_fields(int(entry)) if entry.isdigit() else []
            if fields and fields[0] not in "ZX":
                found[int(entry)] = (int(fields[1]), int(fields[3]))
        return found

    def _carries(os_pid: int, token: str) -> bool:
        """Whether a process has inherited a worker's token (Linux only)."""
        if not token:
            return False
        try:
            with open(f"/proc/{os_pid}/environ", "rb") as file:
                return f"{TREE_VARIABLE}={token}\0".encode() in file.read()
        except OSError:
            return False

    def _members(os_pid: int | None, token: str) -> list[int]:
        """A worker and what it started, also what has left its parent or session.

        `os_pid` None: by the token alone.  In a container much has session 0.
        """
        table = _processes()
        tree = {
            member
            for member, (_, session) in table.items()
            if (os_pid and os_pid in (member, session)) or _carries(member, token)
        }
        grown = True
        while grown:
            below = {member for member, (parent, _) in table.items() if parent in tree}
            grown = not below <= tree
            tree |= below
        return sorted(tree - {os.getpid()})

    def _signal_all(members: Iterable[int], number: int) -> None:
        for member in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(member, number)

    def _kill_members(os_pid: int | None, token: str) -> None:
        import signal

        for _ in range(20):  # what forks while it is looked at is seen the next time
            members = _members(os_pid, token)
            if not members:
                return
            _signal_all(members, signal.SIGKILL)
            time.sleep(0.001)

    def start_time(os_pid: int) -> str:
        """What tells a process from a later one with its number; '' if it is gone."""
        if os.path.isdir("/proc/self"):
            return "".join(_status_fields(os_pid)[19:20])
        return _ask("ps", "-o", "lstart=", "-p", str(os_pid)).strip()

    class Tree:
        """A worker and all that it started."""

        def __init__(self, os_pid: int, token: str):
            self._os_pid, self._token = os_pid, token

        def alive(self) -> bool:
            """Whether anything of it is left."""
            return bool(_members(self._os_pid, self._token))

        def terminate(self) -> None:
            """Ask all of it to end: SIGTERM."""
            import signal

            _signal_all(_members(self._os_pid, self._token), signal.SIGTERM)

        def kill(self) -> None:
            """End all of it at once: SIGKILL."""
            _kill_members(self._os_pid, self._token)

        def close(self) -> None:
            """Forget it."""

    def kill_stray(os_pid: int, born: str, token: str) -> None:
        """End what is left of a dead runner's worker, never by its number alone."""
        own = bool(born) and start_time(os_pid) == born
        _kill_members(os_pid if own else None, token)

    def adopt_orphans() -> None:
        """Be the parent of what daemonises below here, where the system can (Linux)."""
        if os.path.isdir("/proc/self"):
            import ctypes

            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER

    def children_left() -> bool:
        """Whether this process has started what still runs; the dead are reaped."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return False
        return True

    def kill_children() -> None:
        """End what this process has started, and what that has started."""
        _kill_members(os.getpid(), os.environ.get(TREE_VARIABLE, ""))

    def private_file(path: str, flags: int) -> int:
        """Open a file that nobody else may read; return its descriptor."""
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    write_at = os.pwrite

    def _writes(pipe: Any, data: bytes) -> Callable[[], bool]:
        """What writes as much as a pipe has room for, and says whether that is all."""
        rest = memoryview(data)
        os.set_blocking(pipe.fileno(), False)

        def write() -> bool:
            nonlocal rest
            try:
                rest = rest[os.write(pipe.fileno(), rest) :]
            except BlockingIOError:
                return False
            except OSError:  # its reader need not read it
                return True
            return not rest

        return write

    def _reads(pipe: Any, sink: Sink) -> Callable[[], bool]:
        """What hands on what a pipe has, and says whether that was all."""

        def read() -> bool:
            chunk = os.read(pipe.fileno(), PIPE_BYTES)
            if chunk:
                sink(chunk)
            return not chunk

        return read

    def converse(child: Any, data: bytes, sinks: Iterable[Sink]) -> int:
        """Give a child its input, and each sink what comes from stdout and stderr.

        Returns the exit code.  Not to the end of the pipes, which a grandchild may
        hold open for ever: until the child has ended and no more comes for a while.
        """
        import selectors

        write, leave_at = _writes(child.stdin, data), float("inf")
        with selectors.PollSelector() as pipes, child.stdin, child.stdout, child.stderr:
            pipes.register(child.stdin, selectors.EVENT_WRITE, write)
            for pipe, sink in zip((child.stdout, child.stderr), sinks):
                pipes.register(pipe, selectors.EVENT_READ, _reads(pipe, sink))
            while pipes.get_map():
                ended = child.poll() is not None  # before what it printed is looked for
                ready = pipes.select(SILENCE_SECONDS)
                for key in [key for key, _ in ready if key.data()]:
                    pipes.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
                if ended:
                    leave_at = min(leave_at, time.monotonic() + LINGER_SECONDS)
                    if not ready or time.monotonic() > leave_at:
                        break
        return child.wait()  # type: ignore[no-any-return]

    def unsafe(path: str, *, directory: bool = False) -> str | None:
        """Why this path must not be trusted, None if nothing speaks against it."""
        try:
            found = os.stat(path) if directory else os.lstat(path)
        except FileNotFoundError:
            return None
        if stat.S_ISLNK(found.st_mode):
            return "is a symbolic link"
        if not directory and not stat.S_ISREG(found.st_mode):
            return "is not a regular file"
        if not directory and found.st_nlink > 1:
            return "has a second name (a hard link)"
        if found.st_uid != os.geteuid() and not (directory and found.st_uid == 0):
            return f"belongs to another user (uid {found.st_uid})"
        if found.st_mode & 0o022:
            mode = stat.S_IMODE(found.st_mode)
            return f"may be written by others (mode {mode:o}; chmod go-w helps)"
        return None

    def traces() -> Any:
        """What a step may leave in its worker that would harm the next one's."""
        # `signal` makes enums of the answers, which takes 10 µs.
        import _signal  # type: ignore[import-not-found]
        import resource

        umask = os.umask(0o077)
        os.umask(umask)
        alarm = any(_signal.getitimer(_signal.ITIMER_REAL))
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        return umask, alarm, files, _signal.getsignal(_signal.SIGTERM)

    def stop_signals() -> tuple[int, ...]:
        """The signals that ask a runner to stop."""
        import signal

        return (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def enable_escapes() -> None:
        """A terminal understands them."""


def end_by_sigterm() -> None:
    """End this process as if it had never handled SIGTERM."""
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def signal_name(number: int) -> str:
    """`SIGKILL` for 9."""
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class LockFile:
    """A file whose lock says that its holder lives; it ends with the process.

    Raises StorageError if the file is not ours to trust.
    """

    def __init__(self, path: str):
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> bool:
        """Take the lock; False if somebody holds it."""
        reason = unsafe(self.path)
        if reason:
            raise StorageError(f"the lock {self.path} {reason}: remove it")
        try:
            fd = private_file(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise StorageError(f"the lock {self.path}: {error.strerror}") from None
        try:
            taken = try_lock(fd)
        except OSError as error:  # a file system without locks
            os.close(fd)
            raise StorageError(f"the lock {self.path}: {error.strerror}") from None
        if not taken:
            os.close(fd)
            return False
        if not os.fstat(fd).st_nlink:  # removed before we had it: no lock of that name
            os.close(fd)
            return self.acquire()
        self._fd = fd
        return True

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back; with `remove` the file goes too."""
        if self._fd is None:
            return
        removed = not remove
        with contextlib.suppress(OSError):
            if remove:  # while it is held, so that nobody can hold the next one
                os.unlink(self.path)
                removed = True
        os.close(self._fd)
        self._fd = None
        if not removed:  # where an open file cannot be removed
            with contextlib.suppress(OSError):
                os.unlink(self.path)


class Printed(namedtuple("Printed", "head cut tail", defaults=(b"", 0, b""))):
    """What was printed: the first bytes, how many were cut out, the last ones."""

    __slots__ = ()

    def after(self, skip: int = 0) -> bytes:
        """What comes after so many bytes, with a note where some are missing."""
        gap = self.cut - max(0, skip - len(self.head))
        note = b"\n[... %d bytes cut ...]\n" % gap if gap > 0 else b""
        shown: bytes = (
            self.head[skip:]
            + note
            + self.tail[max(0, skip - len(self.head) - self.cut) :]
        )
        return shown

    def total(self) -> int:
        """How many bytes were printed."""
        return len(self.head) + int(self.cut) + len(self.tail)

    def plus(self, more: Printed) -> Printed:
        """This and then that, within the limits."""
        if not self.tail and not self.cut:  # the head may still grow
            both = self.head + more.head
            head, rest = both[:OUTPUT_HEAD_BYTES], both[OUTPUT_HEAD_BYTES:]
        else:
            head, rest = self.head, self.tail + more.head
        if more.cut:
            rest, cut = more.tail, self.cut + len(rest) + more.cut
        else:
            rest, cut = rest + more.tail, self.cut
        over = max(0, len(rest) - OUTPUT_TAIL_BYTES)
        return Printed(head, cut + over, rest[over:])


class OutputFile:
    """What a worker's step prints, in a private file that `trim` keeps short.

    Its first line says whose it is, and how many bytes `trim` has cut out.
    """

    def __init__(self, path: str):
        self.path = path
        self._fd = -1
        self._first_line = b""
        self._size_read = 0

    def create(self) -> int:
        """Make the file; return a descriptor that appends, for the child."""
        self.remove()
        return private_file(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def begin(self, owner: str) -> None:
        """Start anew for the next step."""
        with contextlib.suppress(OSError):  # a full disk stops no step
            if self._fd < 0:  # beside the one that appends and may do no more
                self._fd = private_file(self.path, os.O_RDWR)
            self._first_line = self._line(owner, 0)
            if os.fstat(self._fd).st_size != len(self._first_line):
                os.ftruncate(self._fd, 0)
            write_at(self._fd, self._first_line, 0)

    @staticmethod
    def _line(owner: str, cut: int) -> bytes:
        return f"{owner} {cut:020d}\n".encode()

    def has_some(self) -> bool:
        """Whether anything was printed since `begin`."""
        with contextlib.suppress(OSError):
            return os.fstat(self._fd).st_size > len(self._first_line)
        return False

    def read(self) -> tuple[str, Printed]:
        """(owner, what it has printed so far)."""
        try:
            with open(self.path, "rb") as file:
                owner, _, cut = file.readline(200).decode("latin-1").rpartition(" ")
                head = file.read(OUTPUT_HEAD_BYTES)
                start, self._size_read = file.tell(), os.fstat(file.fileno()).st_size
                file.seek(max(start, self._size_read - OUTPUT_TAIL_BYTES))
                skipped = file.tell() - start
                # A step that prints fast has no end to read to.
                tail = file.read(OUTPUT_TAIL_BYTES)
                return owner, Printed(head, int(cut) + skipped, tail)
        except (OSError, ValueError):  # gone, or not begun
            return "", Printed()

    def all(self) -> bytes:
        """The whole of a short file: what a worker says that never came up."""
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            return file.read(OUTPUT_HEAD_BYTES)
        return b""

    def size(self) -> int:
        """Bytes in the file."""
        with contextlib.suppress(OSError):
            return os.stat(self.path).st_size
        return 0

    def trim(self) -> None:
        """Cut the middle out of a file that has grown long."""
        if self.size() <= OUTPUT_TRIM_BYTES:
            return
        owner, printed = self.read()
        with contextlib.suppress(OSError):
            fd = private_file(self.path, os.O_WRONLY)
            try:
                # In this order a reader finds the first line at any moment.
                line = self._line(owner, printed.cut)
                kept = write_at(fd, line + printed.head + printed.tail, 0)
                grown = os.fstat(fd).st_size
                os.ftruncate(fd, kept)  # at once: what comes between is not counted
                more = grown - self._size_read  # printed since it was read
                write_at(fd, self._line(owner, printed.cut + more), 0)
            finally:
                os.close(fd)

    def remove(self) -> None:
        """Delete it."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)


# ===========================================================================
# 5. Store: schema, transactions, every read, write and transition
# ===========================================================================
#
# The only room with SQL.  A method that takes `db` never commits.  Knows nothing
# of workers, pipes or signals.

APPLICATION_ID = 0x70726D6E  # "prmn", in the header of the file
SCHEMA_VERSION = 2
_INDEXES = (
    # The name stands in it for those that are passed over: see `Records.full`.
    """
    CREATE INDEX process_due
        ON process (dedicated, priority, queue, due_at, id, name)
     WHERE status = 'queued'""",
    """
    CREATE INDEX process_once ON process (once_key)
     WHERE once_key IS NOT NULL AND finished_at IS NULL""",
    "CREATE INDEX process_series ON process (series) WHERE series IS NOT NULL",
    "CREATE INDEX process_retry ON process (retry_of) WHERE retry_of IS NOT NULL",
    "CREATE INDEX process_parent ON process (parent) WHERE parent IS NOT NULL",
    """
    CREATE INDEX definition_likeness ON definition (likeness)
     WHERE likeness IS NOT NULL""",
)
SCHEMA: tuple[str, ...] = (
    """
    CREATE TABLE definition (       -- what equal processes share
        id   INTEGER PRIMARY KEY AUTOINCREMENT, -- never used again: it is cached
        hash INTEGER NOT NULL,      -- CRC-32 of the text, to find it by
        text TEXT NOT NULL,         -- JSON: steps, options, directory of the caller
        likeness INTEGER            -- CRC-32 of what once compares, or NULL
    )""",
    "CREATE INDEX definition_hash ON definition (hash)",
    """
    CREATE TABLE process (
        id          INTEGER PRIMARY KEY,            -- in the order of submission
        pid         TEXT NOT NULL UNIQUE,           -- 32 hex digits
        definition  INTEGER NOT NULL REFERENCES definition,
        status      TEXT NOT NULL,                  -- written by transition only
        queue       TEXT NOT NULL,
        priority    INTEGER NOT NULL,               -- higher goes first
        due_at      REAL NOT NULL,                  -- not to be claimed before
        created_at  REAL NOT NULL,
        started_at  REAL,                           -- of the first claim
        finished_at REAL,                           -- of the final state
        step_index  INTEGER NOT NULL DEFAULT 0,     -- first step not yet done
        attempt     INTEGER NOT NULL DEFAULT 1,     -- 1 + the retries used
        crashes     INTEGER NOT NULL DEFAULT 0,     -- runners that died with it
        claim       INTEGER NOT NULL DEFAULT 0,     -- fence: grows with every claim
        runner      INTEGER,                        -- who claimed it, while running
        cancel_requested INTEGER NOT NULL DEFAULT 0, -- a wish: 1 this run, 2 its series
        name        TEXT,
        progress    TEXT,                           -- JSON: done, total, message
        error       TEXT,                           -- JSON: the last failure
        due_from    REAL,                           -- due_at is so much later; or NULL
        dedicated   INTEGER NOT NULL DEFAULT 0,     -- has a worker of its own
        pause_requested INTEGER NOT NULL DEFAULT 0, -- a wish to its runner
        once_key    TEXT,                           -- equal processes have the same
        series      TEXT,                           -- pid of the first run
        retry_of    INTEGER,                        -- id of the process it repeats
        parent      INTEGER                         -- id of the process it is part of
    )""",
    *_INDEXES,
    # All states but the two in which nearly every process is found.
    """
    CREATE INDEX process_rest ON process (status)
     WHERE status = 'running' OR status = 'interrupted' OR status = 'waiting'
        OR status = 'error' OR status = 'timeout' OR status = 'cancelled'""",
    "CREATE INDEX process_definition ON process (definition)",
    """
    CREATE TRIGGER process_final BEFORE UPDATE ON process
      WHEN OLD.finished_at IS NOT NULL
     BEGIN SELECT RAISE(ABORT, 'a final process never changes'); END""",
    """
    CREATE TABLE data (             -- the input of each step, as JSON text; the one
        process    INTEGER NOT NULL, -- past the last is the output; -1: see `proceed`
        step_index INTEGER NOT NULL,
        data       TEXT NOT NULL,
        PRIMARY KEY (process, step_index)
    ) WITHOUT ROWID""",
    """
    CREATE TABLE output (           -- what the steps printed
        process INTEGER PRIMARY KEY,
        head    BLOB NOT NULL,      -- the first bytes
        cut     INTEGER NOT NULL,   -- how many lay between
        tail    BLOB NOT NULL       -- the last bytes
    )""",
    """
    CREATE TABLE event (            -- what happened, in order
        number  INTEGER PRIMARY KEY,
        process INTEGER NOT NULL,
        at      REAL NOT NULL,
        kind    TEXT NOT NULL,      -- a key of TRANSITIONS, or start, step, progress
        detail  TEXT
    )""",
    "CREATE INDEX event_process ON event (process)",
    """
    CREATE TABLE runner (
        id         INTEGER PRIMARY KEY AUTOINCREMENT, -- never used again
        token      TEXT NOT NULL,   -- names its files; <token>.lock is held for life
        os_pid     INTEGER NOT NULL,
        boot       TEXT NOT NULL,   -- the machine's start it lived in
        started_at REAL NOT NULL,
        queues     TEXT NOT NULL,   -- comma-separated
        waits      INTEGER NOT NULL, -- whether it stays, and so holds the lock for them
        port       INTEGER,         -- of its doorbell: UDP on the loopback
        concurrency TEXT            -- JSON: how many of a name it lets run at once
    )""",
    """
    CREATE TABLE worker (           -- children of a runner that may outlive it
        runner INTEGER NOT NULL REFERENCES runner ON DELETE CASCADE,
        os_pid INTEGER NOT NULL,
        born   TEXT NOT NULL,       -- start time: the number alone proves nothing
        token  TEXT NOT NULL        -- in the environment of all that it started
    )""",
)
MIGRATIONS: dict[int, tuple[str, ...]] = {  # version: statements that lead to it
    2: (
        "ALTER TABLE definition ADD COLUMN likeness INTEGER",
        # Nothing new shares those whose likeness is not known.
        "UPDATE definition SET hash = -1",
        "ALTER TABLE process ADD COLUMN due_from REAL",
        "ALTER TABLE process ADD COLUMN dedicated INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE process ADD COLUMN pause_requested INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE process ADD COLUMN once_key TEXT",
        "ALTER TABLE process ADD COLUMN series TEXT",
        "ALTER TABLE process ADD COLUMN retry_of INTEGER",
        "ALTER TABLE process ADD COLUMN parent INTEGER",
        "ALTER TABLE runner ADD COLUMN concurrency TEXT",
        "DROP INDEX process_due",
        *_INDEXES,
    ),
}

# These may lose a commit when a checkpoint overlaps a reset of the log
# (https://sqlite.org/wal.html, "The WAL-Reset Bug"); see `Store.checkpoint`.
_FIXED_VERSIONS = ((3, 44, 6), (3, 50, 7), (3, 51, 3))

_TROUBLES = {  # a part of SQLite's message: what it means and what to do
    "locked": "is locked by another program: end it or try again",
    "full": "cannot be written: disk full",
    "readonly": "is read-only here",
    "malformed": "is damaged: stop all runners, keep a copy, and salvage it with a"
    " sqlite3 shell whose .recover works, or restore a backup",
    "not a database": "is not a procman database",
    "unable to open": "cannot be opened",
    "disk I/O": "cannot be read or written (disk I/O error)",
}


def wal_reset_bug() -> bool:
    """Whether this SQLite has the fault that `Store.checkpoint` works around."""
    version = sqlite3.sqlite_version_info
    return version < _FIXED_VERSIONS[-1] and not any(
        fixed[:2] == version[:2] and version >= fixed for fixed in _FIXED_VERSIONS
    )


_inherited: list[Connection] = []  # of a parent process, never touched again


class Database:
    """One SQLite file and this process's connection to it.

    Threads may share it: they take turns.  A forked child opens it anew.
    """

    def __init__(
        self, path: str, *, now: Callable[[], float] = time.time, create: bool = True
    ):
        try:
            self.path = os.path.abspath(path)
        except OSError:
            raise StorageError(
                f"where is {path}? The current directory does not exist any more"
            ) from None
        self.now = now
        self.run_directory = self.path + ".run"
        self._create = create
        self._turn = threading.RLock()
        self._db: Connection | None = None
        self._owner = os.getpid()
        self._identity: tuple[int, int] = (0, 0)
        self._commits = 0
        self._wal_limit = WAL_BYTES
        self._durable = True

    # --- opening -----------------------------------------------------------

    @property
    def db(self) -> Connection:
        """The connection, opened on first use."""
        if self._db is None:
            with self._troubles():
                self._open()
        assert self._db is not None
        return self._db

    @contextlib.contextmanager
    def _my_turn(self) -> Iterator[None]:
        """One thread at a time; a forked child begins anew.

        SQLite forbids it its parent's connection, even to close it; and the parent's
        lock may be held by a thread that does not exist in the child.
        """
        if self._owner != os.getpid():
            if self._db is not None:
                _inherited.append(self._db)
            self._db, self._turn, self._owner = None, threading.RLock(), os.getpid()
        with self._turn, self._troubles():
            yield

    def _open(self) -> None:
        self._check_path()
        if os.path.exists(self.path + "-wal"):
            # If the file is not ours, to close it would move its log into it: look at
            # it through a connection that cannot write.
            place = re.sub("[%?#]", lambda found: f"%{ord(found[0]):x}", self.path)
            uri = "file:///" + place.replace(os.sep, "/").lstrip("/") + "?mode=ro"
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as looking:
                self._retry(lambda: self._check_header(looking))
        db = sqlite3.connect(
            self.path, timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            db.row_factory = Row
            version = self._retry(lambda: self._check_header(db))
            self._retry(lambda: self._prepare(db, version))
        except BaseException:
            db.close()
            raise
        found = os.stat(self.path)
        self._identity = (found.st_dev, found.st_ino)
        self._db = db

    def _check_path(self) -> None:
        """Refuse what is not ours; make an empty private file if there is none.

        Once a connection is open the file is never opened by hand: closing it would
        drop SQLite's locks (https://sqlite.org/howtocorrupt.html, 2.2).
        """
        directory = os.path.dirname(self.path)
        if not os.path.isdir(directory):
            raise StorageError(f"there is no directory {directory}: create it first")
        if not os.path.lexists(self.path):
            if not self._create:
                raise NotFound(
                    f"there is no database {self.path} yet: `start` makes it"
                )
            with contextlib.suppress(FileExistsError):
                os.close(private_file(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR))
        for path in (self.path, self.path + "-wal", self.path + "-shm"):
            reason = unsafe(path)
            if reason:
                raise StorageError(f"the database {path} {reason}: refused")
        self._check_directory(directory)

    @staticmethod
    def _check_directory(path: str) -> None:
        reason = unsafe(path, directory=True)
        if reason:
            raise StorageError(f"the directory {path} {reason}: refused")

    def _check_header(self, db: Connection) -> int:
        """The schema's version, 0 for an empty file; refuse all that is not ours."""
        # In this order: another may be making it just now, in one transaction.
        empty = db.execute("PRAGMA schema_version").fetchone()[0] == 0
        owner = db.execute("PRAGMA application_id").fetchone()[0]
        if empty and owner in (0, APPLICATION_ID):
            return 0
        if owner != APPLICATION_ID:
            raise StorageError(f"the database {self.path} belongs to another program")
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StorageError(
                f"the database {self.path} has schema {version}, newer than this"
                f" procman {__version__} knows ({SCHEMA_VERSION}): update procman.py"
            )
        return version

    def _prepare(self, db: Connection, version: int) -> None:
        """Set the connection up; create or migrate the schema in one transaction."""
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")  # cut when it is reset
        if version == SCHEMA_VERSION:
            return
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")
        try:
            version = self._check_header(db)  # another may have been faster
            statements = SCHEMA if version == 0 else ()
            for newer in range(version + 1, SCHEMA_VERSION + 1) if version else ():
                statements += MIGRATIONS[newer]
            # One by one: executescript commits an open transaction.
            for statement in statements:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            db.execute("COMMIT")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")

    def make_run_directory(self) -> None:
        """The private directory for the files of runners; refuse a foreign one."""
        with self._troubles():
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.run_directory, 0o700)
            if os.path.islink(self.run_directory):
                raise StorageError(f"{self.run_directory} is a symbolic link: refused")
            self._check_directory(os.path.dirname(self.path))
            self._check_directory(self.run_directory)

    def close(self) -> None:
        """Close the connection; the next use opens it again."""
        with self._my_turn():
            if self._db is not None:
                with contextlib.suppress(sqlite3.Error):  # what is committed stays
                    self._db.close()
            self._db = None

    # --- transactions ------------------------------------------------------

    @contextlib.contextmanager
    def _troubles(self) -> Iterator[None]:
        """Turn the errors of SQLite and the system into a StorageError's one line."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise  # a mistake in this file
        except sqlite3.Error as error:
            text = str(error)
            if "disk I/O" in text and not self._room_on_disk():
                text = "full"
            for part, meaning in _TROUBLES.items():
                if part in text:
                    kind = Busy if part in ("locked", "full") else StorageError
                    raise kind(f"the database {self.path} {meaning}") from error
            raise StorageError(f"the database {self.path}: {text}") from error
        except OSError as error:
            raise StorageError(
                f"the database {self.path}: {error.strerror}: {error.filename}"
            ) from error

    def _room_on_disk(self) -> bool:
        """Whether SQLite could have made its shared memory there."""
        import shutil

        return shutil.disk_usage(os.path.dirname(self.path)).free >= 1 << 16

    def _retry(self, action: Callable[[], Any]) -> Any:
        """Do it, again and again while another holds the lock."""
        deadline, tries = time.monotonic() + BUSY_SECONDS, 0
        while True:
            try:
                return action()
            except (sqlite3.OperationalError, Busy) as error:
                if "lock" not in str(error) or time.monotonic() >= deadline:
                    raise
            time.sleep(lock_delay(tries, jitter()))
            tries += 1

    @contextlib.contextmanager
    def transaction(
        self, *, wait: float = BUSY_SECONDS, durable: bool = True
    ) -> Iterator[Connection]:
        """A write transaction: committed at the end, rolled back on an error.

        Raises Busy after `wait` seconds.  Not `durable`: what it wrote may be lost in
        a power cut, as a claim may; it is never half there.
        """
        deadline = time.monotonic() + wait
        for tries in itertools.count():
            with self._my_turn():  # not while it waits: others may read meanwhile
                if self._begin(durable, last=time.monotonic() >= deadline):
                    try:
                        self.check_identity()
                        yield self.db
                        self.db.execute("COMMIT")
                    finally:
                        if self.db.in_transaction:  # else a full disk has done it
                            self.db.execute("ROLLBACK")
                    self._commits += 1
                    with contextlib.suppress(sqlite3.Error):  # it is committed
                        self.checkpoint()
                    return
            time.sleep(lock_delay(tries, jitter()))

    def _begin(self, durable: bool, *, last: bool) -> bool:
        """Take the write lock; False if another has it, and on the `last` try Busy."""
        if durable != self._durable:
            level = "FULL" if durable else "NORMAL"
            self.db.execute(f"PRAGMA synchronous = {level}")
            self._durable = durable
        try:
            # IMMEDIATE: a deferred transaction that turns into a write after another
            # commit fails at once, whatever the wait.
            self.db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if last or "lock" not in str(error):
                raise
            return False
        return True

    def check_identity(self) -> None:
        """Into a deleted file inserts succeed: say so before anything is promised."""
        try:
            found = os.stat(self.path)
        except OSError:
            raise StorageError(f"the database {self.path} was deleted") from None
        if (found.st_dev, found.st_ino) != self._identity:
            raise StorageError(f"the database {self.path} was replaced by another file")

    def checkpoint(self) -> None:
        """Copy a long write-ahead log into the database, if nobody writes just now.

        Done while a second connection holds the write lock, so that nobody resets the
        log meanwhile (the fault of `wal_reset_bug`).
        """
        try:
            size = os.stat(self.path + "-wal").st_size
        except OSError:
            return
        if size <= self._wal_limit:
            self._wal_limit = min(self._wal_limit, max(size, WAL_BYTES))
            return
        self._wal_limit = (
            size + WAL_BYTES
        )  # not at each commit while a reader hinders it
        guard = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        try:
            guard.execute("BEGIN IMMEDIATE")
            self.db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            guard.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
        finally:
            guard.close()

    def read(self, sql: str, parameters: Any = ()) -> list[Row]:
        """The rows of a SELECT."""
        with self._my_turn():
            rows: list[Row] = self._retry(
                lambda: self.db.execute(sql, parameters).fetchall()
            )
            return rows

    def version(self) -> tuple[int, int]:
        """What changes with each commit, another connection's or our own."""
        return self.read("PRAGMA data_version")[0][0], self._commits


_OPEN = {"status": "open"}  # a filter
_NUMBERS = ("claim", "attempt", "crashes", "step_index")  # of a row that is claimed


# What comes of calculating with columns that are of any type and size.
_BY_HAND = (ValueError, TypeError, LookupError, OverflowError)


def _whole(value: Any) -> int:
    """A number that is one and can grow, unless a row has been edited by hand."""
    return value if isinstance(value, int) and 0 <= value < 2**62 else 0


WISH_RUN, WISH_SERIES = 1, 2  # values of cancel_requested
_ORDERS = {
    "newest": "process.id DESC",
    "oldest": "process.id",
    "due": "process.due_at, process.id",
    "ended": "process.finished_at DESC, process.id DESC",
}


class Records(Database):
    """What is in a database, to be read."""

    def __init__(
        self, path: str, *, now: Callable[[], float] = time.time, create: bool = True
    ):
        super().__init__(path, now=now, create=create)
        self._definitions: dict[int, Definition] = {}  # the last ones read, parsed

    # --- one process -------------------------------------------------------

    def definition(self, number: int) -> Definition:
        """The parsed definition; the last few hundred are kept."""
        found = self._definitions.get(number)
        if found is None:
            if len(self._definitions) > 256:
                self._definitions.clear()
            sql = "SELECT text FROM definition WHERE id = ?"
            rows = self.read(sql, (number,))
            found = self._parsed(number, rows[0][0] if rows else None)
            self._definitions[number] = found
        return found

    def _parsed(self, number: int, text: Any) -> Definition:
        """The definition of this text; StorageError if it was changed by hand."""
        try:
            found = Definition(text)
            found.check()
        except (*_BY_HAND, AttributeError, RecursionError) as error:
            raise StorageError(
                f"the database {self.path} has been changed by hand: no sound"
                f" definition {number}"
            ) from error
        return found

    def find(self, pid: str) -> Row:
        """The row of a pid or of a unique prefix; raises NotFound."""
        sql = "SELECT * FROM process WHERE pid >= ? AND pid < ? LIMIT 2"
        row: Row = self._one(pid, self.read(sql, (check_pid(pid), pid + "g")))
        return row

    def _one(self, pid: str, found: list[Any]) -> Any:
        if not found:
            raise NotFound(f"no process {pid} in {self.path}")
        if len(found) > 1:
            raise NotFound(f"{pid} is the beginning of several pids: write more of it")
        return found[0]

    def full_pid(self, pid: str) -> str:
        """The pid that a unique prefix stands for; raises NotFound."""
        return pid if len(check_pid(pid)) == PID_LENGTH else str(self.find(pid)["pid"])

    def still_going(self, pids: list[str]) -> list[str]:
        """Those that are neither final nor interrupted, in order; raises NotFound."""
        found: list[str] = []
        for start in range(0, len(pids), 500):  # SQLite may take no more than 999
            some = pids[start : start + 500]
            marks = ", ".join("?" * len(some))
            sql = f"SELECT pid, status FROM process WHERE pid IN ({marks})"
            states = dict(map(tuple, self.read(sql, some)))
            for pid in some:
                if pid not in states:
                    raise NotFound(f"no process {pid} in {self.path}")
                if states[pid] in (QUEUED, RUNNING, WAITING):
                    found.append(pid)
        return found

    _SHOWN = """
        SELECT process.*, data.data,
               (SELECT above.pid FROM process AS above
                 WHERE above.id = process.parent) AS parent_pid
          FROM process
          LEFT JOIN data ON data.process = process.id
           AND data.step_index = process.step_index
           AND process.status IN ('finished', 'interrupted')"""

    def info(self, pid: str) -> ProcessInfo:
        """The record of one process; raises NotFound."""
        clause = "WHERE process.pid >= ? AND process.pid < ? LIMIT 2"
        found = self._infos(clause, (check_pid(pid), pid + "g"))
        info: ProcessInfo = self._one(pid, found)
        return info

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn what comes of rows that make no sense into a StorageError's one line."""
        try:
            yield
        except (NotFound, StorageError):
            raise
        except (*_BY_HAND, AttributeError, RecursionError) as error:
            raise StorageError(
                f"the database {self.path} has been changed by hand: {error}"
            ) from error

    def _infos(self, clause: str, parameters: Any) -> list[ProcessInfo]:
        infos = []
        with self._readable():
            for row in self.read(f"{self._SHOWN} {clause}", parameters):
                try:
                    definition = self.definition(row["definition"])
                except StorageError:
                    sql = "SELECT 1 FROM process WHERE id = ?"
                    if self.read(sql, (row["id"],)):  # else it has just been pruned
                        raise
                    continue
                infos.append(ProcessInfo.from_row(row, definition))
        return infos

    def output(self, pid: str, skip: int = 0) -> tuple[bytes, int]:
        """What a process has printed after so many bytes, and how many there are.

        Also what the running step has printed up to now.
        """
        while True:
            row = self.find(pid)
            printed, live = self._stored_output(row["id"]), self._live_output(row)
            again = self.find(pid)
            if (row["claim"], row["step_index"]) == (
                again["claim"],
                again["step_index"],
            ):
                break  # nothing has moved from the one to the other meanwhile
        rest = live.after(max(0, skip - printed.total()))
        return printed.after(skip) + rest, printed.total() + live.total()

    def _stored_output(self, row_id: int) -> Printed:
        sql = "SELECT head, cut, tail FROM output WHERE process = ?"
        return next((Printed(*row) for row in self.read(sql, (row_id,))), Printed())

    def _live_output(self, row: Row) -> Printed:
        if row["status"] == RUNNING and os.path.isdir(self.run_directory):
            wanted = f"{row['pid']} {row['claim']} {row['step_index']}"
            for name in os.listdir(self.run_directory):
                if name.endswith(".log"):
                    path = os.path.join(self.run_directory, name)
                    owner, printed = OutputFile(path).read()
                    if owner == wanted:
                        return printed
        return Printed()

    # --- many --------------------------------------------------------------

    def _filter(self, filters: Mapping[str, Any]) -> tuple[str, list[Any]]:
        """A WHERE clause; states stand in it as text, so that their index serves."""
        given = check_filters(filters)
        terms, parameters = ["1"], []
        if "status" in given:
            words = STATE_GROUPS[given["status"]]
            alternatives = (f"process.status = '{word}'" for word in words)
            terms.append("(" + " OR ".join(alternatives) + ")")
        for column in ("name", "queue"):
            if column in given:
                terms.append(f"process.{column} = ?")
                parameters.append(given[column])
        if "since" in given:
            terms.append("coalesce(process.finished_at, process.created_at) >= ?")
            parameters.append(parse_since(given["since"], self.now()))
        if "series" in given:
            terms.append("(process.series = ? OR process.pid = ?)")
            parameters += [self._series_of(given["series"])] * 2
        if "parent" in given:
            terms.append("process.parent = ?")
            parameters.append(self.find(given["parent"])["id"])
        return "WHERE " + " AND ".join(terms), parameters

    def _series_of(self, pid: str) -> str:
        """The series that a pid is of, which may have lost its first run."""
        try:
            row = self.find(pid)
        except NotFound:
            sql = """
                SELECT DISTINCT series FROM process
                 WHERE series >= ? AND series < ? LIMIT 2"""
            found: str = self._one(pid, self.read(sql, (pid, pid + "g")))[0]
            return found
        return str(row["series"] or row["pid"])

    def series_goes_on(self, pid: str) -> bool:
        """Whether a run that was cancelled will be followed by another."""
        row = self.find(pid)
        repeats = self.definition(row["definition"]).repeats()
        return repeats and row["cancel_requested"] == WISH_RUN

    def select(
        self, filters: Mapping[str, Any], *, order: str, limit: int, offset: int
    ) -> list[ProcessInfo]:
        """Records of those that pass the filters (`check_filters`)."""
        if order not in _ORDERS:
            known = ", ".join(_ORDERS)
            raise BadSpec(f"order must be one of {known}, not {quoted(order)}")
        where, parameters = self._filter(filters)
        return self._infos(
            f"{where} ORDER BY {_ORDERS[order]} LIMIT ? OFFSET ?",
            (*parameters, limit, offset),
        )

    def count(self, filters: Mapping[str, Any]) -> int:
        """How many processes pass the filters."""
        where, parameters = self._filter(filters)
        return int(self.read(f"SELECT count(*) FROM process {where}", parameters)[0][0])

    def cancellable(self, filters: Mapping[str, Any], after: int) -> list[int]:
        """Ids of the next few hundred that pass and can be cancelled."""
        where, parameters = self._cancellable(filters)
        sql = f"SELECT id FROM process {where} AND id > ? ORDER BY id LIMIT 500"
        return [row[0] for row in self.read(sql, (*parameters, after))]

    def _cancellable(self, filters: Mapping[str, Any]) -> tuple[str, list[Any]]:
        where, parameters = self._filter({**_OPEN, **check_filters(filters)})
        wanted = f"finished_at IS NULL AND cancel_requested < {WISH_SERIES}"
        return f"{where} AND {wanted}", parameters

    def failed(self, filters: Mapping[str, Any]) -> list[str]:
        """Pids of those that ended as error or timeout and were not retried."""
        where, parameters = self._filter(filters)
        rows = self.read(
            f"""
            SELECT pid FROM process {where}
               AND (process.status = 'error' OR process.status = 'timeout')
               AND NOT EXISTS
                   (SELECT 1 FROM process AS again WHERE again.retry_of = process.id)
             ORDER BY process.id""",
            parameters,
        )
        return [row[0] for row in rows]

    def last_event(self) -> int:
        """The number of the newest event."""
        sql = "SELECT coalesce(max(number), 0) FROM event"
        return int(self.read(sql)[0][0])

    def events(
        self, after: int, pid: str | None = None, kinds: Iterable[str] | None = None
    ) -> list[Json]:
        """The next few hundred events after this number, of one process or of all.

        `{number, at, pid, kind, status, detail}`; `status`: the one after it.
        """
        terms, parameters = ["event.number > ?"], [after]  # type: list[str], list[Any]
        if pid is not None:
            terms.append("event.process = (SELECT id FROM process WHERE pid = ?)")
            parameters.append(pid)
        if kinds is not None:
            parameters += (found := list(kinds))
            terms.append(f"event.kind IN ({', '.join('?' * len(found))})")
        rows = self.read(
            f"""
            SELECT event.*, process.pid FROM event
              JOIN process ON process.id = event.process
             WHERE {" AND ".join(terms)} ORDER BY event.number LIMIT 500""",
            parameters,
        )
        with self._readable():
            return [event_record(dict(row)) for row in rows]

    # --- runners -----------------------------------------------------------

    def bells(self) -> list[int]:
        """The ports on which the registered runners are to be rung."""
        rows = self.read("SELECT port FROM runner WHERE port IS NOT NULL")
        return [row[0] for row in rows]

    def runners(self) -> list[Row]:
        """All that are registered, alive or not."""
        return self.read("SELECT * FROM runner ORDER BY id")

    def runner_states(self) -> list[Json]:
        """What there is to know of each; alive is who holds the lock of its life."""
        with self._readable():
            return [self._runner_state(row) for row in self.runners()]

    def _runner_state(self, row: Row) -> Json:
        path = os.path.join(self.run_directory, row["token"] + ".lock")
        life = LockFile(path)
        dead = life.acquire()
        life.release()
        return {
            "os_pid": row["os_pid"],
            "alive": not dead,
            "waits": bool(row["waits"]),
            "queues": row["queues"].split(",") if row["queues"] else [],
            "concurrency": check_concurrency(json.loads(row["concurrency"] or "{}")),
            "started_at": timestamp(row["started_at"]),
        }

    def why(self, pid: str) -> str:
        """One sentence on what holds a process up, by the conditions of the claim."""
        row = self.find(pid)
        with self._readable():
            return self._why(row)

    def _why(self, row: Row) -> str:
        status, error = row["status"], json.loads(row["error"] or "{}")
        definition = self.definition(row["definition"])
        step = quoted(definition.step_name(row["step_index"]))
        if status in FINAL_STATES:
            at = f"it ended as {status} at {timestamp(row['finished_at'])} UTC"
            return at + (f": {error['message']}" if error else "")
        if status == RUNNING and row["cancel_requested"]:
            return "it is being cancelled: its runner ends what it has started"
        if status == RUNNING:
            pausing = ", and asked to pause" if row["pause_requested"] else ""
            return f"it is running: step {step}, attempt {row['attempt']}{pausing}"
        if status == WAITING:
            sql = """
                SELECT count(*) FROM process
                 WHERE parent = ? AND finished_at IS NULL"""
            return f"it waits for {self.read(sql, (row['id'],))[0][0]} children"
        if status == INTERRUPTED:
            said = f", because {error['message']}" if error else ""
            last = row["step_index"] == len(definition.steps)
            where = "after its last step" if last else f"before step {step}"
            return f"it is interrupted {where}{said}: proceed continues it"
        return self._why_queued(row)

    def _why_queued(self, row: Row) -> str:
        now, queue = self.now(), quoted(row["queue"])
        if row["due_at"] > now:
            at = timestamp(row["due_at"])
            words = f"it is due at {at} UTC, in {in_words(row['due_at'] - now)}"
            return words + (f": attempt {row['attempt']}" if row["attempt"] > 1 else "")
        serving = [
            state
            for state in self.runner_states()
            if state["alive"] and row["queue"] in state["queues"]
        ]
        if not serving:
            return f"no runner serves queue {queue}: start one that does"
        limits = {
            name: max(other["concurrency"].get(name, 2**31) for other in serving)
            for state in serving
            for name in state["concurrency"]
        }
        full = self.full(limits)
        if row["name"] in full:
            words = f"as many named {quoted(row['name'])} run as may at once"
            return f"{words}, {limits[row['name']]}"
        clause, names = self._not(full)
        ahead = self.read(
            f"""
            SELECT count(*) FROM process AS p
             WHERE status = 'queued' AND dedicated = ? AND queue = ? AND due_at <= ?
               AND (priority > ?
                    OR (priority = ? AND (due_at < ? OR (due_at = ? AND id < ?))))
                   {clause}""",
            (
                *(row["dedicated"], row["queue"], now),
                *(row["priority"], row["priority"]),
                *(row["due_at"], row["due_at"], row["id"], *names),
            ),
        )[0][0]
        if ahead:
            return f"{ahead} ahead of it in queue {queue}"
        return f"it is the next in queue {queue}, as soon as a worker is free"

    # --- what is due -------------------------------------------------------

    def next_due(self, demand: Demand) -> float | None:
        """When the next process that a runner would claim is due, None if none is.

        With `demand.pid` only that one counts, and it is due now.
        """
        if demand.pid is not None:
            sql = "SELECT 0.0 FROM process WHERE pid = ? AND status = 'queued'"
            return next((row[0] for row in self.read(sql, (demand.pid,))), None)
        clause, names = self._not(self.full(demand.concurrency))
        firsts = [
            row[0]
            for dedicated, room in demand.kinds()
            for priority in (self._priorities(dedicated) if room > 0 else ())
            for queue in demand.queues
            for row in self.read(
                f"""
                SELECT min(due_at) FROM process AS p
                 WHERE p.status = 'queued' AND p.dedicated = ? AND p.priority = ?
                   AND p.queue = ? AND p.due_at < 1e15 {clause}""",
                (dedicated, priority, queue, *names),
            )
            if row[0] is not None
        ]
        return min(firsts, default=None)

    def _priorities(self, dedicated: int) -> Iterator[int]:
        """Those of queued processes, highest first: one look into the index each."""
        below = 2**63 - 1
        while True:
            below = self.read(
                """
                SELECT max(priority) FROM process
                 WHERE status = 'queued' AND dedicated = ? AND priority < ?""",
                (dedicated, below),
            )[0][0]
            if below is None:
                return
            yield below

    def _left(self, concurrency: Mapping[str, int]) -> dict[str, int]:
        """How many more processes of each limited name may run."""
        if not concurrency:
            return {}
        marks = ", ".join("?" * len(concurrency))
        rows = self.read(
            f"""
            SELECT name, count(*) FROM process
             WHERE status = 'running' AND name IN ({marks}) GROUP BY name""",
            list(concurrency),
        )
        running = dict(map(tuple, rows))
        return {name: most - running.get(name, 0) for name, most in concurrency.items()}

    def full(self, concurrency: Mapping[str, int]) -> list[str]:
        """The names of which as many run as may."""
        return [name for name, left in self._left(concurrency).items() if left <= 0]

    @staticmethod
    def _not(names: Sequence[str]) -> tuple[str, Sequence[str]]:
        """A condition on `p` that leaves these names out, and its parameters."""
        if not names:
            return "", ()
        marks = ", ".join("?" * len(names))
        return f"AND (p.name IS NULL OR p.name NOT IN ({marks}))", names


class Store(Records):
    """The processes in a database: every write and transition.

    A method that takes `db` wants the connection of an open `transaction`.
    """

    # --- entering ----------------------------------------------------------

    def insert(self, db: Connection, submissions: Iterable[Submission]) -> list[str]:
        """Add queued processes; return their pids, or those of equal ones instead.

        One without steps is finished at once.  Raises NotUnique.
        """
        pids: list[str] = []
        waiting: list[Submission] = []
        for new in submissions:
            found = None
            if new.once_key is not None or new.options["pid"] is not None:
                self._insert_new(db, waiting)  # it may be equal to one of these
                waiting = []
                found = self._equal(db, new)
            if found is None:
                waiting.append(new)
            pids.append(found or new.pid)
        self._insert_new(db, waiting)
        return pids

    def _insert_new(self, db: Connection, submissions: list[Submission]) -> None:
        sql = "SELECT coalesce(max(id), 0) + 1 FROM process"
        first, now = _whole(db.execute(sql).fetchone()[0]), self.now()
        if not first:
            raise StorageError(f"the database {self.path} has no room for another id")
        rows, inputs, stepless = [], [], []
        numbers: dict[str, int] = {}  # of the definitions
        for row_id, new in enumerate(submissions, first):
            text, options = new.definition, new.options
            number = numbers.get(text)
            if number is None:
                number = numbers[text] = self._definition_id(db, text)
            described = (options["queue"], options["priority"], new.due_at, now)
            more = (options["name"], new.due_from, options["dedicated"], new.once_key)
            series = new.pid if repeating(options) else None
            rows.append((row_id, new.pid, number, *described, *more, series))
            inputs.append((row_id, new.data))
            if text.startswith('{"steps":{},'):
                stepless.append(Move(row_id))
        sql = """
            INSERT INTO process (id, pid, definition, status, queue, priority,
                                 due_at, created_at, name, due_from, dedicated,
                                 once_key, series)
            VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
        db.executemany(sql, rows)
        db.executemany("INSERT INTO data VALUES (?, 0, ?)", inputs)
        self._add_events(db, "start", [(row_id, None) for row_id, _ in inputs])
        self.transition(db, "finish", *stepless)

    def insert_with(self, connection: Connection, new: Submission) -> str:
        """The same, in a transaction of somebody else's connection to this database."""
        self.version()  # opens it, which makes the schema
        factory, connection.row_factory = connection.row_factory, Row
        try:
            self.check_identity()
            files = [row[2] for row in connection.execute("PRAGMA database_list")]
            if not any(file and os.path.samefile(file, self.path) for file in files):
                raise StorageError(f"the connection given is not to {self.path}")
            if not connection.in_transaction:
                raise ProcmanError(
                    "the connection given has no open transaction: BEGIN"
                )
            return self.insert(connection, [new])[0]
        finally:
            connection.row_factory = factory

    @staticmethod
    def _definition_id(db: Connection, text: str) -> int:
        """The number of this definition, which is added if it is new."""
        import zlib

        crc = zlib.crc32(text.encode())
        sql = "SELECT id FROM definition WHERE hash = ? AND text = ?"
        row = db.execute(sql, (crc, text)).fetchone()
        if row is None:
            definition, likeness = Definition(text), None
            if not definition.exclusive():
                likeness = zlib.crc32(definition.likeness())
            sql = "INSERT INTO definition (hash, text, likeness) VALUES (?, ?, ?)"
            db.execute(sql, (crc, text, likeness))
            row = db.execute("SELECT last_insert_rowid()").fetchone()
        return int(row[0])

    # --- equal processes ---------------------------------------------------

    def _equal(self, db: Connection, new: Submission) -> str | None:
        """The pid of an open process to be used instead of a new one, or None.

        One that was started with other options is cancelled: the new one replaces it.
        """
        row = None
        if new.once_key is not None:
            row = self._with_key(db, new.once_key)
            if row is None and new.options["key"] is None:
                row = self._plain_equal(db, new)
        if row is not None and new.options["unique"]:
            raise NotUnique(row["pid"], row["status"], "not unique, equal to process")
        if row is not None and not self._differs(row, new):
            return str(row["pid"])
        sql = "SELECT pid, status FROM process WHERE pid = ?"
        taken = db.execute(sql, (new.pid,)).fetchone()
        if taken is not None:
            raise NotUnique(taken["pid"], taken["status"], "there is a process")
        if row is not None:
            self._cancel(db, row, WISH_SERIES)
        return None

    @staticmethod
    def _with_key(db: Connection, once_key: str) -> Row | None:
        """The open process with this key, less what is about to be cancelled."""
        sql = """
            SELECT process.*, definition.text FROM process
              JOIN definition ON definition.id = process.definition
             WHERE once_key = ? AND finished_at IS NULL AND NOT cancel_requested
             ORDER BY process.id DESC LIMIT 1"""
        row: Row | None = db.execute(sql, (once_key,)).fetchone()
        return row

    def _plain_equal(self, db: Connection, new: Submission) -> Row | None:
        """The same among those that were started without once, unique and key.

        These have no key of their own, which would cost each of them an index entry:
        they are found by their steps, and then compared.
        """
        import zlib

        likeness, data = Definition(new.definition).likeness(), ordered(new.data)
        crc = zlib.crc32(likeness)
        rows = db.execute(
            """
            SELECT process.*, definition.text, data.data FROM definition
             CROSS JOIN process ON process.definition = definition.id
             CROSS JOIN data ON data.process = process.id AND data.step_index = 0
             WHERE definition.likeness = ? AND process.finished_at IS NULL
               AND NOT process.cancel_requested AND length(data.data) = ?
             ORDER BY process.id DESC""",
            (crc, len(new.data)),  # keys in another order make no other length
        )
        for row in rows:
            with contextlib.suppress(StorageError, *_BY_HAND):  # changed by hand
                if row["data"] == new.data or ordered(row["data"]) == data:
                    definition = self._parsed(row["definition"], row["text"])
                    if definition.likeness() == likeness:
                        found: Row = row
                        return found
        return None

    def _differs(self, row: Row, new: Submission) -> bool:
        """Whether a process has other options than those submitted now."""
        definition = self._parsed(row["definition"], row["text"])
        columns = row.keys()
        return any(
            value != (row[name] if name in columns else definition.option(name))
            for name, value in new.own.items()
            if name not in ("once", "unique", "key", "pid")
        )

    # --- claiming ----------------------------------------------------------

    def claim_due(
        self, db: Connection, runner: int, demand: Demand, *, idle: bool = True
    ) -> list[Held]:
        """Claim due processes, as many as are wanted, in the order priority, due, id.

        One that has seen a runner die is claimed alone and where a worker is `idle`: if
        it waited behind others it would be charged for what they do.
        """
        left = self._left(demand.concurrency)
        rows, own = (
            self._allowed(self._due(db, demand, dedicated, room, left), left)
            for dedicated, room in demand.kinds()
        )
        end = next((at for at, row in enumerate(rows) if row["crashes"]), len(rows))
        claims, now = [], self.now()
        for row in (*rows[: end or int(idle)], *own)[: demand.most]:
            began = now if row["started_at"] is None else row["started_at"]
            columns = {"claim": _whole(row["claim"]) + 1, "started_at": began}
            claims.append(Move(row["id"], {**columns, "runner": runner}))
        moved = self.transition(db, "claim", *claims)
        held = (self._hold(db, row) for row in (*rows, *own) if row["id"] in moved)
        return [one for one in held if one is not None]

    def _due(
        self,
        db: Connection,
        demand: Demand,
        dedicated: int,
        room: int,
        left: Mapping[str, int],
    ) -> list[Row]:
        """The first rows that are due, less those of names of which enough run."""
        if room < 1:
            return []
        sql = """
            SELECT p.id, p.pid, p.claim, p.attempt, p.crashes, p.step_index, p.name,
                   p.definition, p.started_at, p.due_at, p.dedicated, data.data
              FROM process AS p
              LEFT JOIN data
                ON data.process = p.id AND data.step_index = p.step_index
             WHERE p.status = 'queued'"""
        if demand.pid is not None:  # whatever it is
            sql += " AND p.pid = ? AND p.dedicated = ?"
            return db.execute(sql, (demand.pid, dedicated)).fetchall()
        clause, names = self._not([name for name in left if left[name] <= 0])
        now = self.now()
        rows: list[Row] = []
        for priority in self._priorities(dedicated):
            due: list[Row] = []
            for queue in demand.queues:
                due += db.execute(
                    f"""{sql} AND p.dedicated = ? AND p.priority = ? AND p.queue = ?
                    AND p.due_at <= ? {clause} ORDER BY p.due_at, p.id LIMIT ?""",
                    (dedicated, priority, queue, now, *names, room - len(rows)),
                ).fetchall()
            if len(due) > 1:
                due.sort(key=lambda row: (row["due_at"], row["id"]))
            rows += due[: room - len(rows)]
            if len(rows) >= room:
                break
        return rows

    @staticmethod
    def _allowed(rows: list[Row], left: dict[str, int]) -> list[Row]:
        """Those that may run at once with what runs; `left` is counted down."""
        if not left:
            return rows
        allowed = []
        for row in rows:
            if left.get(row["name"], 1) > 0:
                allowed.append(row)
                if row["name"] in left:
                    left[row["name"]] -= 1
        return allowed

    def _fail_damaged(self, db: Connection, row: Row, data: Any) -> bool:
        """Whether a process that was claimed is damaged, which is its error."""
        try:
            definition = self.definition(row["definition"])
            numbers = [row[name] for name in _NUMBERS]
            if not (
                numbers == [*map(_whole, numbers)]
                and isinstance(data, str)
                and str(row["pid"]).isalnum()
                and definition.step_name(row["step_index"])
            ):
                raise StorageError(f"the database {self.path} has been changed by hand")
        except StorageError as error:
            failure = to_json(make_error(None, "StorageError", str(error)))
            columns = {"error": failure, "runner": None}
            self.transition(db, "fail", Move(row["id"], columns))
            return True
        return False

    def _hold(self, db: Connection, row: Row) -> Held | None:
        """What was claimed; None where its rows are damaged."""
        if self._fail_damaged(db, row, row["data"]):
            return None
        definition = self.definition(row["definition"])
        timeout = definition.option("timeout")
        return Held(
            row["id"],
            row["pid"],
            row["claim"] + 1,
            row["attempt"],
            row["crashes"],
            row["step_index"],
            definition,
            row["data"],
            None if timeout is None else time.monotonic() + timeout,
            bool(row["dedicated"]),
        )

    # --- recording ---------------------------------------------------------

    def record(
        self, db: Connection, results: Iterable[tuple[Held, Outcome]]
    ) -> list[Settled]:
        """Write how steps ended, and say what that has caused.

        The event is `lost` where the claim is no longer ours: nothing was written.
        """
        alike: dict[Any, list[tuple[Held, Outcome, Json]]] = {}
        for held, outcome in results:
            event = event_after(
                outcome.ending,
                last=held.step_index + 1 == len(held.definition.steps),
                retry_left=held.definition.retry_left(held.attempt),
            )
            columns = self._columns_after(event, held, outcome)
            alike.setdefault((event, *columns), []).append((held, outcome, columns))
        settled: list[Settled] = []
        for (event, *_), group in alike.items():
            settled += self._record_alike(db, event, group)
        return settled

    def _record_alike(
        self, db: Connection, event: str, group: list[tuple[Held, Outcome, Json]]
    ) -> list[Settled]:
        """The same for results that change the same columns."""
        moves = [Move(held.id, columns, held.claim) for held, _, columns in group]
        if event == "step":
            names = [held.definition.step_name(held.step_index) for held, *_ in group]
            moved = self._move(db, event, (RUNNING,), moves, names)
        else:
            details = [self._detail(outcome) for _, outcome, _ in group]
            moved = self.transition(db, event, *moves, details=details)
        kept = [entry for entry in group if entry[0].id in moved]
        settled = self._keep_results(db, event, kept)
        for entry in group:
            if entry[0].id not in moved:
                settled += self._record_wish(db, event, *entry)
        return settled

    def _record_wish(
        self, db: Connection, event: str, held: Held, outcome: Outcome, columns: Json
    ) -> list[Settled]:
        """What becomes of a result that a wish or a fence has kept out."""
        sql = """
            SELECT cancel_requested FROM process
             WHERE id = ? AND claim = ? AND status = 'running'"""
        row = db.execute(sql, (held.id, held.claim)).fetchone()
        if row is None or event in ("cancel", "pause"):  # somebody else's by now
            return [Settled(held, outcome, "lost", None)]
        if row["cancel_requested"]:
            return self.record(
                db, [(held, Outcome("cancelled", printed=outcome.printed))]
            )
        columns = {**columns, "runner": None, "pause_requested": 0}
        return self._record_alike(db, "pause", [(held, outcome, columns)])

    def _keep_results(
        self, db: Connection, event: str, group: list[tuple[Held, Outcome, Json]]
    ) -> list[Settled]:
        """Write down what these steps returned and printed."""
        settled, inputs = [], []
        for held, outcome, _ in group:
            data = held.data if outcome.data is None else outcome.data
            if outcome.ending in ("done", "interrupt"):
                inputs.append((held.id, held.step_index + 1, data))
            if outcome.printed is not None:
                whole = self._stored_output(held.id).plus(outcome.printed)
                sql = "INSERT OR REPLACE INTO output VALUES (?, ?, ?, ?)"
                db.execute(sql, (held.id, *whole))
            following = None
            if event == "step":
                following = held._replace(
                    step_index=held.step_index + 1, data=data, crashes=0
                )
            settled.append(Settled(held, outcome, event, following))
        db.executemany("INSERT OR REPLACE INTO data VALUES (?, ?, ?)", inputs)
        return settled

    @staticmethod
    def _detail(outcome: Outcome) -> str | None:
        """What an event says of a failure."""
        error = outcome.error
        if error is None:
            return None
        return to_json({name: error.get(name) for name in ("step", "type", "message")})

    def _columns_after(self, event: str, held: Held, outcome: Outcome) -> Json:
        """What changes beside the status."""
        columns: Json = {}
        if event in ("step", "interrupt", "finish"):
            columns = {"step_index": held.step_index + 1, "error": None}
        elif outcome.error is not None:
            columns = {"error": to_json(outcome.error, "error")}
        if event != "step":
            columns["runner"] = None
        if event == "retry":
            option, now = held.definition.option, self.now()
            length = retry_delay(
                held.attempt, option("retry_interval"), option("backoff"), jitter()
            )
            columns["attempt"] = held.attempt + 1
            columns.update(due_at=now + length, due_from=now)
        return columns

    def record_progress(self, db: Connection, held: Held, progress: Json) -> None:
        """Keep how far a running process says it is."""
        text = to_json(progress, "progress")
        move = Move(held.id, {"progress": text}, held.claim)
        self._move(db, "progress", (RUNNING,), [move], [text])

    # --- verbs -------------------------------------------------------------

    def cancel(self, db: Connection, pid: str) -> str:
        """Cancel a process, or leave its runner the wish; return the pid.

        A second cancel is fine; WrongState for one that ended otherwise.
        """
        row = self.find(pid)
        if row["status"] != CANCELLED:
            # One that was paused before it began is still to come, as a queued one.
            begun = row["started_at"] is not None and row["status"] != QUEUED
            self._cancel(db, row, WISH_RUN if begun else WISH_SERIES)
        return str(row["pid"])

    def _cancel(self, db: Connection, row: Row, wish: int) -> None:
        if row["status"] == RUNNING:
            sql = """
                UPDATE process SET cancel_requested = max(cancel_requested, ?)
                 WHERE id = ?"""
            db.execute(sql, (wish, row["id"]))
            return
        move = Move(row["id"], {"cancel_requested": wish})
        if not self.transition(db, "cancel", move):
            raise WrongState(row["pid"], "cancel", row["status"], OPEN_STATES)

    def cancel_some(
        self, db: Connection, filters: Mapping[str, Any], ids: Sequence[int]
    ) -> list[str]:
        """Cancel those of `cancellable` that still are, and end their series."""
        where, parameters = self._cancellable(filters)
        sql = f"""
            SELECT * FROM process {where}
               AND id IN ({", ".join("?" * len(ids))}) ORDER BY id"""
        rows = db.execute(sql, (*parameters, *ids)).fetchall()
        for row in rows:
            self._cancel(db, row, WISH_SERIES)
        return [row["pid"] for row in rows]

    def pause(self, db: Connection, pid: str) -> str:
        """Interrupt a queued process, or leave its runner the wish; return the pid."""
        row = self.find(pid)
        if row["status"] == RUNNING and not row["cancel_requested"]:
            sql = "UPDATE process SET pause_requested = 1 WHERE id = ?"
            db.execute(sql, (row["id"],))
        elif row["status"] == QUEUED:
            self.transition(db, "pause", Move(row["id"]))
        elif row["status"] != INTERRUPTED:
            # One that runs comes here only if it is wanted cancelled.
            running = row["status"] == RUNNING
            status = "being cancelled" if running else row["status"]
            raise WrongState(row["pid"], "pause", status, (QUEUED, RUNNING))
        return str(row["pid"])

    def proceed(self, db: Connection, pid: str, data: Json) -> str:
        """Merge `data` over what waits and queue the next step at the front."""
        row = self.find(pid)
        if row["status"] != INTERRUPTED:
            sources = TRANSITIONS["proceed"][0]
            raise WrongState(row["pid"], "proceed", row["status"], sources)
        key = (row["id"], row["step_index"])
        merged = {**(self._input(db, *key) or {}), **data}
        if row["series"] is not None and row["step_index"] == 0:
            # What is said to this run is not said to the next.
            sql = """
                INSERT OR IGNORE INTO data SELECT process, -1, data FROM data
                 WHERE process = ? AND step_index = ?"""
            db.execute(sql, key)
        sql = "UPDATE data SET data = ? WHERE process = ? AND step_index = ?"
        db.execute(sql, (to_json(merged), *key))
        if row["step_index"] == len(self.definition(row["definition"]).steps):
            self.transition(db, "finish", Move(row["id"]))
        else:
            now = self.now()
            first = self.next_due(Demand([row["queue"]], None, {}))
            due = now if first is None else min(now, first - 0.001)
            when = {"due_at": due, "due_from": now}
            columns = {**when, "error": None, "pause_requested": 0}
            self.transition(db, "proceed", Move(row["id"], columns))
        return str(row["pid"])

    def _input(self, db: Connection, row_id: int, index: int) -> Json | None:
        """The recorded input of a step, None if it was never reached."""
        sql = "SELECT data FROM data WHERE process = ? AND step_index = ?"
        row = db.execute(sql, (row_id, index)).fetchone()
        try:
            found = None if row is None else expect_object(json.loads(row[0]))
        except (ValueError, TypeError) as error:
            words = f"the data of a step in {self.path} has been changed by hand"
            raise BadSpec(f"{words}: {error}") from error
        return found

    def retry(
        self, db: Connection, pid: str, step: str | None, data: Json | None
    ) -> str:
        """Queue a new process that does again what a final one did from a step on.

        `step`: by default the one that failed, after success the first that it ran.
        `data` is merged over its recorded input.
        """
        row = self.find(pid)
        if row["status"] not in FINAL_STATES:
            raise WrongState(row["pid"], "retry", row["status"], FINAL_STATES)
        definition = self.definition(row["definition"])
        index = self._retry_index(db, row, definition, step)
        recorded = self._input(db, row["id"], index)
        if recorded is None and data is None:
            words = f"step {quoted(step)} of process {row['pid']} was not reached"
            raise BadSpec(f"{words}: give its data")
        merged = {**(recorded or {}), **(data or {})}
        key = row["once_key"]
        # A series keeps its key for its own runs; equal is what does the same.
        same = index == 0 and to_json(merged) == to_json(recorded or {})
        if definition.repeats() or not (same or str(key).startswith(KEY)):
            key = None
        other = None if key is None else self._with_key(db, key)
        if other is not None:
            raise NotUnique(other["pid"], other["status"], "the key is that of")
        new_id, new_pid = self._again(
            *(db, row, to_json(merged), {"retry_of": row["pid"]}),
            definition=self._definition_id(db, definition.once_only()),
            step_index=index,
            series=row["series"] or row["pid"],
            once_key=key,
            retry_of=row["id"],
        )
        if not definition.steps:
            self.transition(db, "finish", Move(new_id))
        return new_pid

    def retry_some(
        self, db: Connection, pids: Iterable[str]
    ) -> list[tuple[str, str | None]]:
        """Retry those that nobody has retried yet; return (old pid, new or None)."""
        found: list[tuple[str, str | None]] = []
        sql = """
            SELECT 1 FROM process
             WHERE retry_of = (SELECT id FROM process WHERE pid = ?)"""
        for pid in pids:
            if db.execute(sql, (pid,)).fetchone():
                continue
            new = None
            # Pruned meanwhile; its key is taken; changed by hand.  Nothing is written.
            with contextlib.suppress(NotFound, NotUnique, BadSpec):
                new = self.retry(db, pid, None, None)
            found.append((pid, new))
        return found

    @staticmethod
    def _retry_index(
        db: Connection, row: Row, definition: Definition, step: str | None
    ) -> int:
        """Where to begin again."""
        names = [name for name, _ in definition.steps]
        if step is not None and step not in names:
            known = ", ".join(map(quoted, names)) or "none"
            words = f"process {row['pid']} has no step {quoted(step)}; it has: {known}"
            raise BadSpec(words)
        if step is not None:
            return names.index(step)
        index = _whole(row["step_index"])
        if index < len(names) and row["status"] != FINISHED:
            return index
        # The first that it has run: a retry itself may have begun later than at 0.
        sql = """
            SELECT min(step_index) FROM data
             WHERE process = ? AND step_index BETWEEN 0 AND ?"""
        return _whole(db.execute(sql, (row["id"], len(names) - 1)).fetchone()[0])

    _COPIED = ("definition", "queue", "priority", "name", "dedicated")

    def _again(
        self, db: Connection, row: Row, data: str, detail: Json, **more: Any
    ) -> tuple[int, str]:
        """Queue a process like that of a row; return its id and pid.

        `data` is the input of its first step, `detail` what its first event says,
        `more` are its other columns.
        """
        pid, now = os.urandom(PID_LENGTH // 2).hex(), self.now()
        columns = {name: row[name] for name in self._COPIED}
        columns.update(pid=pid, created_at=now, due_at=now, due_from=now)
        columns.update(more)
        marks = ", ".join(f":{name}" for name in columns)
        sql = f"""
            INSERT INTO process (status, {", ".join(columns)})
            VALUES ('queued', {marks})"""
        new_id = db.execute(sql, columns).lastrowid
        assert new_id is not None
        first = columns.get("step_index", 0)
        db.execute("INSERT INTO data VALUES (?, ?, ?)", (new_id, first, data))
        self._add_events(db, "start", [(new_id, to_json(detail))])
        return new_id, pid

    # --- runners -----------------------------------------------------------

    def add_runner(
        self,
        token: str,
        boot: str,
        queues: Iterable[str],
        port: int | None,
        *,
        waits: bool = False,
        concurrency: Mapping[str, int] | None = None,
    ) -> int:
        """Register a runner, which holds the lock of its token; return its number."""
        with self.transaction() as db:
            served = (",".join(queues), waits, port, json.dumps(concurrency or {}))
            number = db.execute(
                """
                INSERT INTO runner (token, os_pid, boot, started_at,
                                    queues, waits, port, concurrency)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
                (token, os.getpid(), boot, self.now(), *served),
            ).lastrowid
        assert number is not None
        return number

    def remove_runner(self, number: int) -> None:
        """Forget a runner that holds nothing any more."""
        with self.transaction() as db:
            db.execute("DELETE FROM runner WHERE id = ?", (number,))

    def add_worker(self, runner: int, os_pid: int, born: str, token: str) -> None:
        """Note a child, so that its tree can be ended if the runner cannot do it."""
        with self.transaction(wait=1, durable=False) as db:
            sql = "INSERT INTO worker VALUES (?, ?, ?, ?)"
            db.execute(sql, (runner, os_pid, born, token))

    def remove_worker(self, runner: int, token: str) -> None:
        """Forget a child of which nothing is left."""
        with self.transaction(wait=1, durable=False) as db:
            sql = "DELETE FROM worker WHERE runner = ? AND token = ?"
            db.execute(sql, (runner, token))

    def workers(self, runner: int) -> list[Row]:
        """The children that a runner has noted."""
        return self.read("SELECT * FROM worker WHERE runner = ?", (runner,))

    def cancels_wanted(self, runner: int) -> set[str]:
        """Pids of this runner's processes that somebody wants cancelled."""
        rows = self.read(
            """
            SELECT pid FROM process
             WHERE status = 'running' AND runner = ? AND cancel_requested""",
            (runner,),
        )
        return {row[0] for row in rows}

    def unowned(self) -> list[int]:
        """Runners that are not registered and hold something all the same."""
        rows = self.read(
            """
            SELECT DISTINCT coalesce(runner, 0) FROM process
             WHERE status = 'running'
               AND coalesce(runner, 0) NOT IN (SELECT id FROM runner)"""
        )
        return [row[0] for row in rows]

    def recover(self, runner: int, *, charged: bool) -> list[str]:
        """Settle what a runner held that was proved dead, and forget it.

        `charged`: its death counts as a crash of each; a reboot does not.  Returns the
        pids.
        """
        with self.transaction(wait=1) as db:
            rows = db.execute(
                """
                SELECT * FROM process
                 WHERE status = 'running' AND coalesce(runner, 0) = ?""",
                (runner,),
            ).fetchall()
            for row in rows:
                self._recover_one(db, row, charged)
            db.execute("DELETE FROM runner WHERE id = ?", (runner,))
        return [row["pid"] for row in rows]

    def _recover_one(self, db: Connection, row: Row, charged: bool) -> None:
        if self._fail_damaged(db, row, data=""):
            return
        crashes = row["crashes"] + (1 if charged else 0)
        definition = self.definition(row["definition"])
        step = definition.step_name(row["step_index"])
        on_lost = definition.option("on_lost") if crashes > row["crashes"] else "retry"
        reason = f"its runner died while step {step!r} ran"
        event = {"retry": "recover", "ask": "interrupt", "error": "fail"}[on_lost]
        if on_lost == "retry" and crashes >= MAX_CRASHES:
            event = "fail"
            reason = f"{crashes} runners died while it ran, the last in step {step!r}"
        if row["pause_requested"] and event == "recover":
            event = "pause"
        if row["cancel_requested"]:
            event = "cancel"
        columns: Json = {"runner": None, "crashes": crashes, "pause_requested": 0}
        if event in ("interrupt", "fail"):
            columns["error"] = to_json(make_error(step, "RunnerDied", reason))
        self.transition(db, event, Move(row["id"], columns, row["claim"]))

    # --- upkeep ------------------------------------------------------------

    def pruning(
        self, older_than: float, *, wait: float = BUSY_SECONDS
    ) -> Iterator[int]:
        """Delete processes that ended more than so many seconds ago.

        A few hundred in a transaction, so that nobody waits for it; yields how many.
        """
        last_id, limit = 0, self.now() - older_than
        while True:
            rows = self.read(
                """
                SELECT id, status, finished_at, definition FROM process
                 WHERE id > ? AND created_at <= ? ORDER BY id LIMIT 500""",
                (last_id, limit),
            )
            if not rows:
                return
            last_id = rows[-1]["id"]
            old = [
                row
                for row in rows
                if row["status"] in FINAL_STATES and (row["finished_at"] or 0) <= limit
            ]
            if old:
                with self.transaction(wait=wait) as db:
                    self._delete(db, old)
            yield len(old)

    def _delete(self, db: Connection, rows: list[Row]) -> None:
        for table, column in (
            ("process", "id"),
            ("data", "process"),
            ("output", "process"),
        ):
            db.executemany(
                f"DELETE FROM {table} WHERE {column} = ?",
                [(row["id"],) for row in rows],
            )
        # The newest event stays, as nobody's, so that its number is never given again.
        sql = """
            UPDATE event SET process = 0
             WHERE process = ? AND number = (SELECT max(number) FROM event)"""
        db.executemany(sql, [(row["id"],) for row in rows])
        sql = "DELETE FROM event WHERE process = ?"
        db.executemany(sql, [(row["id"],) for row in rows])
        sql = """
            DELETE FROM definition
             WHERE id = ? AND NOT EXISTS
                   (SELECT 1 FROM process WHERE process.definition = definition.id)"""
        db.executemany(sql, {(row["definition"],) for row in rows})

    def trouble(self) -> str | None:
        """What SQLite's own check of the whole file finds, None if it is sound."""
        found: str = self.read("PRAGMA quick_check(1)")[0][0]
        return None if found == "ok" else found

    # --- the state machine -------------------------------------------------

    def transition(
        self,
        db: Connection,
        event: str,
        *moves: Move,
        details: Sequence[str | None] | None = None,
    ) -> set[int]:
        """Move processes along TRANSITIONS; return the ids of those that may and did.

        The one writer of `status`.  The moves change the same columns.  With a claim a
        process moves only if that is still its claim and nobody wants something else
        of it, see `_guard`.  What ends a run of a series queues the next one.
        """
        sources, target = TRANSITIONS[event]
        if moves and moves[0].claim is not None:
            sources = (RUNNING,)  # what is queued again is nobody's
        status: Json = {"status": target}
        if target in FINAL_STATES:
            status["finished_at"] = self.now()
        details = details or [None] * len(moves)
        moved = self._move(db, event, sources, moves, details, status)
        if target in FINAL_STATES:
            self._go_on(db, sorted(moved))
        return moved

    def _move(
        self,
        db: Connection,
        kind: str,
        sources: tuple[str, ...],
        moves: Sequence[Move],
        details: Iterable[str | None],
        same: Json | None = None,
    ) -> set[int]:
        """Guarded UPDATEs of the same columns, with an event for each that was made.

        `same`: columns that get the same value in all.
        """
        if not moves:
            return set()
        names, fixed = tuple(moves[0].columns), same or {}
        guard = "" if moves[0].claim is None else self._guard(kind)
        sql, moved = self._update_sql((*fixed, *names), sources, guard), []
        for (row_id, columns, claim), detail in zip(moves, details):
            own = [columns[name] for name in names]
            if db.execute(sql, [*fixed.values(), *own, row_id, claim]).rowcount:
                moved.append((row_id, detail))
        self._add_events(db, kind, moved)
        return {row_id for row_id, _ in moved}

    @staticmethod
    def _guard(kind: str) -> str:
        """A condition: nobody wants it cancelled, nor paused where it would go on."""
        if kind == "cancel":
            return ""
        goes_on = kind in ("step", "retry", "give_back")
        return " AND NOT cancel_requested" + " AND NOT pause_requested" * goes_on

    @staticmethod
    @functools.cache
    def _update_sql(
        names: tuple[str, ...], sources: tuple[str, ...], guard: str
    ) -> str:
        """The UPDATE of these columns of a process in one of these states.

        Its parameters: the columns, the row id, its claim or None for any.
        """
        states = ", ".join(f"'{word}'" for word in sources)
        return (
            f"UPDATE process SET {', '.join(f'{name} = ?' for name in names)}"
            f" WHERE id = ? AND claim = coalesce(?, claim) AND status IN ({states})"
            f"{guard}"
        )

    def _add_events(
        self, db: Connection, kind: str, whose: Iterable[tuple[int, str | None]]
    ) -> None:
        """Write down what happened, for each (row id, detail)."""
        now = self.now()
        if self._set_back(db, now):
            self._recount(db, now)
        db.executemany(
            "INSERT INTO event (process, at, kind, detail) VALUES (?, ?, ?, ?)",
            [(row_id, now, kind, detail) for row_id, detail in whose],
        )

    # --- series ------------------------------------------------------------

    def _go_on(self, db: Connection, ended: Sequence[int]) -> None:
        """Queue the next run of each series of which a run has ended.

        A run that was cancelled before it began, or with its series, is the last.
        """
        for start in range(0, len(ended), GROUP_SIZE):
            some = ended[start : start + GROUP_SIZE]
            marks = ", ".join("?" * GROUP_SIZE)  # always as many: one statement
            rows = db.execute(
                f"""
                SELECT * FROM process
                 WHERE id IN ({marks}) AND +series IS NOT NULL
                   AND started_at IS NOT NULL
                   AND (status <> 'cancelled' OR cancel_requested = {WISH_RUN})""",
                [*some, *[0] * (GROUP_SIZE - len(some))],
            )
            for row in rows.fetchall():
                self._add_successor(db, row)

    def _add_successor(self, db: Connection, row: Row) -> None:
        try:
            definition = self.definition(row["definition"])
            given = self._input(db, row["id"], -1)
            data = self._input(db, row["id"], 0) if given is None else given
        except (StorageError, BadSpec):  # changed by hand, as the run itself says
            return
        if data is None or not definition.repeats():
            return
        key = row["once_key"]
        if key is not None and self._with_key(db, key) is not None:
            return  # while this run was being cancelled another has replaced it
        now = due = self.now()
        trouble = None
        try:
            due = successor_due(definition.option, now, row["started_at"])
        except (ProcmanError, *_BY_HAND) as error:  # no data of its time zone, say
            trouble = to_json(make_error(None, type(error).__name__, str(error)))
        new_id, _ = self._again(
            *(db, row, to_json(data), {"after": row["pid"]}),
            due_at=due,
            series=row["series"],
            once_key=key,
        )
        if trouble is not None:
            self.transition(db, "fail", Move(new_id, {"error": trouble}))

    # --- the clock ---------------------------------------------------------

    @staticmethod
    def _set_back(db: Connection, now: float) -> bool:
        """Whether the clock has been set back since the last event."""
        # Calculated in SQL, in which a text is a number, too.
        sql = "SELECT ? < at - ? FROM event ORDER BY number DESC LIMIT 1"
        row = db.execute(sql, (now, CLOCK_SECONDS)).fetchone()
        return row is not None and bool(row[0])

    def look_at_clock(self) -> None:
        """Count dues anew if the clock was set back, though nothing else happens."""
        with self._my_turn():
            set_back = self._set_back(self.db, self.now())
        if set_back:
            with self.transaction(wait=1) as db:
                self._add_events(db, "clock", [(0, None)])  # nobody's: not listed

    def _recount(self, db: Connection, now: float) -> None:
        """What was to wait for a length waits for that length by the new clock.

        What is due at a moment of the calendar stays so, and what runs was due.
        """
        sql = "UPDATE process SET due_at = min(due_at, ?) WHERE status = 'running'"
        db.execute(sql, (now,))
        rows = db.execute(
            "SELECT * FROM process WHERE status = 'queued' AND due_from > ?", (now,)
        ).fetchall()
        for row in rows:
            try:
                option = self.definition(row["definition"]).option
                due = counted_anew(option, dict(row), now)
            except (ProcmanError, *_BY_HAND):  # no data of its time zone, say
                continue  # it stays as it is
            sql = "UPDATE process SET due_at = ?, due_from = ? WHERE id = ?"
            db.execute(sql, (due, now, row["id"]))


# ===========================================================================
# 6. Steps: from a spec to an object with execute(data), and running it
# ===========================================================================
#
# Knows code, commands and what they print; has never heard of a database.


class ProcessStep:
    """A step as a class: JSON object in, JSON object out, None to pass it on.

    A subclass need not derive from this; having `execute(data)` is enough.
    """

    interrupts = False

    def execute(self, data: Json) -> Json | None:
        """Do the work; raise to fail.  May be `async def`."""
        raise NotImplementedError(f"{type(self).__name__} has no execute")


class InterruptingProcessStep(ProcessStep):
    """A step after which the process waits, interrupted, until somebody proceeds."""

    interrupts = True


class Context(namedtuple("Context", "pid step index attempt report stopped")):
    """What a step can know about itself; see `current`."""

    __slots__ = ()

    @property
    def key(self) -> str:
        """The same text each time this step of this process runs: for idempotency."""
        return f"{self.pid}.{self.step}.{self.index}"

    @property
    def cancelled(self) -> bool:
        """Whether this step has been asked to stop (cancel, timeout, end of runner)."""
        return self.stopped.is_set()  # type: ignore[no-any-return]

    def progress(
        self, done: float, total: float | None = None, message: str | None = None
    ) -> None:
        """Say how far the step is; `status` shows the last word."""
        for value, name in ((done, "done"), (total, "total")):
            if value is not None:
                expect_number(value, name, 0.0, 2**63)
        if message is not None:
            expect_text(message, "message", 1000)
        if total is not None and done > total:
            raise BadSpec(f"done is {done}, more than the total of {total}")
        self.report({"done": done, "total": total, "message": message})

    def log(self, *words: Any) -> None:
        """Print a line with the time, kept with the process (`logs`)."""
        print(time.strftime("%Y-%m-%d %H:%M:%S"), *words, flush=True)


_context: Context | None = None


def current() -> Context:
    """The running step's pid, step, attempt, key, progress(), log() and cancelled."""
    # A copy inside a package asks the one that the worker runs.
    found = _context or getattr(sys.modules.get("procman"), "_context", None)
    if found is None:
        raise ProcmanError("current() is for code that runs inside a step")
    return found


class StepError(ProcmanError):
    """A step failed in a way that has no exception of its own to show."""

    def __init__(self, kind: str, message: str, **more: Any):
        super().__init__(message)
        self.kind, self.more = kind, more


def _load_file(path: str) -> Any:
    """The module of a file, imported once; its neighbours can be imported too."""
    import importlib.util

    path = os.path.realpath(path)
    name = "procman_file_" + re.sub(r"\W", "_", path)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not os.path.isfile(path):
            raise StepError("ModuleNotFoundError", f"there is no file {path}")
        if os.path.dirname(path) not in sys.path:
            sys.path.append(os.path.dirname(path))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _load_module(name: str) -> Any:
    import importlib

    try:
        return sys.modules.get(name) or importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # the module is there, but not what it imports
        places = ", ".join(filter(None, sys.path))
        raise StepError(
            "ModuleNotFoundError", f"no module {error.name!r}; looked in: {places}"
        ) from None


def resolve(reference: str, directory: str) -> Any:
    """What `package.module:name` or `path/to/file.py:name` stands for."""
    where, _, names = reference.rpartition(":")
    if where.endswith(".py"):
        found = module = _load_file(os.path.join(directory, where))
    else:
        found = module = _load_module(where)
    for name in names.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            place = getattr(module, "__file__", None) or where
            raise StepError(
                "AttributeError", f"no {names!r} in module {where!r} ({place})"
            ) from None
    return found


class Services:
    """Named factories, each called on first use and once."""

    def __init__(self, factories: Mapping[str, Any] | None = None):
        self._factories = factories or {}
        self._built: Json = {}

    def get(self, name: str) -> Any:
        """The service of that name."""
        if name not in self._built:
            if name not in self._factories:
                known = ", ".join(sorted(self._factories)) or "none"
                raise StepError(
                    "LookupError", f"no service {name!r}; there are: {known}"
                )
            factory = self._factories[name]
            self._built[name] = factory() if callable(factory) else factory
        return self._built[name]


class _FunctionStep:
    """A step made of a function from data to data."""

    def __init__(self, function: Callable[[Any], Any]):
        self.execute = function


class _Kept:
    """What a command prints on one pipe: copied to our own output, and kept if it fits.

    `target`: the descriptor it is copied to.  Kept: the first `limit` bytes, the last.
    """

    def __init__(self, target: int, limit: int):
        self._target, self._limit = target, limit
        self._head, self._tail = bytearray(), bytearray()
        self.cut = 0

    def add(self, chunk: bytes) -> None:
        """Take what has come."""
        with contextlib.suppress(OSError):  # a full disk stops no command
            os.write(self._target, chunk)
        room = self._limit - len(self._head)
        self._head += chunk[:room]
        self._tail += chunk[room:]
        if len(self._tail) > 2 * OUTPUT_TAIL_BYTES:
            self.cut += len(self._tail) - OUTPUT_TAIL_BYTES
            del self._tail[:-OUTPUT_TAIL_BYTES]

    def kept(self) -> bytes:
        """The first and the last of what came."""
        gap = b"\n[... %d bytes cut ...]\n" % self.cut if self.cut else b""
        return bytes(self._head) + gap + bytes(self._tail)


def _run_command(
    command: list[str] | str, data: bytes, limit: int
) -> tuple[int, _Kept, _Kept]:
    """Run it with `data` on standard input: (exit code, what it printed, errors)."""
    import subprocess

    try:
        child = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
    except OSError as error:
        name = command if isinstance(command, str) else command[0]
        raise StepError(
            type(error).__name__,
            f"cannot run {shorten(name, 200)!r}: {error.strerror} (in {os.getcwd()})",
        ) from None
    out, err = _Kept(1, limit), _Kept(2, OUTPUT_HEAD_BYTES)
    try:
        return converse(child, data, (out.add, err.add)), out, err
    except BaseException:
        child.kill()
        child.wait()
        raise


def _command_failed(command: list[str] | str, code: int, tail: str) -> StepError:
    name = shorten(command if isinstance(command, str) else command[0], 200)
    ended, number = f"ended with exit code {code}", None
    if code < 0:
        number = signal_name(-code)
        ended = f"was ended by {number}"
    message = f"{name!r} {ended}" + (f": {tail}" if tail else "")
    return StepError(
        "CommandFailed", message, exit_code=code if code > 0 else None, signal=number
    )


class _CommandStep:
    """A step made of a program: data on standard input, result on standard output."""

    def __init__(self, command: list[str] | str, output: str):
        self._command, self._output = command, output

    def execute(self, data: Json) -> Json:
        """Run it to its end; raises StepError for any exit code but 0."""
        limit = OUTPUT_HEAD_BYTES if self._output == "text" else MAX_JSON_BYTES
        code, out, err = _run_command(self._command, to_json(data).encode(), limit)
        if code:
            tail = err.kept()[-2000:].decode("utf-8", "replace").strip()
            raise _command_failed(self._command, code, tail)
        if self._output == "text":
            return {"stdout": out.kept().decode("utf-8", "replace"), "exit_code": 0}
        if out.cut:
            raise StepError("BadOutput", f"printed more than {MAX_JSON_BYTES} bytes")
        return expect_object(from_json(out.kept(), "its output"), "its output")


def build_step(spec: Any, services: Services, directory: str) -> Any:
    """The object with `execute` that a spec describes; raises StepError."""
    if isinstance(spec, str):
        found = resolve(spec, directory)
        step = found() if isinstance(found, type) else found
    elif "command" in spec or "shell" in spec:
        command = spec.get("command") or spec["shell"]
        return _CommandStep(command, spec.get("output", "text"))
    elif "call" in spec:
        step = resolve(spec["call"], directory)
    else:
        import copy

        maker = resolve(spec.get("class") or spec["factory"], directory)
        given = [services.get(name) for name in spec.get("services", ())]
        # The spec is used again; a step may change what it was given.
        own = copy.deepcopy(spec)
        step = maker(*given, *own.get("args", ()), **own.get("kwargs", {}))
    if callable(getattr(step, "execute", None)):
        return step
    if (isinstance(spec, str) or "call" in spec) and callable(step):
        return _FunctionStep(step)
    named = (
        spec
        if isinstance(spec, str)
        else spec.get("class") or spec.get("factory") or spec.get("call")
    )
    raise StepError(
        "TypeError", f"{named} gives a {type(step).__name__} that has no execute(data)"
    )


def needs_code(spec: Any) -> bool:
    """Whether a step imports code; else it is a command."""
    return isinstance(spec, str) or not ("command" in spec or "shell" in spec)


# The dict below os.environ: to read that, variable by variable, takes 60 µs.
_environ: dict[Any, Any] = getattr(os.environ, "_data")  # noqa: B009


@contextlib.contextmanager
def _surroundings(order: Mapping[str, Any], context: Context) -> Iterator[None]:
    """The working directory, environment and arguments of a step; then as before."""
    global _context
    spec = order["spec"] if isinstance(order["spec"], dict) else {}
    directory = os.path.join(order["directory"], spec.get("cwd", ""))
    arguments, environment = sys.argv, dict(_environ)
    try:
        try:
            os.chdir(directory)
        except OSError as error:
            raise StepError(
                type(error).__name__,
                f"cannot work in the directory {directory}: {error.strerror}",
            ) from None
        changed = dict(spec.get("env", {}))
        if not needs_code(order["spec"]):
            changed = {
                "PROCMAN_PID": context.pid,
                "PROCMAN_STEP": context.step,
                "PROCMAN_ATTEMPT": str(context.attempt),
                "PROCMAN_KEY": context.key,
                "PROCMAN_DB": order.get("database", ""),
                **changed,
            }
        for name, value in changed.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        given = [(f"--{name}", str(value)) for name, value in order["args"].items()]
        words = itertools.chain.from_iterable(given)
        sys.argv = [sys.argv[0], *words, *order.get("script_args", ())]
        _context = context
        yield
    finally:
        _context = None
        sys.argv = arguments
        if _environ != environment:
            decode = os.environ.decodevalue
            for name in _environ.keys() | environment.keys():
                if name not in environment:
                    del os.environ[decode(name)]
                elif _environ.get(name) != environment[name]:
                    os.environ[decode(name)] = decode(environment[name])


async def _await(result: Any) -> Any:
    return await result


def execute_step(
    order: Mapping[str, Any], services: Services, context: Context
) -> tuple[Json | None, bool]:
    """Run one step: (its result or None, whether it interrupts).

    Whatever it raises comes out of here, sys.exit and its like too.
    """
    with _surroundings(order, context):
        spec = order["spec"]
        step = build_step(spec, services, order["directory"])
        result = step.execute(order["data"])
        if hasattr(result, "__await__"):
            import asyncio

            result = asyncio.run(_await(result))
        interrupts = getattr(step, "interrupts", False) is True or (
            isinstance(spec, dict) and spec.get("interrupt", False)
        )
        return result, bool(interrupts)


def describe_failure(step: str, error: BaseException) -> Json:
    """The record of what a step raised; safe for exceptions that are broken too."""
    import traceback

    if isinstance(error, StepError):
        return make_error(step, error.kind, str(error), **error.more)
    try:
        message = str(error)
    except BaseException as broken:
        message = f"(its message cannot be shown: {type(broken).__name__})"
    if isinstance(error, SystemExit):
        message = f"the step called sys.exit({message})"
    try:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename != __file__
        ]
        lines = traceback.format_list(frames[-50:])
        text = "Traceback (most recent call last):\n" + "".join(lines)
        text += f"{type(error).__name__}: {message}"
    except BaseException:
        text = "(no traceback)"
    clean = text.encode("utf-8", "backslashreplace").decode()
    short = shorten(clean, MAX_TRACEBACK)
    return make_error(step, type(error).__name__, message, traceback=short)


class StepExecutor:
    """Runs steps here and now: no queue, no database, nothing kept.

    `services` maps names to factories.
    """

    def __init__(self, services: Mapping[str, Any] | None = None):
        self._services = Services(services)
        self.step = ""  # the one that ran last

    def execute(
        self, steps: Mapping[str, Any], data: Mapping[str, Any] | None = None
    ) -> Json:
        """The last step's output.  Stops after an interrupting step, with its output.

        A step's own exception comes out as it is; timeouts are not enforced.
        """
        return self.execute_until(steps, data)[0]

    def execute_until(
        self, steps: Mapping[str, Any], data: Mapping[str, Any] | None = None
    ) -> tuple[Json, bool]:
        """The same, and whether it was an interrupting step that ended it."""
        ManagedProcess(steps)
        passed: Json = json.loads(to_json(expect_object({} if data is None else data)))
        pid, home = os.urandom(PID_LENGTH // 2).hex(), os.getcwd()
        for place in (os.path.dirname(os.path.abspath(__file__)), home):
            if place not in sys.path:
                sys.path.append(place)
        for index, (name, spec) in enumerate(steps.items()):
            self.step = name
            order = {"spec": spec, "directory": home, "args": {}, "data": passed}
            context = Context(pid, name, index, 1, lambda _: None, threading.Event())
            try:
                result, interrupts = execute_step(order, self._services, context)
            except StepError as error:
                words = f"step {name!r}: {error}"
                raise StepError(error.kind, words, **error.more) from None
            finally:
                os.chdir(home)
            if result is not None:
                where = f"the output of step {name!r}"
                passed = json.loads(to_json(expect_object(result, where), where))
            if interrupts:
                return passed, True
        return passed, False


# ===========================================================================
# 7. Worker: the child's side of the pipe
# ===========================================================================
#
# The life of a child, from top to bottom.  Its frames are lines of JSON texts with
# tabs between them: an order is a step (Definition.order), whose it is, and its
# input; a report is a header and, where there is one, the output.


_HERE = os.path.dirname(os.path.abspath(__file__))


class _Stopped(BaseException):
    """SIGTERM: the runner wants this step to end."""


class _Connection:
    """The private ends of the pipes to the runner, away from what steps can reach."""

    def __init__(self) -> None:
        self._reading, self._writing = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)  # print() goes where errors go: to the output file
        fds = (0, 1, 2, self._reading, self._writing)
        self._inodes = {fd: os.fstat(fd).st_ino for fd in fds}
        self._turn = threading.Lock()
        self._os_pid = os.getpid()

    def intact(self) -> bool:
        """Whether the steps have left our descriptors and the standard ones alone."""
        try:
            for fd, inode in self._inodes.items():
                if os.fstat(fd).st_ino != inode:
                    return False
        except OSError:
            return False
        return True

    def lines(self) -> Iterator[bytes]:
        """The runner's frames, until it is gone."""
        parts: list[bytes] = []
        while True:
            chunk = os.read(self._reading, 1 << 20)
            if not chunk:
                return
            *whole, rest = chunk.split(b"\n")
            for line in whole:
                yield b"".join([*parts, line])
                parts = []
            parts.append(rest)

    def send(self, header: Json, data: str | None = None) -> None:
        """Write one frame, all of it."""
        line = json.dumps(header) + ("" if data is None else "\t" + data) + "\n"
        content = memoryview(line.encode())
        with self._turn:
            if os.getpid() != self._os_pid:
                os._exit(0)  # a child that a step has forked: it does not speak for it
            try:
                ours = os.fstat(self._writing).st_ino == self._inodes[self._writing]
            except OSError:
                ours = False
            if not ours:
                os._exit(BROKEN_PIPE_EXIT)  # closed, and its number may be another's
            while content:
                content = content[os.write(self._writing, content) :]


class _Sources:
    """The files that this worker has imported, to notice when one has changed."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int, int] | None] = {}
        self._modules = 0
        self._looked_at = self._cost = 0.0
        self._system = os.path.join(os.path.dirname(os.__file__), "")

    @staticmethod
    def _stamp(path: str) -> tuple[int, int, int] | None:
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size

    def note(self, began_at: float) -> None:
        """Remember what has been imported since; wall time, of when the step began.

        What was written later, or just before, may not be what was imported; but what
        is dated beyond now was written when the clock went otherwise.
        """
        if len(sys.modules) == self._modules:
            return
        self._modules = len(sys.modules)
        least, most = (began_at - 0.01) * 1e9, (time.time() + 1) * 1e9
        for module in list(sys.modules.values()):
            path = None
            with contextlib.suppress(Exception):  # modules may be anything
                path = module.__file__
            if isinstance(path, str) and path not in self._seen:
                system = path.startswith(self._system) and "site-packages" not in path
                stamp = None if system else self._stamp(path)
                late = any(least < at < most for at in stamp[:2]) if stamp else False
                self._seen[path] = (0, 0, 0) if late else stamp

    def changed(self) -> str | None:
        """A file that is not what was imported; at most 5 % of the time goes here."""
        began = time.monotonic()
        if began - self._looked_at < min(0.02, 20 * self._cost):
            return None
        found = next(
            (
                path
                for path, stamp in self._seen.items()
                if stamp and self._stamp(path) != stamp
            ),
            None,
        )
        self._looked_at = time.monotonic()
        self._cost = self._looked_at - began
        return found


def _streams_closed() -> bool:
    """Whether a step has closed or detached what print() needs."""
    streams: Any = (sys.__stdout__, sys.__stderr__)
    try:
        return any(stream.closed for stream in streams)
    except (ValueError, AttributeError):
        return True


class _Worker:
    """Runs the orders that come in, one after the other."""

    def __init__(self, connection: _Connection, hello: Json):
        self._connection = connection
        import queue

        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._step_text = ""  # of the last order ...
        self._step: Json = {}  # ... parsed once
        self._output = OutputFile(hello["output"])
        self._script_args, self._database = hello["script_args"], hello["database"]
        self._limit = hello["limit"]
        self._served: set[str] = set()
        self._services = hello["services"]
        self._registry: Services | None = None
        self._home: str | None = None
        self._services_directory = hello["directory"]
        self._sources = _Sources()
        self._stopped = threading.Event()
        self._commands = False  # what runs is a command
        self._progress_at = 0.0
        self._reported: Json = {}
        self._os_pid = os.getpid()
        self._traces: Any = None

    def read(self, frames: Iterator[bytes]) -> None:
        """Take frames in (a thread of its own); when they end the runner is gone."""
        try:
            with contextlib.suppress(OSError):  # a step has closed it
                for line in frames:
                    if line == GIVE_BACK:
                        self._connection.send({"given_back": self._give_back()})
                    else:
                        self._inbox.put(line)
        finally:
            kill_children()
            self._output.remove()
            os._exit(0 if self._connection.intact() else BROKEN_PIPE_EXIT)

    def _give_back(self) -> list[int]:
        """Take out what has not begun; the runner has better use for it."""
        import queue

        numbers = []
        with contextlib.suppress(queue.Empty):
            while True:
                whose = self._inbox.get_nowait().split(b"\t", 2)[1]
                numbers.append(json.loads(whose)["id"])
        return numbers

    def _next_order(self) -> Json:
        """Wait for what Definition.order and WorkerHandle.give have put together."""
        step, whose, data = self._inbox.get().decode().split("\t", 2)
        if step != self._step_text:
            self._step_text, self._step = step, json.loads(step)
        return {**self._step, **json.loads(whose), "data": data}

    def run(self) -> None:
        """Serve until this worker should be replaced."""
        self._traces = traces()
        while True:
            order = self._next_order()
            reason = self._unfit(order)
            if reason:
                self._connection.send({"retire": reason})
                return
            report, data = self._perform(order)
            self._connection.send(report, data)
            if report.get("spent") or self._stopped.is_set():
                return

    def _unfit(self, order: Json) -> str | None:
        """Why another worker must do this, None if this one can."""
        if self._limit:
            self._served.add(order["pid"])
            if len(self._served) > self._limit:
                return f"has served {self._limit}"
        if not needs_code(order["spec"]):
            return None
        if self._home is None:  # one directory a worker: its modules shadow others'
            self._home = order["directory"]
            if self._home not in sys.path:
                sys.path.insert(sys.path.index(_HERE), self._home)
        elif self._home != order["directory"]:
            return f"has imported from {self._home}"
        changed = self._sources.changed()
        return changed and f"{changed} has changed"

    def _perform(self, order: Json) -> tuple[Json, str | None]:
        """Run one step and make its report."""
        report: Json = {"id": order["id"]}
        data, began, began_at = None, time.perf_counter(), time.time()
        self._output.begin(f"{order['pid']} {order['claim']} {order['index']}")
        try:
            report["ending"], data = self._execute(order)
        except BaseException as error:
            report["ending"] = "stopped"
            if not isinstance(error, _Stopped) and not (
                isinstance(error, StepError) and self._stopped.is_set()
            ):
                report["ending"] = "error"
                report["error"] = describe_failure(order["step"], error)
        self._sources.note(began_at)
        for stream in (sys.__stdout__, sys.__stderr__):
            with contextlib.suppress(Exception):
                stream.flush()  # type: ignore[union-attr]
        if self._output.has_some():
            head, cut, tail = self._output.read()[1]
            report["printed"] = [head.decode("latin-1"), cut, tail.decode("latin-1")]
        whole = self._connection.intact() and not _streams_closed()
        if not whole or self._traces != traces() or children_left():
            report["spent"] = True
        report["took"] = time.perf_counter() - began
        return report, data

    def _execute(self, order: Json) -> tuple[str, str | None]:
        context = Context(
            order["pid"],
            order["step"],
            order["index"],
            order["attempt"],
            lambda progress: self._report_progress(order["id"], progress),
            self._stopped,
        )
        order["data"] = expect_object(json.loads(order["data"]))
        order["script_args"], order["database"] = self._script_args, self._database
        self._progress_at = 0.0
        self._commands = not needs_code(order["spec"])
        try:
            services = self._find_services(order["spec"])
            result, interrupts = execute_step(order, services, context)
        finally:
            self._commands = False
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        where = f"the output of step {order['step']!r}"
        data = None if result is None else to_json(expect_object(result, where), where)
        return "interrupt" if interrupts else "done", data

    def _find_services(self, spec: Any) -> Services:
        if isinstance(spec, str) or "services" not in spec:
            return Services()
        if self._registry is None:
            place = self._services_directory
            factories = resolve(self._services, place) if self._services else {}
            if not isinstance(factories, Mapping):
                raise StepError(
                    "TypeError", f"{self._services} is not a dict of factories"
                )
            self._registry = Services(factories)
        return self._registry

    def _report_progress(self, number: int, progress: Json) -> None:
        """At most twice a second, but never lose the end."""
        now, last = time.monotonic(), progress["done"] == progress["total"]
        if now - self._progress_at >= 0.5 or (last and progress != self._reported):
            self._progress_at, self._reported = now, progress
            self._connection.send({"id": number, "progress": progress})

    def stopped(self) -> bool:
        """Whether SIGTERM has come."""
        return self._stopped.is_set()

    def stop(self, *_: Any) -> None:
        """SIGTERM: let the step unwind, then end; a child that it forked ends now."""
        if os.getpid() != self._os_pid:
            end_by_sigterm()
        self._stopped.set()
        if not self._commands:  # a command has been asked, too, and may still tidy up
            raise _Stopped


def worker_main() -> int:
    """Serve a runner at the other end of standard input and output."""
    import signal

    connection = _Connection()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(  # type: ignore[union-attr]
            encoding="utf-8", errors="backslashreplace", line_buffering=True
        )
    # Behind the standard library, whose modules no file of a project should replace,
    # before what is installed; and without the '' of `python -c`.
    found = [place for place in sys.path if place not in ("", _HERE)]
    sites = (
        number for number, place in enumerate(found) if place.endswith("-packages")
    )
    index = next(sites, len(found))
    sys.path[:] = [*found[:index], _HERE, *found[index:]]
    frames = connection.lines()
    worker = _Worker(connection, json.loads(next(frames)))
    adopt_orphans()
    signal.signal(signal.SIGTERM, worker.stop)
    threading.Thread(target=worker.read, args=(frames,), daemon=True).start()
    connection.send({"ready": os.getpid()})
    try:
        worker.run()
        if not worker.stopped():
            return 0
    except _Stopped:
        pass
    end_by_sigterm()
    return FAILED


# ===========================================================================
# 8. Manager: what programs call
# ===========================================================================
#
# Each verb opens one transaction, and rings the runners after its commit.


Waiting = Generator[float, None, list[ProcessInfo]]  # yields pauses in seconds
_MOMENTS: dict[str, Callable[[Any], Any]] = {  # options that only calendars can check
    "at": parse_at,
    "cron": lambda value: next_cron(value, 0.0),
    "tz": lambda value: next_cron("@daily", 0.0, value),
}


def check_moments(defaults: Mapping[str, Any]) -> None:
    """Refuse defaults that would be wrong for any process: a time or zone is none."""
    for name, check in _MOMENTS.items():
        if defaults.get(name) is not None:
            check(defaults[name])


class ProcessManager:
    """The processes in one database: start them, look at them, steer them.

    `path`: the database, else the variable PROCMAN_DB, else procman.db beside this
    file.  `defaults`: process options for those that do not set them.  `now`: the wall
    clock.  May be shared by threads.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        defaults: Mapping[str, Any] | None = None,
        now: Callable[[], float] = time.time,
        create: bool = True,
    ):
        beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "procman.db")
        chosen = os.fspath(path or os.environ.get("PROCMAN_DB") or beside)
        self.store = Store(chosen, now=now, create=create)
        self._defaults = {name: option.default for name, option in OPTIONS.items()}
        self._defaults.update(check_defaults(defaults or {}))
        self._socket: Any = None

    @property
    def path(self) -> str:
        """The database file."""
        return self.store.path

    def start_process(
        self,
        process: ManagedProcess,
        data: Mapping[str, Any] | None = None,
        *,
        connection: Connection | None = None,
    ) -> str:
        """Queue a process and return its pid; it is on disk when this returns.

        `connection`: your own, with an open transaction on the same database; the
        process then starts to exist with your commit.
        """
        if connection is None:
            return self.start_many([(process, data)])[0]
        new = self._prepare(process, data, self._directory())
        return self.store.insert_with(connection, new)

    def start_many(
        self, processes: Iterable[ManagedProcess | tuple[ManagedProcess, Any]]
    ) -> list[str]:
        """Queue many in one transaction, all or none; return the pids in order."""
        directory = self._directory()
        ready = []
        for item in processes:
            process, data = item if isinstance(item, tuple) else (item, None)
            ready.append(self._prepare(process, data, directory))
        with self._verb() as db:
            return self.store.insert(db, ready)

    def _prepare(
        self, process: ManagedProcess, data: Any, directory: str
    ) -> Submission:
        """What `Store.insert` takes, all of it checked."""
        if not isinstance(process, ManagedProcess):
            kind = type(process).__name__
            raise BadType(f"process must be a ManagedProcess, not {kind}")
        own = process.options
        if own.get("at") is not None:
            own = {**own, "at": parse_at(own["at"])}
        options = merge_options(self._defaults, own)
        due_at, due_from = first_due(options, self.store.now())
        text = Definition.text(process.text, options, directory)
        content = to_json(expect_object({} if data is None else data))
        once_key = None
        if options["key"] is not None:
            once_key = KEY + options["key"]
        elif options["once"] or options["unique"]:
            once_key = Definition(text).fingerprint(content)
        if not process.steps and repeating(options):
            raise BadSpec("nothing to run again: a process with a schedule needs steps")
        pid = options["pid"] or os.urandom(PID_LENGTH // 2).hex()
        return Submission(
            *(pid, text, content, options, due_at, due_from, own, once_key)
        )

    @staticmethod
    def _directory() -> str:
        try:
            return os.getcwd()
        except OSError:
            raise BadSpec(
                "the current directory does not exist any more: steps would run in it"
            ) from None

    def get_process_info(self, pid: str) -> ProcessInfo:
        """The record of a process; a unique prefix of its pid will do."""
        return self.store.info(pid)

    def get_process_status(self, pid: str) -> str:
        """Its state, one word."""
        return str(self.store.find(pid)["status"])

    def list_processes(
        self, *, order: str = "newest", limit: int = 50, offset: int = 0, **filters: Any
    ) -> list[ProcessInfo]:
        """Records, newest first; `order` may also be oldest, due and ended.

        Filters: `status` (a state, open or final), `name`, `queue`, `since` (ended, or
        if open created, since then: as `at`, or `5m` ago), `series` (the pid of a run,
        or of what was retried), `parent` (a pid).
        """
        for value, what in ((limit, "limit"), (offset, "offset")):
            expect_number(value, what, 0, 2**31)
        return self.store.select(filters, order=order, limit=limit, offset=offset)

    def count(self, **filters: Any) -> int:
        """How many processes there are, with the filters of `list_processes`."""
        return self.store.count(filters)

    def proceed(self, pid: str, data: Mapping[str, Any] | None = None) -> str:
        """Continue an interrupted process; `data` is merged over what waits.

        Of two simultaneous calls one wins, the other gets WrongState.
        """
        merged = expect_object({} if data is None else data)
        to_json(merged)
        with self._verb() as db:
            return self.store.proceed(db, pid, merged)

    def cancel(self, pid: str) -> str:
        """Cancel an open process; a running one is ended by its runner, then cancelled.

        Acknowledged is kept: it ends as cancelled even if its last step just ended.  To
        cancel the queued run of a series ends the series; to cancel a run that has
        begun ends only that run.
        """
        with self._verb() as db:
            return self.store.cancel(db, pid)

    def cancel_all(self, **filters: Any) -> list[str]:
        """Cancel all open ones that pass the filters, and end their series.

        Filters as for `list_processes`.  Returns their pids, oldest first.
        """
        if filters.get("status") in ("final", *FINAL_STATES):
            raise BadSpec(f"what is {filters['status']} cannot be cancelled")
        pids: list[str] = []
        ids = [0]
        # In small transactions, and looked for before them: nobody waits for it.  What
        # follows a run that ends meanwhile has a higher id.
        while ids := self.store.cancellable(filters, ids[-1]):
            with self._verb() as db:
                pids += self.store.cancel_some(db, filters, ids)
        return pids

    def pause(self, pid: str) -> str:
        """Interrupt a process: a queued one now, a running one after its step.

        `proceed` continues it.  One whose last step runs ends all the same.
        """
        with self._verb() as db:
            return self.store.pause(db, pid)

    def retry(
        self, pid: str, step: str | None = None, data: Mapping[str, Any] | None = None
    ) -> str:
        """Start a new process that does again what a final one did; return its pid.

        From the step that failed (after success the first), or from `step`, with the
        input that this had; `data` is merged over it.  It has the options of the old
        one but for its schedule, and the same `series`.
        """
        merged = None if data is None else expect_object(data)
        to_json(merged)
        with self._verb() as db:
            return self.store.retry(db, pid, step, merged)

    def retry_failed(
        self, *, name: str | None = None, since: Any = None, dry_run: bool = False
    ) -> list[tuple[str, str | None]]:
        """Retry all that ended as error or timeout and were not retried before.

        `since`: those that ended since then.  Returns (old pid, new pid), oldest first;
        with `dry_run` nothing is started and the new pids are None, as they are for
        those whose key another open process has.
        """
        pids = self.store.failed({"name": name, "since": since})
        if dry_run:
            return [(pid, None) for pid in pids]
        found: list[tuple[str, str | None]] = []
        for start in range(0, len(pids), GROUP_SIZE):
            with self._verb() as db:
                found += self.store.retry_some(db, pids[start : start + GROUP_SIZE])
        return found

    def wait(self, pid: str, timeout: float | None = None) -> ProcessInfo:
        """The process once it is final or interrupted.

        `timeout` in seconds, None for ever.  Raises WaitTimeout, ProcessCancelled, and
        ProcessFailed for error and timeout.  Does not start a runner.
        """
        return self._judged(self.wait_all([pid], timeout)[0])

    async def wait_async(self, pid: str, timeout: float | None = None) -> ProcessInfo:
        """The same, awaited."""
        return self._judged((await self.wait_all_async([pid], timeout))[0])

    @staticmethod
    def _judged(info: ProcessInfo) -> ProcessInfo:
        if info.status in (ERROR, TIMEOUT):
            raise ProcessFailed(info)
        if info.status == CANCELLED:
            raise ProcessCancelled(info)
        return info

    def wait_all(
        self, pids: Iterable[str], timeout: float | None = None
    ) -> list[ProcessInfo]:
        """All of them, in order, once each is final or interrupted."""
        return self.sleep_through(self.waiting(pids, timeout, any_will_do=False))

    async def wait_all_async(
        self, pids: Iterable[str], timeout: float | None = None
    ) -> list[ProcessInfo]:
        """The same, awaited."""
        return await self._await(self.waiting(pids, timeout, any_will_do=False))

    def wait_any(
        self, pids: Iterable[str], timeout: float | None = None
    ) -> list[ProcessInfo]:
        """Those that are final or interrupted, as soon as there is one."""
        return self.sleep_through(self.waiting(pids, timeout, any_will_do=True))

    async def wait_any_async(
        self, pids: Iterable[str], timeout: float | None = None
    ) -> list[ProcessInfo]:
        """The same, awaited."""
        return await self._await(self.waiting(pids, timeout, any_will_do=True))

    @staticmethod
    def sleep_through(waiting: Waiting) -> list[ProcessInfo]:
        """What comes of `waiting`, after all its pauses."""
        while True:
            try:
                time.sleep(next(waiting))
            except StopIteration as end:
                return list(end.value)

    @staticmethod
    async def _await(waiting: Waiting) -> list[ProcessInfo]:
        import asyncio

        while True:
            try:
                pause = next(waiting)
            except StopIteration as end:
                return list(end.value)
            await asyncio.sleep(pause)

    def waiting(
        self, wanted: Iterable[str], timeout: float | None, *, any_will_do: bool
    ) -> Waiting:
        """Until all are final or interrupted, or where any will do until one is.

        Yields how many seconds to pause before it looks again.
        """
        if isinstance(wanted, str):
            raise BadType("pids must be a list of texts, not one text")
        limit = None if timeout is None else seconds(timeout, "timeout")
        pids = [self.store.full_pid(pid) for pid in wanted]
        left, began = self.store.still_going(pids), time.monotonic()
        while left and not (any_will_do and len(left) < len(pids)):
            waited = time.monotonic() - began
            if limit is not None and waited >= limit:
                left = self.store.still_going(left)
                if not left:
                    break
                raise WaitTimeout(
                    f"after {limit:g} s {len(left)} of {len(pids)} still open,"
                    f" first {left[0]}: {self.get_process_status(left[0])}"
                )
            yield poll_delay(waited)
            # Of those that are all waited for a few tell whether there is more to do.
            look, rest = (left, []) if any_will_do else (left[:50], left[50:])
            while look and not (look := self.store.still_going(look)):
                look, rest = rest[:50], rest[50:]
            left = look + rest
        still_open = set(left)
        return [self.get_process_info(pid) for pid in pids if pid not in still_open]

    def events(
        self,
        pid: str | None = None,
        *,
        status: str | None = None,
        since: int | None = None,
    ) -> Iterator[Json]:
        """What happens, as it happens: `{number, at, pid, kind, status, detail}`.

        `number` grows; `kind` is a key of TRANSITIONS, start, step or progress;
        `status` is the one after it; `detail` says what changed, or is None.  From now
        on, or after the number `since` (0: from the start).  `pid`: only of that
        process, until it has ended; `status`: only what leaves it so (also open,
        final).
        """
        kinds = None
        if status is not None:
            states = STATE_GROUPS[check_filters({"status": status})["status"]]
            known = (*TRANSITIONS, "start", "step", "progress")
            kinds = [kind for kind in known if status_after(kind) in states]
        if since is not None:
            expect_number(since, "since", 0, 2**63 - 1)
        full = None if pid is None else self.store.find(pid)["pid"]
        number = self.store.last_event() if since is None else since
        return self._follow(number, full, kinds)

    def _follow(
        self, number: int, pid: str | None, kinds: list[str] | None
    ) -> Iterator[Json]:
        seen, quiet_since = None, time.monotonic()
        while True:
            # In this order: what comes between is found the next time.
            version = self.store.version()
            over = pid is not None and self._has_ended(pid)
            some, last = [], number
            if over or version != seen:
                last = max(number, self.store.last_event())
                some = self.store.events(number, pid, kinds)
            for event in some:
                number = event["number"]
                yield event
            if some:
                quiet_since = time.monotonic()
                continue
            if over:
                return
            seen, number = version, last  # what the filter left out is not read again
            time.sleep(poll_delay(time.monotonic() - quiet_since))

    def _has_ended(self, pid: str) -> bool:
        try:
            return self.get_process_status(pid) in FINAL_STATES
        except NotFound:  # pruned meanwhile
            return True

    def listen(
        self,
        callback: Callable[[Json], Any],
        pid: str | None = None,
        status: str | None = None,
        *,
        since: int | None = None,
    ) -> None:
        """Call back with each of `events`, until it returns True."""
        if not callable(callback):
            raise BadType(f"callback must be a function, not {quoted(callback)}")
        for event in self.events(pid, status=status, since=since):
            if callback(event) is True:
                return

    def preview(self, cron: str, tz: str = "UTC", count: int = 10) -> list[float]:
        """The next times at which a cron expression is due, in epoch seconds."""
        expect_number(count, "count", 1, 10_000)
        times: list[float] = []
        for _ in range(count):
            times.append(next_cron(cron, times[-1] if times else self.store.now(), tz))
        return times

    def why(self, pid: str) -> str:
        """One sentence on why a process is not running, or that it is."""
        return self.store.why(pid)

    def logs(self, pid: str, *, raw: bool = False) -> Any:
        """What its steps have printed so far: text, or with `raw` the bytes."""
        printed, _ = self.store.output(pid)
        return printed if raw else printed.decode("utf-8", "backslashreplace")

    def prune(self, older_than: float | str = KEEP_SECONDS) -> int:
        """Delete processes that ended longer ago than that; return how many."""
        return sum(self.store.pruning(seconds(older_than, "older_than")))

    @contextlib.contextmanager
    def _verb(self) -> Iterator[Connection]:
        """A transaction; after its commit the waiting runners are rung."""
        with self.store.transaction() as db:
            yield db
            bells = self.store.bells()
        self._ring(bells)

    def ring(self) -> None:
        """Wake the waiting runners: after a commit of your own connection."""
        with contextlib.suppress(StorageError):  # what is queued is queued
            self._ring(self.store.bells())

    def _ring(self, ports: list[int]) -> None:
        """Send each a byte, which may get lost, for they look anyway."""
        for port in ports:
            # What is not a port was changed by hand, and its runner looks anyway.
            with contextlib.suppress(OSError, OverflowError, TypeError):
                if self._socket is None:
                    import socket

                    self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    self._socket.setblocking(False)
                self._socket.sendto(b"\n", ("127.0.0.1", port))

    def close(self) -> None:
        """Close the database; the next call opens it again."""
        self.store.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None


# ===========================================================================
# 9. Runner: the parent's side of the pipe
# ===========================================================================
#
# Recover, claim, hand over, collect, commit, wait.  The one room that knows both
# the store and the workers: the pool has the workers, the runner brings the two
# together.


class WorkerHandle:
    """The runner's view of one child: its pipes, its tree, what it holds."""

    def __init__(self, token: str, hello: Json, own: int | None = None):
        self.token = token
        self.own = own  # id of the one process that it serves
        self.output = OutputFile(hello["output"])
        self.held: dict[int, Held] = {}  # by id, in the order handed over
        self.ready = False  # it has come up
        self.leaving: str | None = None  # why it gets no more orders
        self.kill_at: float | None = None  # monotonic: then its tree is killed
        self.victim: tuple[int, Outcome] | None = None  # whom it is ended for
        self.head_since = 0.0  # monotonic: since when the first of `held` runs
        self.pace = AHEAD_SECONDS  # what a step takes here, rather too long
        self.asked_back = False
        self.made_at = time.monotonic()
        self.garbled: str | None = None  # what was wrong with what it said
        self.child: asyncio.subprocess.Process | None = None
        self.tree: Tree | None = None
        self.alone = False
        self._orders = [json.dumps(hello) + "\n"]

    async def spawn(self) -> None:
        """Start the child; raises OSError."""
        import asyncio

        # Imported from its path, not run as a script: Python keeps its bytecode; and
        # named procman, as the steps know it.
        boot = (
            "import sys; sys.path[:] = filter(None, sys.path);"  # without our cwd
            "import importlib.util as util;"
            "spec = util.spec_from_file_location('procman', sys.argv.pop(1));"
            "sys.modules['procman'] = procman = util.module_from_spec(spec);"
            "spec.loader.exec_module(procman); sys.exit(procman.main())"
        )
        path = os.path.abspath(__file__)
        appending = self.output.create()
        try:
            self.child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", boot, path, WORKER_COMMAND),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=appending,
                env={**os.environ, TREE_VARIABLE: self.token},
                limit=1 << 20,
                **spawn_options(),
            )
        finally:
            os.close(appending)
        self.tree = Tree(self.child.pid, self.token)
        if self.leaving:
            self.tree.kill()
        self.flush()

    async def frames(self) -> Any:
        """What the child says, some at a time: lists of (header, data or None).

        Raises ValueError for what no worker says: a step has got at its pipe.
        """
        assert self.child and self.child.stdout
        parts: list[bytes] = []
        while True:
            if sum(map(len, parts)) > MAX_FRAME_BYTES:
                raise ValueError("a frame without an end")
            chunk = await self.child.stdout.read(1 << 20)
            if not chunk:
                return
            *whole, rest = chunk.split(b"\n")
            if whole:
                whole[0] = b"".join([*parts, whole[0]])
                parts = []
                yield [self._frame(line) for line in whole]
            parts.append(rest)

    @staticmethod
    def _frame(line: bytes) -> tuple[Json, str | None]:
        header, tab, data = line.decode().partition("\t")
        return json.loads(header), data if tab else None

    def room(self) -> int:
        """How many more steps it may be handed now: short ones several at a time."""
        if self.leaving or (self.held and (self.alone or not self.ready)):
            return 0
        if self.held and time.monotonic() - self.head_since > AHEAD_SECONDS:
            return 0
        return max(0, self._ahead() - len(self.held))

    def _ahead(self) -> int:
        """How many steps it should hold, by its own pace."""
        if self.own is not None:
            return 1
        return max(1, min(GROUP_SIZE, int(AHEAD_SECONDS / self.pace)))

    def hungry(self) -> bool:
        """Whether it has nothing to do, or soon will have."""
        return 2 * self.room() >= self._ahead()

    def give(self, held: Held) -> None:
        """Hand a step over, with the next `flush`; it runs after those held before.

        One that has seen a runner die gets no company: nobody else is to be charged
        for what it does.
        """
        if not self.held:
            self.head_since = time.monotonic()
        self.alone = held.crashes > 0
        self.held[held.id] = held
        data = held.data.replace("\n", " ")  # which only a hand can have put there
        self._orders.append(
            f'{held.definition.order(held.step_index)}\t{{"id":{held.id},'
            f'"pid":"{held.pid}","claim":{held.claim},"attempt":{held.attempt}}}'
            f"\t{data}\n"
        )

    def flush(self) -> None:
        """Send what was handed over, if the child is up to take it."""
        if self._orders and self.child is not None and self.child.stdin is not None:
            # A broken pipe shows in `frames`, as the end.
            with contextlib.suppress(OSError, RuntimeError):
                self.child.stdin.write("".join(self._orders).encode())
            self._orders = []

    def ask_back(self) -> None:
        """Ask for what waits behind the running step."""
        if not self.asked_back:
            self.asked_back = True
            self._orders.append(GIVE_BACK.decode() + "\n")
            self.flush()

    def stalls_at(self) -> float | None:
        """When what waits behind the running step has waited too long."""
        waiting = len(self.held) - 1
        if waiting < 1 or self.asked_back:
            return None
        return self.head_since + STALL_SECONDS - self.pace * waiting

    def take(self, number: int, took: float) -> Held | None:
        """A step has been reported: it is held no more; the next one has begun."""
        took = took if took > 1e-6 else 1e-6  # whatever a step has made of the clock
        self.pace = max(took, 0.9 * self.pace + 0.1 * took)
        self.head_since = time.monotonic()
        return self.held.pop(number, None)

    def head(self) -> Held | None:
        """The step that runs now."""
        return next(iter(self.held.values()), None)

    def deadline(self) -> tuple[float, str] | None:
        """(monotonic time, words) at which the running step's time is up."""
        head = self.head()
        if head is None or self.leaving:
            return None
        limits = []
        length = head.definition.step_timeout(head.step_index)
        if length is not None and self.ready:
            name = head.definition.step_name(head.step_index)
            words = f"step {name!r} ran longer than {length:g} s"
            limits.append((self.head_since + length, words))
        if head.deadline is not None:
            length = head.definition.option("timeout")
            limits.append((head.deadline, f"the process ran longer than {length:g} s"))
        return min(limits, default=None)

    def look_at(self) -> float:
        """When to look again how much the running step has printed."""
        now = time.monotonic()
        if self.output.size() > OUTPUT_TAIL_BYTES:
            return now + STALL_SECONDS
        ran = now - self.head_since
        return now + min(POLL_SECONDS, max(STALL_SECONDS, ran / 2))

    def began(self, held: Held) -> bool:
        """Whether a step has begun: not if the last to begin was another."""
        owner = self.output.read()[0]  # '' also where a full disk has kept it out
        return owner in ("", f"{held.pid} {held.claim} {held.step_index}")

    def death(self, held: Held, code: int | None) -> Json:
        """The error of a step whose worker died under it."""
        step = held.definition.step_name(held.step_index)
        if self.garbled:
            words = "its worker spoke nonsense: did the step write to its pipe?"
            return make_error(step, "WorkerDied", f"{words} ({self.garbled})")
        if code is not None and code < 0:
            name = signal_name(-code)
            words = f"its worker was ended by {name}"
            return make_error(step, "WorkerDied", words, signal=name)
        hint = "did the step call os._exit?"
        if code == BROKEN_PIPE_EXIT:
            hint = "did the step close descriptors that it did not open?"
        words = f"its worker ended with exit code {code} and no result: {hint}"
        return make_error(step, "WorkerDied", words, exit_code=code or None)


class PoolSize(namedtuple("PoolSize", "least most ttl")):
    """How many workers a pool has; those beyond `least` leave when idle for `ttl` s."""

    __slots__ = ()


def pool_size(
    manner: str, least: int | None, most: int | None, worker_ttl: float | str
) -> PoolSize:
    """How many workers: static ignores `most`, ondemand `least`; None: a default."""
    for value, name, low in ((least, "min_workers", 0), (most, "max_workers", 1)):
        if value is not None:
            expect_number(value, name, low, 2**31)
    many, ttl = os.cpu_count() or 1, seconds(worker_ttl, "worker_ttl")
    if manner == "static":
        fixed = expect_number(many if least is None else least, "min_workers", 1, 2**31)
        return PoolSize(fixed, fixed, ttl)
    if manner == "ondemand":
        return PoolSize(0, most or many, ttl)
    if manner != "dynamic":
        known = "dynamic, static, ondemand"
        raise BadSpec(f"pm must be one of {known}, not {quoted(manner)}")
    if least is not None and most is not None and least > most:
        raise BadSpec(f"min_workers is {least}, more than max_workers, {most}")
    least = 1 if least is None else least
    return PoolSize(least, most or max(many, least), ttl)


class Pool:
    """Hands steps to workers and collects how they end; has never heard of a store.

    What is claimed waits in `ready`; outcomes come to `results`, reports of progress to
    `progress`.  `wake` is called when there is something new.
    """

    def __init__(
        self,
        directory: str,
        token: str,
        hello: Json,
        size: PoolSize,
        wake: Callable[[], None],
    ):
        self.workers: list[WorkerHandle] = []
        self.ready: deque[Held] = deque()
        self.results: list[tuple[Held, Outcome]] = []
        self.first_result_at = 0.0  # monotonic
        self.progress: dict[int, tuple[Held, Json]] = {}
        self.failure: BaseException | None = None  # why it cannot work at all
        self.spawn_after = 0.0  # monotonic: after a failure not at once
        self.grace = GRACE_SECONDS
        self.spawned: list[WorkerHandle] = []  # since somebody asked
        self.buried: list[WorkerHandle] = []
        self._directory, self._token, self._hello = directory, token, hello
        self._size, self._wake = size, wake
        self._count = self._failures = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def fill(self) -> None:
        """See to it that there are as many workers as there are at least."""
        while len(self._shared()) < self._size.least and self.may_spawn():
            self.add_worker()

    def _shared(self) -> list[WorkerHandle]:
        """The workers that serve any process."""
        return [worker for worker in self.workers if worker.own is None]

    def add_worker(self, own: int | None = None) -> WorkerHandle:
        """Begin to start one; it can be handed steps at once."""
        import asyncio

        self._count += 1
        token = f"{self._token}-{self._count}"
        output = os.path.join(self._directory, token + ".log")
        worker = WorkerHandle(token, {**self._hello, "output": output}, own)
        self.workers.append(worker)
        task = asyncio.get_running_loop().create_task(self._attend(worker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return worker

    async def _attend(self, worker: WorkerHandle) -> None:
        """The life of one worker, from its start to the end of its tree."""
        import asyncio

        try:
            try:
                await worker.spawn()
            except RuntimeError as error:  # asyncio could start no thread for it
                raise OSError(str(error)) from error
            self.spawned.append(worker)
            self._wake()
            async for frames in worker.frames():
                company = bool(self.results)  # for whose time somebody is awake
                for header, data in frames:
                    self._on_frame(worker, header, data)
                if not company or self.ripe_at() <= time.monotonic():
                    self._wake()
                # One that holds nothing ends with its pipe: a SIGTERM that came in the
                # moment before it began to wait for an order would not wake it.
                if worker.leaving and (worker.leaving == "retire" or not worker.held):
                    break
            await self._clear(worker)
        except asyncio.CancelledError:  # the application ends all its tasks
            worker.leaving = worker.leaving or "stop"
            if worker.tree is not None:
                worker.tree.kill()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            worker.garbled = repr(error)
            worker.kill_at = 0.0
            await self._clear(worker)
        except OSError as error:
            worker.garbled = str(error)
            log().warning("no worker could be started: %s", error)
        except Exception as error:  # a mistake of ours must not pass unseen
            self.failure = error
        self._settle(worker)
        worker.output.remove()
        self.workers.remove(worker)
        self.buried.append(worker)
        self._wake()

    async def _clear(self, worker: WorkerHandle) -> None:
        """Until nothing of a worker's tree is left, which may take until `kill_at`."""
        import asyncio

        assert worker.tree and worker.child and worker.child.stdin
        if worker.ready and not worker.held:  # it is to be given no more
            worker.leaving = worker.leaving or "retire"
        worker.child.stdin.close()
        if worker.leaving is None and not worker.garbled:  # let it say its exit code
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(worker.child.wait(), 0.5)
        began, pause = time.monotonic(), 0.005
        while worker.tree.alive():
            if worker.kill_at is None or time.monotonic() >= worker.kill_at:
                worker.tree.kill()
            if time.monotonic() > (worker.kill_at or began) + BUSY_SECONDS:
                log().warning("worker %s cannot be killed; given up", worker.token)
                return
            await asyncio.sleep(pause)
            pause = min(0.1, pause * 2)
        await worker.child.wait()
        worker.tree.close()

    def _on_frame(self, worker: WorkerHandle, header: Json, data: str | None) -> None:
        if "ready" in header:
            worker.ready, self._failures = True, 0
            worker.head_since = time.monotonic()
        elif "retire" in header:
            worker.leaving = worker.leaving or "retire"
        elif "given_back" in header:
            worker.asked_back = False
            back = [worker.held.pop(number, None) for number in header["given_back"]]
            self.ready.extendleft(held for held in reversed(back) if held is not None)
        elif "progress" in header:
            held = worker.held.get(header["id"])
            to_json(header["progress"])  # a step can reach what makes these frames
            if held is not None:
                self.progress[held.id] = (held, header["progress"])
        elif header["ending"] != "stopped" or worker.leaving == "stop":
            # Else its tree has to go first: see `_settle`.
            self._on_report(worker, header, data)
            return
        self._wake()

    def _on_report(self, worker: WorkerHandle, header: Json, data: str | None) -> None:
        if "error" in header:
            to_json(header["error"])
        held = worker.take(header["id"], float(header["took"]))
        if header.get("spent"):
            worker.leaving = worker.leaving or "retire"
        if held is not None:
            printed = None
            if "printed" in header:
                head, cut, tail = header["printed"]
                printed = Printed(head.encode("latin-1"), cut, tail.encode("latin-1"))
            outcome = Outcome(header["ending"], data, header.get("error"), printed)
            self.add_result(held, outcome)

    def add_result(self, held: Held, outcome: Outcome) -> None:
        """Note how a step ended."""
        if not self.results:
            self.first_result_at = time.monotonic()
        self.results.append((held, outcome))

    def _settle(self, worker: WorkerHandle) -> None:
        """Decide what becomes of what a worker that is gone still held."""
        code = worker.child.returncode if worker.child else None
        head = worker.head()
        if not worker.ready and worker.leaving is None:
            self._count_failure(worker, code)
        elif worker.leaving is None and head is not None and worker.began(head):
            worker.victim = (head.id, Outcome("error", error=worker.death(head, code)))
        if worker.victim is not None:
            number, outcome = worker.victim
            held = worker.held.pop(number, None)
            if held is not None:
                owner, printed = worker.output.read()
                if owner.startswith(held.pid):
                    outcome = outcome._replace(printed=printed)
                self.add_result(held, outcome)
        self.ready.extendleft(reversed(worker.held.values()))
        worker.held.clear()

    def _count_failure(self, worker: WorkerHandle, code: int | None) -> None:
        """A worker never came up: try again later; for ever if the system is short."""
        self._failures += 1
        wait = min(5.0, 0.1 * 2**self._failures)
        self.spawn_after = time.monotonic() + wait
        broken = worker.child is not None or not os.path.exists(sys.executable)
        if broken and self._failures >= MAX_SPAWN_FAILURES:
            said = worker.output.all()[-300:].decode("utf-8", "replace").strip()
            said = said or worker.garbled or f"it ended with {code}"
            self.failure = ProcmanError(f"no worker of {sys.executable} starts: {said}")

    def idle(self) -> bool:
        """Whether a step could begin at once."""
        free = any(not worker.held and worker.room() for worker in self._shared())
        return not self.ready and (free or self.may_spawn() > 0)

    def busy(self) -> bool:
        """Whether a step runs or waits in a worker."""
        return any(worker.held for worker in self.workers)

    def ripe_at(self) -> float:
        """From when on (monotonic) the results should wait no longer for company."""
        if len(self.results) >= GROUP_SIZE or not self.busy():
            return 0.0
        if any(worker.hungry() for worker in self.workers):
            return 0.0
        return self.first_result_at + GROUP_SECONDS

    def may_spawn(self) -> int:
        """How many more workers there may be just now."""
        if time.monotonic() < self.spawn_after:
            return 0
        most: int = self._size.most
        return max(0, most - len(self._shared()))

    def room(self) -> int:
        """How many more steps could begin soon."""
        room = sum(worker.room() for worker in self._shared())
        return max(0, room + self.may_spawn() - len(self.ready))

    def dedicated_room(self) -> int:
        """How many more processes could get a worker of their own."""
        if time.monotonic() < self.spawn_after:
            return 0
        return max(0, MAX_DEDICATED - (len(self.workers) - len(self._shared())))

    def _hand_over_dedicated(self) -> None:
        """Give each step of a dedicated process to its own worker."""
        own = {worker.own: worker for worker in self.workers if not worker.leaving}
        own.pop(None, None)
        for held in [held for held in self.ready if held.dedicated]:
            self.ready.remove(held)
            if held.id not in own and self.dedicated_room():
                own[held.id] = self.add_worker(held.id)
            if held.id in own:
                own.pop(held.id).give(held)
            else:
                self.add_result(held, Outcome("stopped"))
        unsettled = {held.id for held, _ in self.results}
        for worker in own.values():  # its process has ended
            if not worker.held and worker.own not in unsettled:
                self.end(worker, "retire")

    def hand_over(self) -> None:
        """Give what is ready to the workers, and back what none can begin soon."""
        self._hand_over_dedicated()
        room = {worker: worker.room() for worker in self._shared()}
        while self.ready:
            worker = min(room, key=lambda one: len(one.held), default=None)
            if worker is None or (worker.held and self.ready[0].crashes):
                if not self.may_spawn():
                    break
                worker = self.add_worker()
                room[worker] = 1
            elif not room[worker]:
                del room[worker]
                continue
            worker.give(self.ready.popleft())
            room[worker] = 0 if worker.alone else room[worker] - 1
        for worker in self.workers:
            worker.flush()
        while self.ready:
            self.add_result(self.ready.popleft(), Outcome("stopped"))

    def end(
        self, worker: WorkerHandle, why: str, victim: tuple[int, Outcome] | None = None
    ) -> None:
        """Ask a worker's tree to end; after the grace it is killed."""
        if worker.kill_at is not None:
            return
        worker.leaving, worker.victim = why, victim
        worker.kill_at = time.monotonic() + self.grace
        worker.ask_back()
        if worker.held and worker.tree is not None:
            worker.tree.terminate()
        elif worker.child is not None and worker.child.stdin is not None:
            worker.child.stdin.close()  # it is idle, and ends when nobody is there

    def watch(self) -> None:
        """Look after what runs: time limits, graces, output, what waits too long."""
        now = time.monotonic()
        self._let_go(now)
        for worker in self.workers:
            limit, head, stalls = worker.deadline(), worker.head(), worker.stalls_at()
            if worker.kill_at is not None and now >= worker.kill_at and worker.tree:
                worker.tree.kill()
            elif limit and head and now >= limit[0]:
                step = head.definition.step_name(head.step_index)
                error = make_error(step, "Timeout", limit[1])
                self.end(worker, "timeout", (head.id, Outcome("timeout", error=error)))
            elif stalls is not None and now >= stalls:
                worker.ask_back()
            if head and now - worker.head_since > STALL_SECONDS:
                worker.output.trim()
            ended = worker.child is not None and worker.child.returncode is not None
            stuck = not worker.ready and now - worker.made_at > SPAWN_SECONDS
            if worker.tree and (ended or stuck):  # a forked child may hold the pipe
                worker.tree.kill()

    def _let_go(self, now: float) -> None:
        """End workers beyond the least number that have been idle for their time."""
        shared = [worker for worker in self._shared() if not worker.leaving]
        for worker in shared[self._size.least :]:
            idle = worker.ready and not worker.held
            if idle and now - worker.head_since >= self._size.ttl:
                self.end(worker, "retire")

    def moments(self) -> Iterator[float]:
        """When `watch` should be called next, the least of these."""
        for worker in self.workers:
            limit, stalls = worker.deadline(), worker.stalls_at()
            if limit is not None:
                yield limit[0]
            if stalls is not None:
                yield stalls
            if worker.kill_at is not None:
                yield max(worker.kill_at, time.monotonic() + STALL_SECONDS)
            if worker.held:
                yield worker.look_at()

    def cancel(self, pids: set[str]) -> None:
        """End the steps of these processes."""
        for worker in self.workers:
            head = worker.head()
            if head is not None and head.pid in pids:
                self.end(worker, "cancel", (head.id, Outcome("cancelled")))
            elif any(held.pid in pids for held in worker.held.values()):
                worker.ask_back()
        for held in [held for held in self.ready if held.pid in pids]:
            self.ready.remove(held)
            self.add_result(held, Outcome("cancelled"))

    async def close(self) -> None:
        """Stop what runs; all that was held comes to `results`."""
        import asyncio

        for worker in self.workers:
            self.end(worker, "stop")
        while self._tasks:
            self.watch()
            await asyncio.wait(self._tasks, timeout=STALL_SECONDS)
        while self.ready:
            self.add_result(self.ready.popleft(), Outcome("stopped"))


class _Doorbell:
    """A datagram protocol: any datagram wakes the runner."""

    def __init__(self, ring: Callable[[], None]):
        self._ring = ring

    def connection_made(self, transport: Any) -> None:
        """Nothing to do: there is nobody at the other end."""

    def datagram_received(self, data: bytes, address: Any) -> None:
        """Somebody has started, proceeded or cancelled something."""
        self._ring()

    def error_received(self, error: Exception) -> None:
        """A doorbell may fail: the runner looks anyway."""

    def connection_lost(self, error: Exception | None) -> None:
        """The runner ends."""


class Runner:
    """Claims what is due, has workers run it, and writes down what came of it.

    `wait`: stay when nothing is due.  `queues`: those it serves.  `pm`: dynamic (from
    `min_workers`, 1, to `max_workers`, one a CPU; those beyond the least leave when
    idle for `worker_ttl`), static (always `min_workers`, one a CPU) or ondemand (none
    while idle).  `concurrency`: how many processes of a name may run at once, over all
    runners.  `max_jobs`: end after so many processes.  `jobs_per_worker`: replace a
    worker after so many.  `script_args`: added to each step's sys.argv.  `services`:
    `module:dict` of factories.  `grace`, `keep`, `worker_ttl`: lengths.  `pid`: run
    that one and nothing else.  Installs no signal handlers: call `stop`.
    """

    already_running = False  # another has the lock of a waiting one
    _number = _claimed = _done = 0
    _upkeep_after = _prune_after = 0.0  # monotonic
    _claim_after = 0.0  # monotonic: after a claim that found nothing to take
    _pruning: Iterator[int] | None = None  # while there is more to do
    _due: float | None = None  # what the store said ...
    _due_state: Any = None  # ... in this state of it
    _busy_since: float | None = None  # monotonic
    _stopping = False
    _called = _rung = True
    _waker: asyncio.Future[None] | None = None
    _loop: asyncio.AbstractEventLoop | None = None

    def __init__(
        self,
        manager: ProcessManager,
        *,
        wait: bool = False,
        queues: Iterable[str] = (DEFAULT_QUEUE,),
        pm: str = "dynamic",
        min_workers: int | None = None,
        max_workers: int | None = None,
        worker_ttl: float | str = WORKER_SECONDS,
        concurrency: Mapping[str, int] | None = None,
        max_jobs: int | None = None,
        jobs_per_worker: int | None = None,
        script_args: Iterable[str] = (),
        services: str | None = None,
        grace: float | str = GRACE_SECONDS,
        keep: float | str = KEEP_SECONDS,
        pid: str | None = None,
    ):
        if not isinstance(getattr(manager, "store", None), Store):
            kind = type(manager).__name__
            raise BadType(f"manager must be a ProcessManager, not {kind}")
        self._check(queues, script_args, max_jobs, jobs_per_worker)
        if services is not None:
            check_reference(services, "services")
        self._store = manager.store
        self._wait, self._max_jobs = wait, max_jobs
        self._queues = sorted({check_queue(queue) for queue in queues})
        if not self._queues:
            raise BadSpec("queues must name one at least")
        self._concurrency = check_concurrency(concurrency or {})
        self._served = (self._queues, pid, self._concurrency)
        self._keep = seconds(keep, "keep")
        self._token = os.urandom(TOKEN_LENGTH // 2).hex()
        hello = {
            "limit": jobs_per_worker,
            "script_args": list(script_args),
            "services": services,
            "directory": self._directory(),
            "database": self._store.path,
        }
        size = pool_size(pm, min_workers, max_workers, worker_ttl)
        files = self._store.run_directory
        self._pool = Pool(files, self._token, hello, size, self._wake)
        self._pool.grace = seconds(grace, "grace")

    @staticmethod
    def _check(queues: Any, script_args: Any, *numbers: int | None) -> None:
        for texts, name in ((queues, "queues"), (script_args, "script_args")):
            if isinstance(texts, str):
                raise BadType(f"{name} must be a list of texts, not one text")
        for value, name in zip(numbers, ("max_jobs", "jobs_per_worker")):
            if value is not None:
                expect_number(value, name, 1, 2**31)

    @staticmethod
    def _directory() -> str:
        """Where we are, which is where the module of the services is looked for."""
        try:
            return os.getcwd()
        except OSError:  # it has been deleted
            return os.path.dirname(os.path.abspath(__file__))

    # --- life --------------------------------------------------------------

    def run(self) -> int:
        """Run until nothing is due (or `stop`); return how many processes it ran."""
        import asyncio

        return asyncio.run(self.run_async())

    def stop(self) -> None:
        """End soon: what runs is stopped and queued again.  Twice: at once.

        May be called from any thread and from a signal handler.
        """
        if self._stopping:
            self._pool.grace = 0.0
            for worker in list(self._pool.workers):
                if worker.kill_at is not None:  # the others will get no grace
                    worker.kill_at = 0.0
        self._stopping = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # closed already
                self._loop.call_soon_threadsafe(self._wake)

    async def run_async(self) -> int:
        """The same, awaited in an application's own event loop."""
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._store.make_run_directory()
        suffix = "" if self._queues == [DEFAULT_QUEUE] else f"-{','.join(self._queues)}"
        if len(suffix) > 100:  # a file's name may not be that long
            import hashlib

            suffix = "-" + hashlib.sha256(suffix.encode()).hexdigest()
        alone = LockFile(self._store.path + ".lock" + suffix)
        life = LockFile(os.path.join(self._store.run_directory, self._token + ".lock"))
        if self._wait and not alone.acquire():
            self.already_running = True
            return 0
        bell = None
        try:
            while not life.acquire():  # it has just been made: somebody sweeps
                await asyncio.sleep(LOCK_SECONDS)
            bell, port = await self._hang_bell()
            queues, pid, _ = self._served
            self._number = self._store.add_runner(
                *(self._token, boot_id(), () if pid else queues, port),
                waits=self._wait,
                concurrency=self._concurrency,
            )
            await self._serve()
        finally:
            if bell is not None:
                bell.close()
            try:
                await self._leave()
            finally:
                life.release(remove=not self._pool.results)
                alone.release()
        return self._done

    async def _hang_bell(self) -> tuple[Any, int | None]:
        assert self._loop is not None
        doorbell: Any = _Doorbell(self._ring)
        try:
            bell, _ = await self._loop.create_datagram_endpoint(
                lambda: doorbell, local_addr=("127.0.0.1", 0)
            )
        except OSError:  # no loopback here: we look every second
            return None, None
        return bell, bell.get_extra_info("sockname")[1]

    async def _serve(self) -> None:
        """Look after, commit and claim, hand over, wait: until there is no more."""
        import asyncio

        while not self._stopping:
            self._pool.watch()
            if self._wait:
                self._pool.fill()
            self._keep_up()
            self._prune_some()
            if not self._commit():
                busy = time.monotonic() - (self._busy_since or 0.0)
                await asyncio.sleep(min(0.1, 0.001 + busy / 10) * (1 + jitter()))
                continue
            self._pool.hand_over()
            if self._nothing_left():
                return
            await self._pause()
            if self._pool.failure is not None:
                raise self._pool.failure

    def _nothing_left(self) -> bool:
        pool = self._pool
        if pool.results or pool.ready or pool.busy():
            return False
        if self._max_jobs is not None and self._claimed >= self._max_jobs:
            return True
        return not self._wait and not self._is_due(Demand(*self._served))

    async def _leave(self) -> None:
        """Stop what runs, queue it again, and leave nothing behind."""
        import asyncio

        await self._pool.close()
        if not self._number:
            return
        deadline = time.monotonic() + LEAVE_SECONDS
        while self._pool.results:
            if not self._commit(claim=False):
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"the database {self._store.path} could not be written for"
                        f" {LEAVE_SECONDS:g} s: what ran will be recovered"
                    )
                await asyncio.sleep(0.01)
            while self._pool.ready:  # a step has ended meanwhile: the next one waits
                self._pool.add_result(self._pool.ready.popleft(), Outcome("stopped"))
        self._store.remove_runner(self._number)

    def _ring(self) -> None:
        self._called = True
        self._wake()

    def _wake(self) -> None:
        self._rung = True
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    async def _pause(self) -> None:
        """Until something happens, or the next thing is due."""
        import asyncio

        wait = self._pause_seconds()
        if wait <= 0 or self._rung:
            self._rung = False
            await asyncio.sleep(0)
            return
        assert self._loop is not None
        self._waker = self._loop.create_future()
        timer = self._loop.call_later(wait, self._wake)
        try:
            await self._waker
        finally:
            timer.cancel()
            self._waker, self._rung = None, False

    def _pause_seconds(self) -> float:
        now, pool = time.monotonic(), self._pool
        if self._pruning:
            return 0.0
        moments = [now + POLL_SECONDS, *pool.moments()]
        if pool.results:  # with whose commit more is claimed
            moments.append(pool.ripe_at())
        else:
            due = self._next_due(self._demand())
            if due is not None:
                due_at = now + due - self._store.now()
                moments.append(max(due_at, pool.spawn_after, self._claim_after))
            if self._store.full(self._concurrency):  # till another runner makes room
                moments.append(now + STALL_SECONDS)
        return min(moments) - now

    # --- work --------------------------------------------------------------

    def _demand(self) -> Demand:
        """What could be handed over if it were claimed now."""
        room, dedicated = self._pool.room(), self._pool.dedicated_room()
        most = None if self._max_jobs is None else self._max_jobs - self._claimed
        if self._stopping or most == 0:
            room = dedicated = 0
        if most is not None:
            room, dedicated = min(room, most), min(dedicated, most)
        return Demand(*self._served, room, dedicated, most)

    def _next_due(self, demand: Demand) -> float | None:
        """When the next process is due; not looked for again while nothing changes.

        Where enough of a name run it is a long look, past all that wait.
        """
        if not self._concurrency:
            return self._store.next_due(demand)
        kinds = (demand.room > 0, demand.dedicated > 0)
        state = (self._store.version(), kinds)
        if state != self._due_state:
            self._due, self._due_state = self._store.next_due(demand), state
        return self._due

    def _is_due(self, demand: Demand) -> bool:
        due = self._next_due(demand)
        return due is not None and due <= self._store.now()

    def _commit(self, *, claim: bool = True) -> bool:
        """Record results and claim what there is room for, in one transaction.

        False if the database is busy: then nothing has changed, here or there.
        """
        pool, store, now = self._pool, self._store, time.monotonic()
        demand = self._demand() if claim else Demand((), None, {}, 0, 0)
        if pool.results:
            ripe = pool.ripe_at() <= now
        else:
            ripe = claim and now >= self._claim_after and self._is_due(demand)
        if not ripe and not pool.progress:
            return True
        claimed, idle = [], pool.idle()
        try:
            # A claim alone need not reach the disk: without it we claim again.
            durable = bool(pool.results)
            with store.transaction(wait=LOCK_SECONDS, durable=durable) as db:
                for held, report in pool.progress.values():
                    store.record_progress(db, held, report)
                settled = store.record(db, pool.results)
                going_on = [
                    entry.following for entry in settled if entry.following is not None
                ]
                taken = sum(not held.dedicated for held in going_on)
                if claim:
                    demand = demand._replace(room=demand.room - taken)
                    claimed = store.claim_due(db, self._number, demand, idle=idle)
        except Busy as error:
            self._note_busy(error)
            return False
        self._busy_since = None
        pool.results, pool.progress = [], {}
        pool.ready.extendleft(reversed(going_on))
        pool.ready.extend(claimed)
        self._claimed += len(claimed)
        self._claim_after = 0.0 if claimed or idle else now + GROUP_SECONDS
        for entry in settled:
            self._note(entry)
        return True

    def _note(self, settled: Settled) -> None:
        """Count and log what has been committed."""
        held, outcome, event, _ = settled
        if outcome.ending == "stopped":
            self._claimed -= 1
        elif event not in ("step", "lost"):
            self._done += 1
        if event in ("fail", "time_out", "retry"):
            error = outcome.error or {}
            log().warning(
                "pid=%s event=%s attempt=%d step=%s %s: %s",
                *(held.pid, event, held.attempt, error.get("step")),
                *map(one_line, (str(error.get("type")), str(error.get("message")))),
            )

    def _note_busy(self, error: Busy) -> None:
        now = time.monotonic()
        if self._busy_since is None:
            self._busy_since = now
        elif now - self._busy_since > BUSY_SECONDS:
            self._busy_since = now
            log().warning("%s; this runner goes on trying", error)

    # --- upkeep ------------------------------------------------------------

    def _keep_up(self) -> None:
        """Carry out wishes; once a second look after what others left."""
        now = time.monotonic()
        try:
            self._keep_account()
            if now < self._upkeep_after and not self._called:
                return
            if self._pool.busy():
                self._pool.cancel(self._store.cancels_wanted(self._number))
            self._called = False
            if now < self._upkeep_after:
                return
            self._upkeep_after = now + POLL_SECONDS
            self._store.check_identity()
            self._store.look_at_clock()
            if self._number not in [row["id"] for row in self._store.runners()]:
                raise StorageError(
                    "another runner took this one for dead: has somebody removed"
                    f" {self._store.run_directory}?"
                )
            self._recover_dead()
            if self._wait and now >= self._prune_after:
                self._prune_after = now + PRUNE_SECONDS
                self._pruning = self._store.pruning(self._keep, wait=LOCK_SECONDS)
        except Busy as error:
            self._note_busy(error)

    def _prune_some(self) -> None:
        """Delete the next few of those that ended long ago, between other work."""
        try:
            if self._pruning and next(self._pruning, None) is None:
                self._pruning = None
        except Busy:  # from the start again, when there is more time
            self._pruning, self._prune_after = None, time.monotonic() + POLL_SECONDS

    def _keep_account(self) -> None:
        """Note which children there are, for the case that we die before them."""
        pool = self._pool
        while pool.spawned:
            worker = pool.spawned[-1]
            if worker.child is not None and worker not in pool.buried:
                born = start_time(worker.child.pid)
                self._store.add_worker(
                    self._number, worker.child.pid, born, worker.token
                )
            pool.spawned.pop()
        while pool.buried:
            self._store.remove_worker(self._number, pool.buried[-1].token)
            pool.buried.pop()

    def _recover_dead(self) -> None:
        """Settle what runners left that are proved dead: their lock can be taken."""
        for number in self._store.unowned():
            self._store.recover(number, charged=True)
        left = {name[:TOKEN_LENGTH] for name in self._files()}
        rows = {row["token"]: row for row in self._store.runners()}
        # The files of one that is not registered: it died just before, or after it was.
        for token in sorted((left | rows.keys()) - {self._token}):
            row = rows.get(token)
            if not row and not re.fullmatch(f"[0-9a-f]{{{TOKEN_LENGTH}}}", token):
                continue
            life = LockFile(os.path.join(self._store.run_directory, token + ".lock"))
            if not life.acquire():
                continue
            try:
                if row:
                    self._recover(row)
                self._remove_files(token)
                life.release(remove=True)
            finally:
                life.release()

    def _recover(self, row: Any) -> None:
        """Settle what this dead runner left."""
        same_boot = row["boot"] == boot_id()
        for worker in self._store.workers(row["id"]) if same_boot else ():
            kill_stray(worker["os_pid"], worker["born"], worker["token"])
        pids = self._store.recover(row["id"], charged=same_boot)
        if pids:
            names = " ".join(pids[:20])
            log().warning("runner %d died; recovered: %s", row["id"], names)

    def _files(self) -> list[str]:
        """The names of all runners' files."""
        with contextlib.suppress(FileNotFoundError):  # somebody has removed them all
            return os.listdir(self._store.run_directory)
        return []

    def _remove_files(self, token: str) -> None:
        """Those that the workers of a dead runner printed to."""
        for name in self._files():
            if name.startswith(token + "-"):
                OutputFile(os.path.join(self._store.run_directory, name)).remove()


# ===========================================================================
# 10. Command line: parse, call, print, return a code
# ===========================================================================
#
# Nothing uses this room.  Standard output carries data only.


def _done_part(progress: Json | None) -> str:
    """`37 %` of a progress that has a total."""
    if not progress or not progress["total"]:
        return ""
    return f"{100 * progress['done'] / progress['total']:.0f} %"


def _table(infos: Iterable[ProcessInfo]) -> Iterator[str]:
    """The lines of a table for people."""
    heads = ("PID", "STATUS", "NAME", "STEP", "DONE", "ATTEMPT", "CREATED", "DUE")
    rows = [heads]
    for info in infos:
        created, due = timestamp(info.created_at), timestamp(info.due_at)
        rows.append(
            (
                *(info.pid[:12], info.status, info.name or "", info.step or ""),
                *(_done_part(info.progress), str(info.attempt)),
                *(created or "", due or ""),
            )
        )
    widths = [min(40, max(map(len, column))) for column in zip(*rows)]
    for row in rows:
        cells = (f"{shorten(cell, 40):{width}}" for cell, width in zip(row, widths))
        yield printable("  ".join(cells)).rstrip()


def show(infos: Iterable[ProcessInfo], as_json: bool) -> None:
    """A table on a terminal, elsewhere one JSON object a line."""
    if as_json or not sys.stdout.isatty():
        for info in infos:
            print(json.dumps(info.to_json()))
        return
    for line in _table(infos):
        print(line)


def _read_input() -> bytes:
    if sys.stdin is None:  # as cron may have it
        raise BadSpec("standard input is closed")
    return sys.stdin.buffer.read(MAX_JSON_BYTES + 1)


def _read_argument(text: str, where: str) -> bytes:
    """The content of `-` (standard input), of `@FILE`, or the text itself."""
    try:
        if text == "-":
            return _read_input()
        if text.startswith("@"):
            with open(text[1:], "rb") as file:
                return file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        source = "standard input" if text == "-" else text[1:]
        raise BadSpec(f"cannot read {where} from {source}: {error.strerror}") from None
    return text.encode("utf-8", "surrogateescape")


def _data_argument(text: str | None) -> Json | None:
    if text is None:
        return None
    return expect_object(from_json(_read_argument(text, "--data"), "--data"), "--data")


def _manager(
    args: argparse.Namespace, defaults: Json | None = None, *, create: bool = False
) -> ProcessManager:
    if args.db == "":
        raise BadSpec("--db is empty: name a file")
    manager = ProcessManager(args.db, defaults=defaults, create=create)
    args.closing.callback(manager.close)
    return manager


def _say(text: str) -> None:
    print(f"procman: {one_line(text)}", file=sys.stderr)


def _hint(text: str) -> None:
    """Say it to a person, not into a log or a mail from cron."""
    if sys.stderr is not None and sys.stderr.isatty():
        _say(text)


def _variable(name: str) -> str | None:
    """The default of an option in the environment: PROCMAN_RETRY for --retry."""
    return os.environ.get("PROCMAN_" + name.upper()) or None


# Of a metavar: what makes its value of a text.
_TYPES: dict[str, Callable[[str], Any]] = {"N": int, "FACTOR": float}


def _typed(text: str, shown: str, where: str) -> Any:
    """A variable's text as its flag would have it."""
    try:
        if shown in _TYPES:
            return _TYPES[shown](text)
    except ValueError:
        raise BadSpec(f"{where} must be a number, not {quoted(text)}") from None
    if shown == "JSON":
        return from_json(text, where)
    if shown:
        return text
    if text.lower() not in ("0", "1", "false", "true"):
        raise BadSpec(f"{where} must be 1 or 0, not {quoted(text)}")
    return text.lower() in ("1", "true")


def _default_options() -> Json:
    """Process options from PROCMAN_* variables, checked."""
    defaults: Json = {}
    for name, option in OPTIONS.items():
        text = None if name in OF_ONE_PROCESS else _variable(name)
        if text is not None:
            where = "PROCMAN_" + name.upper()
            defaults[name] = option.check(_typed(text, option.shown, where), where)
            try:
                check_moments({name: defaults[name]})
            except BadSpec as error:
                raise BadSpec(f"{where}: {error}") from None
    return check_defaults(defaults)


def _given_steps(args: argparse.Namespace) -> Json:
    steps: Json = {}
    if args.steps is not None:
        source = args.steps if args.steps == "-" else "@" + args.steps
        content = from_json(_read_argument(source, "--steps"), "--steps")
        steps.update(expect_object(content, "--steps"))
    for given in args.step:
        name, equals, spec = given.partition("=")
        if not equals:
            raise BadSpec(f"--step must be NAME=SPEC, not {shorten(given, 60)!r}")
        if name in steps:
            raise BadSpec(f"there are two steps named {shorten(name, 60)!r}")
        steps[name] = from_json(spec, f"--step {name}") if spec[:1] == "{" else spec
    if args.command:
        steps["command"] = {"command": args.command}
    if not steps:
        raise BadSpec(
            "nothing to run: give --step NAME=SPEC, --steps FILE or -- COMMAND"
        )
    return steps


def cmd_start(args: argparse.Namespace) -> int:
    """Queue a process and print its pid."""
    steps = _given_steps(args)
    options = {name: getattr(args, name) for name in OPTIONS}
    if options["args"] is not None:
        options["args"] = from_json(options["args"], "--args")
    process = ManagedProcess(steps, **options)
    manager = _manager(args, _default_options(), create=True)
    print(manager.start_process(process, _data_argument(args.data)))
    if not manager.store.runners():
        _hint("queued; no runner is at work: `procman.py runner` runs what is due")
    return DONE


@contextlib.contextmanager
def _stopping(runner: Runner) -> Iterator[None]:
    """While this lasts the system's signals stop the runner."""
    import signal

    before = {
        number: signal.signal(number, lambda *_: runner.stop())
        for number in stop_signals()
        if signal.getsignal(number) != signal.SIG_IGN  # as after nohup
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _concurrency(given: Iterable[str]) -> dict[str, int]:
    """From NAME=N, several times."""
    found = {}
    for text in given:
        name, equals, most = text.rpartition("=")
        if not equals or not re.fullmatch("[0-9]{1,10}", most):
            raise BadSpec(f"--concurrency must be NAME=N, not {quoted(text)}")
        found[name] = int(most)
    return found


def cmd_runner(args: argparse.Namespace) -> int:
    """Run what is due; with --wait stay."""
    import shlex

    try:
        script_args = shlex.split(args.script_args)
    except ValueError as error:
        raise BadSpec(f"--script-args {quoted(args.script_args)}: {error}") from None
    max_jobs = args.max_jobs
    if args.max_processes is not None and args.wait:
        _say("--max-processes has no effect with --wait: use --max-jobs")
    elif args.max_processes is not None:
        max_jobs = min(args.max_processes, max_jobs or args.max_processes)
    runner = Runner(
        _manager(args, create=True),
        wait=args.wait,
        queues=args.queue.split(","),
        pm=args.pm,
        min_workers=args.min_workers,
        max_workers=args.max_workers,
        worker_ttl=args.worker_ttl,
        concurrency=_concurrency(args.concurrency),
        max_jobs=max_jobs,
        jobs_per_worker=args.jobs_per_worker,
        script_args=script_args,
        services=args.services,
        grace=args.grace,
        keep=args.keep,
    )
    with _stopping(runner):
        count = runner.run()
    already = "a runner with --wait serves this already"
    _hint(already if runner.already_running else f"{count} processes run")
    return DONE


def _exit_code(status: str) -> int:
    return {FINISHED: DONE, INTERRUPTED: INTERRUPTED_EXIT}.get(status, FAILED)


def _say_failure(what: str, error: Json) -> None:
    _say(f"{what}step {error['step']!r}: {error['type']}: {error['message']}")


def _execute_input(debug: bool) -> int:
    """{"steps": ..., "data": ...} on standard input; the output on standard output."""
    given = from_json(_read_input(), "standard input")
    given = expect_object(given, "standard input")
    unknown = ", ".join(sorted(given.keys() - {"steps", "data"}))
    if unknown or "steps" not in given:
        raise BadSpec(
            'standard input must be {"steps": ..., "data": ...}'
            + (f", not {unknown}" if unknown else "")
        )
    out = os.dup(1)
    os.dup2(2, 1)  # what the steps print goes to standard error
    try:
        executor = StepExecutor()
        output, interrupted = executor.execute_until(given["steps"], given.get("data"))
    except (ProcmanError, KeyboardInterrupt):
        raise
    except BaseException as error:
        failure = describe_failure(executor.step, error)
        _say_failure("", failure)
        if debug:
            print(failure["traceback"], file=sys.stderr)
        return FAILED
    finally:
        sys.stdout.flush()
        os.dup2(out, 1)
    print(json.dumps(output))
    return INTERRUPTED_EXIT if interrupted else DONE


def cmd_execute(args: argparse.Namespace) -> int:
    """Run one process in the foreground, or steps from standard input with no queue."""
    if args.pid is None:
        return _execute_input(args.debug)
    manager = _manager(args)
    pid = manager.get_process_info(args.pid).pid
    status = manager.get_process_status(pid)
    if status != QUEUED:
        raise WrongState(pid, "execute", status, (QUEUED,))
    log().disabled = True  # what it would say is said below
    runner = Runner(manager, pid=pid, max_workers=1, max_jobs=1)
    with _stopping(runner):
        runner.run()
    sys.stderr.write(printable(manager.logs(pid)))
    info = manager.get_process_info(pid)
    if info.status == QUEUED:
        _say(f"process {pid} was stopped or is to be retried: it is queued again")
    elif info.status in (FINISHED, INTERRUPTED):
        print(json.dumps(info.output))
    else:
        error = info.error or make_error(info.step, info.status, "no result")
        _say_failure(f"process {pid}: ", error)
    return _exit_code(info.status)


def cmd_status(args: argparse.Namespace) -> int:
    """Print the record of a process."""
    record = _manager(args).get_process_info(args.pid).to_json()
    indent = 2 if sys.stdout.isatty() and not args.json else None
    print(json.dumps(record, indent=indent))
    return DONE


_FILTER_HELP = (
    ("status", {"metavar": "STATE", "help": "a state, open or final"}),
    ("name", {"metavar": "TEXT", "help": "the whole name"}),
    ("queue", {"metavar": "NAME", "help": "the queue it waits in"}),
    ("since", {"metavar": "TIME", "help": "ended since, or open and created; 5m: ago"}),
    ("series", {"metavar": "PID", "help": "runs of a schedule, retries of a process"}),
    ("parent", {"metavar": "PID", "help": "parts of a process"}),
)


def _filters(args: argparse.Namespace) -> Json:
    """What --status, --name and so on say."""
    return {name: getattr(args, name) for name, _ in _FILTER_HELP}


def cmd_list(args: argparse.Namespace) -> int:
    """Print processes, newest first."""
    manager = _manager(args)
    how = {"order": args.order, "limit": args.limit, "offset": args.offset}
    if not args.watch:
        show(manager.list_processes(**how, **_filters(args)), args.json)
        return DONE
    if args.json or not sys.stdout.isatty():
        raise BadSpec("--watch needs a terminal: for a program there is listen")
    import shutil

    enable_escapes()
    while True:
        width, height = shutil.get_terminal_size()  # in a longer list it would scroll
        lines = [*_table(manager.list_processes(**how, **_filters(args)))][: height - 1]
        # From the top; what is left of each line and below the last is cleared.
        shown = "".join(f"{line[: width - 1]}\x1b[K\n" for line in lines)
        print(f"\x1b[H{shown}\x1b[J", end="", flush=True)
        time.sleep(1)


def cmd_count(args: argparse.Namespace) -> int:
    """Print how many processes there are."""
    print(_manager(args).count(**_filters(args)))
    return DONE


def cmd_proceed(args: argparse.Namespace) -> int:
    """Continue an interrupted process and print its pid."""
    print(_manager(args).proceed(args.pid, _data_argument(args.data)))
    return DONE


def cmd_pause(args: argparse.Namespace) -> int:
    """Interrupt a process, after its running step; proceed continues it."""
    print(_manager(args).pause(args.pid))
    return DONE


def cmd_retry(args: argparse.Namespace) -> int:
    """Start a new process that does again what an ended one did; print its pid."""
    manager = _manager(args)
    if (args.pid is None) != args.failed:
        raise BadSpec("give a PID, or --failed for all that failed")
    if args.pid is not None:
        if args.name or args.since or args.dry_run:
            raise BadSpec("--name, --since and --dry-run go with --failed")
        print(manager.retry(args.pid, args.step, _data_argument(args.data)))
        return DONE
    if args.step or args.data:
        raise BadSpec("--step and --data go with a PID")
    found = manager.retry_failed(
        name=args.name, since=args.since, dry_run=args.dry_run
    )
    for old, new in found:
        if args.dry_run or new:
            print(old if args.dry_run else new)
        else:
            _say(f"process {old} not retried: its key is taken, or its data damaged")
    return DONE if args.dry_run or all(new for _, new in found) else WRONG_STATE


def cmd_cancel(args: argparse.Namespace) -> int:
    """Cancel processes and print their pids."""
    manager, code, filters = _manager(args), DONE, _filters(args)
    if args.all == bool(args.pids):
        raise BadSpec("give PIDs, or --all and what it is to be limited to")
    if args.all:
        print("".join(f"{pid}\n" for pid in manager.cancel_all(**filters)), end="")
        return DONE
    if any(value is not None for value in filters.values()):
        raise BadSpec("filters go with --all")
    for pid in args.pids:
        try:
            print(full := manager.cancel(pid))
            if manager.store.series_goes_on(full):
                _hint(f"its series goes on; to end it: cancel --all --series {full}")
        except (NotFound, WrongState) as error:  # the others are cancelled all the same
            _say(str(error))
            code = code or error.exit_code
    return code


def _bar(manager: ProcessManager, pids: Sequence[str]) -> str:
    """How far it is, in one line for a terminal."""
    if len(pids) == 1:
        info = manager.get_process_info(pids[0])
        told = info.progress or {"done": 0, "total": None, "message": info.step}
        done, total = told["done"], told["total"]
        words = f"{info.status}: {told['message'] or info.step or ''}"
    else:
        total = len(pids)
        done = total - len(manager.store.still_going(list(pids)))
        words = "have ended"
    if not total:
        return one_line(words)
    filled = int(30 * done / total)
    return one_line(f"[{'#' * filled:.<30}] {done:g} of {total:g} {words}")


def _with_bar(
    manager: ProcessManager, wanted: Sequence[str], waiting: Waiting
) -> Waiting:
    """The same wait, with a bar on standard error."""
    enable_escapes()
    pids = [manager.store.full_pid(pid) for pid in wanted]
    shown_at = 0.0
    try:
        while True:
            try:
                pause = next(waiting)
            except StopIteration as end:
                return list(end.value)
            if time.monotonic() - shown_at > 0.2:
                shown_at = time.monotonic()
                print(f"\r{_bar(manager, pids)[:78]}\x1b[K", end="", file=sys.stderr)
                sys.stderr.flush()
            yield pause
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def cmd_wait(args: argparse.Namespace) -> int:
    """Wait for processes and print their records."""
    manager = _manager(args)
    timeout = None if args.timeout is None else seconds(args.timeout, "--timeout")
    waiting = manager.waiting(args.pids, timeout, any_will_do=args.any)
    if sys.stderr.isatty():
        waiting = _with_bar(manager, args.pids, waiting)
    infos = manager.sleep_through(waiting)
    show(infos, args.json)
    codes = {_exit_code(info.status) for info in infos}
    return next(code for code in (FAILED, INTERRUPTED_EXIT, DONE) if code in codes)


def cmd_logs(args: argparse.Namespace) -> int:
    """Print what a process has printed."""
    import codecs

    manager, shown = _manager(args), 0
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    while True:
        status = manager.get_process_status(args.pid)
        fresh, shown = manager.store.output(args.pid, shown)
        over = not args.follow or status in FINAL_STATES
        if args.raw:
            sys.stdout.buffer.write(fresh)
        else:
            sys.stdout.write(printable(decoder.decode(fresh, over)))
        sys.stdout.flush()
        if over:
            return DONE
        time.sleep(0.2)


def cmd_listen(args: argparse.Namespace) -> int:
    """Print what happens as it happens, one JSON object a line."""
    manager = _manager(args)
    for event in manager.events(args.pid, status=args.status, since=args.since):
        print(json.dumps({**event, "at": timestamp(event["at"])}), flush=True)
    return DONE


def cmd_why(args: argparse.Namespace) -> int:
    """Say in one sentence why a process is not running."""
    print(one_line(_manager(args).why(args.pid)))
    return DONE


def cmd_schedule(args: argparse.Namespace) -> int:
    """Print when a cron expression is due next."""
    tz = (_variable("tz") or "UTC") if args.tz is None else args.tz
    for at in _manager(args).preview(args.cron, tz, args.count):
        print(timestamp(at))
    return DONE


def cmd_prune(args: argparse.Namespace) -> int:
    """Delete old final processes and print how many they were."""
    print(_manager(args).prune(args.older_than))
    return DONE


def cmd_doctor(args: argparse.Namespace) -> int:
    """Look the installation over; 0 if it is sound."""
    found: Json = {
        "procman": __version__,
        "python": sys.version.split()[0],
        "sqlite": sqlite3.sqlite_version,
        "sqlite_faults": ["wal-reset (worked around)"] if wal_reset_bug() else [],
    }
    manager = _manager(args)
    found["database"], trouble = manager.path, None
    try:
        trouble = manager.store.trouble()
        manager.store.make_run_directory()
        found["processes"] = {state: manager.count(status=state) for state in STATES}
        runners = manager.store.runner_states()
        holders = [state for state in runners if state["waits"] and state["alive"]]
        found["lock"] = "held by a runner" if holders else "free"
        found["runners"] = runners
    except NotFound as error:
        found["note"] = str(error)
    except StorageError as error:
        trouble = str(error)
    found["trouble"], found["sound"] = trouble, trouble is None
    if args.json or not sys.stdout.isatty():
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name + ':':15}{printable(str(value))}")
    return STORAGE if trouble else DONE


_UNRECOGNIZED = {  # what the words that are too many suggest
    "start": ", and -- before a command",
    "schedule": ", and put the five fields in quotes",
}


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as everywhere."""

    def error(self, message: str) -> Any:
        """Usage error."""
        many = "unrecognized" in message
        hint = _UNRECOGNIZED.get(self.prog.split()[-1], "") if many else ""
        _say(f"{message}; see {self.prog} --help{hint}")
        sys.exit(USAGE)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help of a fixed width: to ask a terminal for its own takes an import of 2 ms,
    and each argument that is added makes one of these.
    """

    def __init__(self, prog: str):
        super().__init__(prog, width=80)


_PID = ("pid", {"metavar": "PID"})
_PIDS = ("pids", {"metavar": "PID", "nargs": "+"})
_JSON = ("--json", {"action": "store_true", "help": "also on a terminal"})
_DATA = ("--data", {"metavar": "JSON", "help": "an object; @FILE; -: standard input"})
_STEP = {"action": "append", "default": [], "metavar": "NAME=SPEC"}
_NUMBER: Json = {"metavar": "N", "type": int}
_FLAG: Json = {"action": "store_true"}


def _option_argument(name: str, option: Option) -> tuple[str, Json]:
    """The flag of a process option, as argparse takes it."""
    details: Json = {"help": option.help, "default": None}
    if not option.shown:
        return "--" + name, {**details, "action": "store_true"}
    if option.default not in (None, {}):
        details["help"] += f" (default {option.default})"
    details.update(metavar=option.shown, type=_TYPES.get(option.shown, str))
    return "--" + name.replace("_", "-"), details


_OPTION_ARGUMENTS = [_option_argument(*item) for item in OPTIONS.items()]
_FILTERS_ARGUMENTS = [(f"--{name}", details) for name, details in _FILTER_HELP]

# name: (function, its arguments as argparse takes them, an example)
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], list[Any], str]] = {
    "start": (
        cmd_start,
        [
            ("--step", {**_STEP, "help": "module:name, file.py:name or a JSON object"}),
            (
                "--steps",
                {"metavar": "FILE", "help": "a JSON object; -: standard input"},
            ),
            _DATA,
            *_OPTION_ARGUMENTS,
        ],
        "python procman.py start --retry 3 -- ./backup.sh",
    ),
    "runner": (
        cmd_runner,
        [
            ("--wait", {"action": "store_true", "help": "stay when nothing is due"}),
            ("--max-jobs", {**_NUMBER, "help": "end after N processes"}),
            ("--max-processes", {**_NUMBER, "help": "the same, without --wait"}),
            (
                "--pm",
                {
                    "metavar": "dynamic|static|ondemand",
                    "default": "dynamic",
                    "help": "how many workers: from min to max, always min, 0 to max",
                },
            ),
            (
                "--min-workers --min-children",
                {**_NUMBER, "help": "at least (default 1; static: one a CPU)"},
            ),
            (
                "--max-workers --max-children",
                {**_NUMBER, "help": "at once (default: one a CPU)"},
            ),
            (
                "--worker-ttl",
                {
                    "metavar": "LENGTH",
                    "default": WORKER_SECONDS,
                    "help": "idle so long, those beyond the least leave",
                },
            ),
            (
                "--concurrency",
                {
                    "metavar": "NAME=N",
                    "action": "append",
                    "default": [],
                    "help": "at most N of that name at once, over all runners",
                },
            ),
            ("--jobs-per-worker", {**_NUMBER, "help": "then replace the worker"}),
            (
                "--queue",
                {"metavar": "A,B", "default": DEFAULT_QUEUE, "help": "those it serves"},
            ),
            (
                "--script-args",
                {"metavar": "TEXT", "default": "", "help": "for sys.argv"},
            ),
            ("--services", {"metavar": "MODULE:DICT", "help": "service factories"}),
            (
                "--grace",
                {
                    "metavar": "LENGTH",
                    "default": GRACE_SECONDS,
                    "help": "for steps that are to end (default 10s)",
                },
            ),
            (
                "--keep",
                {
                    "metavar": "LENGTH",
                    "default": KEEP_SECONDS,
                    "help": "what ended longer ago is deleted (default 30d)",
                },
            ),
        ],
        "* * * * * python3 procman.py runner --wait",
    ),
    "execute": (
        cmd_execute,
        [("pid", {"metavar": "PID", "nargs": "?"})],
        "python procman.py execute < process.json",
    ),
    "status": (cmd_status, [_PID, _JSON], "python procman.py status 3f2a91"),
    "proceed": (
        cmd_proceed,
        [_PID, _DATA],
        """python procman.py proceed 3f2a91 --data '{"approved": true}'""",
    ),
    "list": (
        cmd_list,
        [
            *_FILTERS_ARGUMENTS,
            (
                "--order",
                {
                    "metavar": "newest|oldest|due|ended",
                    "default": "newest",
                    "help": "which first",
                },
            ),
            ("--limit", {**_NUMBER, "default": 50, "help": "at most (default 50)"}),
            ("--offset", {**_NUMBER, "default": 0, "help": "less the first N"}),
            ("--watch", {**_FLAG, "help": "again and again, on a terminal"}),
            _JSON,
        ],
        "python procman.py list --status open --since 1h",
    ),
    "count": (cmd_count, _FILTERS_ARGUMENTS, "python procman.py count --status open"),
    "pause": (cmd_pause, [_PID], "python procman.py pause 3f2a91"),
    "retry": (
        cmd_retry,
        [
            ("pid", {"metavar": "PID", "nargs": "?"}),
            ("--step", {"metavar": "NAME", "help": "from there (else what failed)"}),
            ("--data", {"metavar": "JSON", "help": "merged over the step's input"}),
            ("--failed", {**_FLAG, "help": "all that failed and were not retried"}),
            ("--name", {"metavar": "TEXT", "help": "of those with this name"}),
            ("--since", {"metavar": "TIME", "help": "failed since; 5m: ago"}),
            ("--dry-run", {**_FLAG, "help": "only print what would be retried"}),
        ],
        "python procman.py retry --failed --since 2h --dry-run",
    ),
    "cancel": (
        cmd_cancel,
        [
            ("pids", {"metavar": "PID", "nargs": "*"}),
            ("--all", {**_FLAG, "help": "all open ones, and their series"}),
            *_FILTERS_ARGUMENTS,
        ],
        "python procman.py cancel --all --name nightly --status queued",
    ),
    "wait": (
        cmd_wait,
        [
            _PIDS,
            ("--timeout", {"metavar": "LENGTH", "help": "then exit 124"}),
            ("--any", {"action": "store_true", "help": "the first is enough"}),
            _JSON,
        ],
        "python procman.py wait 3f2a91 --timeout 5m",
    ),
    "logs": (
        cmd_logs,
        [
            _PID,
            ("-f --follow", {"action": "store_true", "help": "until it ends"}),
            ("--raw", {"action": "store_true", "help": "the bytes, not escaped"}),
        ],
        "python procman.py logs -f 3f2a91",
    ),
    "listen": (
        cmd_listen,
        [
            ("pid", {"metavar": "PID", "nargs": "?"}),
            ("--status", {"metavar": "STATE", "help": "only what leaves it so"}),
            ("--since", {**_NUMBER, "help": "after event N; 0: from the start"}),
        ],
        "python procman.py listen --status final",
    ),
    "why": (cmd_why, [_PID], "python procman.py why 3f2a91"),
    "schedule": (
        cmd_schedule,
        [
            ("what", {"choices": ["preview"], "metavar": "preview"}),
            ("cron", {"metavar": "CRON", "help": "five fields, or @daily"}),
            ("--tz", {"metavar": "ZONE", "help": "of cron (default UTC)"}),
            ("--count", {**_NUMBER, "default": 10, "help": "times (default 10)"}),
        ],
        'python procman.py schedule preview "0 3 * * mon-fri" --tz Europe/Berlin',
    ),
    "prune": (
        cmd_prune,
        [
            (
                "--older-than",
                {
                    "metavar": "LENGTH",
                    "default": KEEP_SECONDS,
                    "help": "that ended so long ago (default 30d)",
                },
            )
        ],
        "python procman.py prune --older-than 7d",
    ),
    "doctor": (cmd_doctor, [_JSON], "python procman.py doctor"),
}


def _refusing(error: ProcmanError) -> Callable[[argparse.Namespace], int]:
    """A command that says what is wrong with its variables: no other is to say it."""

    def refuse(args: argparse.Namespace) -> int:
        raise error

    return refuse


def _take_arguments(parser: argparse.ArgumentParser, name: str | None) -> None:
    """Teach a parser the arguments of a command, and those of all."""
    hidden = argparse.SUPPRESS  # not given here, it may have been before the command
    parser.add_argument("--db", metavar="FILE", default=hidden, help="the database")
    parser.add_argument(
        "--debug", action="store_true", default=hidden, help="show tracebacks"
    )
    if name is None:
        return
    func, arguments, _ = COMMANDS[name]
    parser.set_defaults(func=func)
    for flag, details in arguments:
        argument = parser.add_argument(*flag.split(), **details)
        text = _variable(argument.dest) if name == "runner" else None
        if text is not None and argument.nargs != 0:
            where = "PROCMAN_" + argument.dest.upper()
            several = isinstance(argument.default, list)
            try:
                found = _typed(text, details.get("metavar", "TEXT"), where)
            except BadSpec as error:
                parser.set_defaults(func=_refusing(error))
                continue
            parser.set_defaults(
                **{argument.dest: text.split(",") if several else found}
            )


def _described(name: str) -> Json:
    """What a parser of this command shows when it is asked for help."""
    func, _, example = COMMANDS[name]
    return {
        "description": func.__doc__,
        "epilog": f"example:\n  {example}",
        "formatter_class": _Help,
        "allow_abbrev": False,
    }


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line, or that of one command's arguments.

    To build all of them takes longer than many a command.
    """
    if only is not None:
        parser = _Parser(prog=f"procman.py {only}", **_described(only))
        _take_arguments(parser, only)
        return parser
    parser = _Parser(
        prog="procman.py",
        allow_abbrev=False,
        description="Durable multi-step background processes on SQLite.",
        epilog="Exit codes: 0 done, 1 process failed, 2 usage, 3 not found, 4 wrong"
        " state, 5 storage trouble, 6 interrupted, 124 timed out.  The database is"
        " --db, else $PROCMAN_DB, else procman.db beside procman.py.",
    )
    parser.add_argument("--version", action="version", version=f"procman {__version__}")
    _take_arguments(parser, None)
    commands: Any = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (func, _, _) in COMMANDS.items():
        command = commands.add_parser(name, help=func.__doc__, **_described(name))
        _take_arguments(command, name)
    return parser


def _run(words: list[str]) -> int:
    """Parse and call; what follows -- is the user's, whatever it looks like."""
    rest: list[str] = []
    if "--" in words:
        rest = words[words.index("--") + 1 :]
        words = words[: words.index("--")]
    closing = contextlib.ExitStack()
    args = argparse.Namespace(db=None, debug=False, command=rest, closing=closing)
    try:
        if words and words[0] in COMMANDS:
            build_parser(words[0]).parse_args(words[1:], args)
        else:
            build_parser().parse_args(words, args)
        if rest and args.func is not cmd_start:
            raise BadSpec("only start takes a command after --")
        with closing:
            code: int = args.func(args)
            return code
    except ProcmanError as error:
        if args.debug:
            import traceback

            traceback.print_exc()
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        sys.stdout.flush()  # here, where an error can be answered


def main(argv: list[str] | None = None) -> int:
    """Run one command; every error is one line on standard error and a code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == [WORKER_COMMAND]:
        return worker_main()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, or not there as under pythonw
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever the locale
    # Steps that are run in this process import the module that they see.
    sys.modules.setdefault("procman", sys.modules[__name__])
    try:
        return _run(words)
    except OSError as error:
        gone = isinstance(error, BrokenPipeError)  # who read has read enough
        if not gone:
            _say(f"{error.strerror}: {error.filename or 'standard output'}")
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE if gone else FAILED


if __name__ == "__main__":
    code = main()
    gc.freeze()  # the interpreter need not look through all of it once more: 2 ms
    sys.exit(code)
