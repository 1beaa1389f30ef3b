"""Tests of procman: behaviour through its public interface, with real processes.

The groups carry the numbers of the rooms of procman.py, so that a failing group
names the room; 11 kills things, 12 are the rules of the house, 13 are benchmarks.
Sleeps stand only in `eventually`, in the steps and in the benchmarks.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import namedtuple
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PROCMAN = HERE / "procman.py"
sys.path.insert(0, str(HERE))

import procman  # noqa: E402
from procman import (  # noqa: E402
    ManagedProcess,
    ProcessManager,
    Runner,
    StepExecutor,
)

WINDOWS = os.name == "nt"
posix = pytest.mark.skipif(WINDOWS, reason="Windows has no such signals or files")

# ===========================================================================
# 0. Fixtures and helpers
# ===========================================================================

# The steps that workers import: steps.py in the directory of each test.
STEPS = '''
import json, os, signal, subprocess, sys, time
from procman import InterruptingProcessStep, ProcessStep, current


def double(data):
    return {"n": data["n"] * 2}

def add_one(data):
    return {**data, "n": data.get("n", 0) + 1}

def nothing(data):
    return None

def shout(data):
    print("out", current().step)
    print("err", current().step, file=sys.stderr)

def fail(data):
    raise ValueError("no luck")

def hang(data):
    mark(data, "hang")
    time.sleep(600)

def nap(data):
    time.sleep(data["seconds"])

async def coroutine(data):
    import asyncio
    await asyncio.sleep(0.01)
    return {"async": True}

def mark(data, word):
    """One line in the ledger: what was run, also if nothing of it was committed."""
    if "ledger" in data:
        with open(data["ledger"], "a") as file:
            file.write(f"{word} {os.getpid()}\\n")
            file.flush()
            os.fsync(file.fileno())

def ledger(data):
    mark(data, current().key)

class Greeter(ProcessStep):
    def __init__(self, *given, **named):
        self.given, self.named = given, named
    def execute(self, data):
        return {"given": list(map(str, self.given)), "named": self.named}

class Ask(InterruptingProcessStep):
    def execute(self, data):
        return {**data, "question": "go on?"}

def make_greeter(*given, **named):
    return Greeter(*given, **named)

def service():
    return "the service"

services = {"greeting": service}
'''


class Clock:
    """A wall clock that stands still until it is advanced."""

    def __init__(self) -> None:
        self.at = time.time()

    def __call__(self) -> float:
        return self.at

    def advance(self, seconds: float) -> None:
        self.at += seconds


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A directory of its own, with steps.py, to work in."""
    for name in [name for name in os.environ if name.startswith("PROCMAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "steps.py").write_text(STEPS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def manager(home, clock):
    """A manager on a database of its own, whose time only the test advances."""
    with contextlib.closing(ProcessManager(home / "procman.db", now=clock)) as found:
        yield found


def steps(*specs, **options):
    """A process whose steps are named a, b, c, ..."""
    return ManagedProcess(dict(zip("abcdefghijkl", specs)), **options)


def drain(manager, **options):
    """Run what is due; return how many processes that were."""
    return Runner(manager, **{"max_workers": 2, "grace": 2, **options}).run()


def demand(room, *queues):
    """What a runner with room for so many asks the store for."""
    return procman.Demand(queues or ("default",), None, {}, room)


Result = namedtuple("Result", "code out err")


def spawn(*words, **options):
    """A procman command as a child; standard output and error are pipes."""
    given = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        **options,
    }
    return subprocess.Popen([sys.executable, str(PROCMAN), *map(str, words)], **given)


def cli(*words, stdin=b"", timeout=60, **options):
    """Run a command to its end: (exit code, standard output, standard error)."""
    child = spawn(*words, stdin=subprocess.PIPE, **options)
    try:
        out, err = child.communicate(stdin, timeout)
    finally:
        child.kill()
    text = [
        part.decode("utf-8", "replace").replace("\r\n", "\n") for part in (out, err)
    ]
    return Result(child.returncode, *text)


def eventually(check, seconds=20):
    """Wait until `check()` is true and return its value; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = check()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


@contextlib.contextmanager
def running(manager, *words):
    """A waiting runner as a child, up and registered, for the time of the block."""
    before = {row["id"] for row in manager.store.runners()}
    child = spawn("runner", "--wait", "--grace", "2", "--db", manager.path, *words)
    try:
        eventually(lambda: {row["id"] for row in manager.store.runners()} - before)
        yield child
    finally:
        child.terminate()
        try:
            child.communicate(timeout=20)
        finally:
            child.kill()


def read_ledger(path):
    """The words written by the steps, in order."""
    return (
        [line.split()[0] for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


# ===========================================================================
# 1. Vocabulary
# ===========================================================================


def test_errors_say_what_which_and_what_now(manager):
    finished = manager.start_process(steps("steps:add_one"))
    failed = manager.start_process(steps("steps:fail", name="bad one"))
    asked = manager.start_process(steps("steps:Ask", "steps:add_one"))
    assert drain(manager) == 3
    queued = manager.start_process(steps("steps:add_one"))
    cancelled = manager.start_process(steps("steps:add_one"))
    assert manager.cancel(cancelled) == cancelled == manager.cancel(cancelled)
    for call, kind, code, text in [
        (
            lambda: manager.proceed(queued),
            procman.WrongState,
            4,
            f"cannot proceed process {queued}: it is queued, .*needs interrupted",
        ),
        (
            lambda: manager.cancel(finished),
            procman.WrongState,
            4,
            f"cannot cancel process {finished}: it is finished, .*needs ",
        ),
        (
            lambda: manager.get_process_info("0" * 32),
            procman.NotFound,
            3,
            f"no process {'0' * 32} in {re.escape(manager.path)}",
        ),
        (
            lambda: manager.cancel("../../etc"),
            procman.NotFound,
            3,
            "no process '../../etc': a pid is 32 lowercase hex digits, or 6 ",
        ),
        (
            lambda: manager.wait(failed),
            procman.ProcessFailed,
            1,
            f"process {failed} ended as error in step 'a': ValueError: no luck",
        ),
        (
            lambda: manager.wait(cancelled),
            procman.ProcessCancelled,
            1,
            f"process {cancelled} was cancelled",
        ),
        (
            lambda: manager.wait_all([finished, queued], 0.001),
            procman.WaitTimeout,
            124,
            f"after 0.001 s 1 of 2 still open, .*{queued}",
        ),
        (
            lambda: manager.wait(queued, "0.001s"),
            procman.WaitTimeout,
            124,
            f"after 0.001 s 1 of 1 still open, .*{queued}",
        ),
        (
            lambda: manager.proceed(asked, ["no", "object"]),
            procman.BadType,
            2,
            "data must be a JSON object, not list",
        ),
        (
            lambda: manager.list_processes(status="done"),
            procman.BadSpec,
            2,
            "status must be one of open, final, queued, .*, not 'done'$",
        ),
    ]:
        with pytest.raises(kind) as caught:
            call()
        assert re.match(text, str(caught.value)), str(caught.value)
        assert caught.value.exit_code == code
        assert isinstance(caught.value, procman.ProcmanError)
    with pytest.raises(procman.ProcessFailed) as caught:
        manager.wait(failed)
    assert caught.value.info == manager.get_process_info(failed)
    assert manager.get_process_status(asked) == "interrupted"


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (procman.BadSpec, ValueError),
        (procman.BadType, TypeError),
        (procman.NotFound, LookupError),
        (procman.WaitTimeout, TimeoutError),
    ],
)
def test_an_error_is_also_the_builtin_one_that_a_caller_would_catch(error, builtin):
    assert issubclass(error, builtin)


def words_nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


WORDS_LOOP = []
WORDS_LOOP.append(WORDS_LOOP)
WORDS_REFUSED = [
    (float("nan"), "DATA.x is nan: JSON has no such number", ValueError),
    (float("-inf"), "DATA.x is -inf: JSON has no such number", ValueError),
    ("\ud800", "DATA.x has a lone surrogate: not valid Unicode", ValueError),
    ({"\udfff": 1}, "has a lone surrogate: not valid Unicode", ValueError),
    ([0, {"y": 2**64}], "DATA.x[1].y is an integer beyond 64 bits: use a string", None),
    (-(2**63) - 1, "DATA.x is an integer beyond 64 bits: use a string", ValueError),
    (2**200, "DATA.x is an integer beyond 64 bits: use a string", ValueError),
    (words_nested(1000), "is nested deeper than 200", ValueError),
    (words_nested(100_000), "is nested deeper than 200", ValueError),
    (WORDS_LOOP, "is nested deeper than 200", ValueError),
    ({1: 2}, "DATA.x has the key 1: ", TypeError),
    ([{"y": {None: 2}}], "DATA.x[0].y has the key None: ", TypeError),
    ({1, 2}, "DATA.x is a set, which JSON cannot carry", TypeError),
    ([b"bytes"], "DATA.x[0] is a bytes, which JSON cannot carry", TypeError),
    (object(), "DATA.x is a object, which JSON cannot carry", TypeError),
    ({"at": sqlite3.Date(2022, 2, 9)}, "DATA.x.at is a date, which JSON", TypeError),
]


@pytest.mark.parametrize(
    ("value", "text", "kind"), WORDS_REFUSED, ids=range(len(WORDS_REFUSED))
)
def test_what_json_cannot_carry_is_refused_with_its_place(manager, value, text, kind):
    queued = manager.start_process(steps("steps:Ask"))
    for place, call in [
        ("data", lambda: manager.start_process(steps("steps:nothing"), {"x": value})),
        ("data", lambda: manager.proceed(queued, {"x": value})),
        (
            "steps.a.kwargs",
            lambda: manager.start_process(
                steps({"class": "steps:Greeter", "kwargs": {"x": value}})
            ),
        ),
    ]:
        with pytest.raises(kind or ValueError) as caught:
            call()
        assert isinstance(caught.value, procman.BadSpec)
        assert text.replace("DATA", place) in str(caught.value)
        if "DATA" in text:
            assert str(caught.value).startswith(place)
        assert len(str(caught.value)) < 300
    assert manager.count() == 1


@pytest.mark.parametrize(
    "data",
    [
        {"numbers": [2**64 - 1, -(2**63), 0.1, 1.7e308, -0.0, 1e-320, True, None]},
        {"": {"": []}, "\0": "\0\x1b\u2028", "ä\U0001f600": "\ufffe"},
        {"deep": words_nested(198)},
        {"tuple": (1, (2,))},
    ],
)
def test_what_json_can_carry_comes_back_as_it_was(manager, data):
    pid = manager.start_process(steps(), data)
    output = manager.get_process_info(pid).output
    assert json.dumps(output) == json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"x": NaN}', "--data.x is nan: JSON has no such number"),
        (b'{"x": [1e999]}', "--data.x[0] is inf: JSON has no such number"),
        (b'{"x": "\\ud800"}', "--data.x has a lone surrogate"),
        (b'{"x": {"y": 1, "y": 2}}', "the key 'y' stands twice in one object"),
        (b'{"x": 1%s}' % (b"0" * 30), "--data.x is an integer beyond 64 bits"),
        (b'{"x": 1%s}' % (b"0" * 9999), "--data"),
        (b'{"x":' * 300 + b"1" + b"}" * 300, "is nested deeper than 200"),
        (b"[" * 100_000, "--data is nested deeper than 200"),
        (b'{"x": 1', "--data is not valid JSON"),
        (b"", "--data is not valid JSON"),
        (b'{"x": "\xff"}', "--data is not valid JSON"),
        (b"[1]", "--data must be a JSON object, not list"),
        (b"null", "--data must be a JSON object, not NoneType"),
    ],
    ids=range(13),
)
def test_a_json_text_from_outside_is_read_as_strictly(home, capsys, text, message):
    (home / "data.json").write_bytes(text)
    words = ["start", "--db", "a.db", "--step", "a=steps:shout", "--data", "@data.json"]
    assert procman.main(words) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("procman: ") and err.count("\n") == 1 and len(err) < 300
    assert out == "" and not (home / "a.db").exists()


def test_data_larger_than_the_limit_is_refused_in_bytes_not_characters(
    manager, capsys, monkeypatch
):
    monkeypatch.setattr(procman, "MAX_JSON_BYTES", 1 << 20)
    size = len('{"x":""}')
    fits = {"x": "€" * ((1 << 20) // 3 - size)}
    pid = manager.start_process(steps(), fits)
    assert manager.get_process_info(pid).output == fits
    for text in ("€" * ((1 << 20) // 3 + 1), "x" * (1 << 20)):
        with pytest.raises(procman.BadSpec, match="^data is larger than 1 MiB$"):
            manager.start_process(steps(), {"x": text})
    Path("data.json").write_text(json.dumps({"x": "x" * (1 << 20)}))
    words = ["start", "--db", manager.path, "--data", "@data.json", "--", "true"]
    assert procman.main(words) == 2
    assert "larger than 1 MiB" in capsys.readouterr().err
    assert manager.count() == 1


# ===========================================================================
# 2. Model
# ===========================================================================


def test_the_table_of_transitions_is_total():
    given = procman.TRANSITIONS
    sources = {state for froms, _ in given.values() for state in froms}
    targets = {to for _, to in given.values()}
    reached = {"queued"} | targets
    assert sources | targets <= set(procman.STATES)
    assert set(procman.FINAL_STATES) <= reached
    assert sources == set(procman.OPEN_STATES), "each open state has a way out"
    assert not set(procman.OPEN_STATES) & set(procman.FINAL_STATES)
    by_itself = {s for event in given.keys() - {"cancel"} for s in given[event][0]}
    assert reached - set(procman.FINAL_STATES) <= by_itself, "... other than cancel"
    assert set(given["cancel"][0]) == set(procman.OPEN_STATES)


def test_the_store_moves_a_process_only_along_the_table(manager):
    pid = manager.start_process(steps("steps:add_one"))
    store, columns = manager.store, "definition, queue, priority, due_at, created_at"
    for event, (sources, target) in procman.TRANSITIONS.items():
        for state in procman.STATES:
            with store.transaction() as db:
                number = db.execute(
                    f"INSERT INTO process (pid, status, {columns})"
                    f" SELECT ?, ?, {columns} FROM process WHERE pid = ?",
                    (f"{event}-{state}", state, pid),
                ).lastrowid
                before = db.execute("SELECT count(*) FROM event").fetchone()[0]
                moved = store.transition(db, event, procman.Move(number))
                after = db.execute("SELECT count(*) FROM event").fetchone()[0]
                sql = "SELECT status FROM process WHERE id = ?"
                assert moved == {number} & {number if state in sources else 0}
                now = db.execute(sql, (number,)).fetchone()[0]
                assert now == (target if moved else state), (event, state)
                assert after - before == len(moved)


MODEL_LONG = "n" * 201
MODEL_BAD_STEPS = [
    (5, "steps.a must be a text or a"),
    (None, "steps.a must be a text or a"),
    (len, "steps.a must "),
    ("", "steps.a must be "),
    ("module", "steps.a must be package.module:name or path/to/file.py:name, not 'mod"),
    ("module:", "steps.a must be package.module:name"),
    (":name", "steps.a must be package.module:name"),
    ("a b:c", "steps.a must be package.module:name"),
    ("../x:c", "steps.a must be package.module:name"),
    ("m:n()", "steps.a must be package.module:name"),
    ("m:n\nm", "steps.a must be "),
    ({}, "steps.a needs exactly one of class, factory, call, command, shell"),
    ({"klass": "m:C"}, "steps.a needs exactly one of class"),
    ({"class": "m:C", "call": "m:f"}, "steps.a needs exactly one of class"),
    (
        {"class": "m:C", "argz": []},
        "steps.a has the unknown key 'argz'; beside class: ",
    ),
    ({"call": "m:f", "args": []}, "steps.a has the unknown key 'args'; beside call: "),
    ({"call": "m:f", 1: []}, "steps.a has the unknown key "),
    ({"shell": "x", "args": []}, "steps.a has the unknown key 'args'"),
    ({"call": "m:f", "output": "json"}, "steps.a has the unknown key 'output'"),
    ({"class": 5}, "steps.a.class must be a text, not int"),
    ({"class": "C"}, "steps.a.class must be package.module:name"),
    ({"factory": ["m:f"]}, "steps.a.factory must be a text, not list"),
    ({"call": "m:"}, "steps.a.call must be package.module:name"),
    ({"class": "m:C", "args": "abc"}, "steps.a.args must be a list, not str"),
    ({"class": "m:C", "args": {}}, "steps.a.args must be a list, not dict"),
    ({"class": "m:C", "kwargs": []}, "steps.a.kwargs must be a JSON object, not list"),
    ({"class": "m:C", "services": "db"}, "steps.a.services must be a list of texts"),
    ({"class": "m:C", "services": ["a", 1]}, "steps.a.services[1] must be a text, not"),
    ({"class": "m:C", "args": [0, {1}]}, "steps.a.args[1] is a set"),
    ({"command": "ls"}, "steps.a.command must be a list of texts, not str"),
    ({"command": []}, "steps.a.command is empty: name a program"),
    ({"command": [""]}, "steps.a.command is empty: name a program"),
    ({"command": ["ls", 5]}, "steps.a.command[1] must be a text, not int"),
    ({"command": ["ls", "\0"]}, "steps.a.command[1] has a NUL character"),
    ({"command": ["ls"], "output": "xml"}, "steps.a.output must be one of text, json"),
    ({"command": ["ls"], "output": ["json"]}, "steps.a.output must be one of text, "),
    ({"shell": 5}, "steps.a.shell must be a text, not int"),
    ({"shell": "a\0b"}, "steps.a.shell has a NUL character"),
    ({"shell": "x", "cwd": 5}, "steps.a.cwd must be a text, not int"),
    ({"shell": "x", "env": []}, "steps.a.env must be a JSON object, not list"),
    ({"shell": "x", "env": {"N": 1}}, "steps.a.env.N must be a text"),
    ({"shell": "x", "env": {"N": "\0"}}, "steps.a.env.N has a NUL character"),
    ({"shell": "x", "env": {"A=B": "1"}}, "steps.a.env has 'A=B': not a variable's"),
    ({"shell": "x", "env": {"": "1"}}, "steps.a.env has ''"),
    ({"shell": "x", "env": {5: "1"}}, "steps.a.env has "),
    ({"shell": "x", "interrupt": 1}, "steps.a.interrupt must be true or false"),
    ({"shell": "x", "timeout": 0}, "steps.a.timeout must be 0.001 to 1e+10"),
    ({"shell": "x", "timeout": -1}, "steps.a.timeout must be 0.001 to 1e+10"),
    ({"shell": "x", "timeout": "soon"}, "steps.a.timeout must be seconds or a text"),
    ({"shell": "x", "timeout": None}, "steps.a.timeout must be seconds or a text"),
    ({"shell": "x", "timeout": True}, "steps.a.timeout must be seconds or a text"),
    ({"shell": "x", "timeout": 1e999}, "steps.a.timeout must be 0.001 to 1e+10"),
    ({"shell": "x", "timeout": 10**400}, "steps.a.timeout must be 0.001 to 1e+10"),
]


@pytest.mark.parametrize(("spec", "text"), MODEL_BAD_STEPS)
def test_a_bad_step_is_refused_with_its_path_and_changes_nothing(manager, spec, text):
    good = manager.start_process(steps("steps:add_one"))
    with pytest.raises(procman.BadSpec) as caught:
        manager.start_many([steps("m:f"), ManagedProcess({"a": spec})])
    assert str(caught.value).startswith(text)
    assert isinstance(caught.value, (TypeError, ValueError))
    assert [info.pid for info in manager.list_processes()] == [good]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, "steps must be a JSON object, not NoneType"),
        ([("a", "m:f")], "steps must be a JSON object, not list"),
        ({1: "m:f"}, "the name of a step must be a text, not int"),
        ({"": "m:f"}, "the name of a step must be 1 to 200 printable characters"),
        ({"a\n": "m:f"}, "the name of a step must be 1 to 200 printable characters"),
        ({MODEL_LONG: "m:f"}, "the name of a step must be 1 to 200 printable"),
        (dict.fromkeys(map(str, range(10_001)), "m:f"), "steps has 10001 steps, more"),
    ],
    ids=range(7),
)
def test_bad_names_of_steps_are_refused(given, text):
    with pytest.raises(procman.BadSpec) as caught:
        ManagedProcess(given)
    assert str(caught.value).startswith(text)
    assert len(str(caught.value)) < 300


MODEL_BAD_OPTIONS = [
    ({"retries": 5}, TypeError, "unknown option 'retries'; known: args, at, backoff, "),
    ({"name": 5}, TypeError, "name must be a text, not int"),
    ({"name": ""}, ValueError, "name must be 1 to 200 printable characters, not ''"),
    ({"name": MODEL_LONG}, ValueError, "name must be 1 to 200 printable characters"),
    ({"name": "a\x1b[31m"}, ValueError, "name must be 1 to 200 printable characters"),
    ({"queue": "a/b"}, ValueError, "queue may hold letters, digits and "),
    ({"queue": 1}, TypeError, "queue must be a text, not int"),
    ({"priority": "1"}, TypeError, "priority must be a whole number, not str"),
    ({"priority": 1.0}, TypeError, "priority must be a whole number, not float"),
    ({"priority": 2**63}, ValueError, "priority must be "),
    ({"retry": "10"}, TypeError, "retry must be a whole number, not str"),
    ({"retry": True}, TypeError, "retry must be a whole number, not bool"),
    ({"retry": -2}, ValueError, "retry must be -1 to "),
    ({"retry": 2**63}, ValueError, "retry must be -1 to "),
    ({"retry": 10**5000}, ValueError, "retry must be -1 to "),
    ({"retry_interval": [1]}, TypeError, "retry_interval must be seconds or a text"),
    ({"retry_interval": -1}, ValueError, "retry_interval must be 0 to 1e+10"),
    ({"retry_interval": "5x"}, ValueError, "retry_interval must be seconds or a text"),
    ({"backoff": "2"}, TypeError, "backoff must be a number, not str"),
    ({"backoff": 0.5}, ValueError, "backoff must be 1 to 1000, not 0.5"),
    ({"backoff": float("nan")}, ValueError, "backoff must be 1 to 1000, not nan"),
    ({"timeout": 0}, ValueError, "timeout must be 0.001 to 1e+10"),
    ({"timeout": False}, TypeError, "timeout must be seconds or a text"),
    ({"timeout": float("inf")}, ValueError, "timeout must be 0.001 to 1e+10"),
    ({"delay": "tomorrow"}, ValueError, "delay must be seconds or a text"),
    ({"delay": -1}, ValueError, "delay must be 0 to 1e+10"),
    ({"delay": 10**400}, ValueError, "delay must be 0 to 1e+10"),
    ({"at": "tomorrow"}, ValueError, "at must be epoch seconds, ISO 8601 with a zone"),
    ({"at": [1]}, TypeError, "at must be a time, not list"),
    ({"at": 10**400}, ValueError, "at must "),
    ({"at": 0, "delay": 1}, ValueError, "give one of at and delay, not both"),
    ({"on_lost": "panic"}, ValueError, "on_lost must be one of retry, ask, error, not"),
    ({"on_lost": ["ask"]}, ValueError, "on_lost must be one of retry, ask, error, not"),
    ({"args": [1]}, TypeError, "args must be a JSON object, not list"),
    ({"args": {"a": [1]}}, TypeError, "args.a must be a text or a number"),
    ({"args": {"a": b"x"}}, TypeError, "args.a "),
    ({"args": {"a": float("nan")}}, ValueError, "args.a is nan"),
    ({"args": {5: "x"}}, TypeError, "a key of args must be a text, not int"),
    ({"interval": "often"}, ValueError, "interval must be seconds or a text"),
    ({"interval": "-2"}, ValueError, "interval must be seconds or a text"),
    ({"interval": -2}, ValueError, "interval must be 0 to 1e+10"),
    ({"interval": -0.5}, ValueError, "interval must be 0 to 1e+10"),
    ({"interval": True}, TypeError, "interval must be seconds or a text"),
    ({"interval": [-1]}, TypeError, "interval must be seconds or a text"),
    ({"interval": float("nan")}, ValueError, "interval must be 0 to 1e+10"),
    ({"interval": 1, "interval_from": 1}, ValueError, "interval_from must be one of "),
    ({"interval_from": "middle"}, ValueError, "interval_from must be one of end, st"),
    ({"cron": 5}, TypeError, "cron must be a text, not int"),
    ({"cron": ""}, ValueError, "cron must be 1 to 1000 printable characters, not ''"),
    ({"cron": "@daily\x1b"}, ValueError, "cron must be 1 to 1000 printable"),
    ({"cron": "* *"}, ValueError, "cron must have five fields"),
    ({"cron": "61 * * * *"}, ValueError, "cron: minute must be 0 to 59, not '61'"),
    ({"cron": "0 0 31 2 *"}, ValueError, "cron: '0 0 31 2 *' is never due"),
    ({"cron": "@daily", "tz": "No/Where"}, ValueError, "tz: no data for the time zon"),
    ({"tz": 5}, TypeError, "tz must be a text, not int"),
    ({"dedicated": 1}, TypeError, "dedicated must be true or false"),
    ({"once": "yes"}, TypeError, "once must be true or false"),
    ({"unique": 0}, TypeError, "unique must be true or false"),
    ({"interval": 1, "cron": "@daily"}, ValueError, "give one of interval and cron, n"),
    ({"interval": -1, "cron": "@daily"}, ValueError, "give one of interval and cron"),
    ({"once": True, "unique": True}, ValueError, "give one of once and unique, not b"),
]


@pytest.mark.parametrize(
    ("options", "kind", "text"), MODEL_BAD_OPTIONS, ids=range(len(MODEL_BAD_OPTIONS))
)
def test_options_are_strict_and_name_themselves(manager, options, kind, text):
    for call in (
        lambda: manager.start_process(steps("steps:add_one", **options)),
        lambda: ProcessManager(manager.path, defaults=options).start_process(
            steps("m:f")
        ),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value).startswith(text)
        assert isinstance(caught.value, procman.BadSpec)
    assert manager.count() == 0


def test_what_is_no_process_is_refused_and_nothing_of_its_batch_is_queued(manager):
    good = steps("steps:add_one")
    for wrong in (
        {"a": "m:f"},
        "m:f",
        None,
        (good, [1]),
        (good, {"x": {1}}),
        (good, "x"),
    ):
        with pytest.raises(TypeError):
            manager.start_many([good, wrong])
    assert manager.count() == 0 and manager.start_many([]) == []


MODEL_GOOD_STEPS = [
    "m:f",
    "pkg.mod:Class.method",
    "größe:übung",
    "path/to/file.py:name",
    "/with space/a-b.py:name",
    "C:\\steps\\a.py:name",
    {"class": "m:C"},
    {"class": "m:C", "args": [1, None, {"a": []}], "kwargs": {}, "services": ["db"]},
    {"class": "m:C", "args": (1, 2)},
    {"factory": "m:f", "args": [1], "kwargs": {"a": 1}, "services": []},
    {"call": "m:f", "timeout": "5m", "interrupt": True, "env": {"A": None, "B": ""}},
    {"command": ["ls", ""], "output": "json", "timeout": 0.5, "interrupt": False},
    {"command": ("ls",), "output": "text", "cwd": "/tmp"},
    {"shell": "echo ä | cat\necho", "env": {"A": "ä"}, "cwd": "sub dir"},
]


def test_every_valid_form_of_a_step_is_accepted_and_kept_in_order(manager):
    names = [f"step {number} ä" for number in range(len(MODEL_GOOD_STEPS))][::-1]
    pid = manager.start_process(ManagedProcess(dict(zip(names, MODEL_GOOD_STEPS))))
    info = manager.get_process_info(pid)
    assert list(info.steps.items()) == [(name, "queued") for name in names]
    assert info.step == names[0]
    ManagedProcess(dict.fromkeys(map(str, range(10_000)), "m:f"))


def test_every_option_has_a_place_in_the_record_or_in_what_happens(manager, clock):
    options = {
        "name": "näme of it",
        "queue": "q.1_-Q",
        "priority": -5,
        "delay": "2h",
        "timeout": "1.5m",
        "retry": -1,
        "retry_interval": "1d",
        "backoff": 2,
        "on_lost": "ask",
        "args": {"number": 1, "text": "x", "flag": True, "none": None},
        "interval": "1h",
        "interval_from": "start",
        "dedicated": True,
        "unique": True,
        "key": "the only",
        "pid": "0123456789abcdef" * 2,
    }
    elsewhere = dict.fromkeys(("at", "cron", "tz", "once"))
    assert {**options, **elsewhere}.keys() == procman.OPTIONS.keys()
    info = manager.get_process_info(
        manager.start_process(steps("m:f", at=None, once=None, **options))
    )
    assert info.pid == info.series == options["pid"]
    assert (info.name, info.queue, info.priority) == ("näme of it", "q.1_-Q", -5)
    assert (info.due_at, info.timeout, info.retry_left) == (clock.at + 7200, 90, -1)
    plain = manager.get_process_info(manager.start_process(steps("m:f")))
    assert (plain.name, plain.queue, plain.priority) == (None, "default", 0)
    assert (plain.due_at, plain.timeout, plain.retry_left) == (clock.at, None, 0)


def test_the_defaults_of_a_manager_give_way_to_the_options_of_a_process(manager, clock):
    defaults = {"queue": "slow", "retry": 3, "timeout": "1m", "at": 2**32}
    other = ProcessManager(manager.path, defaults=defaults, now=clock)
    with contextlib.closing(other):
        pids = [
            other.start_process(steps("m:f", **options))
            for options in (
                {},
                {"queue": "fast", "retry": 0, "timeout": 5},
                {"delay": 9},
            )
        ]
        found = [other.get_process_info(pid) for pid in pids]
    shown = [(info.queue, info.retry_left, info.timeout, info.due_at) for info in found]
    assert shown[0] == ("slow", 3, 60, 2**32)
    assert shown[1] == ("fast", 0, 5, 2**32)
    assert shown[2] == ("slow", 3, 60, clock.at + 9), "its delay is said, the at is not"


def test_a_record_has_the_fields_of_the_contract_in_their_order(manager, clock):
    clock.at = 1644411494.75
    pid = manager.start_process(steps("m:f", at=1644411500, timeout=7))
    record = manager.get_process_info(pid).to_json()
    assert " ".join(record) == (
        "pid name status created_at started_at finished_at due_at output error step"
        " steps progress attempt crashes retry_left queue priority timeout parent"
        " children series exit_code"
    )
    assert record == {
        **dict.fromkeys(record),
        "pid": pid,
        "status": "queued",
        "created_at": "20220209125814",
        "due_at": "20220209125820",
        "step": "a",
        "steps": {"a": "queued"},
        "attempt": 1,
        "crashes": 0,
        "retry_left": 0,
        "queue": "default",
        "priority": 0,
        "timeout": 7.0,
    }
    assert re.fullmatch("[0-9a-f]{32}", pid)
    done = manager.get_process_info(manager.start_process(steps(), {"x": 1})).to_json()
    assert (done["status"], done["output"], done["exit_code"]) == (
        "finished",
        {"x": 1},
        0,
    )
    assert done["finished_at"] == "20220209125814" and done["steps"] == {}


MODEL_KEYED = [
    ({"key": 5}, TypeError, "key must be a text, not int"),
    ({"key": ""}, ValueError, "key must be 1 to 200 printable characters, not ''"),
    ({"key": MODEL_LONG}, ValueError, "key must be 1 to 200 printable characters"),
    ({"pid": 5}, TypeError, "pid must be a text, not int"),
    ({"pid": "abc"}, ValueError, "pid must be 32 lowercase hex digits, not 'abc'"),
    ({"pid": "0" * 31}, ValueError, "pid must be 32 lowercase hex digits"),
    ({"pid": "0" * 33}, ValueError, "pid must be 32 lowercase hex digits"),
    ({"pid": "A" * 32}, ValueError, "pid must be 32 lowercase hex digits"),
    ({"pid": "0" * 31 + "\n"}, ValueError, "pid must be 32 lowercase hex digits"),
    ({"tz": "UTC"}, ValueError, "tz says nothing without cron"),
    ({"tz": "UTC", "interval": 5}, ValueError, "tz says nothing without cron"),
    ({"interval_from": "end"}, ValueError, "interval_from says nothing without inter"),
    (
        {"interval_from": "start", "cron": "@daily"},
        ValueError,
        "interval_from says nothing without interval",
    ),
]


@pytest.mark.parametrize(
    ("options", "kind", "text"), MODEL_KEYED, ids=range(len(MODEL_KEYED))
)
def test_options_of_one_process_are_strict_too(manager, options, kind, text):
    with pytest.raises(kind) as caught:
        manager.start_process(steps("m:f", **options))
    assert str(caught.value).startswith(text)
    assert isinstance(caught.value, procman.BadSpec) and manager.count() == 0


def test_what_names_one_process_is_no_default(home):
    for name, value in (("key", "k"), ("pid", "0" * 32), ("key", 5)):
        with pytest.raises(procman.BadSpec) as caught:
            ProcessManager(home / "a.db", defaults={name: value})
        assert (
            str(caught.value) == f"{name} names one process: it cannot be a default"
        )
    ProcessManager(home / "a.db", defaults={"key": None, "pid": None, "tz": "UTC"})
    assert not (home / "a.db").exists()


@pytest.mark.parametrize(
    ("defaults", "own", "expected"),
    [
        ({"at": 5}, {"delay": 1.0}, {"at": None, "delay": 1.0}),
        ({"delay": 5}, {"at": 1}, {"at": 1, "delay": None}),
        ({"delay": 5}, {"at": 0}, {"at": 0, "delay": None}),
        ({"interval": 5}, {"cron": "@daily"}, {"interval": None, "cron": "@daily"}),
        ({"cron": "@daily"}, {"interval": 0.0}, {"interval": 0.0, "cron": None}),
        ({"once": True}, {"unique": True}, {"once": False, "unique": True}),
        ({"unique": True}, {"once": True}, {"once": True, "unique": False}),
        ({"once": True}, {"once": False}, {"once": False, "unique": False}),
        ({"once": True}, {"unique": False}, {"once": True, "unique": False}),
        ({"unique": True}, {"once": False}, {"once": False, "unique": True}),
        ({}, {"key": "k"}, {"once": True, "unique": False}),
        ({"unique": True}, {"key": "k"}, {"once": False, "unique": True}),
        ({"tz": "Asia/Tokyo"}, {}, {"tz": "Asia/Tokyo", "cron": None}),
        ({"cron": "@daily"}, {"tz": "UTC"}, {"tz": "UTC", "cron": "@daily"}),
        ({"interval": 5}, {"interval_from": "start"}, {"interval": 5}),
    ],
)
def test_a_default_gives_way_to_an_own_option_that_excludes_it(defaults, own, expected):
    given = {name: option.default for name, option in procman.OPTIONS.items()}
    found = procman.merge_options({**given, **defaults}, own)
    assert {name: found[name] for name in expected} == expected
    assert found.keys() == procman.OPTIONS.keys()


def test_what_a_default_has_been_switched_off_for_cannot_be_told_more(manager):
    other = ProcessManager(manager.path, defaults={"cron": "@daily", "retry": 1})
    with contextlib.closing(other):
        with pytest.raises(procman.BadSpec, match="^tz says nothing without cron"):
            other.start_process(steps("m:f", interval=5, tz="UTC"))
        pid = other.start_process(steps("m:f", tz="UTC"))
        assert other.get_process_info(pid).series == pid


@pytest.mark.parametrize(
    "schedule", [{"interval": -1}, {"interval": 0}, {"cron": "@daily"}]
)
def test_a_process_without_steps_has_no_schedule(manager, schedule):
    text = "^nothing to run again: a process with a schedule needs steps$"
    other = ProcessManager(manager.path, defaults=schedule)
    with contextlib.closing(other):
        for call in (
            lambda: manager.start_process(steps(**schedule)),
            lambda: manager.start_many([steps("m:f"), steps(**schedule)]),
            lambda: other.start_process(steps()),
        ):
            with pytest.raises(procman.BadSpec, match=text):
                call()
    assert manager.count() == 0
    pid = manager.start_process(steps(once=True, key="k"))
    assert manager.get_process_info(pid).series is None


@pytest.mark.parametrize(
    ("filters", "kind", "text"),
    [
        ({"nam": "x"}, TypeError, "unknown filter 'nam'; known: status, name, queue, "),
        ({"limits": 1}, TypeError, "unknown filter 'limits'; known: "),
        ({"status": "done"}, ValueError, "status must be one of open, final, queued, "),
        ({"status": ["open"]}, ValueError, "status must be one of open, final"),
        ({"name": 5}, TypeError, "name must be a text, not int"),
        ({"name": "a\n"}, ValueError, "name must be 1 to 200 printable characters"),
        ({"queue": b"x"}, TypeError, "queue must be a text, not bytes"),
        ({"since": "yesterday"}, ValueError, "since must be epoch seconds, ISO 8601"),
        ({"since": "1.2.3m"}, ValueError, "since must be seconds or a text like"),
        ({"since": [5]}, TypeError, "since must be a time, not list"),
        ({"series": 5}, TypeError, "series must be a text, not int"),
        ({"series": "0" * 32}, LookupError, "no process 000000"),
        ({"parent": "0" * 32}, LookupError, "no process 000000"),
        ({"parent": "x"}, LookupError, "no process 'x': a pid is 32 lowercase hex"),
    ],
    ids=range(14),
)
def test_filters_are_strict_and_name_themselves(manager, filters, kind, text):
    pid = manager.start_process(steps("m:f"))
    for call in (manager.list_processes, manager.count, manager.cancel_all):
        with pytest.raises(kind) as caught:
            call(**filters)
        assert str(caught.value).startswith(text)
        assert isinstance(caught.value, procman.ProcmanError)
        assert manager.count(**dict.fromkeys(filters.keys() & {"name"})) == 1
    assert manager.get_process_status(pid) == "queued"
    with pytest.raises(procman.BadSpec, match="^order must be one of newest, oldest, "):
        manager.list_processes(order="id; DROP TABLE process")


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ([("a", 1)], TypeError, "concurrency must be a JSON object, not list"),
        ({1: 1}, TypeError, "a name in concurrency must be a text, not int"),
        ({"": 1}, ValueError, "a name in concurrency must be 1 to 200 printable"),
        ({"a": 0}, ValueError, "concurrency.'a' must be 1 to "),
        ({"a": "1"}, TypeError, "concurrency.'a' must be a whole number, not str"),
        ({"a": True}, TypeError, "concurrency.'a' must be a whole number, not bool"),
        (dict.fromkeys(map(str, range(101)), 1), ValueError, "concurrency has more "),
    ],
    ids=range(7),
)
def test_limits_of_names_are_strict(given, kind, text):
    with pytest.raises(kind) as caught:
        procman.check_concurrency(given)
    assert str(caught.value).startswith(text)
    assert procman.check_concurrency({"a b": 1}) == {"a b": 1}


# ===========================================================================
# 3. Time
# ===========================================================================

TIME_OF_NOTE = 1644411494.0  # 2022-02-09 12:58:14 UTC


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (TIME_OF_NOTE, TIME_OF_NOTE),
        (1644411494, TIME_OF_NOTE),
        ("1644411494", TIME_OF_NOTE),
        ("1644411494.25", TIME_OF_NOTE + 0.25),
        ("20220209125814", TIME_OF_NOTE),
        (" 20220209125814\n", TIME_OF_NOTE),
        ("2022-02-09T12:58:14Z", TIME_OF_NOTE),
        ("2022-02-09 12:58:14z", TIME_OF_NOTE),
        ("2022-02-09T13:58:14+01:00", TIME_OF_NOTE),
        ("2022-02-09T07:28:14.500-05:30", TIME_OF_NOTE + 0.5),
        ("2022-02-09T12:58Z", TIME_OF_NOTE - 14),
        (0, 0.0),
        ("99991231235959", 253402300799.0),
    ],
)
def test_a_moment_is_read_from_each_of_its_forms(given, expected):
    assert procman.parse_at(given) == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("2022-02-09T12:58:14", "at has no time zone: "),
        ("2022-02-09", "at "),
        ("20220229000000", "at must be epoch seconds, ISO 8601 with a zone or 14 dig"),
        ("20220209126000", "at must be epoch seconds"),
        ("20220209", "at looks like a date of 8 digits, 20220209: write all 14, "),
        ("202202091258", "at looks like a date of 12 digits, 202202091258: write "),
        ("2022-02-30T00:00:00Z", "at must be epoch seconds"),
        ("", "at must be epoch seconds"),
        ("-1", "at must be epoch seconds"),
        ("nan", "at must be epoch seconds"),
        ("9" * 400, "at must "),
        ("x" * 10_000, "at must be epoch seconds"),
        (-1, "at must lie between 1970 and 9999, not -1"),
        (253402300800, "at must lie between 1970 and 9999"),
        (float("nan"), "at must lie between 1970 and 9999, not nan"),
        (float("inf"), "at must lie between 1970 and 9999"),
        (10**400, "at must lie between 1970 and 9999"),
        (True, "at must be a time, not bool"),
        ([], "at must be a time, not list"),
    ],
    ids=range(19),
)
def test_what_is_no_moment_is_refused(given, text):
    with pytest.raises(procman.BadSpec) as caught:
        procman.parse_at(given)
    assert str(caught.value).startswith(text)
    assert len(str(caught.value)) < 200


def test_the_advice_for_a_moment_without_a_zone_is_one_that_is_taken():
    for given in ("2022-02-09T12:58:14", "2022-02-09 12:58", "2022-02-09"):
        with pytest.raises(procman.BadSpec) as caught:
            procman.parse_at(given)
        advice = re.search("write (.*) or (.*)", str(caught.value))
        for form in advice.groups():
            assert procman.parse_at(form) > 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (5, 5),
        (0, 0),
        (0.25, 0.25),
        ("5", 5),
        ("2.5", 2.5),
        ("90s", 90),
        ("5m", 300),
        ("1.5h", 5400),
        (" 2d ", 172800),
        ("1w", 604800),
        ("0s", 0),
    ],
)
def test_a_length_is_read_from_each_of_its_forms(given, expected):
    found = procman.seconds(given, "delay")
    assert found == expected and isinstance(found, float)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "m",
        "5 m",
        "5M",
        "5y",
        "-5m",
        "1h30m",
        "nan",
        "inf",
        "1e11",
        "99999999w",
        "-1",
    ]
    + ["5m\n5m", "0x10", "x" * 9999, -0.5, 1e999, float("nan"), 10**11, 10**400]
    + [None, True, [5], {}, b"5m"],
    ids=range(25),
)
def test_what_is_no_length_is_refused(given):
    with pytest.raises(procman.BadSpec, match="^delay must be ") as caught:
        procman.seconds(given, "delay")
    is_type = not isinstance(given, (str, int, float)) or given is True
    assert isinstance(caught.value, TypeError) == is_type
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("attempt", "interval", "backoff", "expected"),
    [
        (1, 300, 1, 300),
        (7, 300, 1, 300),
        (1, 300, 2, 300),
        (2, 300, 2, 600),
        (5, 300, 2, 4800),
        (3, 0.5, 1.5, 1.125),
        (9999, 0, 2.0, 0),
        (10, 300, 2, 86400),
        (10**6, 300, 1000.0, 86400),
        (1, 7 * 86400, 1, 7 * 86400),
        (9999, 7 * 86400, 2.0, 7 * 86400),
    ],
)
def test_the_delay_of_a_retry_grows_to_a_day_or_to_what_was_asked_for(
    attempt, interval, backoff, expected
):
    assert procman.retry_delay(attempt, interval, backoff, 0.0) == expected
    late = procman.retry_delay(attempt, interval, backoff, 1.0)
    assert expected <= late <= max(interval, min(86400, 1.1 * expected))
    assert late == expected or backoff > 1


@pytest.mark.parametrize(
    ("ending", "last", "retry_left", "event"),
    [
        ("done", False, 0, "step"),
        ("done", True, 0, "finish"),
        ("done", True, 5, "finish"),
        ("interrupt", False, 0, "interrupt"),
        ("interrupt", True, 3, "interrupt"),
        ("error", False, 0, "fail"),
        ("error", True, 1, "retry"),
        ("error", True, -1, "retry"),
        ("timeout", False, 0, "time_out"),
        ("timeout", False, 2, "retry"),
        ("timeout", True, -1, "retry"),
        ("cancelled", True, 2, "cancel"),
        ("stopped", True, 2, "give_back"),
    ],
)
def test_what_an_ending_causes(ending, last, retry_left, event):
    assert procman.event_after(ending, last=last, retry_left=retry_left) == event


def test_a_process_runs_no_sooner_than_it_is_due(manager, clock):
    start = clock.at
    later = manager.start_process(steps("steps:add_one", delay="1h"))
    moment = manager.start_process(steps("steps:add_one", at=start + 7200))
    past = manager.start_process(steps("steps:add_one", at=0))
    assert [
        manager.get_process_info(pid).due_at - start for pid in (later, moment)
    ] == [
        3600,
        7200,
    ]
    assert drain(manager) == 1 and manager.get_process_status(past) == "finished"
    clock.at = start + 3599.9
    assert drain(manager) == 0
    clock.at = start + 3600
    assert drain(manager) == 1 and manager.get_process_status(later) == "finished"
    assert manager.get_process_status(moment) == "queued"
    clock.advance(86400)
    assert drain(manager) == 1
    info = manager.get_process_info(moment)
    assert (info.status, info.attempt) == ("finished", 1)
    assert info.started_at == info.finished_at == start + 3600 + 86400


def test_a_failing_process_is_retried_after_growing_intervals_until_none_is_left(
    manager, clock, home
):
    ledger = home / "ledger"
    pid = manager.start_process(
        steps("steps:ledger", "steps:fail", retry=2, retry_interval="5m", backoff=3),
        {"ledger": str(ledger)},
    )
    assert drain(manager) == 1
    for attempt, interval in ((2, 300), (3, 900)):
        info = manager.get_process_info(pid)
        assert (info.status, info.attempt) == ("queued", attempt)
        assert info.retry_left == 3 - attempt
        assert interval <= info.due_at - clock.at <= 1.1 * interval
        assert (info.error["type"], info.error["step"]) == ("ValueError", "b")
        assert info.steps == {"a": "finished", "b": "queued"} and info.exit_code is None
        clock.advance(interval - 1)
        assert drain(manager) == 0
        clock.advance(1 + interval / 10)
        assert drain(manager) == 1
    info = manager.get_process_info(pid)
    assert (info.status, info.attempt, info.retry_left) == ("error", 3, 0)
    assert info.finished_at == clock.at and info.exit_code == 1
    assert drain(manager) == 0
    assert read_ledger(ledger) == [f"{pid}.a.0"], "only the failed step ran again"


def test_waits_for_a_lock_are_short_and_uneven_at_first_and_longer_in_a_crowd():
    for tries, chance, expected in (
        (0, 0, 0.0001),
        (0, 1, 0.0003),
        (5, 0.5, 0.00151875),
        (10**9, 0, 0.004),
        (10**9, 1, 0.012),
    ):
        assert procman.lock_delay(tries, chance) == pytest.approx(expected)


def test_a_waiter_looks_again_after_a_sixteenth_of_its_wait():
    for waited, expected in ((0, 0.0001), (0.016, 0.001), (0.8, 0.05), (1e9, 0.05)):
        assert procman.poll_delay(waited) == pytest.approx(expected)


def at_utc(text):
    return procman.parse_at(text + "Z")


def due_times(count, expression, after, tz=None):
    """The next due times as ISO 8601 in UTC, to the minute."""
    found = [at_utc(after)]
    while len(found) <= count:
        found.append(procman.next_cron(expression, found[-1], tz))
    return [time.strftime("%Y-%m-%dT%H:%M", time.gmtime(at)) for at in found[1:]]


def has_zone_data():
    import importlib.util
    import zoneinfo

    return importlib.util.find_spec("tzdata") is not None or any(
        Path(place, "Europe", "Berlin").exists() for place in zoneinfo.TZPATH
    )


zoned = pytest.mark.skipif(
    not has_zone_data(), reason="no zone data: neither of the system nor from tzdata"
)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("61 * * * *", "cron: minute must be 0 to 59, not '61'"),
        ("* 24 * * *", "cron: hour must be 0 to 23, not '24'"),
        ("* * 0 * *", "cron: day-of-month must be 1 to 31, not '0'"),
        ("* * * 13 *", "cron: month must be 1 to 12 or JAN to DEC, not '13'"),
        ("* * * * 8", "cron: day-of-week must be 0 to 7 or SUN to SAT, not '8'"),
        ("* * * MON *", "cron: month must be 1 to 12 or JAN to DEC, not 'MON'"),
        ("JAN * * * *", "cron: minute must be 0 to 59, not 'JAN'"),
        ("007 * * * *", "cron: minute must be 0 to 59, not '007'"),
        ("\u0663 * * * *", "cron: minute must be *, 5, 1-5, "),
        ("1,,2 * * * *", "cron: minute must be *, 5, 1-5, */2, 1-5/2 or a list of "),
        ("-5 * * * *", "cron: minute must be *, "),
        ("1- * * * *", "cron: minute must be *, "),
        ("*-5 * * * *", "cron: minute must be *, "),
        ("1-5/ * * * *", "cron: minute must be *, "),
        ("\0 * * * *", "cron: minute must be *, "),
        ("\ud800 * * * *", "cron: minute must be *, "),
        ("* * L * *", "cron: day-of-month must be 1 to 31, not 'L'"),
        ("* * 15W * *", "cron: day-of-month must be 1 to 31, not '15W'"),
        ("* * ? * *", "cron: day-of-month must be *, "),
        ("* * * * 5#2", "cron: day-of-week must be *, "),
        ("*/0 * * * *", "cron: a step of minute must be 1 to 60, not '0'"),
        ("*/61 * * * *", "cron: a step of minute must be 1 to 60, not '61'"),
        ("* * * * */8", "cron: a step of day-of-week must be 1 to 7, not '8'"),
        ("5/15 * * * *", "cron: minute '5/15' has no range: write 5-59/15"),
        ("* * * JAN/3 *", "cron: month 'JAN/3' has no range: write JAN-12/3"),
        ("50-10 * * * *", "cron: minute '50-10' runs backwards: write 50-59,0-10"),
        ("* * * * SAT-2", "cron: day-of-week 'SAT-2' runs backwards: write SAT-7,0-2"),
        ("", "cron must have five fields (minute hour day-of-month month day-of-week)"),
        ("* * * *", "cron must have five fields (minute hour day-of-month month day"),
        ("* * * * * *", "cron must have five fields (minute hour day-of-month month"),
        ("@reboot", "cron: '@reboot' is no time: have the system start procman"),
        ("@often", "cron must be one of @yearly @annually @monthly @weekly @daily "),
        ("@daily *", "cron must be one of @yearly "),
        ("* " * 10**7, "cron must be at most 1000 characters long"),
        ("9" * 990 + " * * * *", "cron: minute must be 0 to 59, not '999"),
        ("*/" + "9" * 990 + " * * * *", "cron: a step of minute must be 1 to 60"),
        (5, "cron must be a text, not int"),
        (None, "cron must be a text, not NoneType"),
        (b"* * * * *", "cron must be a text, not bytes"),
    ],
    ids=range(39),
)
def test_what_is_no_cron_expression_is_refused_with_its_field_and_what_is_allowed(
    expression, text
):
    with pytest.raises(procman.BadSpec) as caught:
        procman.next_cron(expression, TIME_OF_NOTE)
    assert str(caught.value).startswith(text)
    assert len(str(caught.value)) < 200 and str(caught.value).isprintable()
    assert isinstance(caught.value, TypeError) != isinstance(expression, str)
    advice = re.search(": write (.+)", str(caught.value))
    if advice:
        texts = ["*" if item == "*" else advice[1] for item in expression.split()]
        assert procman.next_cron(" ".join(texts), TIME_OF_NOTE) > TIME_OF_NOTE


@pytest.mark.parametrize("after", [-1, float("nan"), float("inf"), 4e10, True, "1"])
def test_the_moment_after_which_cron_is_due_must_be_one(after):
    with pytest.raises(procman.BadSpec, match="^after must be "):
        procman.next_cron("* * * * *", after)


@pytest.mark.parametrize(
    ("expression", "same"),
    [
        ("  0\t9-17 \n * * MON-FRI ", "0 9,10,11,12,13,14,15,16,17 * * 1,2,3,4,5"),
        ("0 0 * jan,Mar,DEC sUn", "0 0 * 1,3,12 0"),
        ("0 0 * * 7", "0 0 * * 0"),
        ("0 0 * * fri-sun", "0 0 * * 0,5,6"),
        ("0 0 * * FRI-0", "0 0 * * 0,5,6"),
        ("0 0 * * SUN-TUE", "0 0 * * 0,1,2"),
        ("0 0 * * SUN-SUN", "0 0 * * 0"),
        ("0 0 * * 0-7", "0 0 * * *"),
        ("0 0 * * 1-7/3", "0 0 * * 0,1,4"),
        ("*/15 * * * *", "0,15,30,45 * * * *"),
        ("5-59/15 * * * *", "5,20,35,50 * * * *"),
        ("3-3/2 * * * *", "3 * * * *"),
        ("1-9/4,40,7-8 05 * * *", "1,5,7,8,9,40 5 * * *"),
        ("*/60 */24 */31 */12 *", "0 0 1 1 *"),
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
        ("@monthly", "0 0 1 * *"),
        ("@weekly", "0 0 * * SUN"),
        ("@daily", "0 0 * * *"),
        (" @midnight\n", "0 0 * * *"),
        ("@hourly", "0 * * * *"),
    ],
)
def test_names_ranges_lists_and_steps_of_cron_say_what_numbers_would(expression, same):
    found = due_times(60, expression, "2024-02-27T12:00")
    assert found == due_times(60, same, "2024-02-27T12:00")


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        ("* * * * *", "2024-02-28T23:59", "2024-02-29T00:00"),
        ("* * * * *", "2024-02-28T23:59:59.999", "2024-02-29T00:00"),
        ("0 0 * * *", "2024-02-29T00:00", "2024-03-01T00:00"),
        ("0 0 29 2 *", "2024-02-29T00:00", "2028-02-29T00:00"),
        ("0 0 29 2 */7", "2088-02-29T00:00", "2128-02-29T00:00"),
        ("59 23 31 12 *", "2024-12-31T23:59", "2025-12-31T23:59"),
        # 2024-03-13 is a Wednesday.  Either matches, if neither begins with a star:
        ("0 0 20 * FRI", "2024-03-13T00:00", "2024-03-15T00:00"),
        ("0 0 14 * FRI", "2024-03-13T00:00", "2024-03-14T00:00"),
        ("0 0 14 * 0-7", "2024-03-14T00:00", "2024-03-15T00:00"),
        ("0 0 14,* * FRI", "2024-03-15T00:00", "2024-03-16T00:00"),
        # ... else both:
        ("0 0 * * FRI", "2024-03-13T00:00", "2024-03-15T00:00"),
        ("0 0 13 * *", "2024-03-13T00:00", "2024-04-13T00:00"),
        ("0 0 */2 * SAT", "2024-03-13T00:00", "2024-03-23T00:00"),
        ("0 0 20 * */5", "2024-03-13T00:00", "2024-09-20T00:00"),
        ("0 0 *,14 * FRI", "2024-03-15T00:00", "2024-03-22T00:00"),
    ],
)
def test_when_cron_is_due(expression, after, expected):
    assert due_times(1, expression, after) == [expected]


def test_cron_is_due_later_than_the_given_moment_if_only_by_a_quarter_microsecond():
    due = TIME_OF_NOTE - 14
    just_before = due - 2.5e-7
    assert just_before < due
    assert procman.next_cron("* * * * *", just_before) == due
    assert procman.next_cron("* * * * *", due) == due + 60
    assert procman.next_cron("* * * * *", due + 2.5e-7) == due + 60


@pytest.mark.parametrize(
    "expression",
    ["0 0 31 2 *", "0 0 30,31 2 */2", "* * 31 2,4,6,9,11 *", "0 0 30-31 FEB *"],
)
def test_cron_that_can_never_be_due_is_refused_at_once(expression):
    start = time.perf_counter()
    with pytest.raises(procman.BadSpec) as caught:
        procman.next_cron(expression, TIME_OF_NOTE)
    assert str(caught.value) == f"cron: '{expression}' is never due"
    with contextlib.suppress(procman.BadSpec):
        procman.next_cron("0 0 29 2 *", TIME_OF_NOTE)
    assert time.perf_counter() - start < 0.05


@zoned
@pytest.mark.parametrize(
    ("tz", "expression", "after", "expected"),
    [
        # 02:00 became 03:00 at 01:00 UTC:
        ("Europe/Berlin", "30 2 * * *", "2024-03-30T12:00", "31T01:00 01T00:30"),
        ("Europe/Berlin", "*/20 2 * * *", "2024-03-30T12:00", "31T01:00 01T00:00"),
        ("Europe/Berlin", "0 2,3 * * *", "2024-03-30T12:00", "31T01:00 01T00:00"),
        ("Europe/Berlin", "5 * * * *", "2024-03-31T00:05", "31T01:00 31T01:05"),
        # 03:00 became 02:00 at 01:00 UTC:
        ("Europe/Berlin", "30 2 * * *", "2024-10-26T12:00", "27T00:30 28T01:30"),
        ("Europe/Berlin", "30 * * * *", "2024-10-27T00:00", "27T00:30 27T02:30"),
        ("Europe/Berlin", "30 * * * *", "2024-10-27T01:10", "27T02:30 27T03:30"),
        ("Europe/Berlin", "0 3 * * *", "2024-10-27T01:10", "27T02:00 28T02:00"),
        ("America/New_York", "30 2 * * *", "2024-03-10T00:00", "10T07:00 11T06:30"),
        ("America/New_York", "30 1 * * *", "2024-11-03T00:00", "03T05:30 04T06:30"),
        # 02:00 became 02:30 at 15:30 UTC, and 02:00 became 01:30 at 15:00 UTC:
        ("Australia/Lord_Howe", "15 2 * * *", "2024-10-05T00:00", "05T15:30 06T15:15"),
        ("Australia/Lord_Howe", "45 1 * * *", "2024-04-06T00:00", "06T14:45 07T15:15"),
        # The day after the 29th was the 31st, from 10:00 UTC on:
        ("Pacific/Apia", "0 9 30 12 *", "2011-12-01T00:00", "30T10:00 29T19:00"),
        ("Pacific/Apia", "0 0,9 * * *", "2011-12-29T20:00", "30T10:00 30T19:00"),
        ("Asia/Kolkata", "0 0 * * *", "2024-01-01T00:00", "01T18:30 02T18:30"),
    ],
)
def test_cron_keeps_the_time_of_the_wall_when_clocks_change(
    tz, expression, after, expected
):
    found = due_times(2, expression, after, tz)
    assert " ".join(at[-8:] for at in found) == expected


def wall_minutes(tz, start, days):
    """(epoch seconds, local time) of each minute, with no thought of folds or gaps."""
    import datetime
    import zoneinfo

    zone = zoneinfo.ZoneInfo(tz)
    for at in range(int(start), int(start + days * 86400), 60):
        shown = datetime.datetime.fromtimestamp(at, zone).replace(tzinfo=None)
        yield at, shown


@zoned
@pytest.mark.parametrize(
    ("tz", "after"),
    [
        ("Europe/Berlin", "2024-03-30T00:00"),
        ("Europe/Berlin", "2024-10-26T00:00"),
        ("America/New_York", "2024-11-02T00:00"),
        ("Australia/Lord_Howe", "2024-04-06T00:00"),
        ("Australia/Lord_Howe", "2024-10-05T00:00"),
        ("Pacific/Apia", "2011-12-28T12:00"),
        ("Africa/Casablanca", "2024-04-13T00:00"),
        ("America/Caracas", "2016-04-30T12:00"),
        ("Asia/Pyongyang", "2018-05-04T00:00"),
    ],
)
def test_cron_is_due_at_the_first_moment_at_which_a_clock_shows_or_leaps_over_it(
    tz, after
):
    import datetime

    minute, expected = datetime.timedelta(minutes=1), {}
    for at, shown in wall_minutes(tz, at_utc(after), 3):
        latest = max(expected, default=shown - minute)
        while latest < shown:
            latest += minute
            expected[latest] = at
    for step, hours in ((7, range(24)), (20, range(1, 4)), (60, (0,))):
        moments = sorted(
            {
                at
                for shown, at in expected.items()
                if shown.minute % step == 0 and shown.hour in hours
            }
        )
        expression = f"*/{step} {','.join(map(str, hours))} * * *"
        found = [at_utc(after) - 1]
        for _ in moments:
            found.append(procman.next_cron(expression, found[-1], tz))
        assert found[1:] == moments, expression


@pytest.mark.parametrize(
    "tz",
    ["/etc/localtime", "../zoneinfo/Europe/Berlin", "Europe/../UTC", "Europe/"]
    + ["Europe", "tzdata.zi", "leapseconds", "zone.tab", "Europe/Berlin/x", "No/Where"]
    + ["", " UTC", "x" * 5000, "Europe/Berlin\0", "a\nb", "\ud800", ".", "C:\\x"]
    + [5, b"UTC", []],
    ids=range(21),
)
def test_what_is_no_time_zone_is_refused(tz):
    with pytest.raises(procman.BadSpec) as caught:
        procman.next_cron("* * * * *", TIME_OF_NOTE, tz)
    text = str(caught.value)
    assert len(text) < 200 and text.isprintable()
    if not isinstance(tz, str):
        kind = type(tz).__name__
        assert isinstance(caught.value, procman.BadType)
        assert text == f"tz must be a text, not {kind}"
    elif tz.isprintable() and 0 < len(tz) < 200:
        advice = "install the package tzdata, or check the name"
        assert text == f"tz: no data for the time zone {tz!r}: {advice}"
    else:
        assert text.startswith("tz must be 1 to 200 printable characters, not ")


def test_utc_needs_no_zone_data_and_another_zone_says_how_to_get_it(home):
    code = f"""
import importlib.util, sys
assert importlib.util.find_spec("tzdata") is None
sys.path.insert(0, {str(HERE)!r})
import procman
print(procman.next_cron("0 13 * * *", {TIME_OF_NOTE}))
print(procman.next_cron("0 13 * * *", {TIME_OF_NOTE}, "UTC"))
print("zoneinfo" in sys.modules)
try:
    procman.next_cron("0 13 * * *", {TIME_OF_NOTE}, "Europe/Berlin")
except procman.BadSpec as error:
    print(error)
"""
    child = subprocess.run(
        [sys.executable, "-S", "-c", code],  # -S: no tzdata from site-packages
        env={**os.environ, "PYTHONTZPATH": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    assert child.stdout.decode().splitlines() == [
        str(TIME_OF_NOTE + 106),
        str(TIME_OF_NOTE + 106),
        "False",
        "tz: no data for the time zone 'Europe/Berlin': install the package tzdata,"
        " or check the name",
    ]


def random_field(chance, low, high, names=()):
    """One field in any form but a step from a single value, which we refuse."""
    parts = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        first, last = sorted(chance.sample(range(low, high + 1), 2))
        step = chance.randint(1, (high - low + 1) // 2)
        words = [str(first), str(last)]
        if names and last - low < len(names) and chance.random() < 0.5:
            words = [names[first - low], names[last - low]]
        forms = ("*", "*/{2}", "{0}", "{0}-{1}", "{0}-{1}/{2}", "{0}")
        parts.append(chance.choice(forms).format(*words, step))
    return ",".join(parts)


def random_cron(chance):
    weekdays = ["SUN", "mon", "Tue", "WED", "THU", "fri", "SAT"]
    months = ["JAN", "feb", "Mar", "APR", "MAY", "jun", "JUL", "AUG", "sep", "OCT"]
    months += ["NOV", "dec"]
    fields = [
        random_field(chance, 0, 59),
        random_field(chance, 0, 23),
        random_field(chance, 1, 31) if chance.random() < 0.7 else "*",
        random_field(chance, 1, 12, months) if chance.random() < 0.5 else "*",
        random_field(chance, 0, 7, weekdays) if chance.random() < 0.7 else "*",
    ]
    return chance.choice((" ", "\t", "  ")).join(fields)


def test_the_next_thousand_due_times_of_cron_are_those_of_an_established_library():
    import datetime

    from cronsim import CronSim

    chance = random.Random(20240229)
    for _ in range(40):
        expression = random_cron(chance)
        at = chance.uniform(0, 4e9)
        start = datetime.datetime.fromtimestamp(at, datetime.timezone.utc)
        peer = CronSim(expression, start)
        for _ in range(1000):
            at = procman.next_cron(expression, at)
            assert at == next(peer).timestamp(), (expression, start)


TIME_NOON = 1710331200.0  # 2024-03-13 12:00 UTC, a Wednesday


def options_of(**given):
    """All options, and a function that gives one of them."""
    found = {name: option.default for name, option in procman.OPTIONS.items()}
    found.update(given)
    return found


@pytest.mark.parametrize(
    ("options", "due", "counted"),
    [
        ({}, 0, True),
        ({"delay": 60.0}, 60, True),
        ({"delay": 0.0}, 0, True),
        ({"at": TIME_NOON + 100}, 100, False),
        ({"at": TIME_NOON - 100}, -100, False),
        ({"at": "2024-03-13T13:00:00+00:00"}, 3600, False),
        ({"at": 0}, -TIME_NOON, False),
        ({"interval": 60.0}, 0, True),
        ({"interval": 60.0, "delay": 5.0}, 5, True),
        ({"cron": "0 13 * * *"}, 3600, True),
        # Strictly after now, but at the moment that was asked for, too:
        ({"cron": "0 12 * * *"}, 86400, True),
        ({"cron": "0 12 * * *", "delay": 0.0}, 0, True),
        ({"cron": "0 12 * * *", "at": TIME_NOON}, 0, False),
        ({"cron": "0 12 * * *", "at": TIME_NOON + 1}, 86400, False),
        ({"cron": "*/10 * * * *", "delay": 61.0}, 600, True),
        ({"cron": "*/10 * * * *", "delay": 600.0}, 600, True),
        # What was asked for lies in the past: from now on.
        ({"cron": "*/10 * * * *", "at": TIME_NOON - 601}, 0, False),
        ({"cron": "30 12 * * *", "at": 0}, 1800, False),
    ],
)
def test_when_a_new_process_is_due(options, due, counted):
    given = options_of(**options)
    found, counted_from = procman.first_due(given, TIME_NOON)
    assert found - TIME_NOON == due
    assert counted_from == (TIME_NOON if counted else None)


@zoned
def test_a_new_process_with_cron_is_due_in_its_own_time_zone():
    given = options_of(cron="0 8 * * *", tz="Asia/Tokyo")
    assert procman.first_due(given, TIME_NOON)[0] == TIME_NOON + 11 * 3600


@pytest.mark.parametrize(
    ("options", "now", "started", "due"),
    [
        # From the end, and from the start of the run that has ended at 0:
        ({"interval": 60.0}, 0, -10, 60),
        ({"interval": 60.0}, 0, -1000, 60),
        ({"interval": 60.0, "interval_from": "start"}, 0, -10, 50),
        ({"interval": 60.0, "interval_from": "start"}, 0, -60, 0),
        # What was missed is made up for once:
        ({"interval": 60.0, "interval_from": "start"}, 0, -1000, 0),
        # At once, but no more often than each 50 ms:
        ({"interval": -1.0}, 0, -10, 0),
        ({"interval": -1.0}, 0, 0, 0.05),
        ({"interval": -1.0}, 0, -0.03125, 0.01875),
        ({"interval": -1.0, "interval_from": "start"}, 0, 0, 0.05),
        ({"interval": 0.0}, 0, 0, 0.05),
        ({"interval": 0.0}, 0, -1, 0),
        ({"interval": 0.015625}, 0, 0, 0.05),
        ({"interval": 0.015625}, 0, -1, 0.015625),
        # The clock was set back while it ran:
        ({"interval": 60.0}, 0, 86400, 60),
        ({"interval": 60.0, "interval_from": "start"}, 0, 86400, 60),
        ({"interval": -1.0}, 0, 86400, 0.05),
        ({"interval": 1e9, "interval_from": "start"}, 0, 3e8, 1e9),
        ({"cron": "*/10 * * * *"}, 1, 0, 600),
        ({"cron": "*/10 * * * *"}, 599, 0, 600),
        ({"cron": "*/10 * * * *"}, 600, 0, 1200),
        ({"cron": "*/10 * * * *"}, 1, -86400, 600),
        # ... by less than three hours, which makes no second run:
        ({"cron": "*/10 * * * *"}, -1, 0.25, 600),
        ({"cron": "*/10 * * * *"}, -59, 0.25, 600),
        ({"cron": "* * * * *"}, -30, 0.25, 60),
        ({"cron": "*/10 * * * *"}, -10799, 0.25, 600),
        ({"cron": "*/10 * * * *"}, -10801, 0.25, -10800),
        ({"cron": "*/10 * * * *"}, -86401, 0.25, -86400),
    ],
)
def test_when_the_next_run_of_a_series_is_due(options, now, started, due):
    option = options_of(**options).get
    at = TIME_NOON + now
    found = procman.successor_due(option, at, TIME_NOON + started)
    assert found - TIME_NOON == pytest.approx(due, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "started", "counted_from", "due", "expected"),
    [
        ({}, None, 86400, 86400, 0),
        ({"delay": 60.0}, None, 86400, 86460, 60),
        ({"retry": 5}, 86000, 86400, 86700, 300),
        ({"delay": 60.0}, None, 86400, 86399, 0),  # a proceeded one, at the front
        ({"cron": "*/10 * * * *"}, None, 86400, 87000, 600),
        ({"cron": "*/10 * * * *"}, None, 2, 600, 600),
        ({"cron": "*/10 * * * *"}, None, 6002, 6600, 6600),
        ({"cron": "*/10 * * * *"}, None, 10 * 365 * 86400, 10 * 365 * 86400 + 9, 600),
        ({"cron": "*/10 * * * *", "retry": 5}, 86000, 86400, 86431, 31),
    ],
)
def test_what_was_counted_by_a_clock_that_was_set_back_is_counted_anew(
    options, started, counted_from, due, expected
):
    row = {
        "started_at": None if started is None else TIME_NOON + started,
        "due_from": TIME_NOON + counted_from,
        "due_at": TIME_NOON + due,
    }
    option = options_of(**options).get
    assert procman.counted_anew(option, row, TIME_NOON) == TIME_NOON + expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("5m", TIME_NOON - 300),
        (" 1.5h ", TIME_NOON - 5400),
        ("0s", TIME_NOON),
        ("2w", TIME_NOON - 14 * 86400),
        (TIME_OF_NOTE, TIME_OF_NOTE),
        ("1644411494", TIME_OF_NOTE),
        ("20220209125814", TIME_OF_NOTE),
        ("2022-02-09T13:58:14+01:00", TIME_OF_NOTE),
        (5, 5.0),
    ],
)
def test_since_is_a_moment_or_so_long_ago(given, expected):
    assert procman.parse_since(given, TIME_NOON) == expected


@pytest.mark.parametrize(
    "given", ["", "m", "-5m", "5 m", "5y", "1.2.3m", ".m", "9" * 99 + "w", True, [], -1]
)
def test_what_is_neither_is_refused(given):
    with pytest.raises(procman.BadSpec, match="^since ") as caught:
        procman.parse_since(given, TIME_NOON)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (42.4, "42 s"),
        (119, "119 s"),
        (120, "2 min"),
        (3599, "60 min"),
        (7199, "120 min"),
        (7200, "2.0 h"),
        (12600, "3.5 h"),
        (172799, "48.0 h"),
        (172800, "2.0 days"),
        (86400 * 365, "365.0 days"),
    ],
)
def test_a_length_in_words(length, words):
    assert procman.in_words(length) == words


def test_what_is_retried_together_does_not_come_again_together():
    delays = {procman.retry_delay(2, 100, 2.0, n / 10) for n in range(11)}
    assert len(delays) == 11 and 200 <= min(delays) <= max(delays) <= 220.1
    assert {procman.retry_delay(5, 100, 1.0, n / 10) for n in range(11)} == {100}


# ===========================================================================
# 4. Platform
# ===========================================================================

PLATFORM_HOLDER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import procman
print(procman.LockFile(sys.argv[2]).acquire() and os.getpid(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def platform_python(code, *words):
    """A Python child that has printed its first line; killed at the end."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(HERE), *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        child.first = child.stdout.readline().strip()
        yield child
    finally:
        child.kill()
        child.communicate()


def platform_main(capsys, *words):
    """A command in this process: (exit code, standard output, standard error)."""
    capsys.readouterr()
    code = procman.main(list(map(str, words)))
    return Result(code, *capsys.readouterr())


def test_a_lock_keeps_others_out_until_its_holder_is_killed(home):
    path = home / "some.lock"
    own = procman.LockFile(str(path))
    with platform_python(PLATFORM_HOLDER, path) as holder:
        assert holder.first == b"%d" % holder.pid or WINDOWS
        assert holder.first != b"False"
        assert not own.acquire() and not procman.LockFile(str(path)).acquire()
        with platform_python(PLATFORM_HOLDER, path) as second:
            assert second.first == b"False"
        holder.kill()
        holder.wait()
        eventually(own.acquire)
    with platform_python(PLATFORM_HOLDER, path) as third:
        assert third.first == b"False", "what a kill freed can be held again"
    own.release(remove=True)
    assert not path.exists()


@posix
def test_a_lock_is_not_inherited_by_what_its_holder_starts(home):
    own = procman.LockFile(str(home / "some.lock"))
    assert own.acquire()
    with platform_python("print(1, flush=True); import sys; sys.stdin.read()"):
        own.release()
        assert procman.LockFile(own.path).acquire()


PLATFORM_KINDS = {
    "symlink": "is a symbolic link",
    "dangling": "is a symbolic link",
    "hard link": "has a second name (a hard link)",
    "fifo": "is not a regular file",
    "directory": "is not a regular file",
    "writable": "may be written by others (mode 602; chmod go-w helps)",
    "group writable": "may be written by others (mode 620; chmod go-w helps)",
    "foreign": "belongs to another user (uid 12345)",
}


def platform_lay(kind, path, target):
    """Put something that is not to be trusted at `path`."""
    if kind == "symlink":
        path.symlink_to(target)
    elif kind == "dangling":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "hard link":
        os.link(target, path)
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir(0o700)
    else:
        path.write_bytes(b"" if path.suffix else target.read_bytes())
        path.chmod({"writable": 0o602, "group writable": 0o620}.get(kind, 0o600))
        if kind == "foreign":
            if os.geteuid():
                pytest.skip("only root can give a file to another user")
            os.chown(path, 12345, -1)


def platform_look(home):
    """All that lies there: names, kinds, owners, links, contents."""
    found = {}
    for path in sorted(home.rglob("*")):
        seen = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(seen.st_mode) else None
        found[path] = (seen.st_mode, seen.st_uid, seen.st_nlink, seen.st_size, content)
    return found


@posix
@pytest.mark.parametrize("kind", PLATFORM_KINDS)
def test_a_database_that_is_not_to_be_trusted_is_refused_untouched(home, capsys, kind):
    with contextlib.closing(ProcessManager(home / "target")) as manager:
        pid = manager.start_process(steps("steps:shout"))
    platform_lay(kind, home / "database", home / "target")
    before = platform_look(home)
    for command in (["start", "--", "true"], ["list"], ["cancel", pid], ["runner"]):
        result = platform_main(
            capsys, *command[:1], "--db", home / "database", *command[1:]
        )
        if command == ["runner"] and result.code == 5:
            with contextlib.suppress(FileNotFoundError):
                (home / "database.run").rmdir()
        assert result == (
            5,
            "",
            f"procman: the database {home}/database {PLATFORM_KINDS[kind]}: refused\n",
        )
        assert platform_look(home) == before


@posix
@pytest.mark.parametrize("kind", PLATFORM_KINDS)
def test_a_lock_that_is_not_to_be_trusted_is_refused_untouched(home, capsys, kind):
    (home / "target").write_text("content")
    with contextlib.closing(ProcessManager(home / "a.db")) as manager:
        pid = manager.start_process(steps("steps:shout"))
        (home / "a.db.run").mkdir(0o700)
        platform_lay(kind, home / "a.db.lock", home / "target")
        lock = (home / "a.db.lock").lstat()
        result = platform_main(
            capsys, "runner", "--wait", "--max-jobs", 1, "--db", "a.db"
        )
        assert result.code == 5 and result.err.count("\n") == 1
        assert f"{home}/a.db.lock" in result.err and PLATFORM_KINDS[kind] in result.err
        assert manager.get_process_status(pid) == "queued"
    found = (home / "a.db.lock").lstat()
    assert (found.st_mode, found.st_uid, found.st_size) == (
        lock.st_mode,
        lock.st_uid,
        lock.st_size,
    )
    assert (home / "target").read_text() == "content"
    assert not (home / "nowhere").exists()


@posix
@pytest.mark.parametrize("name", ["", ".run", ".run is a link", "-wal", "-shm"])
def test_a_runner_refuses_places_that_others_may_write(home, capsys, name):
    with contextlib.closing(ProcessManager(home / "a.db")) as manager:
        pid = manager.start_process(steps("steps:shout"))
    (home / "elsewhere").mkdir(0o700)
    if name == "":
        home.chmod(0o777)
    elif name == ".run":
        (home / "a.db.run").mkdir(0o700)
        (home / "a.db.run").chmod(0o770)
    elif name == ".run is a link":
        (home / "a.db.run").symlink_to("elsewhere")
    else:
        (home / f"a.db{name}").symlink_to("elsewhere")
    result = platform_main(capsys, "runner", "--db", "a.db")
    assert result.code == 5 and result.err.count("\n") == 1, result
    assert "may be written by others" in result.err or "symbolic link" in result.err
    assert not list((home / "elsewhere").iterdir())
    home.chmod(0o700)
    if name[:1] != "-":
        with contextlib.closing(ProcessManager(home / "a.db")) as manager:
            assert manager.get_process_status(pid) == "queued"


@posix
def test_files_are_private_even_with_an_umask_of_zero(home):
    before = os.umask(0)
    try:
        with contextlib.closing(ProcessManager(home / "a.db")) as manager:
            manager.start_process(steps("steps:hang"), {"ledger": str(home / "ledger")})
            with running(manager):
                eventually(lambda: read_ledger(home / "ledger"))
                found = {
                    str(path.relative_to(home)): stat.S_IMODE(path.stat().st_mode)
                    for path in home.rglob("a.db*")
                }
                for path in (home / "a.db.run").iterdir():
                    if path.is_file():
                        found[path.suffix] = stat.S_IMODE(path.stat().st_mode)
    finally:
        os.umask(before)
    assert found == {
        **dict.fromkeys(("a.db", "a.db-wal", "a.db-shm", "a.db.lock"), 0o600),
        "a.db.run": 0o700,
        **dict.fromkeys((".lock", ".log"), 0o600),
    }


PLATFORM_FAMILY = """
import os, subprocess, sys, time
import procman

GRANDCHILD = '''
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
import procman
procman.LockFile(sys.argv[2]).acquire()
open(sys.argv[3], "w").close()
time.sleep(600)
'''

CHILD = '''
import subprocess, sys
own = {} if sys.platform == "win32" else {"start_new_session": True}
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], **own)
'''

def family(data):
    here = os.path.dirname(procman.__file__)
    subprocess.run(
        [sys.executable, "-c", CHILD, GRANDCHILD, here, "alive.lock", "up"], check=True
    )
    time.sleep(600 if data["hangs"] else 0)
    while not os.path.exists("up"):
        time.sleep(0.01)
"""


@pytest.mark.parametrize("end", ["cancel", "finish"])
def test_grandchildren_that_left_their_session_die_with_the_process(manager, home, end):
    (home / "more.py").write_text(PLATFORM_FAMILY)
    pid = manager.start_process(steps("more:family"), {"hangs": end == "cancel"})
    alive = procman.LockFile(str(home / "alive.lock"))
    with running(manager, "--grace", "0.2"):
        eventually((home / "up").exists)
        if end == "cancel":
            assert not alive.acquire(), "it lives"
            manager.cancel(pid)
            with pytest.raises(procman.ProcessCancelled):
                manager.wait(pid, 20)
        else:
            assert manager.wait(pid, 20).status == "finished"
        eventually(alive.acquire, 5)
    alive.release()


PLATFORM_SLEEPER = "print(flush=True); import sys; sys.stdin.read()"


@posix
def test_an_os_pid_used_again_is_not_killed_nor_is_any_bystander(monkeypatch):
    with contextlib.ExitStack() as stack:
        stray, innocent = (
            stack.enter_context(platform_python(PLATFORM_SLEEPER)) for _ in range(2)
        )
        kill, hit = os.kill, []

        def guarded(os_pid, number):
            hit.append(os_pid)
            if os_pid in (stray.pid, innocent.pid):
                kill(os_pid, number)

        # A stray kill must fail this test and not end the machine that runs it.
        monkeypatch.setattr(os, "kill", guarded)
        monkeypatch.setattr(os, "killpg", guarded)
        born = procman.start_time(innocent.pid)
        assert born and born == procman.start_time(innocent.pid)
        procman.kill_stray(innocent.pid, "another time", "no-such-token")
        procman.kill_stray(innocent.pid, "", "")
        stray.kill()
        stray.wait()
        assert procman.start_time(stray.pid) == ""
        procman.kill_stray(stray.pid, born, "no-such-token")
        procman.kill_stray(stray.pid, "", "")
        assert set(hit) <= {stray.pid}
        assert innocent.poll() is None
        procman.kill_stray(innocent.pid, born, "no-such-token")
        assert innocent.wait(20) == -signal.SIGKILL
        assert set(hit) <= {stray.pid, innocent.pid}


@pytest.mark.parametrize("boot", ["this", "another"])
def test_a_dead_runner_is_a_crash_of_what_it_held_and_a_reboot_is_not(manager, boot):
    store, this = manager.store, boot == "this"
    pid = manager.start_process(steps("steps:add_one"))
    number = store.add_runner(
        "dead", procman.boot_id() if this else "another", ["default"], None
    )
    with store.transaction() as db:
        assert [held.pid for held in store.claim_due(db, number, demand(9))] == [
            pid
        ]
    with platform_python(PLATFORM_SLEEPER) as stray:
        born = procman.start_time(stray.pid)
        store.add_worker(number, stray.pid, born, "dead-1")
        assert drain(manager) == 1
        info = manager.get_process_info(pid)
        assert (info.status, info.attempt, info.crashes) == ("finished", 1, int(this))
        if this and not WINDOWS:
            assert stray.wait(20) == -signal.SIGKILL
        else:
            assert stray.poll() is None, "after a reboot no number means anything"
    assert store.runners() == []


# ===========================================================================
# 5. Store
# ===========================================================================


def store_filled(path, count=1):
    """A closed database with some finished processes; their pids."""
    with contextlib.closing(ProcessManager(path)) as manager:
        return manager.start_many((steps(), {"x": "x" * 500}) for _ in range(count))


def store_damage(path, kind):
    """Make a file that is no sound database of ours."""
    if kind == "text":
        path.write_text("some text\n" * 500)
    elif kind == "a word":
        path.write_text("hello")
    elif kind.startswith("foreign"):
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute(f"PRAGMA journal_mode = {'WAL' if 'WAL' in kind else 'DELETE'}")
            if kind != "foreign without tables":
                db.execute("CREATE TABLE process (pid TEXT)")
            db.execute("PRAGMA application_id = 7")
            db.execute("PRAGMA user_version = 1")
            db.commit()
    else:
        store_filled(path, 300)
        content = bytearray(path.read_bytes())
        if kind == "newer schema":
            content[60:64] = (99).to_bytes(4, "big")
        elif kind == "no header":
            content[:16] = b"\0" * 16
        elif kind == "overwritten":
            content[4096:] = os.urandom(len(content) - 4096)
        elif kind == "cut":
            del content[8192:]
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("text", "is not a procman database"),
        ("a word", "is not a procman database"),
        ("foreign", "belongs to another program"),
        ("foreign WAL", "belongs to another program"),
        ("foreign without tables", "belongs to another program"),
        ("newer schema", "has schema 99, newer than this procman"),
        ("no header", "is not a procman database"),
        ("overwritten", "is damaged: stop all runners, keep a copy, and salvage"),
        ("cut", "is damaged: stop all runners, keep a copy, and salvage"),
    ],
)
def test_a_file_that_is_no_sound_database_of_ours_is_refused_untouched(
    home, capsys, kind, text
):
    path = home / "a.db"
    store_damage(path, kind)
    before, names = path.read_bytes(), set(os.listdir(home))
    for words in (["start", "--", "true"], ["list"], ["cancel", "0" * 32], ["runner"]):
        code, out, err = platform_main(capsys, words[0], "--db", path, *words[1:])
        assert code == 5 and out == "" and err.count("\n") == 1, (words, out, err)
        assert err.startswith(f"procman: the database {path} {text}")
        assert path.read_bytes() == before
    assert set(os.listdir(home)) - names <= {"a.db.run"}


STORE_KILLED = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[2], isolation_level=None)
db.execute("PRAGMA journal_mode = WAL")
db.execute("PRAGMA wal_autocheckpoint = 0")
if sys.argv[3] == "foreign":
    db.execute("CREATE TABLE a (b)")
else:
    db.execute("PRAGMA user_version = 99")
print(flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["foreign", "newer schema"])
def test_a_refused_database_keeps_what_its_killed_program_left(home, capsys, kind):
    path = home / "a.db"
    if kind != "foreign":
        store_filled(path)
    with platform_python(STORE_KILLED, path, kind) as child:
        child.wait()
    before = [Path(f"{path}{end}").read_bytes() for end in ("", "-wal")]
    assert before[1]
    for words in (["start", "--", "true"], ["list"]):
        assert platform_main(capsys, words[0], "--db", path, *words[1:]).code == 5
        assert [Path(f"{path}{end}").read_bytes() for end in ("", "-wal")] == before


def test_an_empty_file_is_made_a_database_and_a_missing_one_only_by_start(home, capsys):
    path = home / "a.db"
    for words in (["list"], ["status", "0" * 32], ["cancel", "0" * 32]):
        code, out, err = platform_main(capsys, words[0], "--db", path, *words[1:])
        assert (code, out) == (3, "") and not path.exists()
        assert err == f"procman: there is no database {path} yet: `start` makes it\n"
    path.touch(0o600)
    code, out, err = platform_main(capsys, "start", "--db", path, "--", "true")
    assert (code, err) == (0, "")
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA application_id").fetchone() != (0,)
        assert db.execute("PRAGMA user_version").fetchone() != (0,)
    for words in (["list", "--db", path], ["--db", path, "list"]):
        assert platform_main(capsys, *words).out.count(out.strip()) == 1
    path = home / "no" / "a.db"
    code, out, err = platform_main(capsys, "start", "--db", path, "--", "true")
    assert (code, out) == (5, "") and not path.parent.exists()
    assert err == f"procman: there is no directory {home / 'no'}: create it first\n"


def test_processes_that_make_the_database_at_once_all_get_in(home):
    children = [spawn("start", "--db", "a.db", "--", "true") for _ in range(4)]
    found = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0] * 4, found
    with contextlib.closing(ProcessManager(home / "a.db")) as manager:
        listed = {info.pid for info in manager.list_processes()}
        assert listed == {out.decode().strip() for out, _ in found}
        assert manager.store.trouble() is None


@pytest.mark.skipif(WINDOWS, reason="an open file cannot be deleted or replaced there")
@pytest.mark.parametrize("fate", ["deleted", "replaced"])
def test_a_deleted_or_replaced_database_is_noticed_before_anything_is_promised(
    manager, home, fate
):
    pid = manager.start_process(steps("steps:Ask", "steps:add_one"))
    assert drain(manager) == 1
    own = sqlite3.connect(manager.path, isolation_level=None)
    own.execute("BEGIN IMMEDIATE")
    if fate == "replaced":
        store_filled(home / "other.db")
        os.replace(home / "other.db", manager.path)
    else:
        os.remove(manager.path)
    for call in (
        lambda: manager.start_process(steps("steps:add_one"), connection=own),
        lambda: own.rollback() or manager.start_process(steps("steps:add_one")),
        lambda: manager.proceed(pid),
        lambda: manager.cancel(pid),
    ):
        with pytest.raises(procman.StorageError, match=f"procman.db was {fate}"):
            call()
    own.close()
    manager.close()
    again = manager.start_process(steps("steps:add_one"))
    assert again in [info.pid for info in manager.list_processes()]


def test_a_database_locked_by_another_program_is_given_up_after_the_limit(
    manager, home
):
    pid = manager.start_process(steps("steps:add_one"))
    source = PROCMAN.read_text(encoding="utf-8")
    short = source.replace("BUSY_SECONDS = 10.0", "BUSY_SECONDS = 0.5")
    assert short != source
    (home / "copy.py").write_text(short, encoding="utf-8")
    with contextlib.closing(
        sqlite3.connect(manager.path, isolation_level=None)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        for words in (["start", "--", "true"], ["cancel", pid]):
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "copy.py", "--db", manager.path, *words],
                capture_output=True,
                check=False,
                timeout=60,
            )
            assert 0.5 <= time.monotonic() - began < 8
            text = f"procman: the database {manager.path} is locked by another program"
            assert done.returncode == 5 and done.stdout == b""
            assert done.stderr.decode().startswith(text)
            assert done.stderr.count(b"\n") == 1
        assert manager.get_process_status(pid) == "queued", "reading does not wait"
        other.execute("ROLLBACK")
    assert manager.count() == 1
    manager.cancel(pid)


def test_a_short_lock_of_another_program_is_waited_out(manager):
    manager.count()
    with contextlib.closing(
        sqlite3.connect(manager.path, isolation_level=None, check_same_thread=False)
    ) as other:
        other.execute("BEGIN EXCLUSIVE")
        released = threading.Timer(0.3, other.execute, ["ROLLBACK"])
        released.start()
        try:
            pid = manager.start_process(steps("steps:add_one"))
        finally:
            released.join()
    assert manager.get_process_status(pid) == "queued"


def test_a_full_disk_is_the_error_shown_and_nothing_is_half_written(manager):
    manager.start_process(steps("steps:Ask"))
    assert drain(manager) == 1
    db = manager.store.db
    db.execute(
        f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}"
    )
    big = {"x": "x" * 500_000}
    waits = manager.list_processes()[0]
    for call in (
        lambda: manager.start_many([steps("m:f"), (steps("m:f"), big), steps("m:f")]),
        lambda: manager.proceed(waits.pid, big),
    ):
        with pytest.raises(procman.StorageError) as caught:
            call()
        text = f"the database {manager.path} cannot be written: disk full"
        assert str(caught.value) == text and caught.value.exit_code == 5
        assert manager.list_processes() == [waits]
    db.execute("PRAGMA max_page_count = 100000")
    pid = manager.start_process(steps(), big)
    assert manager.get_process_info(pid).output == big
    assert manager.store.trouble() is None


@posix
def test_a_limit_of_the_system_on_files_stops_a_start_cleanly(manager):
    import resource

    pid = manager.start_process(steps("steps:add_one"))
    result = cli(
        *("start", "--db", manager.path, "--data", "-", "--", "true"),
        stdin=b'{"x": "%s"}' % (b"x" * 1_000_000),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2),
    )
    assert (result.code, result.out, result.err.count("\n")) == (5, "", 1), result
    assert result.err.startswith(f"procman: the database {manager.path} cannot be ")
    assert [info.pid for info in manager.list_processes()] == [pid]
    assert manager.store.trouble() is None
    manager.start_process(steps("steps:add_one"))


def store_without_privilege():
    """In a child of root on Linux, before exec: modes of files bind it, too."""
    import ctypes

    if ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
        os._exit(99)


@pytest.mark.skipif(WINDOWS, reason="Wine, run by root, writes to read-only files")
def test_a_read_only_database_is_shown_and_not_written(home):
    store_filled(home / "a.db")
    root = os.geteuid() == 0
    if root and not sys.platform.startswith("linux"):
        pytest.skip("only Linux can take root's privilege to write everywhere away")
    given = {"preexec_fn": store_without_privilege} if root else {}
    os.chmod(home / "a.db", 0o400)
    os.chmod(home, 0o500)
    try:
        before = (home / "a.db").read_bytes()
        started = cli("start", "--db", "a.db", "--", "true", **given)
        listed = cli("list", "--db", "a.db", **given)
        ran = cli("runner", "--db", "a.db", **given)
        assert (home / "a.db").read_bytes() == before
    finally:
        os.chmod(home, 0o700)
        os.chmod(home / "a.db", 0o600)
    for result in (started, ran):
        assert (result.code, result.out, result.err.count("\n")) == (5, "", 1), result
        assert re.search("read-only|cannot be opened|Permission denied", result.err)
    assert listed.code in (0, 5) and listed.err.count("\n") == (listed.code == 5), (
        listed
    )
    with contextlib.closing(ProcessManager(home / "a.db")) as manager:
        assert manager.count() == 1
        manager.start_process(steps())


def store_in_fork(call):
    """What `call` returns or raises in a forked child, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            word = str(call())
        except BaseException as error:
            word = repr(error)
        os.write(writing, word.encode())
        os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as file:
            os.set_blocking(file.fileno(), False)
            return eventually(file.read, 10).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@posix
def test_a_forked_child_and_its_parent_both_go_on(manager):
    before = manager.start_process(steps("steps:add_one"))
    of_child = store_in_fork(lambda: manager.start_process(steps("steps:add_one")))
    own = manager.start_process(steps("steps:add_one"))
    assert [info.pid for info in manager.list_processes()] == [own, of_child, before]
    other = sqlite3.connect(manager.path, timeout=0)
    with contextlib.closing(other), manager.store.transaction() as db:
        store_in_fork(lambda: manager.close() or manager.count())
        db.execute("UPDATE process SET priority = 5")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    assert {info.priority for info in manager.list_processes()} == {5}
    assert manager.store.trouble() is None


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_while_a_thread_writes_does_not_hang(manager):
    manager.count()
    inside, leave = threading.Event(), threading.Event()

    def write():
        with manager.store.transaction():
            inside.set()
            leave.wait(20)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert inside.wait(20)
        counted = store_in_fork(manager.count)
    finally:
        leave.set()
        writer.join()
    assert counted == "0"


def test_threads_may_share_a_manager(manager):
    pids, errors = [], []

    def work():
        try:
            for _ in range(5):
                pid = manager.start_process(steps("steps:add_one"))
                pids.extend(manager.start_many([steps("steps:add_one")] * 3) + [pid])
                assert manager.get_process_status(pid) == "queued"
                manager.cancel(pid)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(pids)) == 120 == manager.count()
    assert manager.count(status="cancelled") == 30


@pytest.mark.parametrize("status", procman.FINAL_STATES)
def test_a_final_row_never_changes_even_by_sql(manager, status):
    pid = manager.start_process(steps("steps:add_one"))
    with contextlib.closing(sqlite3.connect(manager.path)) as db:
        sql = "UPDATE process SET status = ?, finished_at = 1 WHERE pid = ?"
        db.execute(sql, (status, pid))
        db.commit()
        before = manager.get_process_info(pid)
        for change in (
            "status = 'queued'",
            "claim = claim + 1",
            "error = NULL",
            "id = 9",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="final"):
                db.execute(f"UPDATE process SET {change}")
    for call in (manager.proceed, *([manager.cancel] if status != "cancelled" else [])):
        with pytest.raises(procman.WrongState):
            call(pid)
    assert drain(manager) == 0
    assert manager.get_process_info(pid) == before and before.status == status


def test_claims_come_by_priority_then_time_then_order_of_submission(manager, clock):
    given = [(0, 5), (0, 5), (5, 3), (-1, 1), (0, 2), (5, 3), (5, 1), (9, 11), (0, 0)]
    pids = manager.start_many(
        steps("m:f", priority=priority, delay=delay, queue="ab"[delay % 2])
        for priority, delay in given
    )
    clock.advance(10)
    due = [number for number, (_, delay) in enumerate(given) if delay <= 10]
    wanted = sorted(
        due, key=lambda number: (-given[number][0], given[number][1], number)
    )
    store, runner = manager.store, manager.store.add_runner("one", "", ["a", "b"], None)
    claimed = []
    for limit in (1, 4, 99):
        with store.transaction() as db:
            claimed += store.claim_due(db, runner, demand(limit, "a", "b"))
    assert [pids.index(held.pid) for held in claimed] == wanted
    assert manager.count(status="running") == 8


def test_claims_of_several_connections_never_overlap(manager, clock):
    pids = manager.start_many([steps("m:f", priority=n % 3) for n in range(200)])
    claimed, errors = {}, []

    def claim(number):
        store = procman.Store(manager.path, now=clock)
        try:
            runner = store.add_runner(str(number), "", ["default"], None)
            mine = claimed[number] = []
            while True:
                with store.transaction() as db:
                    found = store.claim_due(db, runner, demand(7))
                if not found:
                    return
                mine.extend(found)
        except BaseException as error:
            errors.append(error)
        finally:
            store.close()

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(held.pid for mine in claimed.values() for held in mine) == sorted(
        pids
    )
    places = {pid: (-(number % 3), number) for number, pid in enumerate(pids)}
    for mine in claimed.values():
        order = [places[held.pid] for held in mine]
        assert order == sorted(order)


def test_who_has_lost_its_claim_writes_nothing_any_more(manager):
    pid = manager.start_process(steps("m:f", "m:f"), {"x": 1})
    store = manager.store
    first, second = (store.add_runner(name, "", ["default"], None) for name in "ab")
    with store.transaction() as db:
        [lost] = store.claim_due(db, first, demand(1))
    store.recover(first, charged=True)
    with store.transaction() as db:
        [held] = store.claim_due(db, second, demand(1))
    assert held.claim > lost.claim
    before = manager.get_process_info(pid)
    for ending in ("done", "interrupt", "error", "timeout", "stopped", "cancelled"):
        outcome = procman.Outcome(
            ending, '{"x":2}', {"type": "E"}, procman.Printed(b"printed")
        )
        with store.transaction() as db:
            [entry] = store.record(db, [(lost, outcome)])
            assert (entry.event, entry.following) == ("lost", None)
            store.record_progress(db, lost, {"done": 1, "total": 2, "message": None})
        assert manager.get_process_info(pid) == before
        assert manager.logs(pid) == ""
    with store.transaction() as db:
        outcome = procman.Outcome("done", '{"x":3}')
        [(_, _, event, following)] = store.record(db, [(held, outcome)])
    assert (event, following.data, following.step_index) == ("step", '{"x":3}', 1)


def test_a_wait_for_many_says_how_many_are_open_and_looks_no_further_than_needed(
    manager,
):
    pids = manager.start_many([steps("steps:add_one")] * 1200)
    left = manager.start_process(steps("steps:add_one", delay="1h"))
    assert drain(manager) == 1200
    going = manager.start_many([steps("steps:add_one", delay="1h")] * 60)
    cancel = threading.Timer(0.3, lambda: [manager.cancel(pid) for pid in going])
    cancel.start()
    stay = manager.start_many([steps("steps:add_one", delay="1h")] * 60)
    with pytest.raises(procman.WaitTimeout, match="60 of 120 still open") as raised:
        manager.wait_all([*stay, *going], 3)
    cancel.join()
    assert stay[0] in str(raised.value)
    assert len(manager.wait_any([left, *pids], 5)) == 1200
    assert len(manager.wait_all(pids[:3] * 2, 5)) == 6
    for wait in (manager.wait_all, manager.wait_any):
        assert wait([]) == []
        with pytest.raises(procman.NotFound, match="f" * 32):
            wait([*pids, "f" * 32], 5)


def test_of_results_that_are_recorded_together_each_gets_what_is_its_own(manager):
    pids = manager.start_many([steps("m:f")] * 4 + [steps("m:f", "m:f")] * 2)
    store = manager.store
    first, second = (store.add_runner(name, "", ["default"], None) for name in "ab")
    with store.transaction() as db:
        held = store.claim_due(db, first, demand(6))
    manager.cancel(pids[1])  # in the middle of those that finish
    row = store.find(pids[2])
    with store.transaction() as db:  # somebody else has it now
        move = procman.Move(row["id"], {"runner": None}, row["claim"])
        assert store.transition(db, "give_back", move)
        assert [taken.pid for taken in store.claim_due(db, second, demand(9))] == [
            pids[2]
        ]
    results = [
        (one, procman.Outcome("done", f'{{"n":{number}}}', printed=printed))
        for number, (one, printed) in enumerate(
            zip(held, [None, procman.Printed(b"b"), procman.Printed(b"c")] + [None] * 3)
        )
    ]
    with store.transaction() as db:
        settled = {entry.held.pid: entry for entry in store.record(db, results)}
    events = [settled[pid].event for pid in pids]
    assert events == ["finish", "cancel", "lost", "finish", "step", "step"]
    assert [settled[pid].following.data for pid in pids[4:]] == ['{"n":4}', '{"n":5}']
    infos = [manager.get_process_info(pid) for pid in pids]
    states = [info.status for info in infos]
    assert states == ["finished", "cancelled", "running", "finished"] + ["running"] * 2
    outputs = [info.output for info in infos]
    assert outputs == [{"n": 0}, None, None, {"n": 3}, None, None]
    assert [manager.logs(pid) for pid in pids] == ["", "b", "", "", "", ""]
    kinds = [row[0] for row in store.read("SELECT kind FROM event ORDER BY number")]
    assert kinds[-5:] == ["finish", "finish", "cancel", "step", "step"]


@pytest.mark.parametrize("ending", ["done", "interrupt", "error", "timeout", "stopped"])
def test_an_acknowledged_cancel_wins_however_the_running_step_ends(manager, ending):
    pid = manager.start_process(steps("m:f", retry=5))
    store = manager.store
    runner = store.add_runner("one", "", ["default"], None)
    with store.transaction() as db:
        [held] = store.claim_due(db, runner, demand(1))
    assert manager.cancel(pid) == pid and manager.get_process_status(pid) == "running"
    assert store.cancels_wanted(runner) == {pid}
    with store.transaction() as db:
        outcome = procman.Outcome(
            ending, '{"x":2}', {"type": "E"}, procman.Printed(b"printed")
        )
        [entry] = store.record(db, [(held, outcome)])
        assert (entry.event, entry.following) == ("cancel", None)
    info = manager.get_process_info(pid)
    assert (info.status, info.output, info.exit_code) == ("cancelled", None, 1)
    assert info.finished_at == store.now() and manager.logs(pid) == "printed"


def test_what_is_acknowledged_is_written_through_to_the_disk(manager):
    for _ in range(2):
        manager.start_process(steps("steps:add_one"))
        assert drain(manager) == 1
        for call in (lambda: manager.start_process(steps("m:f")), manager.close):
            with manager.store.transaction() as db:
                assert db.execute("PRAGMA synchronous").fetchone()[0] == 2, "FULL"
                assert db.execute("PRAGMA foreign_keys").fetchone()[0] == 1
            call()
        manager.cancel(manager.list_processes()[0].pid)


def test_a_pid_may_be_cut_to_a_unique_prefix(manager, capsys):
    pids = manager.start_many([steps("m:f")] * 3)
    names = ["abcdef" + "0" * 26, "abcdef1" + "0" * 25, "fedcba" + "f" * 26]
    with manager.store.transaction() as db:
        for pid, name in zip(pids, names):
            db.execute("UPDATE process SET pid = ? WHERE pid = ?", (name, pid))
    for prefix, name in [
        ("fedcba", names[2]),
        ("abcdef0", names[0]),
        ("abcdef1", names[1]),
        (names[0], names[0]),
    ]:
        assert manager.get_process_info(prefix).pid == name
        assert manager.cancel(prefix) == name
    for wrong, text in [
        ("abcdef", "abcdef is the beginning of several pids: write more of it"),
        ("fedcb", "no process 'fedcb': a pid is 32 lowercase hex digits"),
        ("fedcbb", "no process fedcbb in "),
        ("FEDCBA", "no process 'FEDCBA'"),
        ("fedcb_", "no process 'fedcb_'"),
        ("fedcb%", "no process 'fedcb%'"),
        ("", "no process ''"),
        ("0" * 33, "no process '0000"),
        ("/etc/passwd", "no process '/etc/passwd'"),
        ("fedcba\n", "no process 'fedcba\\n'"),
        ("a" * 10_000_000, "no process 'aaa"),
    ]:
        with pytest.raises(procman.NotFound) as caught:
            manager.get_process_status(wrong)
        assert str(caught.value).startswith(text) and len(str(caught.value)) < 200
    with pytest.raises(TypeError, match="a pid must be a text, not bytes"):
        manager.cancel(b"fedcba")


def test_lists_and_counts_are_filtered_and_paged(manager):
    options = [
        {"name": "n" if n % 2 else None, "queue": "ab"[n // 3]} for n in range(6)
    ]
    pids = manager.start_many(steps("m:f", **given) for given in options)
    done = manager.start_process(steps(name="n"))
    manager.cancel(pids[5])
    everything = [done, *reversed(pids)]
    for given, wanted in [
        ({}, everything),
        ({"status": "open"}, pids[4::-1]),
        ({"status": "queued"}, pids[4::-1]),
        ({"status": "final"}, [done, pids[5]]),
        ({"status": "cancelled"}, [pids[5]]),
        ({"status": "finished"}, [done]),
        ({"status": "running"}, []),
        ({"name": "n"}, [done, pids[5], pids[3], pids[1]]),
        ({"name": "%"}, []),
        ({"queue": "b"}, pids[:2:-1]),
        ({"queue": "a", "name": "n", "status": "open"}, [pids[1]]),
    ]:
        assert [info.pid for info in manager.list_processes(**given)] == wanted, given
        assert manager.count(**given) == len(wanted), given
    for limit, offset in [(2, 0), (2, 2), (3, 5), (0, 0), (50, 99)]:
        found = manager.list_processes(limit=limit, offset=offset)
        assert [info.pid for info in found] == everything[offset : offset + limit]
    for given in ({"limit": -1}, {"offset": -1}, {"limit": "5"}, {"status": "x' OR 1"}):
        with pytest.raises(procman.BadSpec):
            manager.list_processes(**given)
    manager.start_many([steps("m:f")] * 60)
    assert len(manager.list_processes()) == 50 and manager.count() == 67


def store_events(manager):
    return manager.store.read("SELECT number, process, kind FROM event ORDER BY number")


def test_prune_deletes_what_ended_long_ago_and_keeps_what_is_open(manager, clock):
    old_open = manager.start_process(steps("m:f", delay="9d"))
    old = manager.start_many([(steps(), {"x": 1})] * 3)
    ended_late = manager.start_process(steps("m:g"))
    clock.advance(3600)
    manager.cancel(ended_late)
    young = manager.start_process(steps())
    assert manager.prune("61m") == 0 and manager.prune(3600) == 3
    left = [young, ended_late, old_open]
    assert [info.pid for info in manager.list_processes()] == left
    for pid in old:
        with pytest.raises(procman.NotFound):
            manager.get_process_info(pid)
    rows = manager.store.read("SELECT count(*) FROM data")
    assert rows[0][0] == 3
    assert manager.prune(0) == 2 and manager.prune(0) == 0
    assert [info.pid for info in manager.list_processes()] == [old_open]
    assert manager.store.read("SELECT count(*) FROM definition")[0][0] == 1
    clock.advance(9 * 86400)
    assert manager.prune(0) == 0 and manager.count(status="queued") == 1


def test_numbers_of_events_and_their_processes_are_never_used_again(manager):
    gone = manager.start_process(steps())
    highest = store_events(manager)[-1]["number"]
    assert manager.prune(0) == 1
    pid = manager.start_process(steps("m:f"))
    with pytest.raises(procman.NotFound):
        manager.get_process_info(gone)
    number = manager.store.find(pid)["id"]
    events = [row for row in store_events(manager) if row["process"] == number]
    assert [row["kind"] for row in events] == ["start"], "none of the one that is gone"
    assert events[0]["number"] > highest


def test_the_write_ahead_log_stays_bounded_while_a_manager_stays_open(manager):
    data = {"x": "x" * 100_000}
    for _ in range(200):
        manager.start_process(steps(), data)
        log = os.stat(manager.path + "-wal").st_size
        assert log < 12 << 20
    assert manager.count() == 200 and os.stat(manager.path).st_size > 10 << 20


@pytest.mark.parametrize("factory", [None, sqlite3.Row, "dict"])
def test_a_start_joins_the_transaction_of_its_caller(manager, factory):
    manager.count()
    with contextlib.closing(sqlite3.connect(manager.path)) as own:
        own.row_factory = factory
        if factory == "dict":
            own.row_factory = lambda cursor, row: {
                column[0]: value for column, value in zip(cursor.description, row)
            }
        own.execute("CREATE TABLE mine (pid TEXT)")
        for end, count in ((own.rollback, 0), (own.commit, 2)):
            own.execute("INSERT INTO mine VALUES ('x')")
            pids = [
                manager.start_process(process, {"n": 1}, connection=own)
                for process in (steps("steps:double", "steps:add_one"), steps())
            ]
            assert own.in_transaction and manager.count() == 0, "not before the commit"
            end()
            assert manager.count() == count
        with pytest.raises(procman.ProcmanError, match="no open transaction: BEGIN"):
            manager.start_process(steps("m:f"), connection=own)
        own.execute("UPDATE mine SET pid = 'y'")
        with pytest.raises(TypeError, match="^data.x is a set"):
            manager.start_process(steps("m:f"), {"x": {1}}, connection=own)
        own.commit()
    assert manager.count() == 2
    if factory is None:
        assert drain(manager) == 1
        assert manager.get_process_info(pids[0]).output == {"n": 3}
    assert manager.get_process_info(pids[1]).output == {"n": 1}


def test_a_start_does_not_join_a_connection_to_another_database(manager, home):
    manager.count()
    store_filled(home / "other.db")
    for path in (home / "other.db", ":memory:"):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as own:
            own.execute("BEGIN IMMEDIATE")
            with pytest.raises(procman.StorageError, match="is not to .*procman.db"):
                manager.start_process(steps("m:f"), connection=own)
            own.execute("ROLLBACK")
    fresh, own = ProcessManager(home / "new.db"), sqlite3.connect(home / "new.db")
    with contextlib.closing(fresh), contextlib.closing(own):
        own.execute("CREATE TABLE mine (pid TEXT)")
        own.execute("INSERT INTO mine VALUES (1)")
        with pytest.raises(procman.ProcmanError):
            fresh.start_process(steps("m:f"), connection=own)


STORE_VERSION_1 = '''
CREATE TABLE definition (
    id   INTEGER PRIMARY KEY AUTOINCREMENT,
    hash INTEGER NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX definition_hash ON definition (hash);
CREATE TABLE process (
    id          INTEGER PRIMARY KEY,
    pid         TEXT NOT NULL UNIQUE,
    definition  INTEGER NOT NULL REFERENCES definition,
    status      TEXT NOT NULL,
    queue       TEXT NOT NULL,
    priority    INTEGER NOT NULL,
    due_at      REAL NOT NULL,
    created_at  REAL NOT NULL,
    started_at  REAL,
    finished_at REAL,
    step_index  INTEGER NOT NULL DEFAULT 0,
    attempt     INTEGER NOT NULL DEFAULT 1,
    crashes     INTEGER NOT NULL DEFAULT 0,
    claim       INTEGER NOT NULL DEFAULT 0,
    runner      INTEGER,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    name        TEXT,
    progress    TEXT,
    error       TEXT
);
CREATE INDEX process_due ON process (priority, queue, due_at, id)
 WHERE status = 'queued';
CREATE INDEX process_rest ON process (status)
 WHERE status = 'running' OR status = 'interrupted' OR status = 'waiting'
    OR status = 'error' OR status = 'timeout' OR status = 'cancelled';
CREATE INDEX process_definition ON process (definition);
CREATE TRIGGER process_final BEFORE UPDATE ON process
  WHEN OLD.finished_at IS NOT NULL
 BEGIN SELECT RAISE(ABORT, 'a final process never changes'); END;
CREATE TABLE data (
    process    INTEGER NOT NULL,
    step_index INTEGER NOT NULL,
    data       TEXT NOT NULL,
    PRIMARY KEY (process, step_index)
) WITHOUT ROWID;
CREATE TABLE output (
    process INTEGER PRIMARY KEY,
    head    BLOB NOT NULL,
    cut     INTEGER NOT NULL,
    tail    BLOB NOT NULL
);
CREATE TABLE event (
    number  INTEGER PRIMARY KEY,
    process INTEGER NOT NULL,
    at      REAL NOT NULL,
    kind    TEXT NOT NULL,
    detail  TEXT
);
CREATE INDEX event_process ON event (process);
CREATE TABLE runner (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    token      TEXT NOT NULL,
    os_pid     INTEGER NOT NULL,
    boot       TEXT NOT NULL,
    started_at REAL NOT NULL,
    queues     TEXT NOT NULL,
    waits      INTEGER NOT NULL,
    port       INTEGER
);
CREATE TABLE worker (
    runner INTEGER NOT NULL REFERENCES runner ON DELETE CASCADE,
    os_pid INTEGER NOT NULL,
    born   TEXT NOT NULL,
    token  TEXT NOT NULL
);
PRAGMA application_id = 1886547310;
PRAGMA user_version = 1;
INSERT INTO definition VALUES
    (1, 11, '{"steps":{"a":"steps:add_one","b":"steps:double"},"options":{},'
        || '"directory":"HOME"}'),
    (2, 22, '{"steps":{"a":"steps:Ask"},"options":{"retry":3},"directory":"HOME"}');
INSERT INTO process (id, pid, definition, status, queue, priority, due_at, created_at,
                     started_at, finished_at, step_index, attempt, runner, claim, name)
VALUES (1, '11111111111111111111111111111111', 1, 'queued', 'default', 0, 5, 5,
        NULL, NULL, 0, 1, NULL, 0, 'n'),
       (2, '22222222222222222222222222222222', 1, 'queued', 'default', 7, 6, 5,
        6, NULL, 1, 2, NULL, 1, NULL),
       (3, '33333333333333333333333333333333', 1, 'finished', 'default', 0, 5, 5,
        6, 7, 2, 1, NULL, 1, NULL),
       (4, '44444444444444444444444444444444', 2, 'interrupted', 'default', 0, 5, 5,
        6, NULL, 1, 1, NULL, 1, NULL),
       (5, '55555555555555555555555555555555', 2, 'error', 'default', 0, 5, 5,
        6, 7, 0, 4, NULL, 4, NULL),
       (6, '66666666666666666666666666666666', 1, 'running', 'default', 0, 5, 5,
        6, NULL, 1, 1, 9, 1, NULL);
INSERT INTO data VALUES (1, 0, '{"n":1}'), (2, 0, '{"n":1}'), (2, 1, '{"n":20}'),
    (3, 0, '{}'), (3, 1, '{"n":1}'), (3, 2, '{"n":2}'), (4, 0, '{}'),
    (4, 1, '{"question":"go on?"}'), (5, 0, '{"x":1}'), (6, 0, '{}'), (6, 1, '{"n":5}');
INSERT INTO output VALUES (3, CAST('printed' AS BLOB), 0, CAST('' AS BLOB));
INSERT INTO event (process, at, kind, detail) VALUES (1, 5, 'start', NULL),
    (2, 5, 'start', NULL), (2, 6, 'claim', NULL), (2, 6, 'step', 'a'),
    (2, 6, 'retry', '{"step":"b","type":"E","message":"no"}');
'''


def store_version_1(path):
    """A database as the first version of the schema made it, with something in it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        directory = json.dumps(str(path.parent))[1:-1]
        db.executescript(STORE_VERSION_1.replace("HOME", directory))
        db.create_function("crc", 1, lambda text: zlib.crc32(text.encode()))
        db.execute("UPDATE definition SET hash = crc(text)")
        db.commit()
        db.execute("PRAGMA journal_mode = WAL")
    if not WINDOWS:
        path.chmod(0o600)


STORE_MARKS = ("application_id", "user_version", "integrity_check", "journal_mode")


def store_shape(path):
    """(columns of each table, SQL of each index and trigger)."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        names = "SELECT name FROM sqlite_master WHERE type = 'table'"
        columns = {
            name: [row[1:] for row in db.execute(f"PRAGMA table_info({name})")]
            for (name,) in db.execute(names).fetchall()
        }
        sql = "SELECT name, sql FROM sqlite_master WHERE type IN ('index', 'trigger')"
        rest = {name: " ".join((text or "").split()) for name, text in db.execute(sql)}
        found = [db.execute(f"PRAGMA {what}").fetchone()[0] for what in STORE_MARKS]
    return columns, rest, found


def test_a_database_of_the_first_version_becomes_one_of_this_and_goes_on(home, clock):
    store_version_1(home / "a.db")
    store_filled(home / "fresh.db")
    before = store_shape(home / "a.db")
    assert before[2][:2] == [procman.APPLICATION_ID, 1]
    manager = ProcessManager(home / "a.db", now=clock)
    with contextlib.closing(manager):
        pids = [str(number) * 32 for number in range(1, 7)]
        found = {info.pid: info for info in manager.list_processes(order="oldest")}
        assert list(found) == pids
        assert store_shape(home / "a.db") == store_shape(home / "fresh.db") != before
        assert store_shape(home / "a.db")[2][2] == "ok"
        assert {info.series for info in found.values()} == {None}
        assert (found[pids[1]].steps, found[pids[1]].attempt) == (
            {"a": "finished", "b": "queued"},
            2,
        )
        assert found[pids[2]].output == {"n": 2} and manager.logs(pids[2]) == "printed"
        kinds = [event["kind"] for event in manager.store.events(0, pids[1])]
        assert kinds == ["start", "claim", "step", "retry"]
        same = ManagedProcess({"a": "steps:add_one", "b": "steps:double"})
        plain = manager.start_process(same, {"z": 1})
        same = ManagedProcess(same.steps, once=True)
        assert manager.start_process(same, {"z": 1}) == plain
        manager.cancel(plain)
        manager.proceed(pids[3], {"yes": True})
        again = manager.retry(pids[4])
        once = manager.start_process(steps("steps:add_one", once=True, interval=60))
        assert drain(manager) == 5
        outputs = [manager.get_process_info(pid).output for pid in pids]
        assert outputs == [{"n": 4}, {"n": 40}, {"n": 2}, outputs[3], None, {"n": 10}]
        assert outputs[3] == {"question": "go on?", "yes": True}
        assert manager.get_process_info(pids[5]).crashes == 1
        assert manager.get_process_status(again) == "interrupted"
        assert manager.get_process_status(once) == "finished"
        assert manager.count(series=once, status="queued") == 1
        assert manager.prune(0) == 8 and manager.store.trouble() is None


STORE_MIGRATES = """
import os, sqlite3, sys
sys.path.insert(0, sys.argv[1])
import procman
path, left, connect = sys.argv[2], [int(sys.argv[3])], sqlite3.connect

def count(statement):
    left[0] -= 1
    if left[0] == 0:
        os._exit(9)

def traced(*given, **named):
    db = connect(*given, **named)
    if not named.get("uri"):
        db.set_trace_callback(count)
    return db

procman.sqlite3.connect = traced
store = procman.Store(path)
store.version()
print(left[0])
"""


def test_a_death_in_the_middle_of_a_migration_changes_nothing(home):
    path, versions = home / "a.db", []
    store_filled(home / "fresh.db")
    old, new = None, store_shape(home / "fresh.db")
    words = [sys.executable, "-c", STORE_MIGRATES, str(HERE), str(path)]
    total = None
    for number in (10**6, 1, 12, 20, -2, -1):
        for end in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{path}{end}")
        store_version_1(path)
        old = old or store_shape(path)
        after = number if number > 0 else total + number
        child = subprocess.run(
            [*words, str(after)], stdout=subprocess.PIPE, timeout=60, check=False
        )
        if total is None:
            total = 10**6 - int(child.stdout)
            assert child.returncode == 0 and total > 25
        else:
            assert (child.returncode, child.stdout) == (9, b""), number
        shape = store_shape(path)
        assert shape in (old, new)
        versions.append(shape[2][1])
        with contextlib.closing(ProcessManager(path)) as manager:
            assert manager.count() == 6
            assert manager.get_process_info("1" * 32).name == "n"
        assert store_shape(path) == new
    assert versions == [2] + [1] * 4 + versions[-1:], "killed before the commit"


def test_those_that_migrate_a_database_at_once_all_get_in(home):
    store_version_1(home / "a.db")
    words = [sys.executable, "-c", STORE_MIGRATES, str(HERE), "a.db", str(10**6)]
    children = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(4)]
    for child in children:
        child.communicate(timeout=60)
    assert [child.returncode for child in children] == [0] * 4
    store_filled(home / "fresh.db")
    assert store_shape(home / "a.db") == store_shape(home / "fresh.db")


def store_claim(manager, pid=None, **wanted):
    """What a new runner claims now."""
    store = manager.store
    number = store.add_runner(os.urandom(4).hex(), "", ["default"], None)
    with store.transaction() as db:
        return store.claim_due(db, number, demand(99)._replace(pid=pid, **wanted))


def store_end(manager, held, ending, **more):
    """Record how a step ended, as its runner would; return the event."""
    error = {"type": "E", "message": "no"} if ending in ("error", "timeout") else None
    outcome = procman.Outcome(ending, error=error, **more)
    with manager.store.transaction() as db:
        return manager.store.record(db, [(held, outcome)])[-1].event


def store_crash(manager):
    """All that is running loses its runner."""
    found = manager.store.read("SELECT DISTINCT runner FROM process WHERE runner > 0")
    return [pid for row in found for pid in manager.store.recover(row[0], charged=True)]


def series_of(manager, pid):
    """The runs of a series, oldest first."""
    return manager.list_processes(series=pid, order="oldest")


STORE_SHARED = {
    "name": "n",
    "queue": "default",
    "priority": 7,
    "dedicated": True,
    "timeout": "1m",
    "args": {"x": 1},
    "backoff": 2,
}


@pytest.mark.parametrize("key", [None, "the only"])
@pytest.mark.parametrize(
    ("way", "status"),
    [
        ("done", "finished"),
        ("error", "error"),
        ("timeout", "timeout"),
        ("cancel", "cancelled"),
        ("cancel an interrupted one", "cancelled"),
        ("interrupt", "finished"),
        ("lost", "error"),
        ("lost again and again", "error"),
        ("damaged", "error"),
    ],
)
def test_however_a_run_ends_the_next_is_queued_with_its_data_and_options(
    manager, clock, way, status, key
):
    on_lost = "error" if way == "lost" else "retry"
    process = steps(
        "m:f", interval=3600, delay=5, on_lost=on_lost, key=key, **STORE_SHARED
    )
    pid = manager.start_process(process, {"x": 1, "y": [None]})
    clock.advance(5)
    [held] = store_claim(manager)
    if "lost" in way:
        assert store_crash(manager) == [pid]
        while way != "lost" and manager.get_process_status(pid) == "queued":
            assert len(store_claim(manager)) == 1 and store_crash(manager) == [pid]
    elif way == "damaged":
        move = procman.Move(held.id, {"runner": None})
        with manager.store.transaction() as db:
            manager.store.transition(db, "give_back", move)
            db.execute("UPDATE process SET step_index = 5")
        assert store_claim(manager) == []
    else:
        if way == "cancel":
            manager.cancel(pid)
        ending = "interrupt" if "interrupt" in way else way
        store_end(manager, held, "done" if way == "cancel" else ending, data='{"z":2}')
        if way == "cancel an interrupted one":
            manager.cancel(pid)
        elif way == "interrupt":
            manager.proceed(pid)
    first, second = series_of(manager, pid)
    assert (first.pid, first.status, first.finished_at) == (pid, status, clock.at)
    assert (second.status, second.due_at) == ("queued", clock.at + 3600)
    assert (second.attempt, second.crashes, second.created_at) == (1, 0, clock.at)
    assert first.series == second.series == pid != second.pid
    assert (second.started_at, second.error, second.output) == (None,) * 3
    old, new = manager.store.find(pid), manager.store.find(second.pid)
    same = ("name", "queue", "priority", "dedicated", "definition", "once_key")
    assert [new[name] for name in same] == [old[name] for name in same]
    assert (new["once_key"] is None) == (key is None)
    assert (new["cancel_requested"], new["retry_of"], new["claim"]) == (0, None, 0)
    [event] = manager.store.events(0, second.pid)
    assert (event["kind"], event["detail"]) == ("start", {"after": pid})
    clock.advance(3600)
    [held] = store_claim(manager)
    assert held.data == '{"x":1,"y":[null]}', "that of the first run, not the last"
    assert held.definition.option("timeout") == 60
    store_end(manager, held, "done")
    assert [info.status for info in series_of(manager, pid)[1:]] == [
        "finished",
        "queued",
    ]


def test_a_run_and_its_successor_are_committed_together_or_not_at_all(manager):
    pid = manager.start_process(steps("m:f", interval=-1))
    [held] = store_claim(manager)
    store = manager.store
    with pytest.raises(KeyError), store.transaction() as db:
        [entry] = store.record(db, [(held, procman.Outcome("done"))])
        assert entry.event == "finish" and manager.count(series=pid) == 2
        raise KeyError
    assert [info.status for info in series_of(manager, pid)] == ["running"]


def test_no_moment_shows_an_ended_run_without_its_successor(home):
    manager, began = ProcessManager(home / "a.db"), time.monotonic()
    pids = manager.start_many([steps("steps:nothing", interval=-1)] * 20)
    torn, looks = [], 0
    with contextlib.closing(manager), contextlib.closing(
        sqlite3.connect(manager.path, isolation_level=None)
    ) as db, running(manager, "--max-workers", "2"):
        while manager.count(status="finished") < 200:
            for _ in range(20):
                looks += 1
                torn += db.execute(
                    """
                    SELECT series, count(*) FROM process
                     GROUP BY series HAVING sum(finished_at IS NULL) <> 1"""
                ).fetchall()
            assert time.monotonic() - began < 20
        assert torn == [] and looks > 200
        manager.cancel_all()
        eventually(lambda: not manager.count(status="open"))
        for pid in pids:
            runs = [info for info in series_of(manager, pid) if info.started_at]
            starts = [info.started_at for info in runs]
            gaps = [late - early for early, late in zip(starts, starts[1:])]
            assert gaps and min(gaps) >= 0.0499, "not faster than 50 ms"


def test_missed_runs_are_made_up_for_once(manager, clock):
    pids = [
        manager.start_process(steps("m:f", interval=60, interval_from="start")),
        manager.start_process(steps("m:f", interval=60)),
        manager.start_process(steps("m:f", cron="* * * * *")),
    ]
    for runs in (2, 3):
        clock.advance(86400)
        held = store_claim(manager)
        assert len(held) == 3
        clock.advance(0.5)
        for one in held:
            store_end(manager, one, "done")
        assert [manager.count(series=pid) for pid in pids] == [runs] * 3
        due = [series_of(manager, pid)[-1].due_at - clock.at for pid in pids]
        assert due[:2] == [59.5, 60] and 0 < due[2] <= 60


def test_the_interval_counts_after_the_last_retry_and_each_run_has_all_of_them(
    manager, clock
):
    pid = manager.start_process(
        steps("m:f", interval=1000, retry=2, retry_interval=10)
    )
    for run in range(3):
        for attempt in (1, 2, 3):
            [held] = store_claim(manager)
            assert (held.attempt, len(series_of(manager, pid))) == (attempt, run + 1)
            event = store_end(manager, held, "error")
            assert event == ("retry" if attempt < 3 else "fail")
            if attempt < 3:
                clock.advance(9)
                assert store_claim(manager) == []
                clock.advance(1)
        clock.advance(999)
        assert store_claim(manager) == []
        clock.advance(1)
    statuses_found = [info.status for info in series_of(manager, pid)]
    assert statuses_found == ["error"] * 3 + ["queued"]
    assert [info.retry_left for info in series_of(manager, pid)] == [0, 0, 0, 2]


def test_an_interval_from_the_start_counts_from_the_first_attempt(manager, clock):
    process = steps("m:f", interval=100, interval_from="start", retry=1)
    pid, start = manager.start_process(process), clock.at
    store_end(manager, *store_claim(manager), "error")
    clock.advance(300)
    [held] = store_claim(manager)
    clock.advance(5)
    store_end(manager, held, "error")
    assert series_of(manager, pid)[-1].due_at == clock.at, "missed long ago"
    [held] = store_claim(manager)
    clock.advance(30)
    store_end(manager, held, "done")
    assert series_of(manager, pid)[-1].due_at == start + 305 + 100


@pytest.mark.parametrize("state", ["new", "later", "retried", "running", "stopped"])
@pytest.mark.parametrize("way", ["cancel", "cancel_all", "once"])
def test_what_ends_a_series_and_what_only_a_run(manager, clock, way, state):
    process = steps("m:f", interval=60, retry=1, key="k")
    pid = manager.start_process(process)
    if state == "later":
        store_end(manager, *store_claim(manager), "done")
    elif state == "retried":
        store_end(manager, *store_claim(manager), "error")
    elif state != "new":
        [held] = store_claim(manager)
        if state == "stopped":
            store_end(manager, held, "interrupt")
    target = series_of(manager, pid)[-1]
    if way == "cancel":
        manager.cancel(target.pid)
    elif way == "cancel_all":
        manager.start_process(steps("m:f", name="other", delay=1))
        assert manager.cancel_all(series=pid) == [target.pid]
        assert manager.cancel_all(series=pid) == []
        assert manager.count(name="other", status="open") == 1
    else:
        other = manager.start_process(steps("m:f", interval=61, key="k"))
        assert other != target.pid
    if state == "running":
        assert manager.get_process_status(pid) == "running"
        assert store_end(manager, held, "done") == "cancel"
    assert manager.get_process_status(target.pid) == "cancelled"
    goes_on = way == "cancel" and state in ("running", "stopped")
    assert manager.count(series=pid, status="open") == goes_on


def test_to_cancel_a_run_paused_before_it_began_ends_its_series_and_says_so(manager):
    pid = manager.start_process(steps("m:f", interval=60))
    manager.pause(pid)
    manager.cancel(pid)
    assert manager.count(status="open") == 0
    assert not manager.store.series_goes_on(pid)


def test_what_began_at_a_later_step_is_retried_from_there_after_success(manager):
    pid = manager.start_process(steps("m:f", "m:g"), {"n": 1})
    [held] = store_claim(manager)
    assert store_end(manager, held, "done", data='{"n": 2}') == "step"
    assert store_end(manager, held._replace(step_index=1), "error") == "fail"
    again = manager.retry(pid)
    assert store_end(manager, *store_claim(manager), "done") == "finish"
    last = manager.get_process_info(manager.retry(again))
    assert last.steps == {"a": "finished", "b": "queued"}
    [held] = store_claim(manager)
    assert (held.pid, held.step_index, held.data) == (last.pid, 1, '{"n":2}')


def test_a_series_can_be_ended_after_its_run_was_cancelled(manager):
    pid = manager.start_process(steps("m:f", interval=60))
    [held] = store_claim(manager)
    manager.cancel(pid)
    assert manager.cancel_all() == [pid] and manager.cancel_all() == []
    assert manager.cancel(pid) == pid
    assert store_end(manager, held, "done") == "cancel"
    assert manager.count() == 1


def test_a_series_whose_next_time_cannot_be_found_ends_as_an_error_that_says_so(
    manager, clock
):
    pid = manager.start_process(steps("m:f", cron="* * * * *", name="n"), {"x": 1})
    with manager.store.transaction() as db:
        db.execute(
            "UPDATE definition SET text = replace(text, '\"* * * * *\"', ?)",
            ('"* * * * *","tz":"No/Where"',),
        )
    clock.advance(60)
    store_end(manager, *store_claim(manager), "done")
    first, second = series_of(manager, pid)
    assert (first.status, second.status, second.name) == ("finished", "error", "n")
    assert second.error["type"] == "BadSpec" and second.error["step"] is None
    assert second.error["message"].startswith("tz: no data for the time zone 'No/Wh")
    assert second.exit_code == 1 and manager.count(status="open") == 0
    again = manager.retry(second.pid)
    clock.advance(60)
    [held] = store_claim(manager)
    assert (held.pid, held.data) == (again, '{"x":1}')


@zoned
def test_a_cron_series_keeps_the_time_of_the_wall_over_a_change_of_clocks(
    manager, clock
):
    for start, expected in (
        ("2024-03-29T12:00", "30T01:30 31T01:00 01T00:30"),  # 02:30 is left out
        ("2024-10-25T12:00", "26T00:30 27T00:30 28T01:30"),  # ... and comes twice
    ):
        clock.at = at_utc(start)
        with contextlib.closing(ProcessManager(f"{start[:7]}.db", now=clock)) as other:
            pid = other.start_process(
                steps("m:f", cron="30 2 * * *", tz="Europe/Berlin")
            )
            found = []
            for _ in range(3):
                due = series_of(other, pid)[-1].due_at
                found.append(time.strftime("%dT%H:%M", time.gmtime(due)))
                clock.at = due - 1
                assert store_claim(other) == []
                clock.at = due + 100
                store_end(other, *store_claim(other), "done")
            assert " ".join(found) == expected


def test_a_series_whose_rows_were_changed_by_hand_troubles_nobody_else(manager, clock):
    pids = manager.start_many(
        [(steps("steps:nothing", interval=60), {"x": n}) for n in range(3)]
    )
    with manager.store.transaction() as db:
        db.execute("DELETE FROM data WHERE process = 1")
        db.execute("UPDATE data SET data = '{' WHERE process = 2")
    other = manager.start_process(steps("steps:nothing"))
    assert drain(manager) >= 2
    assert manager.get_process_status(other) == "finished"
    assert manager.get_process_status(pids[2]) == "finished"
    assert [manager.get_process_status(pid) for pid in pids[:2]] == ["error"] * 2
    assert [manager.count(series=pid, status="open") for pid in pids] == [0, 0, 1]
    clock.advance(60)
    assert drain(manager) == 1
    late = manager.start_process(steps("steps:fail"))
    assert drain(manager) == 1
    with pytest.raises(procman.BadSpec, match="changed by hand"):
        manager.retry(pids[1])
    found = dict(manager.retry_failed())
    assert found.pop(late) and found == dict.fromkeys(pids[:2])


@pytest.mark.parametrize(
    "change",
    [
        "event SET at = 'x'",
        "process SET due_from = 'x'",
        "process SET started_at = 'x' WHERE id = 2",
        "process SET claim = 9223372036854775807 WHERE id = 1",
        "process SET attempt = 9223372036854775807 WHERE id = 1",
        "process SET attempt = 4611686018427387903 WHERE id = 1",
        *[
            f"definition SET text = json_set(text, '{path}', 'x') WHERE id = 1"
            for path in (
                *("$.options", "$.options.retry", "$.options.timeout"),
                *("$.steps", "$.steps.a"),
            )
        ],
        "definition SET text = json_set(text, '$.options.interval', 'x') WHERE id = 2",
    ],
)
def test_a_row_changed_by_hand_ends_no_runner_and_hinders_no_start(
    manager, clock, change
):
    options = {"timeout": 60, "retry": -1, "retry_interval": 1, "backoff": 2}
    for process in (  # their ids and those of their definitions are 1 to 4
        steps("steps:fail", **options),
        steps("steps:nothing", interval=60),
        steps("steps:nothing", key="the only"),
        steps("steps:nothing", cron="* * * * *"),
    ):
        manager.start_process(process)
    with manager.store.transaction() as db:
        db.execute(f"UPDATE {change}")
    clock.advance(-30)
    manager.close()
    manager.store._definitions.clear()
    other = manager.start_process(steps("steps:nothing", unique=True), {"x": 1})
    clock.advance(90)
    drain(manager)
    assert manager.get_process_status(other) == "finished"
    assert manager.count(status="running") == 0


def test_a_runner_recovers_the_rest_where_a_row_was_changed_by_hand(manager):
    damaged, other = (
        manager.start_process(steps("steps:nothing", name=name)) for name in "ab"
    )
    late = manager.start_process(steps("steps:fail", on_lost="ask"))
    assert len(store_claim(manager)) == 3
    with manager.store.transaction() as db:
        db.execute("UPDATE process SET step_index = 'x' WHERE id = 1")
        sql = "UPDATE definition SET text = '{}' WHERE text LIKE '%fail%'"
        db.execute(sql)
    manager.store.close()
    manager.store._definitions.clear()
    assert len(store_crash(manager)) == 3
    states = [manager.get_process_status(pid) for pid in (damaged, other, late)]
    assert states == ["error", "queued", "error"]


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        ("process SET error = '1'", "list", 5),
        ("process SET error = '1'", "why PID", 5),
        ("process SET due_at = 'x', status = 'queued'", "why PID", 5),
        ("process SET step_index = -9", "why PID", 0),
        ("process SET progress = '{}'", "status PID", 5),
        ("process SET progress = '7'", "list", 5),
        ("process SET due_at = 9e999, created_at = 'x'", "list", 0),
        ("event SET detail = '{'", "listen --since 0", 5),
        ("data SET data = '1'", "proceed PID", 2),
        ("runner SET concurrency = '[]'", "doctor", 5),
    ],
)
def test_what_shows_rows_changed_by_hand_answers_in_one_line(
    manager, change, words, code
):
    pid = manager.start_process(steps("steps:nothing"))
    manager.pause(pid)
    manager.store.add_runner("ab" * 8, "boot", ["default"], None)
    with manager.store.transaction() as db:
        db.execute(f"UPDATE {change}")
    result = cli("--db", manager.path, *words.replace("PID", pid).split())
    assert result.code == code, result
    assert result.err.count("\n") == (code > 0 and words != "doctor")


def test_why_is_one_line_whatever_a_step_has_raised(manager):
    pid = manager.start_process(steps("steps:nothing"))
    [held] = store_claim(manager)
    error = {"type": "E", "message": "no\nit is running\x1b[2J"}
    outcome = procman.Outcome("error", error=error)
    with manager.store.transaction() as db:
        manager.store.record(db, [(held, outcome)])
    result = cli("--db", manager.path, "why", pid)
    assert result.out.endswith("no it is running\\x1b[2J\n")
    assert result.out.count("\n") == 1


def test_a_port_changed_by_hand_does_not_make_a_start_fail(manager):
    for port in ("x", -1, 0.5, 2**40):
        manager.store.add_runner("ab" * 8, "boot", ["default"], port)
    pid = manager.start_process(steps("steps:nothing"))
    assert manager.get_process_status(pid) == "queued"


def store_once(manager, data=None, names=("a", "b"), **options):
    """Start a process of two steps, once unless told otherwise."""
    specs = dict.fromkeys(names, "m:f")
    if "unique" not in options:
        options = {"once": True, **options}
    return manager.start_process(ManagedProcess(specs, **options), data)


def test_once_returns_an_open_equal_process_and_starts_no_other(manager, clock):
    pid = store_once(manager, {"x": 1, "y": {"a": 1, "b": [1, 2]}})
    for data in (
        {"x": 1, "y": {"a": 1, "b": [1, 2]}},
        {"y": {"b": (1, 2), "a": 1}, "x": 1},
    ):
        assert store_once(manager, data) == pid
    before = manager.get_process_info(pid)
    clock.advance(10)
    assert store_once(manager, {"x": 1, "y": {"a": 1, "b": [1, 2]}}, retry=0) == pid
    assert manager.get_process_info(pid) == before and manager.count() == 1
    assert len(manager.store.events(0)) == 1


@pytest.mark.parametrize("kind", ["once", "unique"])
def test_what_is_not_equal_is_started(manager, home, monkeypatch, kind):
    options = {kind: True}
    pids = [
        store_once(manager, data, **options)
        for data in (
            *({}, {"x": 1}, {"x": 1.0}, {"x": True}, {"x": "1"}, {"x": None}),
            *({"x": []}, {"x": [1, 2]}, {"x": [2, 1]}, {"x": {}}, {"y": 1}),
        )
    ]
    pids.append(store_once(manager, names=("b", "a"), **options))
    pids.append(store_once(manager, names=("a",), **options))
    pids.append(store_once(manager, key="k", **options))
    pids.append(store_once(manager, key="K", **options))
    pids.append(store_once(manager, {"x": 1}, key="l", **options))
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    pids.append(store_once(manager, **options))
    assert len(set(pids)) == len(pids) == manager.count(status="queued")


def test_the_order_of_steps_counts_and_the_order_of_keys_in_a_step_does_not(manager):
    def start(spec):
        return manager.start_process(steps(spec, once=True))

    pid = start({"shell": "x", "env": {"A": "1", "B": "2"}, "timeout": 1})
    assert start({"timeout": 1, "env": {"B": "2", "A": "1"}, "shell": "x"}) == pid
    assert start({"shell": "x", "env": {"A": "1", "B": "2"}, "timeout": 1.0}) != pid
    # Found among the plain ones, which have no key of their own, as well:
    plain = manager.start_process(steps({"shell": "y", "timeout": 1}))
    assert start({"timeout": 1, "shell": "y"}) == plain
    data = {"ä\U0001f600\0": ["ß\n", 1e5, -0.0], "x": {"b": "", "a": None}}
    plain = manager.start_process(steps("m:f"), data)
    again = {"x": {"a": None, "b": ""}, "ä\U0001f600\0": ("ß\n", 100000.0, -0.0)}
    assert manager.start_process(steps("m:f", once=True), again) == plain
    assert start({"timeout": 1.0, "shell": "y"}) != plain


@pytest.mark.parametrize("kind", ["once", "unique"])
@pytest.mark.parametrize("state", ["queued", "later", "running", "interrupted"])
@pytest.mark.parametrize("how", ["plain", "once", "unique", "key", "series"])
def test_equal_is_who_is_open_however_it_was_started(manager, clock, kind, state, how):
    options = {"key": "k"} if how == "key" else {}
    first = {
        "plain": {"once": None},
        "series": {"once": None, "interval": 60},
        "unique": {"unique": True},
    }.get(how, {})
    if state == "later":
        clock.advance(-50)
    pid = store_once(manager, {"x": 1}, **first, **options)
    if state == "later":
        with manager.store.transaction() as db:
            db.execute("UPDATE process SET due_at = due_at + 1e6")
    elif state != "queued":
        [held] = store_claim(manager)
        if state == "interrupted":
            store_end(manager, held, "interrupt")
    if kind == "once":
        assert store_once(manager, {"x": 1}, **options) == pid
    else:
        with pytest.raises(procman.NotUnique) as caught:
            store_once(manager, {"x": 1}, unique=True, **options)
        assert (caught.value.pid, caught.value.exit_code) == (pid, 4)
        status = "queued" if state == "later" else state
        words = f"nothing started: not unique, equal to process {pid}, which is"
        assert str(caught.value) == f"{words} {status}"
    assert manager.count() == 1
    manager.cancel_all(series=pid)  # if it runs, a wish, with which it does not count
    again = store_once(manager, {"x": 1}, unique=True, **options)
    assert again != pid and manager.get_process_status(again) == "queued"


def test_a_final_process_is_equal_to_nobody(manager):
    for options in ({"once": True}, {"unique": True}, {"key": "k"}, {"once": None}):
        pid = store_once(manager, **options)
        [held] = store_claim(manager)
        assert store_end(manager, held, "done") == "step"
        assert store_end(manager, held._replace(step_index=1), "done") == "finish"
        assert store_once(manager, **options) != pid
        manager.cancel_all()
        assert store_once(manager, **options) != store_once(manager, name="new")
        manager.cancel_all()


STORE_OTHER = [
    ("name", "n", "m"),
    ("queue", "p", "q"),
    ("priority", 1, 2),
    ("delay", "1m", "2m"),
    ("at", 2e9, 2e9 + 1),
    ("interval", 60, 61),
    ("cron", "@daily", "@hourly"),
    ("timeout", 1, 2),
    ("retry", 1, 2),
    ("retry_interval", 1, 2),
    ("backoff", 1.5, 2),
    ("on_lost", "ask", "error"),
    ("args", {"x": 1}, {"x": 2}),
    ("dedicated", True, False),
]


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize(("option", "value", "other"), STORE_OTHER)
def test_once_replaces_who_has_other_options_than_those_said_now(
    manager, option, value, other, key
):
    given = {} if key is None else {"key": key}
    pid = store_once(manager, **{option: value}, **given)
    assert store_once(manager, **given) == pid, "nothing is said of this option"
    assert store_once(manager, **{option: value}, **given) == pid
    new = store_once(manager, **{option: other}, **given)
    assert new != pid
    assert manager.get_process_status(pid) == "cancelled"
    assert store_once(manager, **given) == new
    assert [info.pid for info in manager.list_processes(status="open")] == [new]


def test_once_replaces_a_plain_one_and_one_that_runs_with_its_series(manager, clock):
    plain = store_once(manager, once=None, interval=60)
    [held] = store_claim(manager)
    other = store_once(manager, interval=61)
    assert manager.get_process_status(plain) == "running"
    assert store_once(manager, interval=61) == other, "who is to be cancelled is not"
    assert store_end(manager, held, "done") == "cancel"
    assert manager.count(series=plain) == 1, "its series has ended with it"
    clock.advance(1)
    [held] = store_claim(manager)
    assert held.pid == other
    new = store_once(manager, interval=60)
    assert new not in (other, plain)
    assert store_end(manager, held, "interrupt") == "cancel"
    assert [info.pid for info in manager.list_processes(status="open")] == [new]


def test_a_row_that_was_changed_by_hand_is_equal_to_nobody(manager):
    pids = [store_once(manager, once=None) for _ in range(3)]
    with manager.store.transaction() as db:
        for row, data in ((1, "{{"), (2, 55)):
            db.execute("UPDATE data SET data = ? WHERE process = ?", (data, row))
    assert store_once(manager) == pids[2]
    with manager.store.transaction() as db:
        db.execute("DELETE FROM data WHERE process = 3")
    assert store_once(manager) not in pids


def test_a_key_is_of_one_open_process_whatever_its_steps_and_data_are(manager):
    pid = store_once(manager, {"x": 1}, key="k")
    assert manager.start_process(steps("m:g", key="k"), {"y": 2}) == pid
    with pytest.raises(procman.NotUnique):
        manager.start_process(steps("m:g", key="k", unique=True))
    with contextlib.closing(
        ProcessManager(manager.path, defaults={"unique": True}, now=manager.store.now)
    ) as strict, pytest.raises(procman.NotUnique):
        strict.start_process(steps("m:g", key="k"))
    assert manager.count() == 1


def test_each_run_of_a_series_has_its_key_and_only_the_open_one_counts(manager, clock):
    first = store_once(manager, names=("a",), key="k", interval=60)
    for _ in range(3):
        store_end(manager, *store_claim(manager), "done")
        [current] = manager.list_processes(series=first, status="open")
        assert store_once(manager, key="k") == current.pid != first
        with pytest.raises(procman.NotUnique, match=current.pid):
            store_once(manager, key="k", unique=True)
        clock.advance(60)
    assert manager.count(status="open") == 1


@pytest.mark.parametrize("new_interval", [60, None])
def test_a_key_given_anew_while_a_run_is_being_cancelled_is_not_taken_twice(
    manager, clock, new_interval
):
    old = store_once(manager, names=("a",), key="k", interval=60)
    [held] = store_claim(manager)
    manager.cancel(old)
    new = store_once(manager, names=("a",), key="k", interval=new_interval)
    assert new != old
    assert store_end(manager, held, "done") == "cancel"
    assert [info.pid for info in manager.list_processes(status="open")] == [new]


def test_a_retry_does_not_take_the_key_of_another_open_process(manager):
    old = store_once(manager, names=("a",), key="k")
    store_end(manager, *store_claim(manager), "error")
    new = store_once(manager, names=("a",), key="k")
    with pytest.raises(procman.NotUnique, match=f"the key is that of {new}, which is"):
        manager.retry(old)
    assert manager.retry_failed() == [(old, None)]
    manager.cancel(new)
    again = manager.retry(old)
    assert store_once(manager, names=("a",), key="k") == again


def test_a_pid_of_ones_own_is_taken_once(manager):
    pid = "0123456789abcdef" * 2
    assert manager.start_process(steps("m:f", pid=pid)) == pid
    for options in ({}, {"once": True, "name": "n"}, {"key": "k"}):
        with pytest.raises(procman.NotUnique) as caught:
            manager.start_process(steps("m:g", pid=pid, **options))
        text = f"nothing started: there is a process {pid}, which is queued"
        assert str(caught.value) == text and caught.value.exit_code == 4
    assert manager.start_process(steps("m:f", pid=pid, once=True)) == pid, "the same"
    assert manager.start_process(steps("m:f", pid="f" * 32, once=True)) == pid
    manager.cancel(pid)
    with pytest.raises(procman.NotUnique, match="which is cancelled"):
        manager.start_many([steps("m:h"), steps("m:f", pid=pid)])
    with pytest.raises(procman.NotUnique):
        manager.start_many([steps("m:h", pid="a" * 32), steps("m:i", pid="a" * 32)])
    assert manager.count() == 1


def test_a_start_that_is_refused_cancels_nobody_even_in_the_callers_transaction(
    manager,
):
    old = store_once(manager, key="k", name="old")
    taken = manager.start_process(steps("m:f"))
    with contextlib.closing(sqlite3.connect(manager.path)) as own:
        own.execute("BEGIN IMMEDIATE")
        with pytest.raises(procman.NotUnique, match=taken):
            manager.start_process(
                steps("m:f", key="k", name="new", pid=taken), connection=own
            )
        own.commit()
    assert manager.get_process_status(old) == "queued"
    assert manager.count() == 2


def test_those_that_are_started_together_are_compared_with_each_other(manager):
    plain, once = steps("m:f"), steps("m:f", once=True)
    a, b, c, d, e = manager.start_many(
        [(plain, {"x": 1}), (once, {"x": 1}), (once, {"x": 2}), once, (once, {"x": 2})]
    )
    assert (a, c) == (b, e) and len({a, c, d}) == 3 == manager.count()
    k, m, other = manager.start_many(
        [steps("m:f", key="k"), steps("m:g", key="k"), steps("m:g", key="k", name="n")]
    )
    assert k == m != other and manager.get_process_status(k) == "cancelled"
    for batch in (
        [steps("m:z"), steps("m:h", unique=True), steps("m:h", unique=True)],
        [steps("m:z"), steps("m:h"), steps("m:h", unique=True)],
        [steps("m:z"), steps("m:h", key="k", unique=True)],
    ):
        with pytest.raises(procman.NotUnique):
            manager.start_many(batch)
    assert manager.count() == 5, "all or none"
    manager.start_many([steps("m:h", unique=True), steps("m:h")])
    assert manager.count() == 7, "a plain one looks for nobody"


def test_once_joins_the_transaction_of_its_caller(manager):
    pid = store_once(manager, names=("a",))
    store_once(manager, names=("a",), key="k", name="old")
    before = manager.list_processes()
    with contextlib.closing(sqlite3.connect(manager.path)) as own:
        for end in (own.rollback, own.commit):
            own.execute("BEGIN IMMEDIATE")
            once = steps("m:f", once=True)
            assert manager.start_process(once, connection=own) == pid
            fresh = steps("m:f", once=True, key="l")
            new = manager.start_process(fresh, connection=own)
            assert manager.start_process(fresh, connection=own) == new
            replacing = steps("m:f", key="k", name="new")
            manager.start_process(replacing, connection=own)
            with pytest.raises(procman.NotUnique):
                manager.start_process(steps("m:f", unique=True), connection=own)
            assert manager.list_processes() == before and own.in_transaction
            end()
            assert manager.count() == (2 if end == own.rollback else 4)
    assert manager.count(status="cancelled") == 1


STORE_RACES = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import procman
from procman import ManagedProcess
manager = procman.ProcessManager("procman.db")
manager.count()
open("ready" + sys.argv[2], "w").close()
while not os.path.exists("go"):
    time.sleep(0.001)
for number in range(3):
    own = {"key": "u%d" % number, "unique": True}
    kinds = [{"once": True}, {"unique": True}, {"key": "k"}, own]
    for options in (*kinds, {"pid": "%032x" % number}):
        steps = {"a": "m:f", **{name: "m:f" for name in options}}
        try:
            process = ManagedProcess(steps, **options)
            print(manager.start_process(process, {"n": number}))
        except procman.NotUnique as error:
            print(error.exit_code)
"""


def test_of_ten_that_start_the_same_at_once_one_does(manager, home):
    manager.start_process(steps("m:f"))
    words = [sys.executable, "-c", STORE_RACES, str(HERE)]
    children = [
        subprocess.Popen([*words, str(number)], stdout=subprocess.PIPE)
        for number in range(10)
    ]
    try:
        eventually(lambda: len(list(home.glob("ready*"))) == 10)
        (home / "go").touch()
        said = [child.communicate(timeout=60)[0].split() for child in children]
    finally:
        for child in children:
            child.kill()
    assert [len(words) for words in said] == [15] * 10
    made = set()
    for number, answers in enumerate(zip(*said)):
        kind = number % 5
        pids = {answer for answer in answers if len(answer) == 32}
        assert len(pids) == 1, "all the same, or the one that was first"
        assert answers.count(b"4") == (0 if kind in (0, 2) else 9)
        made |= pids
    assert len(made) == 13, "a key is that of the process of the first round"
    assert manager.count() == 1 + len(made)


def store_dues(manager, pids):
    """When each is due, from now on."""
    now = manager.store.now()
    return [round(manager.get_process_info(pid).due_at - now, 3) for pid in pids]


STORE_BACK = [86400.0, 10 * 365 * 86400.0]


@pytest.mark.parametrize("back", STORE_BACK)
@pytest.mark.parametrize("way", ["a look", "a start", "a cancel", "a claim"])
def test_a_clock_set_back_holds_up_only_what_is_due_at_a_moment(
    manager, clock, back, way
):
    clock.at = TIME_NOON + 29.75
    moment = TIME_NOON + 530
    retried = manager.start_process(steps("m:f", retry=1, retry_interval=300))
    [held] = store_claim(manager)
    clock.at += 0.25
    store_end(manager, held, "error")
    run = manager.start_process(steps("m:f", interval=3600))
    store_end(manager, *store_claim(manager), "done")
    [run] = [info.pid for info in manager.list_processes(series=run, status="open")]
    pids = manager.start_many(
        [
            steps("m:f"),
            steps("m:f", delay="1h"),
            steps("m:f", at=moment),
            steps("m:f", cron="*/10 * * * *"),
            steps("m:f", at=moment, cron="*/10 * * * *"),
        ]
    )
    pids += [retried, run]
    assert store_dues(manager, pids) == [0, 3600, 500, 570, 570, 300, 3600]
    proceeded = manager.start_process(steps("m:f", "m:f", name="p", priority=9))
    store_end(manager, store_claim(manager, pid=proceeded)[0], "interrupt")
    manager.proceed(proceeded)
    spare = manager.start_process(steps("m:f", delay="1d"))
    clock.advance(-back)
    if way == "a look":
        manager.store.look_at_clock()
    elif way == "a start":
        manager.start_process(steps("m:f", delay="2d"))
    elif way == "a cancel":
        manager.cancel(spare)
    else:
        assert len(store_claim(manager, pid=spare)) == 1
    found = store_dues(manager, pids)
    assert found == [0, 3600, 500 + back, 570, 570 + back, 300, 3600]
    assert [held.pid for held in store_claim(manager)] == [proceeded, pids[0]]
    before = manager.store.read("SELECT count(*) FROM event")[0][0]
    for _ in range(3):
        manager.store.look_at_clock()
    clock.advance(1000)
    manager.store.look_at_clock()
    assert manager.store.read("SELECT count(*) FROM event")[0][0] == before
    claimed = {held.pid for held in store_claim(manager)}
    assert claimed == {pids[3], pids[5]}
    clock.advance(3000)
    assert {held.pid for held in store_claim(manager)} == {pids[1], pids[6]}
    clock.at = moment + 600
    assert {held.pid for held in store_claim(manager)} >= {pids[2], pids[4]}


@pytest.mark.parametrize("back", STORE_BACK)
def test_what_runs_while_the_clock_is_set_back_is_due_when_it_is_given_back(
    manager, clock, back
):
    pids = manager.start_many([steps("m:f")] * 3)
    held = store_claim(manager)
    clock.advance(-back)
    manager.store.look_at_clock()
    assert store_end(manager, held[0], "stopped") == "give_back"
    assert store_crash(manager) == pids[1:]
    assert [one.pid for one in store_claim(manager)] == pids[:1], "the others crashed"
    assert [one.pid for one in store_claim(manager)] == pids[1:2]


def test_a_clock_that_trembles_sets_nothing_back(manager, clock):
    pid = manager.start_process(steps("m:f", delay=10))
    due = manager.get_process_info(pid).due_at
    for _ in range(20):
        clock.advance(-0.9)
        manager.store.look_at_clock()
        clock.advance(0.9)
    assert manager.get_process_info(pid).due_at == due
    assert len(manager.store.read("SELECT * FROM event")) == 1


def test_a_cron_run_comes_once_in_its_minute_though_the_clock_goes_back(manager, clock):
    clock.at = TIME_NOON - 600
    pid = manager.start_process(steps("m:f", cron="0 12 * * *"))
    clock.at = TIME_NOON + 0.5
    [held] = store_claim(manager)
    clock.advance(-30)
    manager.store.look_at_clock()
    clock.advance(5)
    store_end(manager, held, "done")
    assert series_of(manager, pid)[-1].due_at == TIME_NOON + 86400


def test_a_time_zone_without_data_holds_nobody_up_when_the_clock_is_set_back(
    manager, clock
):
    pids = manager.start_many(
        [steps("m:f", cron="@daily"), steps("m:f", delay=50), steps("m:g", interval=5)]
    )
    with manager.store.transaction() as db:
        sql = "UPDATE definition SET text = replace(text, '\"@daily\"', ?)"
        db.execute(sql, ('"@daily","tz":"No/Where"',))
    due = manager.get_process_info(pids[0]).due_at
    clock.advance(-86400)
    new = manager.start_process(steps("m:f"))
    assert manager.get_process_info(pids[0]).due_at == due
    assert store_dues(manager, pids[1:]) == [50, 0]
    assert {held.pid for held in store_claim(manager)} == {new, pids[2]}


@pytest.mark.parametrize("back", STORE_BACK)
def test_an_idle_runner_notices_a_clock_that_is_set_back(manager, clock, back):
    pids = manager.start_many(
        [
            steps("steps:nothing", delay=3600),
            steps("steps:nothing", delay=1, interval=3600),
        ]
    )
    with thread_runner(manager):
        clock.advance(-back)
        eventually(lambda: store_dues(manager, pids) == [3600, 1])
        clock.advance(2)
        manager.wait(pids[1], 20)
        [late] = manager.list_processes(series=pids[1], status="queued")
        assert store_dues(manager, [pids[0], late.pid]) == [3598, 3600]
        clock.advance(3600)
        manager.wait_all([pids[0], late.pid], 20)
        assert manager.count(series=pids[1]) == 3 and manager.count() == 4


def test_a_clock_that_leaps_runs_each_series_once_and_not_in_a_storm(manager, clock):
    series = manager.start_many(
        [
            (steps("steps:nothing", interval=60), {"n": 0}),
            steps("steps:nothing", interval=60, interval_from="start"),
            steps("steps:nothing", interval="1d"),
            steps("steps:nothing", cron="* * * * *"),
            steps("steps:nothing", cron="@daily"),
        ]
    )
    clock.advance(86400)
    drain(manager)
    for leap, wanted in [
        (10 * 365 * 86400, [1] * 5),
        (-10 * 365 * 86400, [0] * 5),
        (59, [0, 0, 0, None, None]),
        (1, [1, 1, 0, None, None]),
        (-86400, [0] * 5),
        (86400, [1] * 5),
        (0, [0] * 5),
    ]:
        before = [manager.count(series=pid, status="finished") for pid in series]
        clock.advance(leap)
        manager.store.look_at_clock()
        drain(manager)
        after = [manager.count(series=pid, status="finished") for pid in series]
        ran = [late - early for early, late in zip(before, after)]
        assert all(
            count == most or (most is None and count <= 1)
            for count, most in zip(ran, wanted)
        ), (leap, ran)
        assert manager.count(status="open") == 5


def test_as_many_of_a_name_run_as_may_whichever_runner_claims_them(manager):
    pids = manager.start_many(
        [steps("m:f", name=name) for name in "aaab"] + [steps("m:f")] * 2
    )
    limits = {"a": 2, "b": 1, "none of these": 1}
    held = store_claim(manager, concurrency=limits, room=1)
    assert [one.pid for one in held] == pids[:1]
    held += store_claim(manager, concurrency=limits, room=9)
    assert [one.pid for one in held] == [*pids[:2], *pids[3:]], "counted in one batch"
    more = manager.start_many(
        [steps("m:f", name=name, priority=5) for name in "aab"]
        + [steps("m:f", name="c", priority=-5), steps("m:f", name="a", dedicated=True)]
        + [steps("m:f", priority=-9)]
    )
    # Those that are passed over do not stand in the way of others.
    [one] = store_claim(manager, concurrency=limits, room=1)
    assert one.pid == more[3]
    assert [one.pid for one in store_claim(manager, concurrency=limits)] == [more[5]]
    assert store_claim(manager, concurrency=limits) == []
    store_end(manager, held[0], "error")
    [one] = store_claim(manager, concurrency=limits)
    assert one.pid == more[0], "the first of those that were passed over"
    store_end(manager, held[2], "done")
    assert [one.pid for one in store_claim(manager, concurrency=limits)] == [more[2]]
    assert store_claim(manager, concurrency={"a": 2}) == []
    # Who has no limit of its own does not keep one.
    assert {one.pid for one in store_claim(manager)} == {pids[2], more[1], more[4]}


def test_dedicated_ones_have_a_room_of_their_own(manager):
    pids = manager.start_many(
        [steps("m:f", dedicated=n % 2 == 1, priority=n) for n in range(8)]
    )
    held = store_claim(manager, room=2, dedicated=0)
    assert [one.pid for one in held] == [pids[6], pids[4]]
    assert not any(one.dedicated for one in held)
    held = store_claim(manager, room=0, dedicated=1)
    assert [(one.pid, one.dedicated) for one in held] == [(pids[7], True)]
    assert store_claim(manager, room=0, dedicated=0) == []
    held = store_claim(manager, room=5, dedicated=5, most=1)
    assert [one.pid for one in held] == [pids[2]]
    held = store_claim(manager, room=5, dedicated=5, most=3)
    assert [one.pid for one in held] == [pids[0], pids[5], pids[3]]
    assert store_claim(manager, pid=pids[1], room=1, dedicated=0) == []
    assert len(store_claim(manager, pid=pids[1], room=0, dedicated=1)) == 1


def store_random_process(chance):
    return steps(
        "m:f",
        priority=chance.choice((0, 0, -1, 5)),
        queue=chance.choice(("default", "a", "b")),
        dedicated=chance.random() < 0.3,
        name=chance.choice((None, "x", "x", "y", "y")),
        delay=chance.choice((0, 0, 5, 50)),
    )


def test_a_runner_waits_until_just_that_moment_at_which_it_can_claim_something(
    manager, clock
):
    chance, store, held = random.Random(20240313), manager.store, []
    runners = [store.add_runner(name, "", ["default"], None) for name in "ab"]
    pids, claims, empty = [], 0, 0
    for _ in range(250):
        if chance.random() < 0.3:
            pids += manager.start_many(
                store_random_process(chance) for _ in range(chance.randint(1, 6))
            )
        if chance.random() < 0.5:
            clock.advance(chance.choice((1, 4, 50)))
        for one in [one for one in held if chance.random() < 0.1]:
            held.remove(one)
            store_end(manager, one, chance.choice(("done", "stopped")))
        if chance.random() < 0.1:
            sql = "UPDATE process SET crashes = 1 WHERE status = 'queued' AND id % 2"
            with store.transaction() as db:
                db.execute(sql)
        wanted = procman.Demand(
            chance.sample(("default", "a", "b", "c"), chance.randint(1, 3)),
            None,
            {name: chance.randint(1, 2) for name in "xyz" if chance.random() < 0.8},
            chance.randint(0, 4),
            chance.randint(0, 2),
            chance.choice((None, None, 1, 3)),
        )
        if pids and chance.random() < 0.1:
            wanted = procman.Demand(("default",), chance.choice(pids), {}, 1, 1)
        due = store.next_due(wanted)
        with store.transaction() as db:
            found = store.claim_due(db, chance.choice(runners), wanted)
        assert bool(found) == (due is not None and due <= clock.at), wanted
        held += found
        claims, empty = claims + bool(found), empty + (not found)
        if wanted.pid is None:
            most = wanted.room + wanted.dedicated
            assert len(found) <= (most if wanted.most is None else wanted.most)
            assert sum(one.dedicated for one in found) <= wanted.dedicated
            for name, limit in wanted.concurrency.items():
                mine = [one for one in found if store.find(one.pid)["name"] == name]
                assert not mine or manager.count(name=name, status="running") <= limit
    assert claims > 40 and empty > 40


def test_prune_leaves_a_series_what_is_left_of_it(manager, clock):
    first = manager.start_process(steps("m:f", interval=60))
    store_end(manager, *store_claim(manager), "error")
    again = manager.retry(first)
    assert manager.retry_failed(dry_run=True) == []
    clock.advance(59)
    [held] = store_claim(manager)
    assert held.pid == again
    store_end(manager, held, "error")
    clock.advance(1)
    [held] = store_claim(manager)
    assert manager.prune(30) == 1
    with pytest.raises(procman.NotFound):
        manager.get_process_info(first)
    left = [info.pid for info in manager.list_processes(series=first)]
    assert sorted(left) == sorted([again, held.pid])
    for pid in left:
        assert manager.count(series=pid) == 2
    store_end(manager, held, "done")
    assert manager.count(series=first, status="queued") == 1
    # Its number is nobody else's: what it was retried as is not that of another.
    assert manager.retry_failed(dry_run=True) == [(again, None)]
    [(_, new)] = manager.retry_failed()
    assert manager.get_process_info(new).series == first
    assert manager.prune(0) == 2 and manager.count() == 2
    other = manager.start_process(steps("m:g"))
    store_end(manager, store_claim(manager, pid=other)[0], "error")
    assert manager.retry_failed(dry_run=True) == [(other, None)]
    assert manager.cancel_all(series=first) and manager.count(status="open") == 0
    manager.prune(0)
    with pytest.raises(procman.NotFound):
        manager.list_processes(series=first)
    rows = manager.store.read(
        "SELECT (SELECT count(*) FROM definition), (SELECT count(*) FROM data)"
    )
    assert tuple(rows[0]) == (0, 0)


def store_random_verb(chance, manager, clock, held, pids):
    """Do something that a user, a runner or the clock might do."""
    verb = chance.choice(("start", "start", "claim", "claim", "end", "end", "steer"))
    pid = chance.choice(pids or ["0" * 32])
    if verb == "start":
        key = chance.choice(({"once": True}, {"unique": True}, {"key": "k"}, {}))
        more = chance.choice(({}, {"interval": chance.choice((-1, 60, 61))}))
        process = steps("m:f", "m:g", retry=chance.randint(0, 1), **key, **more)
        pids.append(manager.start_process(process, {"x": chance.randint(0, 1)}))
    elif verb == "claim":
        held += store_claim(manager, room=chance.randint(1, 3))
    elif verb == "end" and held:
        endings = ("done", "done", "error", "timeout", "interrupt", "stopped")
        one = held.pop(chance.randrange(len(held)))
        if store_end(manager, one, chance.choice(endings)) == "step":
            held.append(one._replace(step_index=1, data="{}"))
    elif verb == "steer":
        call = chance.choice(("cancel", "pause", "proceed", "retry", "clock", "crash"))
        if call == "clock":
            clock.advance(chance.choice((1, 60, 400, 400, -5000)))
        elif call == "crash" and chance.random() < 0.3:
            store_crash(manager)
        elif call != "crash":
            pids += {getattr(manager, call)(pid)} - set(pids)
            pids += [info.pid for info in manager.list_processes()[:1]]


@pytest.mark.parametrize("seed", range(4))
def test_no_key_is_taken_twice_and_no_series_has_two_runs_whatever_happens(
    manager, clock, seed
):
    chance, held, pids, refused = random.Random(seed), [], [], 0
    for _ in range(250):
        try:
            store_random_verb(chance, manager, clock, held, pids)
        except (procman.WrongState, procman.NotFound):
            refused += 1
        twice = manager.store.read(
            """
            SELECT once_key FROM process
             WHERE once_key IS NOT NULL AND finished_at IS NULL
               AND NOT cancel_requested
             GROUP BY once_key HAVING count(*) > 1"""
        )
        assert [tuple(row) for row in twice] == []
        twice = manager.store.read(
            """
            SELECT series FROM process JOIN definition
                ON definition.id = process.definition
             WHERE finished_at IS NULL AND text LIKE '%"interval":%'
             GROUP BY series HAVING count(*) > 1"""
        )
        assert [tuple(row) for row in twice] == []
    assert refused < 200 and manager.count(status="final") > 20
    assert manager.store.trouble() is None
    manager.cancel_all()
    store_crash(manager)
    assert manager.count(status="open") == 0


# ===========================================================================
# 6. Steps
# ===========================================================================

# More steps, in more.py: `give` and `do` take Python text, so that tests are tables.
MORE = '''
import asyncio, contextlib, ctypes, json, os, signal, subprocess, sys, threading, time
from pathlib import Path
from procman import ProcessStep, current
from steps import mark

LISTEN = """
import signal, socket, sys
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
server = socket.create_server(("127.0.0.1", 0))
with open(sys.argv[1], "w") as file:
    file.write(str(server.getsockname()[1]) + ";")
while True:
    server.accept()[0].close()
"""


class Outer:
    class Inner:
        @staticmethod
        def run(data):
            return {"nested": True}

class Async(ProcessStep):
    async def execute(self, data):
        await asyncio.sleep(0)
        return {"async": True}

class Empty:
    pass

class Half:
    execute = "not callable"

class Own(BaseException):
    pass

class Broken(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def give(data):
    return eval(data["give"])

def do(data):
    mark(data, "do")
    exec(data["do"], globals(), {"data": data})

def place(data):
    names = ("MINE", "GONE", "PROCMAN_STEP")
    return {"cwd": os.getcwd(), **{name: os.environ.get(name) for name in names}}

def deep(levels):
    found = {}
    for _ in range(levels):
        found = {"in": found}
    return found

def forever():
    return forever()

def listen(path, *more):
    """Start a program that answers on the port in the file, and wait until it does."""
    child = subprocess.Popen([sys.executable, "-c", LISTEN, path, *more])
    await_file(path)
    return child

def await_file(path):
    deadline = time.monotonic() + 30
    while not (os.path.exists(path) and os.path.getsize(path)):
        assert time.monotonic() < deadline
        time.sleep(0.005)

def meet(data):
    """Succeed only beside another that runs at the same time."""
    mark(data, "in")
    ledger, deadline = Path(data["ledger"]), time.monotonic() + 30
    while ledger.read_text().count("in ") % 2:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(0.05)
    mark(data, "out")

def hold(data):
    """Run until the file `go` is there."""
    mark(data, "hold")
    await_file(data["go"])
    return {"held": True}

def stay(data):
    """Start a program and never end; neither listens to SIGTERM."""
    if "deaf" in data:
        signal.signal(signal.SIGTERM, lambda *_: mark(data, "TERM"))
        listen(data["port"], "deaf")
    else:
        listen(data["port"])
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(600)
'''
PYTHON = sys.executable


@pytest.fixture
def more(home):
    """The home directory, with more.py."""
    (home / "more.py").write_text(MORE, encoding="utf-8")
    return home


@pytest.fixture
def direct(more, monkeypatch):
    """A StepExecutor; what it makes this process import is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    modules = set(sys.modules)
    yield StepExecutor({"greeting": lambda: "the service"})
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def outcomes(manager, specs, data=None, **options):
    """Run processes of one step each, in one drain: {name of the step: its record}."""
    pids = manager.start_many(
        (ManagedProcess({name: spec}), (data or {}).get(name, {}))
        for name, spec in specs.items()
    )
    drain(manager, **options)
    return {name: manager.get_process_info(pid) for name, pid in zip(specs, pids)}


def run_codes(manager, codes, **options):
    """The same for texts of Python that a step executes."""
    data = {code: {"do": code} for code in codes}
    return outcomes(manager, dict.fromkeys(codes, "more:do"), data, **options)


def answers(path):
    """Whether the program that `listen` started is alive."""
    import socket

    port = eventually(lambda: path.exists() and path.read_text().partition(";")[0])
    try:
        socket.create_connection(("127.0.0.1", int(port)), timeout=5).close()
    except ConnectionError:
        return False
    return True


ADD = "import json, sys; d = json.load(sys.stdin); print(json.dumps({'n': d['n'] + 1}))"
BUILT = {"args": [1, "x"], "kwargs": {"k": [2]}, "services": ["greeting"]}
GREETED = {"given": ["the service", "1", "x"], "named": {"k": [2]}}
FORMS = {  # name: (spec, output for {"n": 4})
    "function": ("steps:double", {"n": 8}),
    "class": ("steps:Greeter", {"given": [], "named": {}}),
    "class with all": ({"class": "steps:Greeter", **BUILT}, GREETED),
    "factory": ({"factory": "steps:make_greeter", **BUILT}, GREETED),
    "call": ({"call": "steps:double"}, {"n": 8}),
    "async call": ({"call": "steps:coroutine"}, {"async": True}),
    "async class": ("more:Async", {"async": True}),
    "nested name": ("more:Outer.Inner.run", {"nested": True}),
    "file": ("sub/own.py:Own", {"own": "from beside"}),
    "file call": ({"call": "./sub/own.py:Own.static"}, {"static": 4}),
    "None": ("steps:nothing", {"n": 4}),
    "command text": (
        {"command": [PYTHON, "-c", "print(input())"]},
        {"stdout": '{"n":4}\n', "exit_code": 0},
    ),
    "command json": ({"command": [PYTHON, "-c", ADD], "output": "json"}, {"n": 5}),
    "shell": ({"shell": "echo a && echo b"}, {"stdout": "a\nb\n", "exit_code": 0}),
}
OWN = """
import beside
class Own:
    def execute(self, data):
        return {"own": beside.text}
    @staticmethod
    def static(data):
        return {"static": data["n"]}
"""


def own_file(home):
    (home / "sub").mkdir()
    (home / "sub" / "own.py").write_text(OWN)
    (home / "sub" / "beside.py").write_text("text = 'from beside'")
    return str(home / "sub" / "own.py")


def normal(output):
    """The output of a command, less what Windows makes of a line's end."""
    if "stdout" in output:
        lines = output["stdout"].splitlines()
        output["stdout"] = "".join(line.rstrip() + "\n" for line in lines)
    return output


def test_every_form_of_a_step_works_in_a_worker(manager, more):
    path = own_file(more)
    forms = {**FORMS, "path": (path + ":Own", {"own": "from beside"})}
    specs = {name: spec for name, (spec, _) in forms.items()}
    data = {name: {"n": 4} for name in specs}
    infos = outcomes(manager, specs, data, services="steps:services")
    assert {name: info.error for name, info in infos.items() if info.error} == {}
    found = {name: normal(info.output) for name, info in infos.items()}
    assert found == {name: output for name, (_, output) in forms.items()}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_step_works_without_a_queue(direct, more, name):
    own_file(more)
    spec, output = FORMS[name]
    assert normal(direct.execute({"a": spec}, {"n": 4})) == output


def test_each_step_gets_the_output_of_the_one_before_and_none_passes_it_on(
    manager, direct
):
    pipeline = {"a": "steps:add_one", "b": "steps:nothing", "c": "steps:double"}
    pid = manager.start_process(ManagedProcess(pipeline), {"n": 4, "more": 1})
    assert drain(manager) == 1
    info = manager.get_process_info(pid)
    assert (info.status, info.output, info.step) == ("finished", {"n": 10}, None)
    assert list(info.steps.items()) == [(name, "finished") for name in "abc"]
    assert direct.execute(pipeline, {"n": 4, "more": 1}) == {"n": 10}
    assert direct.execute({}, {"kept": 1}) == {"kept": 1}


def test_cwd_and_env_hold_for_one_step_of_any_form(manager, more, monkeypatch):
    monkeypatch.setenv("GONE", "here")
    (more / "sub").mkdir()
    code = (
        "import json, os; print(json.dumps({'cwd': os.getcwd(), **{name:"
        " os.environ.get(name) for name in ('MINE', 'GONE', 'PROCMAN_STEP')}}))"
    )
    common = {"cwd": "sub", "env": {"MINE": "ä", "GONE": None}}
    infos = outcomes(
        manager,
        {
            "call": {"call": "more:place", **common},
            "class": {"factory": "more:Outer", **common},
            "command": {"command": [PYTHON, "-c", code], "output": "json", **common},
            "after": "more:place",
            "plain": {"command": [PYTHON, "-c", code], "output": "json"},
            "nowhere": {"call": "more:place", "cwd": "no such place"},
        },
        max_workers=1,
    )
    sub = {"cwd": str(more / "sub"), "MINE": "ä", "GONE": None}
    top = {"cwd": str(more), "MINE": None, "GONE": "here"}
    assert infos["call"].output == {**sub, "PROCMAN_STEP": None}
    assert infos["command"].output == {**sub, "PROCMAN_STEP": "command"}
    assert infos["after"].output == {**top, "PROCMAN_STEP": None}
    assert infos["plain"].output == {**top, "PROCMAN_STEP": "plain"}
    assert infos["nowhere"].status == "error"
    assert "no such place" in infos["nowhere"].error["message"]


def test_a_command_is_told_about_its_process(manager, home):
    code = (
        "import json, os; print(json.dumps({name: value for name, value in"
        " os.environ.items() if name.startswith('PROCMAN_')}))"
    )
    step = {"command": [PYTHON, "-c", code], "output": "json"}
    pid = manager.start_process(steps("steps:nothing", step))
    drain(manager)
    found = manager.get_process_info(pid).output
    found.pop("PROCMAN_TREE")
    assert found == {
        "PROCMAN_PID": pid,
        "PROCMAN_STEP": "b",
        "PROCMAN_ATTEMPT": "1",
        "PROCMAN_KEY": f"{pid}.b.1",
        "PROCMAN_DB": manager.path,
    }


def test_any_form_of_a_step_may_interrupt(manager, direct):
    forms = {
        "class": "steps:Ask",
        "call": {"call": "steps:double", "interrupt": True},
        "command": {"shell": "echo x", "interrupt": True},
        "none": {"call": "steps:nothing", "interrupt": True},
        "not": {"call": "steps:double", "interrupt": False},
    }
    infos = outcomes(manager, forms, {name: {"n": 1} for name in forms})
    assert {name: info.status for name, info in infos.items()} == {
        **dict.fromkeys(forms, "interrupted"),
        "not": "finished",
    }
    assert infos["class"].output == {"n": 1, "question": "go on?"}
    assert (infos["call"].output, infos["none"].output) == ({"n": 2}, {"n": 1})
    both = {"a": forms["call"], "b": "steps:fail"}
    assert direct.execute(both, {"n": 1}) == {"n": 2}
    assert direct.execute_until(both, {"n": 1}) == ({"n": 2}, True)
    assert direct.execute_until({"a": "steps:double"}, {"n": 1}) == ({"n": 2}, False)


MISSING = {  # spec: what its error says, {home} filled in
    "nosuchmodule:name": ["ModuleNotFoundError", "'nosuchmodule'", "{home}"],
    "nosuchpackage.inner:name": ["ModuleNotFoundError", "nosuchpackage", "{home}"],
    "steps:NoSuch": ["AttributeError", "'NoSuch'", "'steps'", "steps.py"],
    "more:Outer.Gone": ["AttributeError", "Outer.Gone", "more.py"],
    "gone/file.py:name": ["ModuleNotFoundError", "no file", "{home}", "file.py"],
    "imports:name": ["ModuleNotFoundError", "nosuchneighbour"],
    "broken:name": ["SyntaxError", "broken.py"],
}


def test_missing_code_is_an_error_that_says_where_it_was_looked_for(manager, more):
    (more / "imports.py").write_text("import nosuchneighbour\n")
    (more / "broken.py").write_text("def (:\n")
    specs = {name: name for name in MISSING}
    specs["service"] = {"class": "steps:Greeter", "services": ["nosuch"]}
    infos = outcomes(manager, specs, services="steps:services")
    for name, words in MISSING.items():
        error = infos[name].error
        said = f"{error['type']} {error['message']}"
        for word in words:
            assert word.format(home=more) in said, name
        assert (infos[name].status, error["step"]) == ("error", name)
    assert "imports.py" in infos["imports:name"].error["traceback"]
    said = infos["service"].error["message"]
    assert "'nosuch'" in said and "greeting" in said


def test_what_has_no_execute_is_an_error_that_names_the_step(manager, direct):
    specs = {
        "instance": "more:Empty",
        "dict": "steps:services",
        "class": {"class": "more:Empty"},
        "attribute": {"class": "more:Half"},
        "factory": {"factory": "steps:service"},
        "call": {"call": "steps:services"},
    }
    for name, info in outcomes(manager, specs).items():
        assert (info.status, info.error["step"]) == ("error", name)
        assert "has no execute" in info.error["message"], name
        with pytest.raises(Exception, match="has no execute") as caught:
            direct.execute({"fine": "steps:nothing", name: specs[name]})
        assert name in str(caught.value)


BAD_RESULTS = {
    "[1]": "must be a JSON object, not list",
    "'text'": "must be a JSON object, not str",
    "False": "must be a JSON object, not bool",
    "{'a': [float('nan')]}": r"\.a\[0\] is nan",
    "{'a': float('-inf')}": r"\.a is -inf",
    "{'a': '\\ud800'}": r"\.a has a lone surrogate",
    "{'\\udfff': 1}": "lone surrogate",
    "{'a': {1, 2}}": r"\.a is a set",
    "{'a': b'x'}": r"\.a is a bytes",
    "{1: 2}": "has the key 1",
    "{'a': 2 ** 200}": r"\.a is an integer beyond 64 bits",
    "deep(100_000)": "nested deeper than 200",
    "{'a': current}": r"\.a is a function",
}


def test_a_result_that_json_cannot_carry_is_an_error_of_its_step(manager, direct):
    data = {text: {"give": text} for text in BAD_RESULTS}
    data["itself"] = {"give": "(lambda found: found.update(a=found) or found)({})"}
    data["good"] = {"give": "{'a': (1, 2.5, None, True, 'ä😀', 2 ** 63)}"}
    infos = outcomes(manager, dict.fromkeys(data, "more:give"), data)
    for name, words in {**BAD_RESULTS, "itself": "nested deeper than 200"}.items():
        info = infos[name]
        assert (info.status, info.error["step"], info.output) == ("error", name, None)
        assert re.search(words, info.error["message"]), name
        with pytest.raises(ValueError, match=words):
            direct.execute({name: "more:give"}, data[name])
    assert infos["good"].output == {"a": [1, 2.5, None, True, "ä😀", 2**63]}


RAISED = {  # code of a step: (type, part of the message)
    "raise ValueError('no luck')": ("ValueError", "no luck"),
    "sys.exit()": ("SystemExit", "sys.exit"),
    "sys.exit(0)": ("SystemExit", "sys.exit(0)"),
    "sys.exit('text')": ("SystemExit", "text"),
    "raise KeyboardInterrupt": ("KeyboardInterrupt", ""),
    "raise Own('mine')": ("Own", "mine"),
    "raise Broken": ("Broken", "cannot be shown"),
    "forever()": ("RecursionError", "recursion"),
    "raise MemoryError": ("MemoryError", ""),
    "bytearray(1 << 62)": ("MemoryError", ""),
    "raise ValueError('\\ud800')": ("ValueError", r"\ud800"),
    "raise ValueError('x' * 10**6)": ("ValueError", "cut ..."),
    "raise StopIteration": ("StopIteration", ""),
    "raise GeneratorExit": ("GeneratorExit", ""),
    "raise asyncio.CancelledError": ("CancelledError", ""),
}


def test_whatever_a_step_raises_is_its_error_and_its_worker_goes_on(manager, more):
    codes = [*RAISED, "print(os.getpid())"]
    infos = run_codes(manager, codes, max_workers=1)
    for code, (kind, words) in RAISED.items():
        error = infos[code].error
        assert infos[code].status == "error"
        assert (error["step"], error["type"]) == (code, kind)
        assert words in error["message"], code
        assert error["exit_code"] is error["signal"] is None
        assert len(error["message"]) < 5000 and len(error["traceback"]) < 20000
        assert kind in error["traceback"]
    assert "more.py" in infos["raise ValueError('no luck')"].error["traceback"]
    assert infos["print(os.getpid())"].status == "finished"


def test_a_step_that_ends_its_worker_is_an_error_and_runs_once(manager, more):
    ends = {
        "os._exit(0)": "exit code 0",
        "os._exit(3)": "exit code 3",
        "os.abort()": "" if WINDOWS else "SIGABRT",
        "ctypes.string_at(0)": "" if WINDOWS else "SIGSEGV",
    }
    if not WINDOWS:
        ends["os.kill(os.getpid(), signal.SIGKILL)"] = "SIGKILL"
    data = {code: {"do": code, "ledger": str(more / "ledger")} for code in ends}
    data["'fine'"] = {"do": "'fine'"}
    infos = outcomes(manager, dict.fromkeys(data, "more:do"), data)
    for code, words in ends.items():
        error = infos[code].error
        if code == "ctypes.string_at(0)" and error["type"] == "OSError":
            continue  # Windows lets Python catch it
        assert (infos[code].status, error["type"]) == ("error", "WorkerDied"), code
        assert words in error["message"] and error["step"] == code
        assert error["signal"] == (words if words.startswith("SIG") else None)
    assert (
        infos["os._exit(3)"].error["exit_code"] == infos["os._exit(3)"].exit_code == 3
    )
    assert infos["os._exit(0)"].exit_code == 1
    assert infos["'fine'"].status == "finished"
    assert read_ledger(more / "ledger") == ["do"] * len(ends)


def python(code, **more):
    return {"command": [PYTHON, "-c", code], **more}


@posix
def test_a_command_is_not_waited_for_longer_because_its_child_goes_on_printing(manager):
    silent, loud = manager.start_many(
        steps({"shell": f"echo first; {child} & exit 0"})
        for child in ("sleep 600", "while :; do echo more; sleep 0.01; done")
    )
    began = time.monotonic()
    assert drain(manager) == 2
    assert time.monotonic() - began < 20
    assert manager.wait(silent).output == {"stdout": "first\n", "exit_code": 0}
    assert manager.wait(loud).output["stdout"].startswith("first\nmore\n")


@posix
def test_a_command_that_closes_its_output_early_still_gets_all_of_its_input(manager):
    data = {"text": "x" * 300_000}
    shell = "exec >&- 2>&-; test $(wc -c) -gt 300000 || exit 3"
    pid = manager.start_process(steps({"shell": shell}), data)
    unread = manager.start_process(steps({"shell": "exec <&-; echo no"}), data)
    assert drain(manager) == 2
    assert manager.wait(pid).output == {"stdout": "", "exit_code": 0}
    assert manager.wait(unread).output == {"stdout": "no\n", "exit_code": 0}


def test_what_a_step_changes_of_its_arguments_no_other_process_sees(manager, home):
    (home / "collect.py").write_text(
        "class Collect:\n"
        "    def __init__(self, given, *, seen):\n"
        "        self.given, self.seen = given, seen\n"
        "    def execute(self, data):\n"
        "        self.given.append(data['n'])\n"
        "        self.seen['n'] = self.seen.get('n', 0) + 1\n"
        "        return {'given': self.given, 'seen': self.seen}\n"
    )
    spec = {"class": "collect:Collect", "args": [[]], "kwargs": {"seen": {}}}
    pids = manager.start_many((steps(spec), {"n": number}) for number in range(3))
    assert drain(manager, max_workers=1) == 3
    for number, info in enumerate(manager.wait_all(pids)):
        assert info.output == {"given": [number], "seen": {"n": 1}}


def test_what_is_printed_between_two_steps_is_not_the_next_ones(manager, home):
    (home / "late.py").write_text(
        "import threading, time\n"
        "def first(data):\n"
        "    def later():\n"
        "        time.sleep(0.3)\n"
        "        print('late')\n"
        "        open('printed', 'w').close()\n"
        "    threading.Thread(target=later, daemon=True).start()\n"
        "def second(data): pass\n"
    )
    with running(manager, "--max-workers", "1"):
        manager.wait(manager.start_process(steps("late:first")), 30)
        eventually((home / "printed").exists)
        pid = manager.start_process(steps("late:second"))
        manager.wait(pid, 30)
    assert manager.logs(pid) == ""


BAD_COMMANDS = {  # name: (spec, type, words, exit code, signal)
    "missing": (
        {"command": ["./nosuchprogram", "x"]},
        ("FileNotFoundError", "nosuchprogram", None, None),
    ),
    "exit": (
        python("import sys; sys.exit('x' * 10**5 + ' the end of it')"),
        ("CommandFailed", "exit code 1: ", 1, None),
    ),
    "code": (
        python("import sys; print('out'); sys.exit(77)"),
        ("CommandFailed", "exit code 77", 77, None),
    ),
    "shell": ({"shell": "exit 3"}, ("CommandFailed", "exit code 3", 3, None)),
    "no json": (
        python("print('hi')", output="json"),
        ("BadSpec", "not valid JSON", 0, 0),
    ),
    "nothing": (python("", output="json"), ("BadSpec", "not valid JSON", 0, 0)),
    "NaN": (python("print('{\"a\": NaN}')", output="json"), ("BadSpec", "nan", 0, 0)),
    "list": (python("print([1])", output="json"), ("BadType", "a JSON object", 0, 0)),
    "deep": (python("print('[' * 10**5)", output="json"), ("BadSpec", "deeper", 0, 0)),
    "latin": (
        python('import os; os.write(1, b\'{"a": "\\xff"}\')', output="json"),
        ("BadSpec", "not valid JSON", 0, 0),
    ),
}
if not WINDOWS:
    BAD_COMMANDS["killed"] = (
        {"shell": "kill -KILL $$"},
        ("CommandFailed", "SIGKILL", None, "SIGKILL"),
    )
    BAD_COMMANDS["forbidden"] = (
        {"command": ["./steps.py"]},
        ("PermissionError", "steps.py", None, None),
    )


def test_a_command_that_fails_is_an_error_that_says_how(manager, home):
    infos = outcomes(manager, {name: spec for name, (spec, _) in BAD_COMMANDS.items()})
    for name, (_, (kind, words, code, number)) in BAD_COMMANDS.items():
        info, error = infos[name], infos[name].error
        assert (info.status, error["type"], error["step"]) == ("error", kind, name)
        assert words in error["message"]
        assert (error["exit_code"], error["signal"]) == (code or None, number or None)
        assert info.exit_code == (code or 1)
    assert infos["exit"].error["message"].endswith("the end of it")
    assert len(infos["exit"].error["message"]) < 5000
    assert str(home) in infos["missing"].error["message"]


def test_a_command_need_not_read_its_input(manager, home):
    step = python("print('done')")
    pid = manager.start_process(steps(step), {"text": "x" * 10_000_000})
    assert drain(manager) == 1
    assert normal(manager.get_process_info(pid).output)["stdout"] == "done\n"


def test_a_command_reads_all_of_a_long_input(manager, home):
    read = "json.load(sys.stdin.buffer)['text']"
    code = f"import json, sys; print(json.dumps({{'n': len({read})}}))"
    step = python(code, output="json")
    pid = manager.start_process(steps(step), {"text": "ä" * 3_000_000})
    drain(manager)
    assert manager.get_process_info(pid).output == {"n": 3_000_000}


# What comes between the two system calls of a trim is cut from the log without being
# counted; calls take longer under Wine.
TRIM_BYTES = 1 << 20 if WINDOWS else 1 << 17


def test_of_a_command_that_prints_much_the_beginning_and_the_end_are_kept(
    manager, home
):
    line, lines = b"0123456789abcde\n", 1_500_000
    code = f"import os; [os.write(1, {line!r} * 1000) for _ in range({lines // 1000})]"
    step = python(
        "import os; os.write(1, b'first '); " + code + "; os.write(1, b' last')"
    )
    pid = manager.start_process(steps(step))
    drain(manager)
    total = len(line) * lines + len(b"first  last")
    for kept, missing in (
        (manager.get_process_info(pid).output["stdout"], 0),
        (manager.logs(pid), TRIM_BYTES),
    ):
        assert kept.startswith("first 0123") and kept.endswith("abcde\n last")
        head, cut, tail = re.split(r"\n\[\.\.\. (\d+) bytes cut \.\.\.\]\n", kept)
        assert len(head) >= 1 << 16 and 1 << 20 <= len(tail) <= 2 << 20
        assert 0 <= total - (len(head) + int(cut) + len(tail)) <= missing


def test_what_a_command_prints_is_text_whatever_its_bytes(manager, home):
    printed = b"caf\xc3\xa9 \xff \x00 \x1b[31m"
    step = python(f"import os; os.write(1, {printed!r}); os.write(2, b'err')")
    pid = manager.start_process(steps(step))
    drain(manager)
    found = manager.get_process_info(pid).output["stdout"]
    assert found == printed.decode("utf-8", "replace")
    raw = manager.logs(pid, raw=True)
    assert raw in (printed + b"err", b"err" + printed)


def test_a_command_is_over_though_its_child_holds_its_pipes(manager, more):
    code = (
        "import subprocess, sys; sys.path[:0] = [sys.argv[2]]; import more;"
        " print('done', flush=True); more.listen(sys.argv[1])"
    )
    port = more / "port"
    path = os.pathsep.join([str(HERE), str(more)])
    command = [PYTHON, "-c", code, str(port), str(more)]
    began = time.monotonic()
    pid = manager.start_process(
        steps({"command": command, "env": {"PYTHONPATH": path}}, "steps:nothing")
    )
    drain(manager)
    info = manager.get_process_info(pid)
    assert info.status == "finished", info.error
    assert normal(info.output)["stdout"] == "done\n"
    assert time.monotonic() - began < 15
    eventually(lambda: not answers(port))


def test_a_step_without_a_queue_raises_its_exception_as_it_is(direct, more):
    with pytest.raises(ValueError, match="^no luck$") as caught:
        direct.execute({"a": "steps:fail"})
    assert type(caught.value) is ValueError
    for code, kind in {
        "sys.exit(3)": SystemExit,
        "raise KeyboardInterrupt": None,
    }.items():
        with pytest.raises(kind or KeyboardInterrupt):
            direct.execute({"a": "more:do"}, {"do": code})
    with pytest.raises(procman.BadSpec, match=r"steps\.b\.nosuch|unknown key 'nosuch'"):
        direct.execute(
            {"a": "more:do", "b": {"call": "more:do", "nosuch": 1}},
            {"do": "open('ran', 'w')"},
        )
    assert not (more / "ran").exists()


def test_steps_without_a_queue_leave_this_process_as_it_was(direct, more, monkeypatch):
    built = []
    executor = StepExecutor({"list": lambda: built.append(1) or built})
    data = {"do": "os.chdir('..'); os.environ['LEFT'] = '1'; sys.argv.append('left')"}
    given, before = dict(data), (os.getcwd(), dict(os.environ), list(sys.argv))
    use = {"class": "steps:Greeter", "services": ["list"]}
    assert executor.execute({"a": "more:do", "b": use, "c": use}, data) == {
        "given": ["[1]"],
        "named": {},
    }
    with pytest.raises(ValueError):
        executor.execute({"a": "more:do"}, {"do": data["do"] + "; raise ValueError"})
    assert (os.getcwd(), dict(os.environ), sys.argv) == before
    assert data == given and built == [1]


def test_current_is_for_code_inside_a_step(direct):
    found = "{'s': current().step, 'a': current().attempt, 'k': current().key}"
    given = direct.execute(
        {"one": "steps:nothing", "two": "more:give"}, {"give": found}
    )
    assert (given["s"], given["a"]) == ("two", 1)
    assert re.fullmatch(r"[0-9a-f]{32}\.two\.1", given["k"])
    with pytest.raises(procman.ProcmanError, match="inside a step"):
        procman.current()


# ===========================================================================
# 7. Worker
# ===========================================================================


@contextlib.contextmanager
def thread_runner(manager, **options):
    """A waiting Runner in a thread of this process, for the time of the block."""
    given = {"wait": True, "max_workers": 1, "grace": 2, **options}
    runner, ended = Runner(manager, **given), []

    def body():
        try:
            ended.append(runner.run())
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    try:
        yield runner, ended
    finally:
        runner.stop()
        thread.join(30)
        assert not thread.is_alive()


NOISE = """
print("print", flush=True)
print("err", file=sys.stderr)
os.write(1, b"write 1\\n")
os.write(2, b"write 2\\n")
sys.__stdout__.write("no newline at the end of this ")
subprocess.run([sys.executable, "-c", "print('child'); import os; os.write(2, b'ce')"])
subprocess.run("echo shell", shell=True)
print(json.dumps({"id": 1, "ending": "done", "took": 0}) + "\\t{}")
os.write(1, b"\\xff\\x00{\\"retire\\": 1}\\n")
print("\\ud800 \\u20ac")
data["read"] = sys.stdin.read() if sys.stdin else ""
sys.stdout = sys.stderr = None
"""


def test_what_a_step_prints_is_kept_and_never_touches_its_result(manager, more):
    code = NOISE + "data['fine'] = True"
    pid = manager.start_process(steps("more:do", "steps:shout"), {"do": code})
    other = manager.start_process(steps("more:give"), {"give": "{'quiet': 1}"})
    assert drain(manager, max_workers=1) == 2
    info = manager.get_process_info(pid)
    assert (info.status, info.output) == ("finished", {"do": code})
    raw = manager.logs(pid, raw=True).replace(b"\r\n", b"\n")
    for words in (
        *(b"print\n", b"err\n", b"write 1\n", b"write 2\n", b"no newline at the end"),
        *(
            b"child\n",
            b"ce",
            b"shell\n",
            b'"ending": "done"',
            b'\xff\x00{"retire": 1}\n',
        ),
        *("\\ud800 €\n".encode(), b"out b\n", b"err b\n"),
    ):
        assert words in raw, words
    assert raw.index(b"print") < raw.index(b"write 1") < raw.index(b"out b")
    assert manager.logs(other) == ""


def test_output_is_visible_while_the_step_runs(manager, more):
    code = (
        "print('early', end=''); sys.stdout.flush(); await_file('go'); print(' late')"
    )
    with thread_runner(manager):
        pid = manager.start_process(steps("more:do"), {"do": code})
        eventually(lambda: manager.logs(pid) == "early")
        assert manager.get_process_status(pid) == "running"
        (more / "go").write_text("go")
        manager.wait(pid, 30)
    assert manager.logs(pid).splitlines() == ["early late"]


def test_what_several_workers_print_for_one_process_is_shown_once(manager, more):
    code = "print('before', current().step); await_file(current().step); print('after')"
    with thread_runner(manager, max_workers=3):
        others = []
        for name in ("other 1", "other 2"):  # each on a worker of its own
            others.append(
                manager.start_process(ManagedProcess({name: "more:do"}), {"do": code})
            )
            eventually(lambda: manager.logs(others[-1]))
        pid = manager.start_process(steps(*["more:do"] * 3), {"do": code})
        shown = [""]

        def all_shown():
            return manager.logs(pid).replace("\r", "") == shown[0]

        for step, other in (("a", "other 2"), ("b", "other 1"), ("c", None)):
            shown[0] += f"before {step}\n"
            eventually(all_shown, 5)
            assert manager.get_process_info(pid).step == step
            if other:  # its worker takes the next step
                (more / other).write_text("go")
                manager.wait(others.pop(), 30)
            (more / step).write_text("go")
            shown[0] += "after\n"
        manager.wait(pid, 30)
    assert all_shown()


LINE = "0123456789abcde\n"


@pytest.mark.parametrize("lines", [100_000, 800_000])
def test_the_beginning_and_the_end_of_long_output_are_kept(manager, home, lines):
    code = f"[os.write(1, {LINE.encode()!r} * 1000) for _ in range({lines // 1000})]"
    (home / "print_much.py").write_text(f"import os\ndef much(data):\n    {code}\n")
    pid = manager.start_process(
        steps("steps:shout", "print_much:much", "steps:shout", "print_much:much")
    )
    drain(manager)
    kept = manager.logs(pid, raw=True)
    assert manager.get_process_status(pid) == "finished"
    shouted = os.linesep.join(["out a", "err a", ""]).encode()
    assert kept.startswith(shouted + LINE.encode())
    assert kept.endswith(LINE.encode())
    head, cut, tail = re.split(rb"\n\[\.\.\. (\d+) bytes cut \.\.\.\]\n", kept)
    assert len(head) == 64 << 10 and len(tail) == 1 << 20
    printed = 2 * (lines * len(LINE) + len(shouted))
    assert 0 <= printed - (len(head) + int(cut) + len(tail)) <= TRIM_BYTES


def test_the_file_of_a_step_that_never_stops_printing_stays_small(manager, more):
    code = (
        "while not os.path.exists('go'): os.write(1, b'x' * 65536); time.sleep(0.001)"
    )
    with thread_runner(manager):
        pid = manager.start_process(steps("more:do"), {"do": code})
        total = 0
        run = more / "procman.db.run"

        def trimmed():
            nonlocal total
            sizes = [file.stat().st_size for file in run.glob("*.log")]
            total, before = max([total, *sizes]), total
            return any(size < before / 2 for size in sizes)

        eventually(trimmed)
        (more / "go").write_text("go")
        manager.wait(pid, 30)
    kept = manager.logs(pid, raw=True)
    assert b" bytes cut " in kept and len(kept) < 1.2 * (1 << 20)


def test_a_step_leaves_nothing_behind_for_the_next(manager, more):
    spoil = (
        "os.mkdir('deep'); os.chdir('deep'); os.environ['LEFT'] = '1';"
        " os.environ.pop('PATH'); sys.argv[:] = ['x'];"
        " sys.stdout = open(os.devnull, 'w')"
    )
    look = (
        "{'pid': os.getpid(), 'cwd': os.getcwd(), 'left': os.environ.get('LEFT'),"
        " 'path': 'PATH' in os.environ, 'argv': sys.argv[1:]}"
    )
    args = {"first": 1, "second": "two words"}
    data = [
        {"do": spoil, "give": look},
        {"do": spoil + "; raise ValueError", "give": look},
    ]
    pids = [
        manager.start_process(steps("more:give"), data[0]),
        manager.start_process(steps("more:do", "more:give", args=args), data[0]),
        manager.start_process(steps("more:do"), {"do": "os.rmdir('deep')"}),
        manager.start_process(steps("more:do"), data[1]),
        manager.start_process(steps("more:give"), data[0]),
    ]
    drain(manager, max_workers=1, script_args=["--all", "x y"])
    found = [manager.get_process_info(pid).output for pid in pids]
    common = {"pid": found[0]["pid"], "cwd": str(more), "left": None, "path": True}
    assert found[0] == {**common, "argv": ["--all", "x y"]}
    words = ["--first", "1", "--second", "two words", "--all", "x y"]
    assert found[1] == {**common, "argv": words}
    assert found[4] == found[0]
    assert manager.get_process_status(pids[3]) == "error"


def test_a_worker_whose_imported_file_has_changed_is_replaced(manager, home):
    (home / "teller.py").write_text(
        "import os, helper_b\n"
        "def tell(data):\n    return {'v': helper_b.v, 'p': os.getpid()}\n"
    )
    (home / "helper_b.py").write_text("v = 1\n")
    with thread_runner(manager):

        def tell():
            pid = manager.start_process(steps("teller:tell"))
            return manager.wait(pid, 30).output

        first, again = tell(), tell()
        assert first == again and first["v"] == 1
        (home / "helper_b.py").write_text("v = 2  # another\n")
        second = eventually(lambda: [found for found in [tell()] if found["v"] == 2])[0]
        assert second["p"] != first["p"]
        (home / "steps.py").write_text("broken(")  # not imported: nobody minds
        assert tell() == second


def test_modules_of_the_same_name_in_two_directories_do_not_mix(
    manager, home, monkeypatch
):
    pids = []
    for name in ("one", "two", "one"):
        (home / name).mkdir(exist_ok=True)
        (home / name / "same.py").write_text(f"def tell(data): return {{'{name}': 1}}")
        monkeypatch.chdir(home / name)
        pids += manager.start_many([steps("same:tell"), steps("./same.py:tell")])
    drain(manager, max_workers=1)
    names = [list(manager.get_process_info(pid).output or "") for pid in pids]
    assert names == [["one"], ["one"], ["two"], ["two"], ["one"], ["one"]]


def test_modules_come_from_where_start_was_called_whatever_cwd_says(manager, home):
    (home / "sub").mkdir()
    (home / "sub" / "steps.py").write_text("def nothing(data): return {'wrong': 1}")
    (home / "sub" / "base64.py").write_text("raise ValueError('not me')")
    (home / "uses.py").write_text("def use(data):\n    import base64")
    infos = outcomes(
        manager,
        {
            "a": {"call": "steps:nothing", "cwd": "sub"},
            "b": {"call": "uses:use", "cwd": "sub"},
        },
    )
    assert [info.output for info in infos.values()] == [{}, {}]


@pytest.mark.skipif(WINDOWS, reason="close() waits there for another thread's read()")
def test_a_step_that_closes_descriptors_harms_no_other(manager, more):
    codes = ["os.closerange(0, 256)", "os.closerange(3, 256)", "print('fine')"]
    infos = run_codes(manager, codes, max_workers=1)
    for code in codes[:2]:
        assert infos[code].error["type"] == "WorkerDied"
        assert "descriptors" in infos[code].error["message"]
    assert manager.logs(infos["print('fine')"].pid).splitlines() == ["fine"]


@pytest.mark.parametrize(
    "code",
    ["sys.stdout.close()", "sys.__stderr__.detach()", "os.close(0)", "os.close(1)"],
)
def test_a_step_that_closes_its_streams_harms_no_other(manager, more, code):
    codes = [code, "print('fine', file=sys.stderr); print('too')"]
    infos = run_codes(manager, codes, max_workers=1)
    assert infos[codes[1]].status == "finished", infos[codes[1]].error
    assert sorted(manager.logs(infos[codes[1]].pid).splitlines()) == ["fine", "too"]


@pytest.mark.parametrize(
    "code",
    [
        "listen('port')",
        "listen('port', 'deaf')",
        pytest.param(
            "subprocess.run("
            "[sys.executable, '-c', 'import more; more.listen(\"port\")'],"
            " env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})",
            id="orphan",
        ),
        pytest.param(
            "subprocess.Popen([sys.executable, '-c', LISTEN, 'port'], close_fds=True,"
            " start_new_session=True, env={}); await_file('port')",
            id="session",
        ),
    ],
)
def test_what_a_step_leaves_running_is_gone_soon_after_it(manager, more, code):
    pid = manager.start_process(steps("more:do"), {"do": code})
    with thread_runner(manager):
        assert manager.wait(pid, 30).status == "finished", manager.get_process_info(pid)
        if not WINDOWS:  # Wine does not tell a worker what its job holds
            eventually(lambda: not answers(more / "port"), 5)
    eventually(lambda: not answers(more / "port"), 5)


def test_a_worker_serves_so_many_processes_and_is_replaced(manager, more):
    tell = {"give": "{**data, 'seen': [*data.get('seen', ()), os.getpid()]}"}
    pids = manager.start_many([(steps("more:give", "more:give"), tell)] * 5)
    assert drain(manager, max_workers=1, jobs_per_worker=2) == 5
    seen = [manager.get_process_info(pid).output["seen"] for pid in pids]
    served = [worker for pair in seen for worker in set(pair)]
    counts = sorted(served.count(worker) for worker in set(served))
    assert max(counts) <= 2 and len(counts) >= 3


def test_services_are_built_once_a_worker(manager, home):
    (home / "own_services.py").write_text(
        "import os\n"
        "def build():\n"
        "    open('built', 'a').write(f'{os.getpid()} ')\n"
        "    return 'built'\n"
        "registry = {'used': build, 'unused': lambda: 1 / 0, 'ready': 7}\n"
    )
    spec = {"class": "steps:Greeter", "services": ["used", "ready"]}
    pids = manager.start_many([steps(spec, spec)] * 3)
    assert drain(manager, max_workers=1, services="own_services:registry") == 3
    for pid in pids:
        assert manager.get_process_info(pid).output["given"] == ["built", "7"]
    assert len((home / "built").read_text().split()) == 1
    pid = manager.start_process(steps(spec))
    drain(manager, services="own_services:nosuch")
    assert "'nosuch'" in manager.get_process_info(pid).error["message"]


def test_a_step_knows_what_it_is_and_can_say_how_far(manager, clock, more):
    tell = (
        "print('told', current().step, current().attempt, current().key, current().pid,"
        " current().index, current().cancelled); current().log('logged', 1);"
        " current().progress(1, 4, 'one'); await_file('go'); current().progress(4, 4);"
        " 1 / (current().attempt - 1)"
    )
    process = steps("steps:nothing", "more:do", retry=1, retry_interval=5)
    with thread_runner(manager):
        pid = manager.start_process(process, {"do": tell})
        found = eventually(lambda: manager.get_process_info(pid).progress)
        assert found == {"done": 1, "total": 4, "message": "one"}
        (more / "go").write_text("go")
        eventually(lambda: manager.get_process_info(pid).attempt == 2)
        clock.advance(6)
        manager.ring()
        info = manager.wait(pid, 30)
    assert info.progress == {"done": 4, "total": 4, "message": None}
    told = [line for line in manager.logs(pid).splitlines() if line[:4] == "told"]
    assert told == [f"told b {n} {pid}.b.1 {pid} 1 False" for n in (1, 2)]
    assert re.search(
        r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d logged 1\r?$", manager.logs(pid)
    )


@pytest.mark.parametrize(
    "given", ["-1", "2, 1", "'1'", "1, None, 'a\\x1b'", "float('nan')"]
)
def test_progress_that_makes_no_sense_is_refused(direct, given):
    with pytest.raises(ValueError):
        direct.execute({"a": "more:do"}, {"do": f"current().progress({given})"})


# ===========================================================================
# 8. Manager
# ===========================================================================

BAD_DATA = {  # Python text: the type of the error, the place in it
    "[1]": (TypeError, "data"),
    "'text'": (TypeError, "data"),
    "{'at': [__import__('datetime').datetime.now()]}": (TypeError, "data.at[0]"),
    "{'a': {'b': b'x'}}": (TypeError, "data.a.b"),
    "{'a': {1}}": (TypeError, "data.a"),
    "{'a': object()}": (TypeError, "data.a"),
    "{'a': {3: 4}}": (TypeError, "data.a"),
    "{None: 4}": (TypeError, "data"),
    "{'a': float('nan')}": (ValueError, "data.a"),
    "{'a': [0, float('inf')]}": (ValueError, "data.a[1]"),
    "{'a': '\\ud800'}": (ValueError, "data.a"),
    "{'a': 2 ** 64}": (ValueError, "data.a"),
    "{'a': 'x' * (65 << 20)}": (ValueError, "larger than 64 MiB"),
}


@pytest.mark.parametrize("text", BAD_DATA)
def test_data_that_json_cannot_carry_is_refused_and_nothing_is_queued(manager, text):
    kind, place = BAD_DATA[text]
    data = eval(text)
    for call in (
        lambda: manager.start_process(steps("steps:nothing"), data),
        lambda: manager.start_many([steps(), (steps("steps:nothing"), data)]),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert place in str(caught.value)
    assert manager.count() == 0


def test_many_are_started_in_order_all_or_none(manager):
    given = [steps("steps:double"), (steps("steps:double"), {"n": 2}), steps()]
    pids = manager.start_many(iter(given))
    assert len(set(pids)) == 3 and all(
        re.fullmatch("[0-9a-f]{32}", pid) for pid in pids
    )
    assert [info.pid for info in manager.list_processes()] == pids[::-1]
    assert [manager.get_process_status(pid) for pid in pids] == [
        *("queued", "queued", "finished")
    ]

    def breaks():
        yield steps()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        manager.start_many(breaks())
    for wrong in ({"a": "steps:double"}, None, "steps:double"):
        with pytest.raises(TypeError, match="ManagedProcess"):
            manager.start_many([steps(), wrong])
    assert manager.start_many([]) == []
    assert manager.count() == 3


def test_a_process_can_start_with_a_transaction_of_the_caller(manager, home):
    manager.count()
    with contextlib.closing(sqlite3.connect(manager.path, isolation_level=None)) as own:
        with pytest.raises(procman.ProcmanError, match="BEGIN"):
            manager.start_process(steps(), connection=own)
        own.execute("BEGIN IMMEDIATE")
        lost = manager.start_process(steps("steps:nothing"), connection=own)
        own.execute("ROLLBACK")
        own.execute("BEGIN IMMEDIATE")
        pid = manager.start_process(steps("steps:nothing"), {"n": 1}, connection=own)
        assert manager.count() == 0
        own.execute("COMMIT")
    with contextlib.closing(sqlite3.connect(home / "other.db")) as other:
        other.execute("BEGIN")
        with pytest.raises(procman.StorageError, match="not to"):
            manager.start_process(steps(), connection=other)
    with pytest.raises(procman.NotFound):
        manager.get_process_info(lost)
    assert drain(manager) == 1
    assert manager.get_process_info(pid).output == {"n": 1}


def test_defaults_hold_for_processes_that_do_not_say_otherwise(home, clock):
    given = {"queue": "mail", "retry": 2, "priority": 5, "timeout": "1m", "delay": 60}
    path = home / "procman.db"
    with contextlib.closing(ProcessManager(path, defaults=given, now=clock)) as manager:
        one = manager.get_process_info(manager.start_process(steps("steps:nothing")))
        own = {"queue": "own", "retry": 0, "priority": 0, "timeout": None, "delay": 0}
        pid = manager.start_process(steps("steps:nothing", **own))
        two = manager.get_process_info(pid)
    assert (one.queue, one.retry_left, one.priority, one.timeout) == ("mail", 2, 5, 60)
    assert (two.queue, two.retry_left, two.priority) == ("own", 0, 0)
    assert (one.due_at, two.due_at) == (clock.at + 60, clock.at)
    for wrong, kind in {
        "nosuch": TypeError,
        "retry": TypeError,
        "queue": ValueError,
    }.items():
        with pytest.raises(kind, match=wrong):
            ProcessManager(path, defaults={wrong: "a b"})


def test_proceed_merges_over_what_waits_and_any_runner_continues(manager):
    data = {"kept": 1, "new": {"old": 1}, "n": 1}
    pid = manager.start_process(steps("steps:Ask", "steps:add_one"), data)
    drain(manager)
    waiting = manager.get_process_info(pid)
    assert (waiting.status, waiting.step) == ("interrupted", "b")
    assert waiting.steps == {"a": "interrupted", "b": "queued"}
    for wrong in ([1], "text", 3, {"a": {1}}, {"a": float("nan")}):
        with pytest.raises(ValueError):
            manager.proceed(pid, wrong)
    assert manager.get_process_info(pid) == waiting
    assert manager.proceed(pid[:8], {"new": {"more": 2}, "n": 5}) == pid
    assert manager.get_process_status(pid) == "queued"
    assert drain(manager) == 1
    info = manager.get_process_info(pid)
    expected = {"kept": 1, "new": {"more": 2}, "n": 6, "question": "go on?"}
    assert (info.status, info.output, info.attempt) == ("finished", expected, 1)


def test_proceed_goes_to_the_front_or_finishes_at_once(manager, clock):
    last, first, second = manager.start_many(
        [steps("steps:Ask"), *[steps("steps:Ask", "steps:nothing")] * 2]
    )
    drain(manager)
    clock.advance(-50)
    queued = manager.start_many([steps("steps:nothing")] * 3)
    clock.advance(100)
    manager.proceed(last, {"n": 1})
    info = manager.get_process_info(last)
    assert (info.status, info.output) == ("finished", {"question": "go on?", "n": 1})
    assert info.finished_at == clock.at and info.exit_code == 0
    manager.proceed(first)
    manager.proceed(second)
    assert drain(manager, max_jobs=2, max_workers=1) == 2
    states = [manager.get_process_status(pid) for pid in (first, second, *queued)]
    assert states == ["finished"] * 2 + ["queued"] * 3


def test_of_simultaneous_proceeds_one_wins(manager, clock):
    pids = manager.start_many([steps("steps:Ask", "steps:nothing")] * 8)
    drain(manager)
    won, barrier = [], threading.Barrier(3)

    def proceed(number):
        own = ProcessManager(manager.path, now=clock)
        with contextlib.closing(own):
            for pid in pids:
                barrier.wait(20)
                try:
                    own.proceed(pid, {"won": number})
                    won.append((pid, number))
                except procman.WrongState as error:
                    assert f"cannot proceed process {pid}: it is" in str(error)

    threads = [threading.Thread(target=proceed, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(pid for pid, _ in won) == sorted(pids)
    drain(manager)
    for pid, number in won:
        assert manager.get_process_info(pid).output["won"] == number


def test_each_verb_is_refused_where_it_makes_no_sense(manager, more):
    queued = manager.start_process(steps("steps:nothing", delay=60))
    finished, failed = manager.start_many([steps(), steps("steps:fail")])
    waiting = manager.start_process(steps("steps:Ask", "steps:nothing"))
    cancelled = manager.start_process(steps("steps:nothing", delay=60))
    assert manager.cancel(cancelled[:8]) == cancelled
    drain(manager)
    for pid in (queued, finished, failed, cancelled):
        with pytest.raises(procman.WrongState, match=f"cannot proceed process {pid}"):
            manager.proceed(pid)
    for pid in (finished, failed):
        before = manager.get_process_info(pid)
        with pytest.raises(procman.WrongState, match=f"cannot cancel process {pid}"):
            manager.cancel(pid)
        assert manager.get_process_info(pid) == before
    for pid in (queued, waiting, cancelled):
        assert manager.cancel(pid) == manager.cancel(pid) == pid
        info = manager.get_process_info(pid)
        assert info.status == "cancelled" and info.finished_at
    assert drain(manager) == 0


def test_cancel_ends_what_runs_with_its_tree(manager, more):
    go, ledger = str(more / "go"), str(more / "ledger")
    with thread_runner(manager, max_workers=2, grace=0.3):
        deaf = manager.start_process(
            steps("more:stay", "steps:nothing", retry=3),
            {"port": str(more / "port"), "deaf": 1, "ledger": ledger},
        )
        held = manager.start_process(steps("more:hold"), {"go": go, "ledger": ledger})
        assert answers(more / "port")
        eventually(lambda: "hold" in read_ledger(more / "ledger"))
        with pytest.raises(procman.WrongState, match="it is running"):
            manager.proceed(held)
        for pid in (deaf, held, held):
            assert manager.cancel(pid) == pid
        for pid in (deaf, held):
            with pytest.raises(procman.ProcessCancelled) as caught:
                manager.wait(pid, 30)
            assert caught.value.info.status == "cancelled"
        assert not answers(more / "port")
    info = manager.get_process_info(deaf)
    assert info.steps == {"a": "cancelled", "b": "queued"}
    assert (info.output, info.exit_code) == (None, 1)
    if not WINDOWS:
        assert "TERM" in read_ledger(more / "ledger")


def test_a_cancel_holds_against_the_end_of_the_last_step(manager, more):
    data = {"go": str(more / "go"), "ledger": str(more / "ledger")}
    ends = "await_file('go'); mark(data, 'over')"
    pid = manager.start_process(steps("more:do"), {**data, "do": ends})
    with running(manager):
        eventually(lambda: read_ledger(more / "ledger") == ["do"])
        with manager.store.transaction() as db:  # the result has to wait for this
            (more / "go").write_text("go")
            eventually(lambda: "over" in read_ledger(more / "ledger"))
            manager.store.cancel(db, pid)
        with pytest.raises(procman.ProcessCancelled):
            manager.wait(pid, 30)


def test_wait_gives_the_record_or_raises_how_it_ended(manager):
    fine, failed, waiting, cancelled, still = manager.start_many(
        [
            (steps("steps:double"), {"n": 1}),
            steps("steps:fail"),
            steps("steps:Ask"),
            steps("steps:nothing"),
            steps("steps:nothing", delay=60),
        ]
    )
    manager.cancel(cancelled)
    with thread_runner(manager):
        assert manager.wait(fine, 30).output == {"n": 2}
        with pytest.raises(procman.ProcessFailed, match="no luck") as caught:
            manager.wait(failed[:10], timeout=30)
        assert caught.value.info == manager.get_process_info(failed)
        assert manager.wait(waiting, 30).status == "interrupted"
    with pytest.raises(procman.ProcessCancelled):
        manager.wait(cancelled)
    for length in (0, 0.02):
        with pytest.raises(TimeoutError, match=f"{still}: queued") as timed_out:
            manager.wait(still, length)
    assert isinstance(timed_out.value, procman.WaitTimeout)
    settled = [fine, failed, waiting, cancelled]
    infos = manager.wait_all(reversed(settled), 1)
    assert [info.pid for info in infos] == settled[::-1]
    assert [info.pid for info in manager.wait_any([still, fine], 1)] == [fine]
    for wait in (manager.wait_all, manager.wait_any):
        with pytest.raises(procman.WaitTimeout):
            wait([still], 0.02)
    with pytest.raises(ValueError):
        manager.wait(still, -1)


def test_a_wait_ends_when_another_program_settles_the_process(manager, clock):
    pid = manager.start_process(steps("steps:nothing", delay=60))
    other = threading.Thread(target=lambda: cli("cancel", pid, "--db", manager.path))
    other.start()
    with pytest.raises(procman.ProcessCancelled):
        manager.wait(pid, 30)
    other.join()


def test_logs_are_text_or_the_bytes_themselves(manager, more):
    code = r"os.write(1, b'a\xff\xc3\xa9\x00\n')"
    pid = manager.start_process(steps("more:do"), {"do": code})
    assert (manager.logs(pid), manager.logs(pid, raw=True)) == ("", b"")
    drain(manager)
    assert manager.logs(pid[:9], raw=True) == b"a\xff\xc3\xa9\x00\n"
    assert manager.logs(pid) == "a\\xff\xe9\x00\n"


NO_PIDS = [
    "0" * 32,
    "abcdef",
    "abc",
    "",
    "A" * 32,
    "../../etc/passwd",
    "%",
    "' OR 1 --",
]


def test_an_unknown_pid_is_not_found_by_any_verb(manager):
    manager.start_process(steps("steps:nothing"))
    verbs = [
        *(manager.get_process_info, manager.get_process_status, manager.proceed),
        *(manager.cancel, manager.wait, manager.logs),
        lambda pid: manager.wait_all([pid], 1),
        lambda pid: manager.wait_any([pid], 1),
    ]
    for verb in verbs:
        for pid in [*NO_PIDS, "a" * 10_000_000, "é" * 32, "0" * 31 + "\n"]:
            with pytest.raises(procman.NotFound) as caught:
                verb(pid)
            assert len(str(caught.value)) < 300
        for pid in (None, 3, b"0" * 32, ["0" * 32]):
            with pytest.raises(TypeError):
                verb(pid)
    assert manager.count(status="queued") == 1


# --- cancelling --------------------------------------------------------------


def event_rows(manager):
    """All of the table of events, as (number, kind)."""
    return [(row["number"], row["kind"]) for row in store_events(manager)]


def held_at(more, **data):
    """Data for `more:hold`: it runs until the file `go` is there."""
    return {"go": str(more / "go"), "ledger": str(more / "ledger"), **data}


def until_held(more, times=1):
    """Wait until so many steps run that only the file `go` ends."""
    eventually(lambda: read_ledger(more / "ledger").count("hold") >= times)


def set_columns(manager, pid, **columns):
    """What no verb sets: columns of a row, by SQL."""
    with manager.store.transaction() as db:
        names = ", ".join(f"{name} = ?" for name in columns)
        sql = f"UPDATE process SET {names} WHERE pid = ?"
        assert db.execute(sql, (*columns.values(), pid)).rowcount == 1


def all_final(manager):
    """One process of each final state: {state: pid}."""
    slow = steps("more:do", timeout=0.3)
    pids = manager.start_many(
        [
            (steps("steps:double"), {"n": 1}),
            steps("steps:fail"),
            (slow, {"do": "time.sleep(600)"}),
            steps("steps:nothing", delay=60),
        ]
    )
    manager.cancel(pids[3])
    drain(manager)
    found = dict(zip(procman.FINAL_STATES, pids))
    assert statuses(manager, pids) == list(found)
    return found


def test_cancel_ends_every_open_state_once_and_a_second_cancel_is_fine(manager, more):
    queued, later, paused, waits, asks, runs = manager.start_many(
        [
            steps("steps:nothing", queue="other"),
            steps("steps:nothing", delay=60),
            steps("steps:nothing", queue="other"),
            steps("steps:nothing", queue="other"),
            steps("steps:Ask", "steps:nothing"),
            (steps("more:hold"), held_at(more)),
        ]
    )
    manager.pause(paused)
    set_columns(manager, waits, status="waiting")
    with thread_runner(manager):
        until_held(more)
        pids = [queued, later, paused, waits, asks, runs]
        assert statuses(manager, pids) == [
            *("queued", "queued", "interrupted", "waiting", "interrupted", "running")
        ]
        for pid in pids:
            assert manager.cancel(pid[:12]) == manager.cancel(pid) == pid
        manager.wait_all(pids, 20)
    assert statuses(manager, pids) == ["cancelled"] * 6
    assert [kind for _, kind in event_rows(manager)].count("cancel") == 6
    infos = map(manager.get_process_info, pids)
    assert all(info.finished_at and info.output is None for info in infos)


def test_what_is_final_is_neither_cancelled_nor_paused_nor_changed_by_that(
    manager, more, capsys
):
    found, database = all_final(manager), ("--db", manager.path)
    before = [*map(manager.get_process_info, found.values())], event_rows(manager)
    assert manager.cancel(found["cancelled"]) == found["cancelled"]
    for status, pid in found.items():
        for verb in ("cancel", "pause"):
            if (status, verb) == ("cancelled", "cancel"):
                continue
            with pytest.raises(
                procman.WrongState, match=f"cannot {verb} process {pid}"
            ):
                getattr(manager, verb)(pid)
            code, out, err = call_main(capsys, verb, pid, *database)
            assert (code, out, err.count("\n")) == (4, "", 1) and status in err
    after = [*map(manager.get_process_info, found.values())], event_rows(manager)
    assert before == after


def filtered_processes(manager, clock):
    """Processes that differ in what filters look at: {name: pid}."""
    names = ("old", "plain", "named", "queued elsewhere", "parent", "child", "asks")
    clock.advance(-3600)
    pids = [manager.start_process(steps("m:f"))]
    clock.advance(3600)
    pids += manager.start_many(
        [
            steps("m:f"),
            steps("m:f", name="nightly"),
            steps("m:f", queue="mail"),
            steps("m:f"),
            steps("m:f", name="part"),
            steps("m:f", "m:f"),
        ]
    )
    found = dict(zip(names, pids))
    row = manager.store.find(found["parent"])
    set_columns(manager, found["child"], parent=row["id"])
    manager.pause(found["asks"])
    return found


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, "old, plain, named, queued elsewhere, parent, child, asks"),
        ({"status": "open", "queue": "default"},
         "old, plain, named, parent, child, asks"),
        ({"status": "interrupted"}, "asks"),
        ({"status": "running"}, ""),
        ({"name": "nightly"}, "named"),
        ({"name": "night"}, ""),
        ({"queue": "mail"}, "queued elsewhere"),
        ({"since": "5m"}, "plain, named, queued elsewhere, parent, child, asks"),
        ({"since": "5m", "status": "queued", "queue": "default"},
         "plain, named, parent, child"),
        ({"parent": "parent"}, "child"),
        ({"parent": "child"}, ""),
        ({"series": "plain"}, "plain"),
        ({"name": None, "status": None, "since": None, "queue": "mail"},
         "queued elsewhere"),
    ],
)  # fmt: skip
def test_cancel_all_cancels_what_passes_its_filters_and_nothing_else(
    manager, clock, filters, expected
):
    found = filtered_processes(manager, clock)
    final = manager.start_process(ManagedProcess({}, name="nightly", queue="mail"))
    for name in ("parent", "series"):
        if name in filters:
            filters = {**filters, name: found[filters[name]]}
    wanted = [found[name] for name in expected.split(", ") if name]
    if "status" not in filters:
        assert manager.count(**filters, status="open") == len(wanted)
    assert manager.cancel_all(**filters) == wanted
    assert {info.pid for info in manager.list_processes(status="cancelled")} == {
        *wanted
    }
    assert manager.get_process_status(final) == "finished"
    assert manager.cancel_all(**filters) == []


def test_cancel_all_reaches_more_than_one_transaction_takes(manager):
    pids = manager.start_many(
        steps("m:f", name="many" if n % 12 else "few") for n in range(1320)
    )
    many = [pid for n, pid in enumerate(pids) if n % 12]
    assert manager.cancel_all(name="many") == many and len(many) == 1210
    assert manager.count(status="open") == 110
    assert [kind for _, kind in event_rows(manager)].count("cancel") == 1210


def test_cancel_all_refuses_filters_that_make_no_sense(manager):
    pid = manager.start_process(steps("m:f"))
    for wrong in (
        *({"status": state} for state in ("final", *procman.FINAL_STATES)),
        *({"status": "done"}, {"colour": "red"}, {"since": "soon"}, {"name": ""}),
        *({"queue": 3}, {"since": True}),
    ):
        with pytest.raises(procman.BadSpec):
            manager.cancel_all(**wrong)
    for wrong in ({"parent": "0" * 32}, {"series": "0" * 32}):
        with pytest.raises(procman.NotFound):
            manager.cancel_all(**wrong)
    assert manager.get_process_status(pid) == "queued"


def test_cancel_all_ends_series_and_what_runs_where_cancel_ends_one_run(manager, more):
    series = steps("more:hold", interval=0)
    alone, together = manager.start_many([(series, held_at(more))] * 2)
    with thread_runner(manager, max_workers=2, grace=0.3):
        until_held(more, 2)
        manager.cancel(alone)
        assert manager.cancel_all(series=together) == [together]
        assert manager.cancel_all(series=together) == []
        manager.wait_all([alone, together], 20)
    first, second = manager.list_processes(series=alone, order="oldest")
    assert (first.status, second.status, second.series) == (
        "cancelled",
        "queued",
        alone,
    )
    assert [info.status for info in manager.list_processes(series=together)] == [
        "cancelled"
    ]
    assert manager.cancel_all() == [second.pid]
    assert drain(manager) == 0 and manager.count() == 3


def test_cancel_all_looks_past_what_has_ended_before_it_takes_the_lock(manager):
    manager.start_many([ManagedProcess({})] * 3000)
    pids = manager.start_many([steps("m:f")] * 2)
    db, locked = manager.store.db, []
    db.set_progress_handler(lambda: locked.append(db.in_transaction), 1000)
    assert manager.cancel_all() == pids
    db.set_progress_handler(None, 0)
    assert False in locked and locked.count(True) < 5


# --- pausing -----------------------------------------------------------------


def test_a_process_paused_in_a_step_stops_before_the_next_and_proceeds(manager, more):
    data = held_at(more, n=1)
    pid = manager.start_process(steps("more:hold", "steps:add_one"), data)
    with thread_runner(manager):
        until_held(more)
        assert manager.pause(pid[:8]) == manager.pause(pid) == pid
        assert manager.get_process_status(pid) == "running"
        assert manager.why(pid) == (
            "it is running: step 'a', attempt 1, and asked to pause"
        )
        (more / "go").write_text("go")
        info = manager.wait(pid, 20)
        assert (info.status, info.step, info.error) == ("interrupted", "b", None)
        assert info.steps == {"a": "interrupted", "b": "queued"}
        assert info.output == {"held": True} and info.finished_at is None
        assert manager.pause(pid) == pid  # it is already
        manager.proceed(pid, {"n": 5})
        info = manager.wait(pid, 20)
    assert (info.status, info.output) == ("finished", {"held": True, "n": 6})
    assert (info.attempt, info.crashes) == (1, 0)
    assert read_ledger(more / "ledger") == ["hold"]
    kinds = [kind for _, kind in event_rows(manager)]
    assert kinds == ["start", "claim", "pause", "proceed", "claim", "finish"]


def test_what_was_paused_and_has_proceeded_is_not_paused_again(manager, more):
    specs = ("more:hold", "steps:nothing", "steps:Ask", "steps:nothing")
    pid = manager.start_process(steps(*specs), held_at(more))
    with thread_runner(manager):
        until_held(more)
        manager.pause(pid)
        (more / "go").write_text("go")
        assert manager.wait(pid, 20).step == "b"
        manager.proceed(pid)
        assert manager.wait(pid, 20).step == "d"  # for c asks
        manager.proceed(pid)
        assert manager.wait(pid, 20).status == "finished"


def test_a_step_that_interrupts_while_it_is_paused_interrupts_once(manager, more):
    asks = {"call": "more:hold", "interrupt": True}
    process = steps(asks, "steps:nothing", "steps:nothing")
    pid = manager.start_process(process, held_at(more))
    with thread_runner(manager):
        until_held(more)
        manager.pause(pid)
        (more / "go").write_text("go")
        assert manager.wait(pid, 20).step == "b"
        manager.proceed(pid)
        assert manager.wait(pid, 20).status == "finished"


def test_a_failure_of_a_paused_step_waits_with_its_next_attempt(manager, more, clock):
    code = "mark(data, 'hold'); await_file(data['go']); raise ValueError('again')"
    process = steps("more:do", retry=1, retry_interval=60)
    pid = manager.start_process(process, held_at(more, do=code))
    with thread_runner(manager):
        until_held(more)
        manager.pause(pid)
        (more / "go").write_text("go")
        info = manager.wait(pid, 20)
        assert (info.status, info.step, info.attempt) == ("interrupted", "a", 2)
        assert info.error["message"] == "again" and info.retry_left == 0
        assert info.steps == {"a": "interrupted"}
        assert "because again" in manager.why(pid)
        clock.advance(3600)
        manager.proceed(pid)
        with pytest.raises(procman.ProcessFailed, match="again"):
            manager.wait(pid, 20)
    assert manager.get_process_info(pid).attempt == 2
    assert read_ledger(more / "ledger").count("do") == 2


def test_a_paused_step_that_fails_for_good_or_is_the_last_ends_all_the_same(
    manager, more
):
    code = "mark(data, 'hold'); await_file(data['go']); raise ValueError('for good')"
    last, failed = manager.start_many(
        [
            (steps("more:hold"), held_at(more)),
            (steps("more:do", "steps:nothing"), held_at(more, do=code)),
        ]
    )
    with thread_runner(manager, max_workers=2):
        until_held(more, 2)
        manager.pause(last)
        manager.pause(failed)
        (more / "go").write_text("go")
        infos = manager.wait_all([last, failed], 20)
    assert [info.status for info in infos] == ["finished", "error"]


def test_a_cancel_wish_wins_over_a_pause(manager, more):
    data = held_at(more)
    pid = manager.start_process(steps("more:hold", "steps:nothing"), data)
    with manager.store.transaction() as db:
        (held,) = manager.store.claim_due(db, 1, demand(1))
    manager.pause(pid)
    manager.cancel(pid)
    with pytest.raises(procman.WrongState, match="cancelled"):
        manager.pause(pid)
    with manager.store.transaction() as db:
        done = procman.Outcome("done", "{}")
        (settled,) = manager.store.record(db, [(held, done)])
    assert settled.event == "cancel"
    assert manager.get_process_status(pid) == "cancelled"


def test_what_is_paused_while_it_is_queued_waits_at_once_whenever_it_is_due(
    manager, clock
):
    now, later = manager.start_many(
        [(steps("steps:double", "steps:add_one", **when), {"n": 1})
         for when in ({}, {"delay": 3600})]
    )  # fmt: skip
    for pid in (now, later):
        assert manager.pause(pid) == pid
        info = manager.get_process_info(pid)
        assert (info.status, info.step, info.output) == ("interrupted", "a", {"n": 1})
        assert info.steps == {"a": "queued", "b": "queued"} and info.started_at is None
    clock.advance(61)
    assert drain(manager) == 0
    manager.proceed(now)
    manager.proceed(later, {"n": 5})
    assert drain(manager) == 2
    assert [info.output["n"] for info in manager.wait_all([now, later], 0)] == [3, 11]


def test_a_pause_holds_when_the_runner_is_stopped_or_killed(manager, more):
    pid = manager.start_process(steps("more:hold", "steps:nothing"), held_at(more))
    with thread_runner(manager, grace=0.2):
        until_held(more)
        manager.pause(pid)
    info = manager.get_process_info(pid)
    assert (info.status, info.step, info.crashes) == ("interrupted", "a", 0)
    manager.proceed(pid)
    with running(manager) as runner:
        until_held(more, 2)
        manager.pause(pid)
        runner.kill()
        runner.wait()
    assert manager.get_process_status(pid) == "running"
    assert drain(manager) == 0
    info = manager.get_process_info(pid)
    assert (info.status, info.step, info.attempt) == ("interrupted", "a", 1)
    assert (info.crashes, info.error) == (1, None)
    (more / "go").write_text("go")
    manager.proceed(pid)
    assert drain(manager) == 1 and manager.get_process_status(pid) == "finished"


# --- retrying ----------------------------------------------------------------


def test_retry_repeats_from_what_failed_and_after_success_from_the_first(manager, more):
    found = all_final(manager)
    before = {pid: manager.get_process_info(pid) for pid in found.values()}
    for status, pid in found.items():
        again = manager.retry(pid[:10])
        info = manager.get_process_info(again)
        assert (info.status, info.step, info.attempt) == ("queued", "a", 1), status
        assert (info.series, info.crashes, info.error) == (pid, 0, None)
        assert again not in found.values() and info.due_at == info.created_at
    assert drain(manager) == 4
    states = [info.status for info in manager.list_processes(limit=4, order="newest")]
    assert states == ["finished", "timeout", "error", "finished"]
    assert {pid: manager.get_process_info(pid) for pid in before} == before


def test_retry_begins_at_any_step_with_its_input_and_data_merged_over_it(manager, more):
    options = {"queue": "mail", "priority": 7, "name": "a name", "retry": 0}
    code = "if data['n'] == 1: raise ValueError('no')"
    process = steps("steps:add_one", "more:do", "steps:add_one", **options)
    pid = manager.start_process(process, {"n": 0, "do": code})
    assert drain(manager, queues=["mail"]) == 1
    assert manager.get_process_info(pid).step == "b"
    for step, data, first, reached in [
        (None, None, "b", None),
        (None, {"n": 2}, "b", 3),
        ("a", None, "a", None),
        ("a", {"n": 5}, "a", 7),
        ("b", {"n": 5}, "b", 6),
        ("c", {"n": 8}, "c", 9),
    ]:
        again = manager.retry(pid, step, data)
        info = manager.get_process_info(again)
        assert (info.step, info.name, info.queue) == (first, "a name", "mail")
        assert (info.priority, info.series, info.attempt) == (7, pid, 1)
        done = [name for name, state in info.steps.items() if state == "finished"]
        assert "".join(done) == "abc"[: "abc".index(first)]
        assert drain(manager, queues=["mail"]) == 1
        info = manager.get_process_info(again)
        if reached is None:
            assert (info.status, info.step) == ("error", "b")
        else:
            assert (info.status, info.output["n"]) == ("finished", reached)
    assert info.output == {"n": 9}  # c had no input of its own
    last = next(iter(manager.events(again, since=0)))
    assert (last["kind"], last["detail"]) == ("start", {"retry_of": pid})


def test_retry_refuses_what_it_cannot_do_and_starts_nothing(manager, more):
    failed, stepless, queued, asks = manager.start_many(
        [
            steps("steps:fail", "steps:nothing"),
            ManagedProcess({}),
            steps("steps:nothing", delay=60),
            steps("steps:Ask", "steps:nothing"),
        ]
    )
    drain(manager)
    for pid, step, data, text in [
        (failed, "b", None, "step 'b' of process .* was not reached: give its data"),
        (failed, "c", None, "has no step 'c'; it has: 'a', 'b'"),
        (failed, "", {}, "has no step ''"),
        (stepless, "a", None, "has no step 'a'; it has: none"),
        (failed, None, [1], "data must be a JSON object"),
        (failed, None, {"a": {1}}, "data.a is a set"),
    ]:
        with pytest.raises(procman.BadSpec, match=text):
            manager.retry(pid, step, data)
    for pid in (queued, asks):
        with pytest.raises(procman.WrongState, match=f"cannot retry process {pid}"):
            manager.retry(pid)
    for pid in NO_PIDS:
        with pytest.raises(procman.NotFound):
            manager.retry(pid)
    assert manager.count() == 4
    again = manager.get_process_info(manager.retry(stepless))
    assert (again.status, again.series, again.output) == ("finished", stepless, {})
    again = manager.retry(failed, "b", {"n": 1})
    assert drain(manager) == 1
    assert manager.get_process_info(again).output == {"n": 1}


def test_a_retried_run_joins_its_series_but_does_not_carry_it_on(manager, clock):
    first = manager.start_process(steps("steps:fail", interval=3600))
    assert drain(manager) == 1
    (successor,) = manager.list_processes(status="queued")
    again = manager.retry(first)
    assert drain(manager) == 1
    twice = manager.retry(again)
    clock.advance(100)
    assert drain(manager) == 1
    runs = manager.list_processes(series=again, order="oldest")
    assert [info.pid for info in runs] == [first, successor.pid, again, twice]
    assert {info.series for info in runs} == {first}
    assert manager.count(status="queued") == manager.count() - 3 == 1
    clock.advance(3600)
    assert drain(manager) == 1 and manager.count() == 5  # the series itself goes on


def test_a_cron_expression_may_have_tabs_and_be_long(manager, clock):
    minutes = ",".join(map(str, range(60)))
    for cron in ("0\t3  *\t* *", f"{minutes} {minutes[:60]} * * *"):
        assert manager.start_process(steps("steps:nothing", cron=cron))
    (_, at_three) = manager.list_processes()
    assert time.strftime("%H:%M", time.gmtime(at_three.due_at)) == "03:00"
    with pytest.raises(procman.BadType, match="cron must be a text, not int"):
        steps("steps:nothing", cron=5)


def test_what_is_said_to_a_paused_run_is_not_said_to_the_next(manager, clock):
    first = manager.start_process(steps("steps:nothing", interval="1d"), {"n": 1})
    for data in ({"n": 2}, {"m": 3}):
        manager.pause(first)
        manager.proceed(first, data)
    drain(manager)
    assert manager.get_process_info(first).output == {"n": 2, "m": 3}
    clock.advance(86400)
    drain(manager)
    [_, second, _] = manager.list_processes(series=first)
    assert second.output == {"n": 1}
    again = manager.retry(first)
    drain(manager)
    assert manager.get_process_info(again).output == {"n": 2, "m": 3}


def test_a_series_is_found_by_a_part_of_its_pid_after_its_first_run_was_pruned(
    manager, clock
):
    first = manager.start_process(steps("steps:nothing", interval="1d"))
    drain(manager)
    clock.advance(2 * 86400)
    assert manager.prune("1d") == 1
    for pid in (first, first[:9]):
        assert manager.count(series=pid) == 1
    with pytest.raises(procman.NotFound):
        manager.count(series="f" * 32 if first[0] != "f" else "0" * 32)


def test_retries_of_retries_are_all_of_the_series_of_the_first(manager):
    pids = [manager.start_process(steps("steps:fail"))]
    for _ in range(3):
        drain(manager)
        pids.append(manager.retry(pids[-1]))
    assert manager.get_process_info(pids[0]).series is None
    for pid in pids:
        found = manager.list_processes(series=pid[:9], order="oldest")
        assert [info.pid for info in found] == pids


def test_a_key_is_held_by_one_open_process_also_among_retries(manager):
    process = steps("steps:fail", key="nightly")
    first = manager.start_process(process)
    drain(manager)
    other = manager.start_process(process)
    for _ in range(2):
        with pytest.raises(procman.NotUnique) as caught:
            manager.retry(first)
        assert (caught.value.pid, caught.value.exit_code) == (other, 4)
    assert manager.retry_failed() == [(first, None)]
    assert manager.count() == 2
    drain(manager)
    again = manager.retry(first)
    assert manager.start_process(process) == again
    with pytest.raises(procman.NotUnique):
        manager.retry(other)
    assert manager.count() == 3


def test_a_run_of_a_keyed_series_is_retried_beside_it(manager):
    process = steps("steps:fail", key="nightly", interval="1d")
    first = manager.start_process(process)
    drain(manager)
    again = manager.retry(first)
    open_ones = manager.list_processes(series=first, status="open", order="oldest")
    assert [info.pid for info in open_ones][1:] == [again]
    assert manager.start_process(process) == open_ones[0].pid, "the key is the series'"


@pytest.mark.parametrize(
    ("how", "same"),
    [({}, True), ({"data": {"n": 0}}, True), ({"data": {"n": 1}}, False)]
    + [({"data": {"n": 0.0}}, False), ({"step": "b", "data": {"n": 0}}, False)],
)
def test_a_retry_is_equal_only_to_what_does_the_same(manager, how, same):
    process = steps("steps:fail", "steps:nothing", once=True)
    first = manager.start_process(process, {"n": 0})
    drain(manager)
    again = manager.retry(first, **how)
    assert (manager.start_process(process, {"n": 0}) == again) == same


def test_retry_failed_retries_each_failure_once(manager, more, clock):
    early = manager.start_process(steps("steps:fail", name="red"))
    drain(manager)
    clock.advance(3600)
    found = all_final(manager)
    red, fine = manager.start_many(
        [steps("steps:fail", name="red"), steps("steps:nothing", name="red")]
    )
    drain(manager)
    failures = [early, found["error"], found["timeout"], red]
    everything = manager.count()
    for filters, expected in [
        ({}, failures),
        ({"name": "red"}, [early, red]),
        ({"name": "re"}, []),
        ({"since": "5m"}, failures[1:]),
        ({"since": clock.at}, failures[1:]),
        ({"since": clock.at - 3600}, failures),
        ({"name": "red", "since": "5m"}, [red]),
    ]:
        pairs = [(pid, None) for pid in expected]
        assert manager.retry_failed(**filters, dry_run=True) == pairs, filters
    assert manager.count() == everything
    for wrong in ({"since": "soon"}, {"name": ""}, {"name": 3}):
        with pytest.raises(procman.BadSpec):
            manager.retry_failed(**wrong)
    for filters, expected in [
        ({"name": "red", "since": "5m"}, [red]),
        ({"name": "red"}, [early]),
        ({}, [found["error"], found["timeout"]]),
        ({}, []),
    ]:
        pairs = manager.retry_failed(**filters)
        assert [old for old, _ in pairs] == expected
        for old, new in pairs:
            assert manager.get_process_info(new).series == old
    assert manager.count() == everything + 4
    assert drain(manager) == 4
    again = [old for old, _ in manager.retry_failed(dry_run=True)]
    assert len(again) == 4 and not {*again} & {*failures}  # the retries have failed
    assert fine not in again


def test_what_somebody_else_retries_meanwhile_is_not_retried_twice(manager, more):
    pids = manager.start_many([steps("steps:fail")] * 3)
    drain(manager)

    class Slow(procman.Store):
        """Where somebody is faster between the look and the transaction."""

        def failed(self, filters):
            found = super().failed(filters)
            manager.retry(pids[1])
            return found

    with contextlib.closing(ProcessManager(manager.path)) as other:
        other.store = Slow(manager.path)
        assert [old for old, _ in other.retry_failed()] == [pids[0], pids[2]]
        other.store.close()
    assert manager.count(status="queued") == 3


# --- looking -----------------------------------------------------------------


def test_since_is_when_it_ended_or_for_what_is_open_when_it_began(manager, clock):
    clock.at = 1644411494.0  # 2022-02-09T12:58:14Z
    ended_late, ended_early, open_early = manager.start_many(
        [
            steps("steps:nothing", delay=1000),
            steps("steps:nothing"),
            steps("m:f", at=2e9),
        ]
    )
    drain(manager)
    clock.advance(1000)
    drain(manager)
    open_late = manager.start_process(steps("m:f", at=2e9))
    clock.advance(10)
    late = {ended_late, open_late}
    for since, expected in {
        1644412494: late,
        "1644412494": late,
        "1644412494.0": late,
        "2022-02-09T13:14:54Z": late,
        "2022-02-09T14:14:54+01:00": late,
        "20220209131454": late,
        "10s": late,
        "1m": late,
        "0.5h": {ended_late, ended_early, open_early, open_late},
        "9s": set(),
        1644412494.5: set(),
        "20220209125815": late,
        "20220209125814": {ended_late, ended_early, open_early, open_late},
    }.items():
        found = {info.pid for info in manager.list_processes(since=since)}
        assert found == expected, since
        assert manager.count(since=since) == len(expected)
    assert manager.count(since="10s", status="final") == 1
    for wrong in ("soon", "", "2022-02-09T13:14:54", -1, 1e300, float("nan"), "1.2.3m"):
        with pytest.raises(procman.BadSpec, match="since"):
            manager.count(since=wrong)
    for wrong in (True, [1], b"5m"):
        with pytest.raises(TypeError, match="since"):
            manager.list_processes(since=wrong)


def test_a_series_is_found_by_any_of_its_runs_also_when_the_first_is_gone(
    manager, clock
):
    first = manager.start_process(steps("steps:nothing", interval=3600))
    other = manager.start_process(steps("steps:nothing"))
    for _ in range(3):
        drain(manager)
        clock.advance(3600)
    runs = [info.pid for info in manager.list_processes(series=first, order="oldest")]
    assert len(runs) == 4 and runs[0] == first
    for pid in runs:
        for name in (pid, pid[:8]):
            assert manager.count(series=name) == 4
            assert manager.count(series=name, status="finished") == 3
    assert [info.pid for info in manager.list_processes(series=other)] == [other]
    assert manager.prune(2.5 * 3600) == 2
    for pid in runs:
        assert [info.pid for info in manager.list_processes(series=pid)] == runs[:0:-1]
    for pid in NO_PIDS:
        with pytest.raises(procman.NotFound):
            manager.count(series=pid) if pid else manager.get_process_info(pid)


def test_parts_are_listed_by_what_they_are_part_of(manager):
    above, *parts, other = manager.start_many([steps("m:f")] * 4)
    for pid in parts:
        set_columns(manager, pid, parent=manager.store.find(above)["id"])
    found = manager.list_processes(parent=above[:7])
    assert [info.pid for info in found] == parts[::-1]
    assert {info.parent for info in found} == {above}
    assert manager.get_process_info(other).parent is None
    assert manager.count(parent=other) == 0
    manager.cancel(parts[0])
    assert manager.count(parent=above, status="open") == 1
    with pytest.raises(procman.NotFound):
        manager.count(parent="0" * 32)


def test_lists_are_ordered_and_paged_as_asked(manager, clock):
    second, first, third = manager.start_many(
        [steps("steps:nothing", delay=delay) for delay in (20, 10, 30)]
    )
    for _ in range(2):
        clock.advance(11)
        drain(manager)
    clock.advance(11)
    for order, expected in {
        "newest": [third, first, second],
        "oldest": [second, first, third],
        "due": [first, second, third],
        "ended": [second, first, third],  # what is open comes last
    }.items():
        found = [info.pid for info in manager.list_processes(order=order)]
        assert found == expected, order
        for offset in range(3):
            page = manager.list_processes(order=order, limit=1, offset=offset)
            assert [info.pid for info in page] == [expected[offset]]
    for wrong in ("", "random", "id; --", None, 3):
        with pytest.raises(
            procman.BadSpec, match="order must be one of newest, oldest"
        ):
            manager.list_processes(order=wrong)
    with pytest.raises(TypeError, match="unknown filter 'pid'; known: status, name"):
        manager.list_processes(pid=first)
    with pytest.raises(TypeError, match="unknown filter 'limit'"):
        manager.count(limit=3)


# --- events ------------------------------------------------------------------


def test_the_life_of_a_process_is_told_by_its_events(manager, more):
    fails_once = (
        "if not os.path.exists('tried'):\n"
        "    open('tried', 'w').close()\n"
        "    raise OSError('no')"
    )
    specs = ("more:do", "steps:Ask", "more:hold", "more:do")
    process = steps(*specs, retry=1, retry_interval=0)
    data = held_at(more, do=fails_once)
    pid = manager.start_process(process, data)
    last = {**data, "do": "current().progress(1, 4, 'a quarter')"}
    with thread_runner(manager):
        assert manager.wait(pid, 20).step == "c"
        manager.proceed(pid)
        until_held(more)
        manager.pause(pid)
        (more / "go").write_text("go")
        assert manager.wait(pid, 20).step == "d"
        manager.proceed(pid, last)
        assert manager.wait(pid, 20).status == "finished"
    told = list(manager.events(pid[:6], since=0))
    assert [(event["kind"], event["status"]) for event in told] == [
        *[("start", "queued"), ("claim", "running"), ("retry", "queued")],
        *[("claim", "running"), ("step", "running"), ("interrupt", "interrupted")],
        *[("proceed", "queued"), ("claim", "running"), ("pause", "interrupted")],
        *[("proceed", "queued"), ("claim", "running"), ("progress", "running")],
        ("finish", "finished"),
    ]
    assert {event["kind"]: event["detail"] for event in told if event["detail"]} == {
        "retry": {"step": "a", "type": "OSError", "message": "no"},
        "step": "a",
        "progress": {"done": 1, "total": 4, "message": "a quarter"},
    }
    for event in told:
        assert list(event) == ["number", "at", "pid", "kind", "status", "detail"]
        assert event["pid"] == pid and event["at"] == manager.store.now()
    numbers = [event["number"] for event in told]
    assert numbers == sorted({*numbers})


def test_each_ending_is_an_event_of_its_own(manager, more):
    found = all_final(manager)
    kinds = dict(zip(procman.FINAL_STATES, ("finish", "fail", "time_out", "cancel")))
    for status, pid in found.items():
        *_, last = manager.events(pid, since=0)
        assert (last["kind"], last["status"]) == (kinds[status], status)
    details = [
        list(manager.events(pid, since=0))[-1]["detail"] for pid in found.values()
    ]
    assert details[0] is details[3] is None
    assert details[1] == {"step": "a", "type": "ValueError", "message": "no luck"}
    assert details[2]["type"] == "Timeout"


def test_events_begin_now_or_after_a_number_or_with_the_first(manager):
    first, second = manager.start_many([ManagedProcess({})] * 2)
    everything = [event["number"] for event in manager.events(second, since=0)]
    assert len(everything) == 2
    assert list(manager.events(first, since=0))[0]["kind"] == "start"
    assert [event["kind"] for event in manager.events(second, since=everything[0])] == [
        "finish"
    ]
    assert list(manager.events(second, since=everything[1])) == []
    assert list(manager.events(second)) == []  # from now on: it has ended
    assert list(manager.events(second, since=2**62)) == []
    from_now = manager.events()
    third = manager.start_process(ManagedProcess({}))
    assert [next(from_now)["pid"], next(from_now)["pid"]] == [third] * 2
    for wrong in (-1, "0", 1.5, True, 2**63):
        with pytest.raises(procman.BadSpec, match="since"):
            manager.events(since=wrong)
    for wrong in ("done", "", "step"):
        with pytest.raises(procman.BadSpec, match="status"):
            manager.events(status=wrong)
    for pid in NO_PIDS:
        with pytest.raises(procman.NotFound):
            manager.events(pid)


def test_events_are_filtered_by_the_status_that_they_leave(manager, more):
    found = all_final(manager)
    failed = found["error"]
    for status, kinds in {
        "queued": ["start"],
        "running": ["claim"],
        "open": ["start", "claim"],
        "error": ["fail"],
        "final": ["fail"],
        "interrupted": [],
        "waiting": [],
        "finished": [],
    }.items():
        told = list(manager.events(failed, status=status, since=0))
        assert [event["kind"] for event in told] == kinds, status
    final = manager.events(status="final", since=0)
    assert {next(final)["pid"] for _ in range(4)} == {*found.values()}


def test_what_a_filter_of_events_leaves_out_is_read_once(manager, monkeypatch):
    find, looks = manager.store.events, []

    def look(after, *more):
        found = find(after, *more)
        looks.append(after)
        if len(looks) == 1:
            manager.start_process(steps("m:f"))
        if len(looks) == 2:
            manager.cancel(pids[0])
        return found

    pids = manager.start_many([steps("m:f")] * 3)
    monkeypatch.setattr(manager.store, "events", look)
    event = next(manager.events(status="cancelled", since=0))
    assert (event["number"], event["pid"]) == (5, pids[0])
    assert looks == [0, 3, 4]


def test_who_follows_a_process_gets_its_last_event_whenever_that_comes(manager):
    class Hasty(ProcessManager):
        """Where somebody cancels what is followed just before that is looked at."""

        def get_process_status(self, pid):
            looks.append(pid)
            if len(looks) == 3:
                manager.cancel(pid)
            return super().get_process_status(pid)

    looks = []
    pid = manager.start_process(steps("m:f"))
    with contextlib.closing(Hasty(manager.path)) as hasty:
        told = [event["kind"] for event in hasty.events(pid, since=0)]
    assert told == ["start", "cancel"]


def test_who_follows_a_process_that_is_pruned_is_done(manager, clock):
    pid, other = manager.start_many([steps("m:f")] * 2)
    told = manager.events(pid, since=0)
    assert next(told)["kind"] == "start"
    everything = manager.events(since=0)
    assert next(everything)["pid"] == pid
    manager.cancel(pid)
    clock.advance(10)
    assert manager.prune(5) == 1
    assert list(told) == []
    manager.cancel(other)  # also a number that was there when it was pruned is passed
    assert [next(everything)["kind"] for _ in range(2)] == ["start", "cancel"]


def test_a_listener_ends_when_its_callback_returns_true_and_nothing_else(manager):
    pids = manager.start_many([ManagedProcess({})] * 4)
    answers, told = [None, 1, "yes", [True], False, True, True], []

    def call(event):
        told.append(event["number"])
        return answers[len(told) - 1]

    assert manager.listen(call, since=0) is None
    assert len(told) == 6
    ends = []
    manager.listen(ends.append, pids[2], "final", since=0)  # with the process
    assert [(event["pid"], event["kind"]) for event in ends] == [(pids[2], "finish")]
    with pytest.raises(ZeroDivisionError):
        manager.listen(lambda event: 1 / 0, since=0)


def test_no_event_is_missed_or_told_twice_while_many_write(live):
    def write(number):
        with contextlib.closing(ProcessManager(live.path)) as own:
            for _ in range(200):
                own.start_process(steps("steps:nothing", name=f"writer {number}"))

    def follow(told):
        with contextlib.closing(ProcessManager(live.path)) as own:
            ended = 0
            for event in own.events(since=0):
                told.append((event["number"], event["kind"]))
                ended += event["status"] == "finished"
                if ended == 800:
                    return

    live.count()
    told = [], []
    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    threads += [threading.Thread(target=follow, args=(one,)) for one in told]
    with running(live, "--max-workers", "2"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    table = event_rows(live)
    assert [kind for _, kind in table].count("finish") == 800
    for one in told:
        numbers = [number for number, _ in one]
        assert numbers == sorted({*numbers})
        assert one == table


# --- waiting -----------------------------------------------------------------


def test_waits_for_none_one_any_and_all(manager, more):
    assert (
        manager.wait_all([]) == manager.wait_any([]) == manager.wait_all(iter([])) == []
    )
    asks, fine, held = manager.start_many(
        [steps("steps:Ask", "m:f"), steps("steps:nothing"),
         (steps("more:hold"), held_at(more))]
    )  # fmt: skip
    with thread_runner(manager, max_workers=2):
        (found,) = manager.wait_any([held, fine], 20)
        assert found.pid == fine
        infos = manager.wait_all([fine, asks, fine], 20)
        assert [info.pid for info in infos] == [fine, asks, fine]
        with pytest.raises(procman.WaitTimeout, match=f"1 of 2 .*{held}: running"):
            manager.wait_all([fine, held], 0.05)
        (more / "go").write_text("go")
        assert [info.status for info in manager.wait_any([held], 20)] == ["finished"]
    for wrong in ("text", None, 3, [3]):
        with pytest.raises(TypeError):
            manager.wait_all(wrong)
    for wait in (manager.wait_all, manager.wait_any):
        for wrong, kind in ((-1, ValueError), ("soon", ValueError), ([], TypeError)):
            with pytest.raises(kind, match="timeout"):
                wait([fine], wrong)


def test_waits_can_be_awaited_several_at_once_in_one_event_loop(manager, more):
    import asyncio

    fine, failed, cancelled, held, later = manager.start_many(
        [
            (steps("steps:double"), {"n": 1}),
            steps("steps:fail"),
            steps("m:f", delay=60),
            (steps("more:hold"), held_at(more)),
            steps("m:f", delay=60),
        ]
    )
    manager.cancel(cancelled)

    async def several():
        assert await manager.wait_all_async([]) == []
        assert await manager.wait_any_async([]) == []
        waits = [
            manager.wait_async(fine, 20),
            manager.wait_async(failed, 20),
            manager.wait_async(cancelled, 20),
            manager.wait_any_async([later, fine], 20),
            manager.wait_all_async([fine, failed], 20),
            manager.wait_async(later, 0.05),
            manager.wait_async("0" * 32, 1),
        ]
        given_up = asyncio.ensure_future(manager.wait_async(held))
        found = await asyncio.gather(*waits, return_exceptions=True)
        assert not given_up.done()
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        return found

    with thread_runner(manager, max_workers=2):
        one, error, gone, any_one, both, late, nobody = asyncio.run(several())
        assert manager.get_process_status(held) == "running"
        (more / "go").write_text("go")
        assert asyncio.run(manager.wait_async(held, 20)).output == {"held": True}
    assert one.output == {"n": 2} and any_one == [one]
    assert [info.pid for info in both] == [fine, failed]
    assert isinstance(error, procman.ProcessFailed) and "no luck" in str(error)
    assert error.info == both[1] and error.info.error["type"] == "ValueError"
    assert isinstance(gone, procman.ProcessCancelled) and gone.info.pid == cancelled
    assert isinstance(late, procman.WaitTimeout) and isinstance(
        nobody, procman.NotFound
    )


# --- why ---------------------------------------------------------------------


def test_why_says_what_holds_a_queued_process_up(manager, more, clock):
    one = manager.start_process(steps("steps:fail", retry=1, retry_interval=300))
    later = manager.start_process(steps("m:f", delay=90, queue="other"))
    mine = manager.start_process(steps("m:f", queue="other"))
    for pid, queue in ((one, "default"), (mine, "other")):
        assert manager.why(pid[:7]) == (
            f"no runner serves queue '{queue}': start one that does"
        )
    assert drain(manager) == 1
    at = procman.timestamp(clock.at + 300)
    assert manager.why(one) == f"it is due at {at} UTC, in 5 min: attempt 2"
    at = procman.timestamp(clock.at + 90)
    assert manager.why(later) == f"it is due at {at} UTC, in 90 s"
    data = held_at(more)
    with thread_runner(manager):
        held = manager.start_process(steps("more:hold", "steps:nothing"), data)
        until_held(more)
        assert manager.why(held) == "it is running: step 'a', attempt 1"
        low, high, last = (
            manager.start_process(steps("steps:nothing", priority=priority))
            for priority in (0, 5, 0)
        )
        assert manager.why(high) == (
            "it is the next in queue 'default', as soon as a worker is free"
        )
        for pid, ahead in ((low, 1), (last, 2)):
            assert manager.why(pid) == (
                f"{ahead} ahead of it in queue 'default'"
            )
        assert manager.why(mine).startswith("no runner serves queue 'other'")
        (more / "go").write_text("go")
        manager.wait_all([held, high, low, last], 20)
    claimed = [
        row["pid"]
        for row in manager.store.read(
            "SELECT pid FROM event JOIN process ON process.id = event.process"
            " WHERE kind = 'claim' ORDER BY number"
        )
    ]
    assert claimed[-3:] == [high, low, last]  # as it was said
    assert manager.why(mine).startswith("no runner serves queue 'other'")


def test_why_knows_how_many_of_a_name_may_run_at_once(manager, more):
    named = steps("more:hold", name="mine")
    first, second = manager.start_many([(named, held_at(more))] * 2)
    with thread_runner(manager, max_workers=2, concurrency={"mine": 1}):
        until_held(more)
        assert manager.why(second) == "as many named 'mine' run as may at once, 1"
        other = manager.start_process(steps("more:hold"), held_at(more))
        until_held(more, 2)  # which is not held up by the second
        behind = manager.start_process(steps("steps:nothing"))
        assert manager.why(behind) == (
            "it is the next in queue 'default', as soon as a worker is free"
        )
        (more / "go").write_text("go")
        manager.wait_all([first, second, other, behind], 20)


def test_why_says_what_an_interrupted_a_running_and_an_ended_process_waits_for(
    manager, more, clock
):
    asks, last, paused, waits = manager.start_many(
        [
            steps("steps:Ask", "steps:nothing"),
            steps("steps:Ask"),
            steps("steps:nothing", queue="other"),
            steps("steps:nothing", queue="other"),
        ]
    )
    drain(manager)
    manager.pause(paused)
    assert manager.why(asks) == (
        "it is interrupted before step 'b': proceed continues it"
    )
    assert manager.why(paused) == (
        "it is interrupted before step 'a': proceed continues it"
    )
    assert manager.why(last) == (
        "it is interrupted after its last step: proceed continues it"
    )
    set_columns(manager, waits, status="waiting")
    assert manager.why(waits) == "it waits for 0 children"
    crashed = manager.start_process(steps("more:hold", on_lost="ask"), held_at(more))
    with running(manager) as runner:
        until_held(more)
        runner.kill()
        runner.wait()
    assert manager.why(crashed) == "it is running: step 'a', attempt 1"
    assert drain(manager) == 0
    assert manager.why(crashed) == (
        "it is interrupted before step 'a', because its runner died while step 'a' ran:"
        " proceed continues it"
    )
    manager.proceed(crashed)
    with manager.store.transaction() as db:
        manager.store.claim_due(db, 1, demand(1))
    manager.cancel(crashed)
    assert manager.why(crashed) == (
        "it is being cancelled: its runner ends what it has started"
    )
    at = procman.timestamp(clock.at)
    for status, pid in all_final(manager).items():
        said = {"error": ": no luck", "timeout": ": the process ran longer than 0.3 s"}
        assert manager.why(pid) == (
            f"it ended as {status} at {at} UTC{said.get(status, '')}"
        )
    for pid in NO_PIDS:
        with pytest.raises(procman.NotFound):
            manager.why(pid)


def test_a_preview_lists_when_cron_is_due(manager, clock):
    clock.at = 1644411494.0  # a Wednesday, 2022-02-09T12:58:14Z
    days = manager.preview("0 3 * * *", count=3)
    assert [procman.timestamp(at) for at in days] == [
        *("20220210030000", "20220211030000", "20220212030000")
    ]
    assert len(manager.preview("@hourly")) == 10
    for wrong in (0, -1, 10_001, "3", 1.0, True):
        with pytest.raises(procman.BadSpec, match="count"):
            manager.preview("@hourly", count=wrong)
    for cron, tz in (
        ("@soon", "UTC"),
        ("* * * *", "UTC"),
        ("@daily", "Nowhere/At/All"),
    ):
        with pytest.raises(procman.BadSpec):
            manager.preview(cron, tz)


# ===========================================================================
# 9. Runner
# ===========================================================================


def statuses(manager, pids):
    return [manager.get_process_status(pid) for pid in pids]


def test_a_drain_runs_what_is_due_and_returns_how_many_that_were(manager, clock):
    assert drain(manager) == 0
    pids = manager.start_many(
        [
            *[steps("steps:nothing", "steps:nothing")] * 40,
            *(steps("steps:fail"), steps("steps:Ask"), steps()),
            steps("steps:nothing", delay=60),
        ]
    )
    assert drain(manager) == 42
    assert statuses(manager, pids[40:]) == [
        "error",
        "interrupted",
        "finished",
        "queued",
    ]
    assert set(statuses(manager, pids[:40])) == {"finished"}
    assert drain(manager) == 0
    clock.advance(60)
    assert drain(manager) == 1


def test_a_failed_step_is_tried_again_from_its_input_after_ever_longer(
    manager, clock, more
):
    fail = "1 / (current().attempt == 4)"
    process = steps("steps:add_one", "more:do", retry=4, retry_interval=100, backoff=3)
    pid = manager.start_process(process, {"do": fail})
    for attempt, interval in enumerate((100, 300, 900), 1):
        assert drain(manager) == 1
        info = manager.get_process_info(pid)
        assert (info.status, info.attempt) == ("queued", attempt + 1)
        assert info.retry_left == 4 - attempt
        assert interval <= info.due_at - clock.at <= 1.1 * interval
        assert (info.error["type"], info.error["step"]) == ("ZeroDivisionError", "b")
        assert info.steps == {"a": "finished", "b": "queued"}
        clock.advance(interval - 1)
        assert drain(manager) == 0
        clock.advance(1 + interval / 10)
    drain(manager)
    info = manager.get_process_info(pid)
    assert (info.status, info.attempt, info.error) == ("finished", 4, None)
    assert info.output == {"do": fail, "n": 1}


def test_after_the_last_retry_the_failure_is_final(manager, clock, home):
    process = steps("steps:ledger", "steps:fail", retry=1, retry_interval=0)
    pid = manager.start_process(process, {"ledger": str(home / "ledger")})
    assert drain(manager) == 2
    info = manager.get_process_info(pid)
    assert (info.status, info.attempt, info.retry_left) == ("error", 2, 0)
    assert info.steps == {"a": "finished", "b": "error"}
    assert (info.finished_at, info.exit_code) == (clock.at, 1)
    assert read_ledger(home / "ledger") == [f"{pid}.a.0"]


def test_a_timeout_ends_the_step_with_its_whole_tree(manager, more):
    data = {"port": str(more / "port"), "ledger": str(more / "ledger")}
    long = 6 if WINDOWS else 2  # enough to start two interpreters
    stay = {"call": "more:stay", "timeout": long}
    sleeper = python("import time; time.sleep(600)", timeout="0.3s")
    nap = {"call": "steps:nap"}
    one, two, three, four, fine = manager.start_many(
        [
            (steps(stay), {**data, "deaf": 1}),
            steps("steps:nothing", sleeper, "steps:nothing"),
            (steps(nap, nap, nap, timeout=1.5), {"seconds": 1}),
            (steps(sleeper, retry=1, retry_interval=60), {}),
            (steps(nap, nap, {**nap, "timeout": 5}, timeout=60), {"seconds": 0.01}),
        ]
    )
    assert drain(manager, max_workers=5, grace=0.2) == 5
    assert not answers(more / "port")
    if not WINDOWS:
        assert "TERM" in read_ledger(more / "ledger")
    for pid, step, words in (
        (one, "a", f"step 'a' ran longer than {long} s"),
        (two, "b", "step 'b' ran longer than 0.3 s"),
        (three, None, "the process ran longer than 1.5 s"),
    ):
        info = manager.get_process_info(pid)
        assert (info.status, info.exit_code) == ("timeout", 1)
        # A slow machine may be in the first step still.
        assert (info.error["step"], info.error["type"]) == (
            step or info.step,
            "Timeout",
        )
        assert info.error["message"] == words
        assert info.steps[step or info.step] == "timeout"
    info = manager.get_process_info(four)
    assert (info.status, info.attempt, info.error["type"]) == ("queued", 2, "Timeout")
    assert manager.get_process_status(fine) == "finished"


def test_a_runner_serves_its_queues_only(manager):
    queues = ["default", "mail", "films", "mail"]
    pids = [manager.start_process(steps("steps:nothing", queue=q)) for q in queues]
    assert drain(manager) == 1
    assert statuses(manager, pids) == ["finished", *["queued"] * 3]
    assert drain(manager, queues=["films", "mail"]) == 3
    assert statuses(manager, pids) == ["finished"] * 4
    with pytest.raises(procman.BadSpec, match="queues must name one at least"):
        procman.Runner(manager, queues=[])


def test_as_many_run_at_once_as_there_are_workers_and_no_more(manager, more):
    ledger = more / "ledger"
    pids = manager.start_many([(steps("more:meet"), {"ledger": str(ledger)})] * 6)
    assert drain(manager, max_workers=2) == 6
    assert set(statuses(manager, pids)) == {"finished"}
    at_once = [0]
    for word in read_ledger(ledger):
        at_once.append(at_once[-1] + {"in": 1, "out": -1}[word])
    assert max(at_once) == 2


def test_max_jobs_ends_a_runner_that_waits_and_one_that_does_not(manager):
    for wait in (False, True):
        pids = manager.start_many([steps("steps:nothing", "steps:nothing")] * 3)
        assert drain(manager, max_jobs=2, wait=wait) == 2
        assert statuses(manager, pids) == ["finished", "finished", "queued"]
        assert drain(manager, max_jobs=2, wait=False) == 1


def test_higher_priorities_go_first_then_what_was_due_first(manager, clock, home):
    data = {"ledger": str(home / "ledger")}
    given = [0, 5, -1, 5, 0]
    pids = [
        manager.start_process(steps("steps:ledger", priority=priority), data)
        for priority in given
    ]
    pids.append(manager.start_process(steps("steps:ledger", at=clock.at - 9), data))
    drain(manager, max_workers=1)
    order = [pids[index] for index in (1, 3, 5, 0, 4, 2)]
    assert read_ledger(home / "ledger") == [f"{pid}.a.0" for pid in order]


def test_a_waiting_runner_takes_what_comes_at_once_and_what_is_due_in_time(home):
    manager = ProcessManager(home / "procman.db")
    with contextlib.closing(manager), running(manager, "--max-workers", "2"):
        manager.wait(manager.start_process(steps("steps:nothing")), 30)
        delays = [0.25, 0.5, 0.75, 1.0]
        late = [
            manager.start_process(steps("steps:nothing", delay=delay))
            for delay in delays
        ]
        began = time.monotonic()
        for _ in range(8):
            manager.wait(manager.start_process(steps("steps:nothing")), 30)
        assert time.monotonic() - began < 3  # by its own looks it would be 8
        for info in manager.wait_all(late, 30):
            assert info.started_at >= info.due_at
            assert info.started_at - info.due_at < 0.6


def test_a_long_step_does_not_hold_back_what_was_claimed_with_it(manager, more):
    data = {"go": str(more / "go"), "ledger": str(more / "ledger")}
    with thread_runner(manager, max_workers=2):
        manager.wait_all(manager.start_many([steps("steps:nothing")] * 300), 30)
        long, *quick = manager.start_many(
            [(steps("more:hold"), data), *[steps("steps:nothing")] * 60]
        )
        manager.wait_all(quick, 30)
        assert manager.get_process_status(long) == "running"
        other, *quick = manager.start_many(
            [(steps("more:hold"), data), *[steps("steps:nothing")] * 60]
        )
        eventually(lambda: manager.get_process_status(other) == "running")
        eventually(lambda: set(statuses(manager, quick)) == {"queued"}, 2)
        assert {manager.get_process_info(pid).attempt for pid in quick} == {1}
        (more / "go").write_text("go")
        manager.wait_all([long, other, *quick], 30)
    assert set(statuses(manager, [long, other, *quick])) == {"finished"}


def test_a_stopped_runner_gives_back_at_the_same_step_and_charges_nothing(
    manager, more
):
    data = {"go": str(more / "go"), "ledger": str(more / "ledger")}
    process = steps("steps:ledger", "more:hold", "steps:ledger", retry=1)
    pids = manager.start_many([(process, data)] * 3)
    with thread_runner(manager, max_workers=2) as (runner, ended):
        eventually(lambda: read_ledger(more / "ledger").count("hold") == 2)
        runner.stop()
        eventually(lambda: ended)
    assert ended == [0]
    infos = [manager.get_process_info(pid) for pid in pids]
    assert [(info.status, info.step) for info in infos].count(("queued", "b")) >= 2
    for info in infos:
        assert (info.attempt, info.crashes, info.error) == (1, 0, None)
        assert info.status == "queued" and info.retry_left == 1
    (more / "go").write_text("go")
    assert drain(manager) == 3
    assert set(statuses(manager, pids)) == {"finished"}
    written = read_ledger(more / "ledger")
    assert [written.count(f"{pid}.a.0") for pid in pids] == [1, 1, 1]


def test_a_runner_that_is_stopped_before_it_begins_runs_nothing(manager):
    pid = manager.start_process(steps("steps:nothing"))
    for wait in (False, True):
        runner = Runner(manager, wait=wait)
        runner.stop()
        assert runner.run() == 0
    assert manager.get_process_status(pid) == "queued"


@posix
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_stops_a_runner_gracefully_and_a_second_at_once(manager, more, number):
    ledger = more / "ledger"
    data = {"port": str(more / "port"), "deaf": 1, "ledger": str(ledger)}
    pid = manager.start_process(steps("steps:nothing", "more:stay"), data)
    with running(manager, "--grace", "60") as child:
        assert answers(more / "port")
        child.send_signal(getattr(signal, number))
        eventually(lambda: "TERM" in read_ledger(ledger))
        assert child.poll() is None and manager.get_process_status(pid) == "running"
        child.send_signal(getattr(signal, number))
        assert child.wait(20) == 0
        assert not answers(more / "port")
    info = manager.get_process_info(pid)
    assert (info.status, info.step, info.attempt, info.crashes) == ("queued", "b", 1, 0)


@posix
def test_a_start_that_is_committed_is_acknowledged_though_no_bell_can_be_rung(manager):
    import resource

    manager.store.add_runner("token", "", ["default"], 9, waits=True)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    manager.start_process(steps("m:f"))
    manager.close()
    manager.get_process_status(manager.list_processes()[0].pid)
    unused = os.open(os.devnull, os.O_RDONLY)
    os.close(unused)  # the lowest number that is free, and so no more than it
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (unused, limits[1]))
        pid = manager.start_process(steps("m:f"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert manager.get_process_status(pid) == "queued"


def test_processes_that_want_a_worker_alone_are_not_claimed_again_and_again(manager):
    pids = manager.start_many([steps("steps:add_one")] * 600)
    with manager.store.transaction() as db:
        db.execute("UPDATE process SET crashes = 1 WHERE id % 30 = 0")
    assert drain(manager) == 600
    assert {info.status for info in manager.wait_all(pids)} == {"finished"}
    claims = manager.store.read("SELECT count(*) FROM event WHERE kind = 'claim'")
    assert claims[0][0] < 900


@posix
@pytest.mark.parametrize(("last", "status"), [("exit 0", "finished"), ("", "queued")])
def test_a_command_that_is_asked_to_end_has_the_grace_to_tidy_up(
    manager, home, last, status
):
    shell = (
        f"trap 'sleep 0.5; echo tidy > tidied; {last or 'exit 1'}' TERM;"
        " echo > ready; while :; do sleep 0.05; done"
    )
    pid = manager.start_process(steps({"shell": shell}))
    with running(manager, "--grace", "60") as child:
        eventually((home / "ready").exists)
        child.terminate()
        assert child.wait(20) == 0
    assert (home / "tidied").read_text() == "tidy\n"
    info = manager.get_process_info(pid)
    assert (info.status, info.attempt, info.crashes) == (status, 1, 0)


@posix
def test_a_step_that_takes_the_sigterm_for_itself_delays_the_end_no_longer(
    manager, home
):
    (home / "taker.py").write_text(
        "import os, signal, time\n"
        "def until_told(data):\n"
        "    def take(*_): told.append(True)\n"
        "    told, before = [], signal.signal(signal.SIGTERM, take)\n"
        "    open('ready', 'w').close()\n"
        "    while not told:\n"
        "        time.sleep(0.01)\n"
        "    signal.signal(signal.SIGTERM, before)\n"
    )
    pid = manager.start_process(steps("taker:until_told"))
    with running(manager, "--grace", "60") as child:
        eventually((home / "ready").exists)
        child.terminate()
        assert child.wait(20) == 0
    assert manager.get_process_status(pid) == "finished"


def test_one_waiting_runner_serves_a_set_of_queues(manager):
    pid = manager.start_process(steps("steps:nothing", queue="mail"))
    with running(manager) as first:
        quiet = cli("runner", "--wait", "--db", manager.path)
        assert quiet == (0, "", "")
        second = Runner(manager, wait=True)
        assert second.run() == 0 and second.already_running
        with running(manager, "--queue", "mail"):
            assert manager.wait(pid, 30).status == "finished"
            other = manager.start_process(steps("steps:nothing"))
            assert manager.wait(other, 30).status == "finished"
            assert drain(manager) == 0
        assert first.poll() is None
    with thread_runner(manager) as (runner, ended):
        manager.wait(manager.start_process(steps("steps:nothing")), 30)
    assert ended == [1] and not runner.already_running


def test_a_runner_can_be_awaited_and_leaves_signals_alone(manager, more):
    import asyncio

    data = {"go": str(more / "go"), "ledger": str(more / "ledger")}
    done, held = manager.start_many(
        [steps("steps:nothing"), (steps("more:hold"), data)]
    )
    numbers = procman.stop_signals()
    seen, deadline = [], time.monotonic() + 60

    def has_held(times):
        assert time.monotonic() < deadline
        return read_ledger(more / "ledger").count("hold") >= times

    async def application():
        before = [signal.getsignal(number) for number in numbers]
        runner = Runner(manager, wait=True, max_workers=2, grace=2)
        task = asyncio.ensure_future(runner.run_async())
        # The file alone is not enough: the step may be ended before it writes to it.
        while not (has_held(1) and manager.count(status="finished")):
            seen.append([signal.getsignal(number) for number in numbers] == before)
            await asyncio.sleep(0.005)
        runner.stop()
        assert await asyncio.wait_for(task, 20) == 1
        task = asyncio.ensure_future(Runner(manager, grace=2).run_async())
        while not has_held(2):
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert manager.get_process_status(held) == "queued"
        (more / "go").write_text("go")
        return await Runner(manager).run_async()

    assert asyncio.run(application()) == 1
    assert all(seen) and len(seen) > 2
    assert statuses(manager, [done, held]) == ["finished"] * 2


@pytest.mark.skipif(WINDOWS, reason="an open file cannot be deleted there")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_runner_whose_database_is_deleted_ends_and_takes_its_workers_along(
    manager, more, replaced
):
    manager.start_process(steps("more:stay"), {"port": str(more / "port")})
    idle = steps("steps:nothing")
    with thread_runner(manager, max_workers=2, grace=0.3) as (_, ended):
        assert answers(more / "port")
        for path in more.glob("procman.db*"):
            if path.is_file():
                path.unlink()
        if replaced:
            with contextlib.closing(ProcessManager(more / "procman.db")) as other:
                other.start_process(idle)
        eventually(lambda: ended, 5)
        assert isinstance(ended[0], procman.StorageError), ended
        assert ("replaced" if replaced else "deleted") in str(ended[0])
        assert not answers(more / "port")


def test_a_runner_outlasts_a_program_that_holds_the_write_lock(manager, more):
    data = {"go": str(more / "go"), "ledger": str(more / "ledger")}
    pids = manager.start_many([(steps("more:hold", "steps:nothing"), data)] * 2)
    with running(manager, "--max-workers", "1") as child:
        eventually(lambda: "hold" in read_ledger(more / "ledger"))
        foreign = sqlite3.connect(manager.path, isolation_level=None)
        with contextlib.closing(foreign):
            foreign.execute("BEGIN IMMEDIATE")
            locked = time.monotonic()
            (more / "go").write_text("go")
            eventually(lambda: time.monotonic() - locked > 1.5)
            assert child.poll() is None
            assert manager.count(status="running") == 1
            foreign.execute("ROLLBACK")
        for info in manager.wait_all(pids, 30):
            assert (info.status, info.attempt, info.crashes) == ("finished", 1, 0)
    assert read_ledger(more / "ledger") == ["hold"] * 2


def test_hundreds_of_processes_leave_nothing_behind(manager, more):
    linux = sys.platform == "linux"

    def left():
        found = {"threads": threading.active_count()}
        if linux:
            found["fds"] = len(os.listdir("/proc/self/fd"))
            own = Path(f"/proc/self/task/{os.getpid()}/children")
            found["children"] = own.read_text()
        return found

    tell = {"give": "{'fds': len(os.listdir('/proc/self/fd'))}"}
    drain(manager)
    before = left()
    command = python("print(1)")
    count = 5 if WINDOWS else 20
    first = manager.start_process(steps("more:give"), tell) if linux else None
    manager.start_many([steps("steps:nothing")] * 400 + [steps(command)] * count)
    last = manager.start_process(steps("more:give"), tell) if linux else None
    assert drain(manager, max_workers=1) == 400 + count + 2 * linux
    manager.start_many([steps("steps:nothing")] * 40)
    assert drain(manager, jobs_per_worker=5) == 40
    after = left()
    # SQLite keeps a few descriptors of closed connections, to use them again.
    assert after.pop("fds", 0) - before.pop("fds", 0) <= 3
    assert after == before
    assert list((more / "procman.db.run").iterdir()) == []
    names = {path.name for path in more.iterdir()} - {"__pycache__"}
    assert names - {"procman.db-wal", "procman.db-shm"} == {
        *("more.py", "steps.py", "procman.db", "procman.db.run")
    }
    assert manager.store.runners() == [] and manager.count(status="finished") >= 440
    if linux:
        first, last = (manager.get_process_info(pid).output for pid in (first, last))
        assert first == last


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_workers", 0),
        ("max_workers", 1.5),
        ("max_jobs", -1),
        ("jobs_per_worker", True),
        ("queues", ["a/b"]),
        ("grace", "soon"),
        ("keep", -1),
        ("services", "nocolon"),
    ],
)
def test_a_runner_refuses_options_that_make_no_sense(manager, option, value):
    with pytest.raises(ValueError, match=option.rstrip("s")):
        Runner(manager, **{option: value})


def test_a_step_whose_file_is_dated_in_the_future_does_not_cost_a_worker_each(
    manager, home
):
    later = time.time() + 10 * 365 * 86400
    os.utime(home / "steps.py", (later, later))
    ledger = home / "ledger"
    manager.start_many([(steps("steps:ledger"), {"ledger": str(ledger)})] * 6)
    assert drain(manager, max_workers=1) == 6
    assert len({line.split()[1] for line in ledger.read_text().splitlines()}) == 1


def test_a_runner_that_prunes_much_runs_what_is_due_meanwhile(live):
    old = ProcessManager(live.path, now=lambda: time.time() - 40 * 86400)
    with contextlib.closing(old):
        for _ in range(4):
            old.start_many([ManagedProcess({})] * 10_000)
    pid = live.start_process(steps("steps:nothing"))
    with running(live, "--keep", "30d"):
        eventually(lambda: live.get_process_status(pid) != "queued")
        assert live.count(status="finished") > 1000, "it has not pruned first"
        eventually(lambda: live.count(status="final") == 1)
    assert live.get_process_status(pid) == "finished"


# --- how many workers ------------------------------------------------------


def workers_of(child):
    """The os_pids of the workers that a runner has just now (POSIX)."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, check=True
    ).stdout.decode()
    rows = [line.split() for line in listed.splitlines()]
    return {
        int(pid) for pid, parent, state in rows
        if int(parent) == child.pid and not state.startswith("Z")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "idle", "busy"),
    [
        (["--min-workers", "2", "--max-workers", "3"], 2, 3),
        (["--min-children", "0", "--max-children", "2"], 0, 2),
        (["--pm", "static", "--min-workers", "3", "--max-workers", "1"], 3, 3),
        (["--pm", "ondemand", "--min-workers", "2", "--max-workers", "2"], 0, 2),
    ],
)
@posix
def test_a_pool_has_as_many_workers_as_its_manner_says(live, home, words, idle, busy):
    with running(live, *words, "--worker-ttl", "0.2") as child:
        eventually(lambda: len(workers_of(child)) == idle)
        gate, seen = home / "gate", set()
        wait = f"while ! test -e {gate}; do sleep 0.02; done"
        pids = live.start_many([steps({"shell": wait})] * 5)

        def as_many_as_run():
            seen.add(len(workers_of(child)))
            return live.count(status="running") == busy
        eventually(as_many_as_run)
        assert max(seen) <= busy
        gate.touch()
        live.wait_all(pids, 30)
        eventually(lambda: len(workers_of(child)) == idle)
    assert statuses(live, pids) == ["finished"] * 5


@posix
def test_a_worker_that_is_killed_while_idle_is_replaced(live):
    with running(live, "--min-workers", "2", "--max-workers", "2") as child:
        before = eventually(lambda: len(workers_of(child)) == 2 and workers_of(child))
        os.kill(min(before), signal.SIGKILL)
        after = eventually(
            lambda: min(before) not in workers_of(child)
            and len(workers_of(child)) == 2
            and workers_of(child)
        )
        assert max(before) in after, "the other one was left alone"
        assert live.wait(live.start_process(steps("steps:nothing")), 30)


def test_what_is_of_the_wrong_kind_is_named(manager):
    for call, words in [
        (lambda: Runner("procman.db"), "manager must be a ProcessManager, not str"),
        (lambda: ProcessManager("x.db", defaults=5), "defaults must be a dict of"),
        (lambda: manager.listen(5), "callback must be a function, not 5"),
        (lambda: manager.wait_all("abcdef"), "pids must be a list of texts"),
    ]:
        with pytest.raises(procman.BadType, match=words):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_workers": 3, "max_workers": 2}, "min_workers is 3, more than"),
        ({"pm": "static", "min_workers": 0}, "min_workers must be 1 to"),
        ({"pm": "often"}, "pm must be one of dynamic, static, ondemand"),
        ({"min_workers": -1}, "min_workers must be 0 to"),
        ({"max_workers": 0}, "max_workers must be 1 to"),
        ({"max_workers": 1.5}, "max_workers must be a whole number"),
        ({"worker_ttl": "soon"}, "worker_ttl must be seconds"),
        ({"concurrency": {"a": 0}}, "concurrency.'a' must be 1 to"),
        ({"concurrency": {"": 1}}, "a name in concurrency"),
        ({"concurrency": ["a"]}, "concurrency must be a JSON object"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(manager, options, words):
    with pytest.raises(procman.BadSpec, match=re.escape(words)):
        Runner(manager, **options)


def test_dedicated_processes_have_workers_of_their_own_beside_a_full_pool(live, home):
    ledger = home / "ledger"
    with running(live, "--max-workers", "1"):
        [busy] = live.start_many([steps("steps:hang")])
        eventually(lambda: live.get_process_status(busy) == "running")
        process = steps(*["steps:ledger"] * 3, dedicated=True)
        own = live.start_many([(process, {"ledger": str(ledger)})] * 4)
        plain = live.start_process(steps("steps:ledger"))
        assert [info.status for info in live.wait_all(own, 30)] == ["finished"] * 4
        assert statuses(live, [busy, plain]) == ["running", "queued"]
        live.cancel(busy)
        assert live.wait(plain, 30).status == "finished"
    owners = {}
    for line in ledger.read_text().splitlines():
        key, os_pid = line.split()
        owners.setdefault(key.partition(".")[0], set()).add(os_pid)
    assert sorted(map(len, owners.values())) == [1] * 4, "one worker for all its steps"
    assert len(set.union(*owners.values())) == 4, "and for no other process"


def test_a_dedicated_process_is_cancelled_timed_out_retried_and_paused_as_any(live):
    with running(live, "--max-workers", "1"):
        slow = live.start_process(steps("steps:hang", dedicated=True))
        late = live.start_process(steps("steps:hang", dedicated=True, timeout=0.5))
        again = live.start_process(
            steps("steps:fail", dedicated=True, retry=2, retry_interval=0)
        )
        asks = live.start_process(steps("steps:Ask", "steps:nothing", dedicated=True))
        eventually(lambda: live.get_process_status(slow) == "running")
        live.cancel(slow)
        found = live.wait_all([slow, late, again, asks], 30)
        assert [info.status for info in found] == [
            *("cancelled", "timeout", "error", "interrupted")
        ]
        assert found[2].attempt == 3
        live.proceed(asks)
        assert live.wait(asks, 30).output["question"] == "go on?"


@posix
def test_a_runner_that_is_stopped_gives_its_dedicated_processes_back(live):
    with running(live, "--max-workers", "1") as child:
        pids = live.start_many([steps("steps:hang", dedicated=True)] * 3)
        eventually(lambda: statuses(live, pids) == ["running"] * 3)
        child.terminate()
        assert child.wait(20) == 0
    found = [live.get_process_info(pid) for pid in pids]
    assert [(info.status, info.attempt, info.crashes) for info in found] == [
        ("queued", 1, 0)
    ] * 3


def test_max_jobs_counts_dedicated_processes_too(manager):
    manager.start_many([steps("steps:nothing", dedicated=True)] * 3)
    assert drain(manager, max_jobs=1) == 1
    manager.start_many([steps("steps:nothing")] * 3)
    assert drain(manager, max_jobs=4) == 4
    assert drain(manager) == 1


def most_at_once(ledger):
    """How many ran at the same time, by lines `+ word` and `- word`."""
    most, running = {}, {}
    for line in ledger.read_text().splitlines():
        sign, word = line.split()
        running[word] = running.get(word, 0) + (1 if sign == "+" else -1)
        most[word] = max(most.get(word, 0), running[word])
    return most


CONCURRENT = """
import os, time

def most(data):
    found, running = 0, 0
    for line in open(data["ledger"], "rb"):
        if line[2:].strip().decode() == data["name"]:
            running += 1 if line[:1] == b"+" else -1
            found = max(found, running)
    return found

def mark(data):
    with open(data["ledger"], "ab", 0) as file:
        file.write(b"+ %s\\n" % data["name"].encode())
        deadline = time.monotonic() + 10
        time.sleep(0.02)
        while most(data) < data["company"] and time.monotonic() < deadline:
            time.sleep(0.01)
        file.write(b"- %s\\n" % data["name"].encode())
"""


def test_at_most_so_many_of_a_name_run_at_once_over_all_runners(live, home):
    (home / "at_once.py").write_text(CONCURRENT, encoding="utf-8")
    ledger = home / "ledger"
    path = {"ledger": str(ledger)}
    limits = ["--concurrency", "two=2", "--concurrency", "one=1", "--max-workers", "4"]
    pids = live.start_many(
        (steps("at_once.py:mark", name=name), {**path, "name": name, "company": least})
        for name, least in [("two", 2), ("one", 1), ("many", 3), ("many", 3)] * 12
    )
    runners = [spawn("runner", *limits, "--db", live.path) for _ in range(3)]
    for runner in runners:
        assert runner.wait(60) == 0, runner.stderr.read()
        runner.communicate()
    assert set(statuses(live, pids)) == {"finished"}
    most = most_at_once(ledger)
    assert (most["one"], most["two"], most["many"] >= 3) == (1, 2, True)


def test_a_name_of_which_enough_run_holds_nothing_else_up(live, home):
    gate = home / "gate"
    wait = {"shell": f"while ! test -e {gate}; do sleep 0.02; done"}
    if WINDOWS:
        wait = {"call": "steps:hang"}
    with running(live, "--concurrency", "api=1", "--max-workers", "2"):
        first, second = live.start_many([steps(wait, name="api")] * 2)
        other = live.start_process(steps("steps:nothing", name="other"))
        assert live.wait(other, 30).status == "finished"
        assert sorted(statuses(live, [first, second])) == ["queued", "running"]
        assert "as many named 'api' run as may" in live.why(second)
        live.cancel(first)
        eventually(lambda: live.get_process_status(second) == "running")
        live.cancel(second)
        eventually(lambda: live.get_process_status(second) == "cancelled")


# --- schedules -------------------------------------------------------------


def test_a_runner_follows_a_series_at_its_interval_and_never_faster_than_may_be(live):
    often = live.start_process(steps("steps:nothing", interval=-1))
    with running(live):
        eventually(lambda: live.count(series=often) >= 8)
        assert len(live.cancel_all(series=often)) >= 1
        eventually(lambda: live.count(series=often, status="open") == 0)
    runs = live.list_processes(series=often, order="oldest", limit=1000)
    begun = [info.started_at for info in runs if info.started_at]
    assert min(late - early for early, late in zip(begun, begun[1:])) >= 0.05
    assert {info.series for info in runs} == {often}


# ===========================================================================
# 10. Command line
# ===========================================================================

RECORD_KEYS = [
    *("pid", "name", "status", "created_at", "started_at", "finished_at", "due_at"),
    *("output", "error", "step", "steps", "progress", "attempt", "crashes"),
    *("retry_left", "queue", "priority", "timeout", "parent", "children", "series"),
    "exit_code",
]

# Steps that tests of 10 and 11 add to those of the head.
MORE_STEPS = '''
import os, socket, subprocess, sys, time
from procman import current
from steps import mark

def paint(data):
    print("\\x1b[31mred\\x07\\tgr\\u00fcn \\u2192", flush=True)
    sys.stdout.buffer.write(b"\\xff\\n")

def gate(data):
    mark(data, "gate")
    print("before the gate", flush=True)
    while not os.path.exists(data["gate"]):
        time.sleep(0.01)
    print("behind the gate")

def argv(data):
    return {"argv": sys.argv[1:]}

def say(text):
    os.write(1, b"low\\n")
    print("high")
    return text

CALL = """
import os, socket, sys, time
line = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
line.sendall(f"{sys.argv[2]} {os.getpid()}".encode())
time.sleep(600)
"""

def tied(data):
    """The first time: hang, with a child; both are on the line to the test."""
    first = not os.path.exists(data["ledger"])
    mark(data, "tied")
    if first:
        port = str(data["port"])
        subprocess.Popen([sys.executable, "-c", CALL, port, "child"])
        line = socket.create_connection(("127.0.0.1", data["port"]))
        line.sendall(f"step {os.getpid()}".encode())
        time.sleep(600)

def hang_if_told(data):
    mark(data, current().step)
    if data["hang"]:
        time.sleep(600)

def own_ledger(data):
    with open(os.path.join(data["directory"], f"{os.getpid()}.ledger"), "a") as file:
        file.write(current().pid + "\\n")
'''


@pytest.fixture
def live(home):
    """A manager on the real clock, which it shares with the commands."""
    with contextlib.closing(ProcessManager(home / "procman.db")) as found:
        yield found


@pytest.fixture
def gates(home):
    (home / "more.py").write_text(MORE_STEPS, encoding="utf-8")
    return home


def call_main(capsys, *words):
    """A command in this process: the same code, without a start of Python."""
    try:
        code = procman.main([str(word) for word in words])
    except SystemExit as error:
        code = error.code
    return Result(code, *capsys.readouterr())


def copied(directory, *words, module=False, cwd=None, env=None):
    """A command of a procman.py of its own; returns what it printed."""
    directory.mkdir(exist_ok=True)
    copy = directory / "procman.py"
    if not copy.exists():
        copy.write_bytes(PROCMAN.read_bytes())
    start = ["-m", "procman"] if module else [str(copy)]
    return (
        subprocess.run(
            [sys.executable, *start, *map(str, words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=cwd or directory,
            env=env,
            timeout=60,
            check=True,
        )
        .stdout.decode()
        .strip()
    )


def on_terminal(*words):
    """A command whose standard output and error are a terminal: (code, screen)."""
    import pty

    master, terminal = pty.openpty()
    child = spawn(*words, stdout=terminal, stderr=terminal)
    os.close(terminal)
    screen = b""
    with contextlib.suppress(OSError):  # Linux says EIO where others say the end
        while True:
            chunk = os.read(master, 65536)
            if not chunk:
                break
            screen += chunk
    os.close(master)
    return child.wait(60), screen.decode().replace("\r\n", "\n")


ONE = ("start", "--step", "one=steps:double")
BAD_INPUT = [  # a command, and what its one line must name
    ((), "COMMAND"),
    (("nonsense",), "nonsense"),
    (("start",), "nothing to run"),
    (("start", "--"), "nothing to run"),
    (("start", "--step", "one"), "NAME=SPEC, not 'one'"),
    (("start", "--step", "=steps:f"), "the name of a step"),
    (("start", "--step", "one=steps"), "steps.one must be"),
    (("start", "--step", 'one={"call": '), "--step one"),
    (("start", "--step", 'one={"call": "m:f", "colour": 1}'), "steps.one has"),
    (("start", "--step", 'one={"shell": "x", "timeout": -1}'), "steps.one.timeout"),
    (("start", "--step", 'one={"command": ["x", 3]}'), "steps.one.command[1]"),
    (("start", "--step", 'one={"command": []}'), "steps.one.command"),
    (("start", "--step", 'one={"shell": "x", "call": "m:f"}'), "steps.one needs"),
    ((*ONE, "--step", "one=steps:f"), "two steps named 'one'"),
    (("start", "--steps", "missing.json"), "--steps from missing.json: No such"),
    (("start", "--steps", "."), "--steps"),
    ((*ONE, "--data", "{"), "--data is not valid JSON"),
    ((*ONE, "--data", ""), "--data is not valid JSON"),
    ((*ONE, "--data", "[1]"), "--data must be a JSON object"),
    ((*ONE, "--data", '{"a": {"b": [NaN]}}'), "--data.a.b[0]"),
    ((*ONE, "--data", '{"a": 1e999}'), "--data.a"),
    ((*ONE, "--data", '{"a": "\\ud800"}'), "--data.a has a lone surrogate"),
    ((*ONE, "--data", '{"a": 1, "a": 2}'), "'a' stands twice"),
    ((*ONE, "--data", '{"a": 18446744073709551616}'), "--data.a is an integer"),
    ((*ONE, "--data", '{"a": ' + "[" * 100_000), "nested deeper"),
    ((*ONE, "--data", "@missing.json"), "--data from missing.json: No such"),
    ((*ONE, "--colour", "red"), "--colour"),
    ((*ONE, "--retry", "ten"), "--retry"),
    ((*ONE, "--retry", "1.5"), "--retry"),
    ((*ONE, "--retry", "-2"), "retry must be -1 to"),
    ((*ONE, "--retry", str(2**63)), "retry must be"),
    ((*ONE, "--retry-interval", "-1"), "retry_interval"),
    ((*ONE, "--backoff", "0.5"), "backoff"),
    ((*ONE, "--backoff", "nan"), "backoff"),
    ((*ONE, "--priority", "99999999999"), "priority"),
    ((*ONE, "--timeout", "soon"), "timeout must be seconds"),
    ((*ONE, "--timeout", "0"), "timeout must be"),
    ((*ONE, "--timeout", "1e999"), "timeout must be"),
    ((*ONE, "--delay", "-1"), "delay must be"),
    ((*ONE, "--delay", "1h", "--at", "0"), "at and delay"),
    ((*ONE, "--at", "tomorrow"), "at must be"),
    ((*ONE, "--at", "2022-02-09T12:58:14"), "at has no time zone"),
    ((*ONE, "--on-lost", "shrug"), "on_lost must be one of"),
    ((*ONE, "--queue", "../etc"), "queue may hold"),
    ((*ONE, "--name", ""), "name must be"),
    ((*ONE, "--name", "a\x1b[2Jb"), "name must be"),
    ((*ONE, "--args", "[1]"), "args must be a JSON object"),
    ((*ONE, "--args", '{"a": {}}'), "args.a"),
    ((*ONE, "--args", "x"), "--args is not valid JSON"),
    (("runner", "--max-workers", "0"), "max_workers"),
    (("runner", "--max-jobs", "many"), "--max-jobs"),
    (("runner", "--jobs-per-worker", "-1"), "jobs_per_worker"),
    (("runner", "--queue", "a,,b"), "queue"),
    (("runner", "--grace", "long"), "grace"),
    (("runner", "--keep", "x"), "keep"),
    (("runner", "--services", "steps"), "services"),
    (("runner", "--script-args", "it's"), "--script-args"),
    (("status",), "PID"),
    (("status", "abcdef", "--", "ls"), "only start"),
    (("list", "--status", "done"), "status must be one of"),
    (("list", "--limit", "-1"), "limit"),
    (("list", "--offset", "x"), "--offset"),
    (("proceed", "abcdef", "--data", "[1]"), "--data must be a JSON object"),
    (("wait", "abcdef", "--timeout", "long"), "--timeout"),
    (("prune", "--older-than", "long"), "older"),
    (("list", "--order", "random"), "order must be one of newest, oldest, due, ended"),
    (("list", "--since", "soon"), "since must be"),
    (("list", "--since", "2022-02-09T12:58:14"), "since has no time zone"),
    (("list", "--name", ""), "name must be"),
    (("list", "--limit", "2.5"), "--limit"),
    (("list", "--watch"), "--watch needs a terminal"),
    (("list", "--watch", "--json"), "--watch needs a terminal"),
    (("list", "--colour"), "--colour"),
    (("count", "--status", "done"), "status must be one of"),
    (("count", "--limit", "3"), "--limit"),
    (("cancel", "--all", "--status", "finished"), "what is finished"),
    (("pause",), "PID"),
    (("pause", "abcdef", "--all"), "--all"),
    (("retry",), "give a PID"),
    (("why",), "PID"),
    (("wait",), "PID"),
    (("listen", "--since", "soon"), "--since"),
    (("listen", "--since", "-1"), "since must be"),
    (("listen", "--since", "1.5"), "--since"),
    (("listen", "--status", "done"), "status must be one of"),
    (("listen", "--json"), "--json"),
    (("schedule",), "preview, CRON"),
    (("schedule", "preview"), "CRON"),
    (("schedule", "review", "@daily"), "review"),
    (("schedule", "preview", "@soon"), "@soon"),
    (("schedule", "preview", "61 * * * *"), "minute"),
    (("schedule", "preview", "@daily", "--tz", "Nowhere/At/All"), "Nowhere/At/All"),
    (("schedule", "preview", "@daily", "--count", "0"), "count must be 1 to"),
    (("schedule", "preview", "@daily", "--count", "many"), "--count"),
    ((*ONE, "--interval", "soon"), "interval must be"),
    ((*ONE, "--interval", "-2"), "interval"),
    ((*ONE, "--interval", "5m", "--cron", "@daily"), "interval and cron"),
    ((*ONE, "--cron", "* * *"), "five fields"),
    ((*ONE, "--cron", "@daily", "--tz", "Nowhere/At/All"), "Nowhere/At/All"),
    ((*ONE, "--tz", "UTC"), "tz says nothing without cron"),
    ((*ONE, "--interval-from", "end"), "interval_from says nothing without interval"),
    ((*ONE, "--interval", "1", "--interval-from", "now"), "interval_from must be one"),
    ((*ONE, "--once", "--unique"), "once and unique"),
    ((*ONE, "--key", ""), "key must be"),
    ((*ONE, "--pid", "abc"), "pid must be 32 lowercase hex digits"),
    (("runner", "--pm", "magic"), "pm must be one of"),
    (("runner", "--min-workers", "3", "--max-workers", "2"), "min_workers is 3"),
    (("runner", "--worker-ttl", "long"), "worker_ttl"),
    (("runner", "--concurrency", "name"), "--concurrency must be NAME=N"),
    (("runner", "--concurrency", f"name={'9' * 5000}"), "--concurrency must be NAME=N"),
    (("runner", "--concurrency", "name=0"), "concurrency"),
]


@pytest.mark.parametrize(("words", "named"), BAD_INPUT)
def test_bad_input_gives_one_line_that_names_it_and_changes_nothing(
    home, monkeypatch, capsys, words, named
):
    monkeypatch.setenv("PROCMAN_DB", "fresh.db")
    code, out, err = call_main(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("procman: ") and err.count("\n") == 1 and err[-1] == "\n"
    assert named in err and "\x1b" not in err and len(err) < 500
    assert os.listdir(home) == ["steps.py"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (b"", "standard input"),
        (b"[]", "standard input"),
        (b'{"data": {}}', '"steps"'),
        (b'{"steps": {}, "date": {}}', "date"),
        (b'{"steps": {"a": 7}}', "steps.a"),
        (b'{"steps": {}, "data": []}', "data"),
        (b"\xff", "standard input"),
    ],
)
def test_bad_standard_input_of_execute_gives_one_line(
    home, monkeypatch, capsys, given, named
):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    code, out, err = call_main(capsys, "execute")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("procman: ") and named in err


def test_start_takes_its_steps_and_data_in_all_ways_and_prints_only_the_pid(live):
    Path("data.json").write_text('\ufeff{"n": 4}', encoding="utf-8")
    Path("steps.json").write_text('{"x": "steps:double", "y": "steps:add_one"}')
    program = "import json, sys; print(json.load(sys.stdin)['n'], sys.argv[1:])"
    spec = 'y={"call": "steps:add_one", "timeout": "5m"}'
    ways = [
        (("--step", "x=steps:double", "--step", spec, "--data", '{"n": 3}'), b""),
        (("--steps", "steps.json", "--data", "@data.json"), b""),
        (("--steps", "-", "--step", "z=steps:double", "--data", '{"n": 1}'),
         b'{"x": "steps:double"}'),
        (("--steps", "steps.json", "--data", "-"), b'{"n": 5}'),
        (("--step", "x=steps:double", "--data", '{"n": 6}',
          *("--", sys.executable, "-c", program, "--retry", "--", "-x")), b""),
    ]  # fmt: skip
    pids = []
    for words, stdin in ways:
        code, out, err = cli("start", "--db", live.path, *words, stdin=stdin)
        assert (code, err) == (0, "")
        assert re.fullmatch("[0-9a-f]{32}\n", out)
        pids.append(out.strip())
    assert drain(live) == len(pids)
    outputs = [live.wait(pid, 0).output for pid in pids]
    assert outputs[:4] == [{"n": 7}, {"n": 9}, {"n": 4}, {"n": 11}]
    assert outputs[4]["stdout"].split("\r\n" if WINDOWS else "\n")[0] == (
        "12 ['--retry', '--', '-x']"
    )
    states = live.get_process_info(pids[4]).steps
    assert list(states) == ["x", "command"]


def test_status_prints_the_record_with_exactly_its_keys_in_order(manager, clock):
    words = (
        *("--name", "nightly", "--queue", "low", "--priority", "-3", "--retry", "2"),
        *("--timeout", "5m", "--at", "20380119031407", "--args", '{"a": 1}'),
        *("--retry-interval", "1h", "--backoff", "2", "--on-lost", "ask"),
    )
    waiting = cli(*ONE, *words, "--db", manager.path).out.strip()
    code, out, err = cli("status", waiting, "--db", manager.path)
    record = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert list(record) == RECORD_KEYS
    assert re.fullmatch("20[0-9]{12}", record["created_at"])
    assert {**record, "created_at": ""} == {
        **dict.fromkeys(RECORD_KEYS), "pid": waiting, "name": "nightly",
        "status": "queued", "created_at": "", "due_at": "20380119031407",
        "step": "one", "steps": {"one": "queued"}, "attempt": 1, "crashes": 0,
        "retry_left": 2, "queue": "low", "priority": -3, "timeout": 300.0,
    }  # fmt: skip
    clock.at = 1644411494.5
    fails = steps("steps:double", {"call": "steps:fail"})
    done = manager.start_process(fails, {"n": 1})
    drain(manager)
    record = json.loads(cli("status", done, "--db", manager.path).out)
    assert list(record) == RECORD_KEYS
    assert {record[f"{event}_at"] for event in ("created", "started", "finished")} == {
        "20220209125814"
    }
    assert list(record["error"]) == [
        *("step", "type", "message", "traceback", "exit_code", "signal")
    ]
    assert record["steps"] == {"a": "finished", "b": "error"}
    assert (record["status"], record["exit_code"]) == ("error", 1)
    assert record["output"] is None


def test_the_exit_codes_tell_what_happened(live, capsys):
    good = live.start_process(steps("steps:double"), {"n": 1})
    bad = live.start_process(steps("steps:fail"))
    asks = live.start_process(steps("steps:Ask"))
    drain(live)
    waits = live.start_process(steps("steps:nothing"))
    live.close()
    Path("text.db").write_text("not a database " * 100)
    Path("text.db").chmod(0o600)
    nobody = "0" * 32
    for code, words in [
        (0, ("wait", good)),
        (1, ("wait", good, asks, bad)),
        (6, ("wait", good, asks)),
        (124, ("wait", good, waits, "--timeout", "0.05")),
        (0, ("wait", waits, good, "--any", "--timeout", "1m")),
        (3, ("wait", good, nobody)),
        (3, ("status", nobody)),
        (3, ("status", "../../etc/passwd")),
        (3, ("logs", nobody)),
        (4, ("proceed", good)),
        (4, ("cancel", good)),
        (4, ("execute", good)),
        (3, ("execute", nobody)),
        (5, ("status", good, "--db", "text.db")),
        (5, (*ONE, "--db", "text.db")),
        (5, (*ONE, "--db", "missing/x.db")),
        (3, ("list", "--db", "missing.db")),
        (3, ("prune", "--db", "missing.db")),
    ]:
        where = () if "--db" in words else ("--db", live.path)
        real = code in (1, 124) or words == ONE
        found = cli(*words, *where) if real else call_main(capsys, *words, *where)
        assert found.code == code, (words, found)
        if code in (0, 1, 6):
            infos = [json.loads(line) for line in found.out.splitlines()]
            asked = [word for word in words if re.fullmatch("[0-9a-f]{32}", word)]
            if "--any" in words:
                asked.remove(waits)
            assert [info["pid"] for info in infos] == asked and found.err == ""
        else:
            assert found.out == "" and found.err.count("\n") == 1, found
            assert found.err.startswith("procman: ")
    assert Path("text.db").read_text() == "not a database " * 100
    assert not Path("missing.db").exists()


def test_execute_runs_one_process_and_prints_only_its_output(live, gates):
    good = live.start_process(steps("steps:shout", "steps:add_one"), {"n": 1})
    bad = live.start_process(steps("steps:fail"))
    asks = live.start_process(steps("steps:Ask", "steps:double"), {"n": 1})
    others = live.start_process(steps("steps:double"), {"n": 1})
    code, out, err = cli("execute", good[:8], "--db", live.path)
    assert (code, out) == (0, '{"n": 2}\n')
    assert "out a\n" in err and "err a\n" in err
    code, out, err = cli("execute", bad, "--db", live.path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert bad in err and "ValueError: no luck" in err and "'a'" in err
    code, out, _ = cli("execute", asks, "--db", live.path)
    assert (code, json.loads(out)) == (6, {"n": 1, "question": "go on?"})
    assert live.get_process_status(others) == "queued"


def test_execute_from_standard_input_keeps_what_steps_print_out_of_its_output(gates):
    def execute(data, **specs):
        given = json.dumps({"steps": specs, "data": data})
        return cli("execute", "--db", "never.db", stdin=given.encode())

    code, out, err = execute({"n": 1}, a="steps:add_one", b="more:say", c="more.py:say")
    assert (code, out) == (0, '{"n": 2}\n')
    assert sorted(err.split()) == ["high", "high", "low", "low"]
    code, out, _ = execute({}, ask="steps:Ask", gates="steps:fail")
    assert (code, json.loads(out)) == (6, {"question": "go on?"})
    code, out, err = execute({}, first="steps:nothing", second="steps:fail")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "ValueError: no luck" in err and "'second'" in err
    assert not Path("never.db").exists()


def test_proceed_merges_its_data_and_prints_the_pid(live):
    pid = live.start_process(steps("steps:Ask", "steps:add_one"), {"n": 1, "m": 1})
    drain(live)
    database = ("--db", live.path)
    code, out, err = cli("proceed", pid[:6], "--data", '{"n": 5}', *database)
    assert (code, out, err) == (0, pid + "\n", "")
    drain(live)
    assert live.wait(pid, 0).output == {"n": 6, "m": 1, "question": "go on?"}
    code, out, err = cli("proceed", pid, *database)
    assert (code, out) == (4, "")
    assert "finished" in err and "needs interrupted" in err


def test_list_filters_and_pages_as_one_object_a_line(live, capsys):
    pids = [
        live.start_process(ManagedProcess({} if n % 2 else {"a": "m:f"}, name=name))
        for n, name in enumerate(["red", "red", "blue", "blue", "blue"])
    ]
    pids.append(live.start_process(steps("m:f", queue="slow")))
    newest = pids[::-1]
    live.cancel(pids[0])
    for words, expected in [
        ((), newest),
        (("--limit", "2"), newest[:2]),
        (("--limit", "2", "--offset", "3"), newest[3:5]),
        (("--offset", "9"), []),
        (("--limit", "0"), []),
        (("--status", "open"), [pids[5], pids[4], pids[2]]),
        (("--status", "final"), [pids[3], pids[1], pids[0]]),
        (("--status", "cancelled"), [pids[0]]),
        (("--name", "blue", "--status", "queued"), [pids[4], pids[2]]),
        (("--queue", "slow"), [pids[5]]),
    ]:
        code, out, err = call_main(capsys, "list", "--db", live.path, *words)
        infos = [json.loads(line) for line in out.splitlines()]
        assert (code, err, [info["pid"] for info in infos]) == (0, "", expected), words
        assert all(list(info) == RECORD_KEYS for info in infos)


def test_cancel_of_several_cancels_all_that_it_can(live):
    first, last = (live.start_process(steps("steps:double")) for _ in range(2))
    final = live.start_process(ManagedProcess({}))
    words = ("cancel", first, "f" * 32, final, last, "--db", live.path)
    code, out, err = cli(*words)
    assert (code, out) == (3, f"{first}\n{last}\n")
    assert "f" * 32 in err.splitlines()[0] and final in err.splitlines()[1]
    assert live.count(status="cancelled") == 2
    assert cli("cancel", first, last, "--db", live.path).code == 0


def test_logs_follows_a_running_process_to_its_end(live, gates):
    pid = live.start_process(
        steps("more:gate", "steps:shout"), {"gate": str(gates / "open")}
    )
    with running(live):
        follower = spawn("logs", "-f", pid, "--db", live.path)
        assert follower.stdout.readline().split() == [b"before", b"the", b"gate"]
        assert live.get_process_status(pid) == "running"
        assert cli("logs", pid, "--db", live.path).out == "before the gate\n"
        code, out, _ = cli("list", "--status", "running", "--db", live.path)
        assert json.loads(out)["pid"] == pid
        waiter = spawn("wait", pid, "--db", live.path)
        (gates / "open").touch()
        out, err = follower.communicate(timeout=20)
        assert json.loads(waiter.communicate(timeout=20)[0])["status"] == "finished"
    lines = out.decode().split()
    assert lines[:3] == ["behind", "the", "gate"] and err == b""
    assert sorted(lines[3:]) == ["b", "b", "err", "out"]
    assert (follower.returncode, waiter.returncode) == (0, 0)


def test_logs_escapes_what_could_steer_a_terminal_and_raw_does_not(live, gates):
    pid = live.start_process(steps("more:paint"))
    drain(live)
    environment = {**os.environ, "PYTHONUTF8": "1"}
    words = ("logs", pid, "--db", live.path)
    code, out, err = cli(*words, env=environment)
    assert (code, out, err) == (0, "\\x1b[31mred\\x07\tgrün →\n\\xff\n", "")
    child = spawn(*words, "--raw")
    raw = child.communicate(timeout=20)[0].replace(b"\r\n", b"\n")
    assert raw == "\x1b[31mred\x07\tgrün →\n".encode() + b"\xff\n"


def test_logs_prints_what_the_terminals_encoding_lacks_as_escapes(live, gates):
    pid = live.start_process(steps("more:paint"))
    drain(live)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code, out, err = cli("logs", pid, "--db", live.path, env=environment)
    assert (code, err) == (0, "")
    assert out == "\\x1b[31mred\\x07\tgr\\xfcn \\u2192\n\\xff\n"


def test_prune_deletes_what_ended_long_ago_and_says_how_many(manager, clock):
    clock.advance(-8 * 86400)
    old = [manager.start_process(ManagedProcess({})) for _ in range(2)]
    waiting = manager.start_process(steps("steps:double"))
    clock.advance(8 * 86400)
    fresh = manager.start_process(ManagedProcess({}))
    words = ("prune", "--db", manager.path)
    assert cli(*words) == (0, "0\n", "")
    assert cli(*words, "--older-than", "7d") == (0, "2\n", "")
    assert [info.pid for info in manager.list_processes()] == [fresh, waiting]
    assert cli("status", old[0], "--db", manager.path).code == 3


def test_doctor_tells_a_sound_installation_from_an_unsound_one(live, home):
    code, out, _ = cli("doctor", "--db", "none.db")
    assert (code, json.loads(out)["sound"]) == (0, True)
    assert not Path("none.db").exists() and not Path("none.db.run").exists()
    live.start_process(steps("steps:double"))
    doctor = ("doctor", "--db", live.path)
    with running(live) as child:
        found = json.loads(cli(*doctor).out)
        assert (found["sound"], found["trouble"]) == (True, None)
        assert found["database"] == live.path
        assert found["sqlite"] == sqlite3.sqlite_version
        assert found["runners"][0]["alive"] is True
        assert found["lock"].startswith("held")
        child.kill()
        child.wait()
        code, out, _ = cli(*doctor)
    found = json.loads(out)
    assert (code, found["lock"], found["runners"][0]["alive"]) == (0, "free", False)
    live.start_many([(ManagedProcess({}), {"text": "x" * 1000})] * 50)
    live.close()
    with contextlib.closing(sqlite3.connect(live.path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(Path(live.path).read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = b"\xa5" * 4096
    Path(live.path).write_bytes(content)
    code, out, err = cli(*doctor)
    assert (code, json.loads(out)["sound"]) == (5, False)
    assert json.loads(out)["trouble"] and "Traceback" not in err
    if not WINDOWS:
        Path("open.db").touch()
        Path("open.db").chmod(0o666)
        code, out, _ = cli("doctor", "--db", "open.db")
        assert (code, json.loads(out)["sound"]) == (5, False)
        assert "written by others" in json.loads(out)["trouble"]


def test_the_database_is_named_before_or_after_the_command_or_by_the_environment(home):
    app, environment = home / "app", {**os.environ, "PROCMAN_DB": "from_variable.db"}
    pids = [
        copied(app, "--db", "before.db", *ONE, cwd=home, env=environment),
        copied(app, *ONE, "--db", "after.db", cwd=home, env=environment),
        copied(app, *ONE, cwd=home, env=environment),
        copied(app, *ONE, cwd=home),
        copied(app, *ONE, module=True),
    ]
    for database, expected in [
        (home / "before.db", pids[:1]),
        (home / "after.db", pids[1:2]),
        (home / "from_variable.db", pids[2:3]),
        (app / "procman.db", pids[:2:-1]),
    ]:
        with contextlib.closing(ProcessManager(database)) as found:
            assert [info.pid for info in found.list_processes()] == expected


def test_step_modules_are_found_beside_procman_and_where_start_was_called(home):
    app, elsewhere = home / "app", home / "elsewhere"
    for directory, word in ((app, "beside"), (elsewhere, "near")):
        directory.mkdir()
        (directory / f"{word}_steps.py").write_text(
            f"def add(data):\n    return {{**data, '{word}': True}}\n"
        )
    (elsewhere / "where.py").write_text(
        "import os\ndef here(data):\n    return {**data, 'cwd': os.getcwd()}\n"
    )
    pid = copied(
        app,
        *("start", "--step", "a=beside_steps:add", "--step", "b=near_steps:add"),
        *("--step", "c=where.py:here"),
        cwd=elsewhere,
    )
    copied(app, "runner", cwd=home)
    record = json.loads(copied(app, "status", pid, cwd=home))
    assert record["error"] is None
    assert {**record["output"], "cwd": ""} == {"beside": True, "near": True, "cwd": ""}
    assert os.path.samefile(record["output"]["cwd"], elsewhere)


def test_a_pid_may_be_cut_to_a_unique_prefix_of_six_or_more(live, capsys):
    pids = ["abcdef" + "0" * 26, "abcdef" + "1" * 26]
    for pid in pids:
        started = live.start_process(steps("steps:double"))
        with contextlib.closing(sqlite3.connect(live.path)) as database, database:
            database.execute("UPDATE process SET pid = ? WHERE pid = ?", (pid, started))
    for prefix, code, named in [
        (pids[0], 0, ""),
        ("abcdef1", 0, ""),
        ("abcdef", 3, "several"),
        ("abcde", 3, "abcde"),
        ("abcdef2", 3, "abcdef2"),
        ("ABCDEF1", 3, "ABCDEF1"),
        ("abcdef%", 3, "abcdef%"),
        (pids[0] + "0", 3, "hex digits"),
        ("", 3, "hex digits"),
    ]:
        found = call_main(capsys, "status", prefix, "--db", live.path)
        assert found.code == code and named in found.err, found
    assert call_main(capsys, "cancel", "abcdef1", "--db", live.path).out == (
        pids[1] + "\n"
    )


def parser_commands():
    """{name: parser} of all commands, and what stands before them."""
    top = procman.build_parser()
    choices = next(
        action.choices for action in top._actions if hasattr(action, "choices")
        and isinstance(action.choices, dict)
    )  # fmt: skip
    return dict(choices), top


def test_every_command_has_a_help_with_an_example(capsys):
    commands, _ = parser_commands()
    assert list(commands) == [
        *("start", "runner", "execute", "status", "proceed", "list", "count"),
        *("pause", "retry", "cancel", "wait", "logs", "listen", "why", "schedule"),
        *("prune", "doctor"),
    ]
    overview = call_main(capsys, "--help")
    assert (overview.code, overview.err) == (0, "")
    for name, parser in commands.items():
        assert re.search(rf"(?m)^ +{name} +\w", overview.out), f"{name} not explained"
        found = call_main(capsys, name, "--help")
        assert (found.code, found.err) == (0, "")
        example = found.out.partition("example:\n")[2]
        assert f"procman.py {name}" in example
        for action in parser._actions:
            for option in action.option_strings:
                assert option in found.out


def test_version_is_one_line_on_standard_output():
    assert cli("--version") == (0, f"procman {procman.__version__}\n", "")


def test_debug_adds_the_traceback_and_keeps_the_exit_code(live):
    live.start_process(ManagedProcess({}))
    for words in (("--debug", "status", "abcdef"), ("status", "abcdef", "--debug")):
        code, out, err = cli(*words, "--db", live.path)
        assert (code, out) == (3, "")
        assert "Traceback (most recent call last)" in err and "abcdef" in err
    given = b'{"steps": {"a": "steps:fail"}}'
    assert "steps.py" in cli("--debug", "execute", stdin=given).err


@posix
def test_a_reader_that_goes_away_early_ends_the_command_quietly(live):
    live.start_many([ManagedProcess({})] * 400)
    for words in (("list", "--limit", "400"), ("--help",), ("start", "--help")):
        reading, writing = os.pipe()
        child = spawn(*words, "--db", live.path, stdout=writing)
        os.close(writing)
        if words[0] == "list":
            assert os.read(reading, 1) == b"{"
        os.close(reading)
        assert child.communicate(timeout=20)[1] == b"", words
        assert child.returncode == 0, words


@posix
def test_a_terminal_gets_a_table_and_with_json_what_a_program_gets(live):
    pid = live.start_process(steps("steps:double", name="a name"), {"n": 1})
    final = live.start_process(ManagedProcess({}))
    code, screen = on_terminal("list", "--db", live.path)
    lines = screen.splitlines()
    assert code == 0 and len(lines) == 3
    assert lines[0].split() == [
        *("PID", "STATUS", "NAME", "STEP", "DONE", "ATTEMPT", "CREATED", "DUE")
    ]
    assert [line.split()[:2] for line in lines[1:]] == [
        [final[:12], "finished"],
        [pid[:12], "queued"],
    ]
    columns = [line.index(word) for line, word in zip(lines[::2], ("NAME", "a name"))]
    assert columns[0] == columns[1]
    code, screen = on_terminal("list", "--json", "--db", live.path)
    assert [json.loads(line)["pid"] for line in screen.splitlines()] == [final, pid]
    code, screen = on_terminal("status", pid, "--db", live.path)
    assert json.loads(screen)["pid"] == pid and screen.count("\n") > len(RECORD_KEYS)
    code, screen = on_terminal(*ONE, "--db", live.path)
    assert re.fullmatch(r"[0-9a-f]{32}\nprocman: queued; .*runner.*\n", screen)


@posix
def test_a_bare_environment_as_that_of_cron_is_enough(home):
    script = 'umask 000; exec "$0" "$@" <&-'

    def bare(*words):
        return subprocess.run(
            ["/bin/sh", "-c", script, sys.executable, str(PROCMAN), *words],
            capture_output=True,
            env={
                "PATH": "",
                "LC_ALL": "C",
                "TMPDIR": "/nowhere",
                "PYTHONDONTWRITEBYTECODE": "1",  # not into the checkout
            },
            timeout=60,
            check=False,
        )

    data = '{"n": 1, "text": "gr\u00fcn"}'
    started = bare(*ONE, "--db", "x.db", "--name", "gr\u00fcn", "--data", data)
    assert (started.returncode, started.stderr) == (0, b"")
    pid = started.stdout.decode().strip()
    done = bare("runner", "--db", "x.db")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    record = json.loads(bare("status", "--db", "x.db", pid).stdout)
    assert (record["name"], record["output"]) == ("gr\u00fcn", {"n": 2})
    for path in home.glob("x.db*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    failed = bare("execute", "--db", "x.db")
    assert failed.returncode == 2 and failed.stderr.count(b"\n") == 1, failed
    assert bare(*ONE, "--db", "x.db", "--data", "-").returncode == 2
    script = 'exec "$0" "$@" <&- 2>&-'
    assert bare(*ONE, "--db", "x.db").returncode == 0
    assert bare("runner", "--db", "x.db").returncode == 0


def test_a_second_waiting_runner_leaves_quietly_so_that_cron_may_start_it(live, gates):
    database = ("--db", live.path)
    with running(live, "--script-args", "--mode 'a b'") as first:
        assert cli("runner", "--wait", *database) == (0, "", "")
        code, out, err = cli("runner", "--wait", "--max-processes", "1", *database)
        assert (code, out, err.count("\n")) == (0, "", 1)
        assert "--max-processes" in err and "--max-jobs" in err
        pid = live.start_process(steps("more:argv", args={"limit": 5}))
        assert live.wait(pid, 20).output == {"argv": ["--limit", "5", "--mode", "a b"]}
        other = live.start_process(steps("more:argv", queue="other"))
        words = ("--wait", "--queue", "other", "--max-jobs", "1")
        third = cli("runner", *words, *database)
        assert third == (0, "", "")
        assert live.wait(other, 0).output == {"argv": []}
        assert cli("runner", *database) == (0, "", "")
        assert first.poll() is None


# --- steering and looking ----------------------------------------------------


def test_cancel_all_on_the_command_line_says_whom_it_has_cancelled(live, capsys):
    mine = [live.start_process(steps("m:f", name="mine")) for _ in range(2)]
    mail, other = live.start_many([steps("m:f", queue="mail"), steps("m:f")])
    final = live.start_process(ManagedProcess({}, name="mine"))

    def cancel(*words):
        return call_main(capsys, "cancel", *words, "--db", live.path)

    for words, named in [
        ((), "give PIDs, or --all"),
        ((other, "--all"), "give PIDs, or --all"),
        ((other, "--name", "mine"), "filters go with --all"),
        (("--status", "open"), "give PIDs, or --all"),
        (("--all", "--status", "final"), "what is final cannot be cancelled"),
        (("--all", "--status", "error"), "what is error cannot be cancelled"),
        (("--all", "--status", "done"), "status must be one of"),
        (("--all", "--since", "soon"), "since must be"),
        (("--all", "--colour", "red"), "--colour"),
    ]:
        code, out, err = cancel(*words)
        assert (code, out, err.count("\n")) == (2, "", 1) and named in err, words
    assert cancel("--all", "--parent", "0" * 32).code == 3
    assert live.count(status="queued") == 4
    assert cancel("--all", "--name", "mine") == (0, "".join(f"{x}\n" for x in mine), "")
    assert cancel("--all", "--name", "mine") == (0, "", "")
    assert cancel("--all", "--queue", "mail", "--since", "1h") == (0, mail + "\n", "")
    assert cancel("--all") == (0, other + "\n", "")
    assert live.get_process_status(final) == "finished"


def test_pause_and_retry_print_the_pid_of_what_they_have_done(live, capsys):
    pid, failed = live.start_many(
        [(steps("steps:double", delay=3600), {"n": 1}), steps("steps:fail", "m:f")]
    )

    def call(*words):
        return call_main(capsys, *words, "--db", live.path)

    assert call("pause", pid[:6]) == call("pause", pid) == (0, pid + "\n", "")
    assert live.get_process_status(pid) == "interrupted"
    assert call("proceed", pid, "--data", '{"n": 4}').code == 0
    drain(live)
    assert live.wait(pid, 0).output == {"n": 8}
    code, out, err = call("pause", pid)
    assert (code, out) == (4, "") and "it is finished" in err
    for words, reached in [((), 8), (("--step", "a", "--data", '{"n": 3}'), 6)]:
        code, out, err = call("retry", pid[:7], *words)
        assert (code, err) == (0, "") and re.fullmatch("[0-9a-f]{32}\n", out)
        drain(live)
        assert live.wait(out.strip(), 0).output == {"n": reached}
    for words, code, named in [
        ((failed, "--step", "b"), 2, "give its data"),
        ((failed, "--step", "c"), 2, "no step 'c'"),
        ((failed, "--data", "[1]"), 2, "--data must be a JSON object"),
        ((failed, "--failed"), 2, "give a PID, or --failed"),
        ((), 2, "give a PID, or --failed"),
        (("--name", "x"), 2, "give a PID, or --failed"),
        ((failed, "--name", "x"), 2, "go with --failed"),
        ((failed, "--since", "1h"), 2, "go with --failed"),
        ((failed, "--dry-run"), 2, "go with --failed"),
        (("--failed", "--step", "a"), 2, "go with a PID"),
        (("--failed", "--data", "{}"), 2, "go with a PID"),
        (("--failed", "--since", "soon"), 2, "since must be"),
        ((failed, failed), 2, "unrecognized"),
        (("0" * 32,), 3, "no process"),
        ((live.start_process(steps("m:f", delay=60)),), 4, "it is queued"),
    ]:
        found = call("retry", *words)
        assert (found.code, found.out, found.err.count("\n")) == (code, "", 1), words
        assert named in found.err and "-- before" not in found.err
    assert live.count() == 5


def test_retry_failed_prints_what_it_would_and_what_it_does_retry(live, capsys):
    red, blue, held = live.start_many(
        [steps("steps:fail", **given)
         for given in ({"name": "red"}, {"name": "blue"}, {"key": "mine"})]
    )  # fmt: skip
    drain(live)
    live.start_process(steps("steps:nothing", key="mine"))

    def retry(*words):
        return call_main(capsys, "retry", "--failed", *words, "--db", live.path)

    everything = (0, f"{red}\n{blue}\n{held}\n", "")
    assert retry("--dry-run") == retry("--dry-run", "--since", "1h") == everything
    assert retry("--dry-run", "--name", "red") == (0, red + "\n", "")
    assert retry("--since", "20380119031407") == (0, "", "")
    assert live.count() == 4
    code, out, err = retry("--name", "red")
    assert (code, err) == (0, "") and live.get_process_info(out.strip()).series == red
    code, out, err = retry()
    assert live.get_process_info(out.strip()).series == blue
    assert held in err and err.count("\n") == 1
    assert retry("--name", "red") == (0, "", "")
    assert live.count() == 6


def test_list_and_count_take_the_same_filters(manager, clock, capsys):
    found = filtered_processes(manager, clock)
    manager.cancel(found["plain"])
    five, database = procman.timestamp(clock.at - 300), ("--db", manager.path)
    names = {pid: name for name, pid in found.items()}
    for words, expected in [
        ((), "asks, child, parent, queued elsewhere, named, plain, old"),
        (("--status", "final"), "plain"),
        (("--name", "nightly"), "named"),
        (("--queue", "mail"), "queued elsewhere"),
        (("--since", five), "asks, child, parent, queued elsewhere, named, plain"),
        (("--since", five, "--status", "interrupted"), "asks"),
        (("--parent", found["parent"]), "child"),
        (("--series", found["old"][:8]), "old"),
        (("--name", "nightly", "--queue", "mail"), ""),
    ]:
        code, out, err = call_main(capsys, "list", *words, *database)
        infos = [json.loads(line) for line in out.splitlines()]
        assert (code, err) == (0, ""), words
        assert ", ".join(names[info["pid"]] for info in infos) == expected
        counted = call_main(capsys, "count", *words, *database)
        assert counted == (0, f"{len(infos)}\n", "")
    for order in ("newest", "oldest", "due", "ended"):
        words = ("list", "--order", order, "--limit", "2", "--offset", "1", *database)
        listed = call_main(capsys, *words).out.splitlines()
        wanted = manager.list_processes(order=order, limit=2, offset=1)
        assert [json.loads(line)["pid"] for line in listed] == [x.pid for x in wanted]


@contextlib.contextmanager
def at_terminal(*words):
    """A command in the foreground of a terminal: (child, what it shows, type to it)."""
    import fcntl
    import pty
    import termios

    def foreground():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def read():
        with contextlib.suppress(OSError):
            while True:
                chunk = os.read(master, 65536)
                if not chunk:
                    return
                shown.extend(chunk)

    shown = bytearray()
    master, terminal = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, b"\x0c\0\x50\0\0\0\0\0")  # 12 lines of 80
    child = spawn(
        *words,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=foreground,
        env={**os.environ},  # less what readline has put below it: LINES
    )
    os.close(terminal)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield child, lambda: bytes(shown).decode(), lambda key: os.write(master, key)
    finally:
        child.kill()
        child.wait()
        reader.join(20)
        os.close(master)


@posix
def test_a_watched_list_is_shown_anew_in_place_until_it_is_interrupted(live, gates):
    first = live.start_process(steps("steps:nothing", delay=3600))
    words = ("list", "--watch", "--status", "open", "--db", live.path)
    with running(live) as runner, at_terminal(*words) as (child, shown, press):
        eventually(lambda: first[:12] in shown())
        second = live.start_process(
            steps("more:gate"), {"gate": str(gates / "open"), "ledger": "ledger"}
        )
        eventually(lambda: re.search(f"{second[:12]} +running", shown()))
        live.cancel(first)
        eventually(lambda: first[:12] not in shown().split("\x1b[H")[-1])
        frames = shown().split("\x1b[H")[1:]
        assert not shown().startswith("PID") and "\x1b[2J" not in shown()
        for frame in frames[:-1]:  # what an earlier one has left is wiped
            *lines, end = frame.split("\r\n")
            assert lines[0].startswith("PID") and end == "\x1b[J"
            assert all(line.endswith("\x1b[K") for line in lines)
        many = live.start_many([steps("steps:nothing", delay=3600)] * 30)
        eventually(lambda: many[-1][:12] in shown())
        press(b"\x03")
        assert child.wait(20) == 130
        assert "Traceback" not in shown()
        tall = [frame.count("\n") for frame in shown().split("\x1b[H")]
        assert max(tall) < 12  # else the terminal scrolls
        assert runner.poll() is None
        (gates / "open").touch()
        assert live.wait(second, 20).status == "finished"


@posix
def test_a_wait_shows_how_far_it_is_on_a_terminal_and_nowhere_else(live, more):
    code = (
        "current().progress(3, 10, 'so far'); await_file(data['go']);"
        "current().progress(10, 10)"
    )
    data = {"go": str(more / "go"), "do": code}
    with running(live, "--max-workers", "1"):
        pid = live.start_process(steps("more:do"), data)
        also = live.start_process(steps("steps:nothing"), data)
        quiet = spawn("wait", pid, "--db", live.path)
        one = at_terminal("wait", pid, "--json", "--db", live.path)
        two = at_terminal("wait", pid, also, "--json", "--db", live.path)
        with one as (first, shown, _), two as (second, of_both, _):
            eventually(
                lambda: "3 of 10" in shown() and "0 of 2 have ended" in of_both()
            )
            assert f"[{'#' * 9}{'.' * 21}] 3 of 10 running: so far" in shown()
            (more / "go").write_text("go")
            assert first.wait(20) == second.wait(20) == 0
            eventually(lambda: '"exit_code": 0}' in shown())
            eventually(lambda: of_both().count('"exit_code": 0}') == 2)
        assert "\r\x1b[K{" in shown()  # the bar is wiped before the record is shown
        out, err = quiet.communicate(timeout=20)
    assert json.loads(out)["pid"] == pid and err == b""
    code, screen = on_terminal("wait", pid, "--json", "--db", live.path)
    assert code == 0 and "of 10" not in screen
    code, screen = on_terminal("wait", "0" * 32, "--db", live.path)
    assert code == 3 and "no process" in screen


# --- listening ---------------------------------------------------------------

INTERRUPTIBLE = (
    {}
    if WINDOWS
    else {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
)


@posix
def test_listen_prints_each_event_at_once_and_ends_quietly_by_ctrl_c(live):
    live.start_process(ManagedProcess({}))
    number = live.store.last_event()
    words = ("listen", "--since", number, "--db", live.path)
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    child = spawn(*words, env=environment, **INTERRUPTIBLE)
    for _ in range(2):
        pid = live.start_process(ManagedProcess({}))
        for kind, status in (("start", "queued"), ("finish", "finished")):
            event = json.loads(child.stdout.readline())
            number += 1
            assert re.fullmatch("20[0-9]{12}", event.pop("at"))
            assert list(event.items()) == [
                *[("number", number), ("pid", pid), ("kind", kind)],
                *[("status", status), ("detail", None)],
            ]
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=20) == (b"", b"")
    assert child.returncode == 130


def test_listen_to_a_process_ends_with_it(live, capsys):
    pid, later = live.start_many([steps("steps:fail", retry=1, retry_interval=0)] * 2)
    child = spawn("listen", pid, "--since", "0", "--db", live.path)
    assert json.loads(child.stdout.readline())["kind"] == "start"
    drain(live)
    out, err = child.communicate(timeout=20)
    kinds = [json.loads(line)["kind"] for line in out.splitlines()]
    assert (kinds, err) == (["claim", "retry", "claim", "fail"], b"")
    assert child.returncode == 0
    words = ("listen", later[:8], "--status", "error", "--since", "0")
    code, out, err = call_main(capsys, *words, "--db", live.path)
    event = json.loads(out)
    assert (code, err, event["pid"], event["status"]) == (0, "", later, "error")
    assert event["detail"]["message"] == "no luck"
    assert call_main(capsys, "listen", later, "--db", live.path) == (0, "", "")
    assert call_main(capsys, "listen", "0" * 32, "--db", live.path).code == 3
    assert call_main(capsys, "listen", "--db", "missing.db").code == 3


def test_why_and_a_preview_of_a_schedule_are_lines_of_text(live, capsys):
    pid = live.start_process(steps("m:f"))
    assert call_main(capsys, "why", pid[:6], "--db", live.path) == (
        *(0, "no runner serves queue 'default': start one that does\n", ""),
    )
    assert call_main(capsys, "why", "0" * 32, "--db", live.path).code == 3
    preview = ("schedule", "preview", "30 4 29 2 *", "--db", "never.db")
    code, out, err = call_main(capsys, *preview, "--count", "2")
    assert (code, err) == (0, "") and not Path("never.db").exists()
    assert [line[4:] for line in out.splitlines()] == ["0229043000"] * 2
    assert len(call_main(capsys, *preview).out.splitlines()) == 10
    words = ("schedule", "preview", "0", "3", "*", "*", "*")
    code, out, err = call_main(capsys, *words)
    assert (code, out) == (2, "") and "the five fields in quotes" in err
    assert "required: preview, CRON;" in call_main(capsys, "schedule").err
    words = (
        "schedule",
        "preview",
        "0 12 1 7 *",
        "--tz",
        "Asia/Kolkata",
        "--count",
        "1",
    )
    if has_zone_data():
        assert call_main(capsys, *words).out[4:] == "0701063000\n"


# --- variables ---------------------------------------------------------------


def test_variables_are_defaults_of_start_and_its_own_flags_win(
    live, monkeypatch, capsys
):
    given = {
        "NAME": "nightly", "QUEUE": "mail", "PRIORITY": "-3", "RETRY": "2",
        "RETRY_INTERVAL": "1h", "BACKOFF": "1.5", "TIMEOUT": "5m", "ON_LOST": "ask",
        "ARGS": '{"a": 1}', "DELAY": "60", "INTERVAL": "-1", "INTERVAL_FROM": "start",
        "DEDICATED": "1", "ONCE": "TRUE", "UNIQUE": "", "AT": "", "KEY": "taken",
        "PID": "0" * 32, "STEPS": "missing.json", "DATA": "[", "COLOUR": "red",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv("PROCMAN_" + name, value)

    def start(*words):
        code, out, err = call_main(capsys, *ONE, *words, "--db", live.path)
        assert (code, err) == (0, "")
        row = live.store.find(out.strip())
        assert row["once_key"] is None or not row["once_key"].startswith("key")
        options = live.store.definition(row["definition"]).options
        return live.get_process_info(out.strip()), {**options, **dict(row)}

    info, options = start()
    assert info.pid != "0" * 32
    assert (info.name, info.queue, info.priority) == ("nightly", "mail", -3)
    assert (info.retry_left, info.timeout) == (2, 300)
    assert round(info.due_at - info.created_at) == 60
    expected = {
        "retry_interval": 3600, "backoff": 1.5, "on_lost": "ask", "args": {"a": 1},
        "interval": -1, "interval_from": "start", "once": True, "dedicated": 1,
    }  # fmt: skip
    assert {name: options[name] for name in expected} == expected
    assert start()[0].pid == info.pid  # for there is PROCMAN_ONCE
    monkeypatch.setenv("PROCMAN_DEDICATED", "false")
    words = ("--name", "own", "--queue", "default", "--priority", "0", "--retry", "0")
    words += ("--at", "20380119031407", "--cron", "@daily", "--unique", "--args", "{}")
    info, options = start(*words, "--data", '{"n": 1}')
    assert (info.name, info.queue, info.priority) == ("own", "default", 0)
    assert procman.timestamp(info.due_at) == "20380120000000"
    assert (options["dedicated"], options["cron"]) == (0, "@daily")
    assert not {"interval", "once", "args"} & {*options}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RETRY", "ten"), ("RETRY", "1.5"), ("RETRY", "-2"), ("PRIORITY", "x"),
        ("BACKOFF", "0.5"), ("BACKOFF", "x"), ("TIMEOUT", "soon"), ("TIMEOUT", "0"),
        ("DELAY", "-1"), ("ONCE", "yes"), ("DEDICATED", "2"), ("ARGS", "{"),
        ("ARGS", "[1]"), ("ARGS", '{"a": {}}'), ("QUEUE", "../etc"), ("NAME", "a\x1bb"),
        ("ON_LOST", "shrug"), ("INTERVAL", "soon"), ("INTERVAL_FROM", "now"),
        ("AT", "tomorrow"), ("CRON", "* *"), ("CRON", "0 0 30 2 *"), ("TZ", "No/where"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_named_and_nothing_is_written(
    home, monkeypatch, capsys, name, value
):
    monkeypatch.setenv("PROCMAN_DB", "fresh.db")
    monkeypatch.setenv("PROCMAN_" + name, value)
    code, out, err = call_main(capsys, *ONE)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"PROCMAN_{name}" in err
    assert os.listdir(home) == ["steps.py"]


@zoned
def test_a_preview_has_the_zone_that_a_start_would_have(live, monkeypatch, capsys):
    monkeypatch.setenv("PROCMAN_TZ", "Asia/Kolkata")
    preview = ("schedule", "preview", "0 12 1 7 *", "--count", "1")
    start = call_main(capsys, *ONE, "--cron", preview[2], "--db", live.path)
    due = procman.timestamp(live.get_process_info(start.out.strip()).due_at)
    assert due.endswith("0701063000")
    assert call_main(capsys, *preview) == (0, due + "\n", "")
    assert call_main(capsys, *preview, "--tz", "UTC").out.endswith("0701120000\n")
    assert call_main(capsys, *preview, "--tz", "").code == 2
    monkeypatch.setenv("PROCMAN_TZ", "No/where")
    code, out, err = call_main(capsys, *preview)
    assert (code, out) == (2, "") and "No/where" in err


def test_what_a_step_starts_has_neither_its_pid_nor_its_key(live):
    start = [sys.executable, str(PROCMAN), *ONE, "--data", '{"n": 1}']
    pid = live.start_process(steps({"command": start}))
    assert drain(live, max_jobs=1) == 1
    started = live.wait(pid, 0).output["stdout"].strip()
    assert started != pid and live.count() == 2
    assert live.store.find(started)["once_key"] is None
    assert drain(live) == 1 and live.wait(started, 0).output == {"n": 2}


def test_variables_are_defaults_of_a_runner_and_of_no_other_command(
    live, monkeypatch, capsys
):
    mail, other = live.start_many(
        [steps("steps:nothing", queue=queue) for queue in ("mail", "default")]
    )
    monkeypatch.setenv("PROCMAN_QUEUE", "mail")
    monkeypatch.setenv("PROCMAN_CONCURRENCY", "a=1,b=2")
    monkeypatch.setenv("PROCMAN_MIN_WORKERS", "2")
    for name, value in {"WAIT": "1", "MAX_WORKERS": "2", "LIMIT": "x"}.items():
        monkeypatch.setenv("PROCMAN_" + name, value)
    words = ("runner", "--db", live.path)
    assert cli(*words) == (0, "", "")
    assert statuses(live, [mail, other]) == ["finished", "queued"]
    assert cli(*words, "--queue", "default") == (0, "", "")
    assert statuses(live, [mail, other]) == ["finished", "finished"]
    with running(live, "--concurrency", "c=3"):
        (state,) = live.store.runner_states()
        assert state["queues"] == ["mail"]
        assert state["concurrency"] == {"a": 1, "b": 2, "c": 3}
    monkeypatch.setenv("PROCMAN_MAX_WORKERS", "1")
    found = cli(*words)
    assert found.code == 2 and "min_workers is 2, more than max_workers" in found.err
    monkeypatch.delenv("PROCMAN_MIN_WORKERS")
    for name, value in [
        ("MAX_JOBS", "many"), ("MAX_WORKERS", "0"), ("GRACE", "long"), ("PM", "magic"),
        ("CONCURRENCY", "a"), ("WORKER_TTL", "long"),
    ]:  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setenv("PROCMAN_" + name, value)
            code, out, err = call_main(capsys, *words)
            assert (code, out, err.count("\n")) == (2, "", 1), err
            assert name.lower() in err.lower()
            database = ("--db", live.path)
            for others in ((*database, "count"), ("count", *database), ("--help",)):
                assert call_main(capsys, *others).code == 0, (name, others)


# --- help --------------------------------------------------------------------


def test_every_flag_is_explained_and_every_example_is_one():
    import shlex

    commands, top = parser_commands()
    for name, parser in commands.items():
        unexplained = [
            action.option_strings[0]
            for action in parser._actions
            if action.option_strings and not action.help
        ]
        assert not unexplained, (name, unexplained)
        words = shlex.split(parser.epilog.partition("example:\n")[2])
        words = words[words.index("procman.py") + 1 :]
        for end in ("<", "--"):
            words = words[: words.index(end)] if end in words else words
        args = top.parse_args(words)
        assert args.func is procman.COMMANDS[name][0]


# ===========================================================================
# 11. Crashes
# ===========================================================================


class Line:
    """Where steps and their children call in: each is heard to end."""

    def __init__(self):
        import socket

        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(20)
        self.port = self._server.getsockname()[1]
        self._callers = []

    def callers(self, count):
        """{word: os_pid} of the next who call."""
        found = {}
        for _ in range(count):
            caller = self._server.accept()[0]
            caller.settimeout(20)
            self._callers.append(caller)
            word, os_pid = caller.recv(100).split()
            found[word.decode()] = int(os_pid)
        return found

    def all_end(self):
        """Wait until none of those who called is alive; fails after 20 s."""
        for caller in self._callers:
            with contextlib.suppress(ConnectionError):
                assert caller.recv(1) == b""
        return True

    def close(self):
        for caller in (self._server, *self._callers):
            caller.close()


@pytest.fixture
def line():
    with contextlib.closing(Line()) as found:
        yield found


@pytest.fixture
def bystander():
    """A program of somebody else's, to whom nothing may happen."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield child
    child.kill()
    child.wait()


def kill_at_once(os_pid):
    os.kill(os_pid, signal.SIGTERM if WINDOWS else signal.SIGKILL)


def is_whole(live):
    """No runner, no file of one, nothing running, and SQLite finds no fault."""
    assert live.count(status="running") == 0
    assert live.store.runners() == []
    assert os.listdir(live.store.run_directory) == []
    live.close()
    with contextlib.closing(sqlite3.connect(live.path)) as database:
        return database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_a_start_killed_at_any_moment_is_queued_whole_or_not_at_all(live):
    first = live.start_process(steps("steps:double"), {"n": 0})
    children = []
    for n in range(12):
        words = ("--data", json.dumps({"n": n}), "--db", live.path)
        children.append(spawn(*ONE, *words))
    deadline = time.monotonic() + 20
    while live.count() < 4 and time.monotonic() < deadline:
        pass
    for child in children:
        child.kill()
    # One may have been killed before the end of its line.
    printed = b"\n".join(child.communicate(timeout=20)[0] for child in children)
    began = time.monotonic()
    last = live.start_process(steps("steps:double"), {"n": 1})
    assert time.monotonic() - began < 5
    pids = {info.pid for info in live.list_processes(status="queued")}
    assert {first, last, *printed.decode().split()} <= pids
    assert drain(live) == len(pids) >= 5
    assert {live.wait(pid, 0).status for pid in pids} == {"finished"}
    assert is_whole(live)


def test_a_runner_killed_before_or_after_it_was_registered_leaves_no_file(live):
    code = (
        "import os, sys; import procman\n"
        "def die(*given, **named): os._exit(9)\n"
        "setattr(procman.Store, sys.argv[1], die)\n"
        "manager = procman.ProcessManager(sys.argv[2])\n"
        "procman.Runner(manager).run()\n"
    )
    for moment in ("add_runner", "remove_runner"):
        words = [sys.executable, "-c", code, moment, live.path]
        env = {**os.environ, "PYTHONPATH": str(HERE)}
        assert subprocess.run(words, env=env, check=False).returncode == 9
        if moment == "remove_runner":  # as if it had died just after that
            [row] = live.store.runners()
            live.store.remove_runner(row["id"])
        assert len(os.listdir(live.store.run_directory)) == 1
        assert drain(live) == 0
        assert is_whole(live)


def test_a_lock_whose_file_was_removed_before_it_was_taken_is_taken_anew(home):
    path = str(home / "one.lock")
    procman_lock, taken = procman.try_lock, []

    def slow(fd):
        if not taken:  # between our open and our lock
            taken.append(fd)
            if not WINDOWS:
                os.unlink(path)
        return procman_lock(fd)

    first, second = procman.LockFile(path), procman.LockFile(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(procman, "try_lock", slow)
        assert first.acquire()
    assert os.path.exists(path)
    assert not second.acquire()
    first.release(remove=True)


def test_a_number_used_again_by_another_program_is_not_killed(
    live, gates, bystander, monkeypatch
):
    gate = {"gate": str(gates / "open"), "ledger": str(gates / "ledger")}
    pid = live.start_process(steps("more:gate"), gate)
    with running(live) as runner:
        eventually(lambda: read_ledger(gates / "ledger"))
        [row] = eventually(lambda: live.store.read("SELECT * FROM worker"))
        runner.kill()
        runner.wait()
    if not WINDOWS:  # whose job objects end it with the runner
        tree = procman.Tree(row["os_pid"], row["token"])
        eventually(lambda: not tree.alive())
    with contextlib.closing(sqlite3.connect(live.path)) as database, database:
        changed = database.execute(
            "UPDATE worker SET os_pid = ?, born = 'long ago'", (bystander.pid,)
        )
        assert changed.rowcount == 1
    (gates / "open").touch()
    killed = []
    with monkeypatch.context() as patch:  # to record: a fault here once ended it all
        patch.setattr(os, "kill", lambda *given: killed.append(given))
        assert drain(live, pid="0" * 32) == 0
    assert killed == []
    assert drain(live) == 1
    assert live.wait(pid, 0).crashes == 1
    assert bystander.poll() is None


def test_a_killed_runner_takes_its_workers_along_and_another_recovers(
    live, gates, line
):
    ledger = gates / "ledger"
    pid = live.start_process(
        steps("steps:nothing", "more:tied", retry=0),
        {"ledger": str(ledger), "port": line.port},
    )
    with running(live) as runner:
        assert set(line.callers(2)) == {"step", "child"}
        runner.kill()
        runner.wait()
        assert line.all_end()
    assert live.get_process_status(pid) == "running"
    assert drain(live, pid="0" * 32) == 0
    info = live.get_process_info(pid)
    assert (info.status, info.crashes, info.attempt) == ("queued", 1, 1)
    assert info.steps == {"a": "finished", "b": "queued"}
    assert drain(live) == 1
    info = live.wait(pid, 0)
    assert (info.crashes, info.attempt, info.error) == (1, 1, None)
    assert read_ledger(ledger) == ["tied", "tied"]
    assert is_whole(live)


def test_a_reboot_is_no_crash_and_nobody_is_killed_for_it(live, gates, bystander):
    gate = {"gate": str(gates / "open"), "ledger": str(gates / "ledger")}
    pids = [
        live.start_process(steps("more:gate", on_lost=on_lost), gate)
        for on_lost in ("retry", "error")
    ]
    with running(live, "--max-workers", "2") as runner:
        eventually(lambda: len(read_ledger(gates / "ledger")) == 2)
        runner.kill()
        runner.wait()
    born = procman.start_time(bystander.pid)
    with contextlib.closing(sqlite3.connect(live.path)) as database, database:
        database.execute("UPDATE runner SET boot = 'another'")
        database.execute(
            "UPDATE worker SET os_pid = ?, born = ?", (bystander.pid, born)
        )
    (gates / "open").touch()
    assert drain(live) == 2
    assert [live.wait(pid, 0).crashes for pid in pids] == [0, 0]
    assert bystander.poll() is None


def test_a_killed_worker_or_command_is_an_error_of_its_step_and_retries_apply(
    live, gates, line
):
    kept = {"retry": 1, "retry_interval": 0}
    command = "import sys; sys.path[:0] = ['.']; import more; exec(more.CALL)"
    spec = {"command": [sys.executable, "-c", command, str(line.port), "command"]}
    given = {"ledger": str(gates / "ledger"), "port": line.port}
    with running(live, "--max-workers", "2") as runner:
        died = live.start_process(steps("more:tied", **kept), given)
        os_pids = line.callers(2)
        kill_at_once(os_pids["step"])
        assert line.all_end()
        assert live.wait(died, 20).attempt == 2
        spec["env"] = {"PYTHONPATH": os.pathsep.join([str(HERE), str(gates)])}
        failed = live.start_process(steps(spec))
        kill_at_once(line.callers(1)["command"])
        with pytest.raises(procman.ProcessFailed) as caught:
            live.wait(failed, 20)
        alone = live.start_process(
            steps("more:tied"), {**given, "ledger": str(gates / "ledger2")}
        )
        kill_at_once(line.callers(2)["step"])
        with pytest.raises(procman.ProcessFailed) as lonely:
            live.wait(alone, 20)
        assert live.wait(live.start_process(steps("steps:nothing")), 20)
        assert runner.poll() is None
    assert read_ledger(gates / "ledger") == ["tied", "tied"]
    error, death = caught.value.info.error, lonely.value.info.error
    assert (error["type"], death["type"]) == ("CommandFailed", "WorkerDied")
    if not WINDOWS:
        assert error["signal"] == death["signal"] == "SIGKILL"
        assert "SIGKILL" in error["message"] and "SIGKILL" in death["message"]
    assert lonely.value.info.crashes == 0
    assert drain(live) == 0  # on Windows the runner was not stopped, but ended
    assert is_whole(live)


@pytest.mark.skipif(WINDOWS, reason="no SIGSTOP on Windows")
def test_a_step_that_was_not_begun_when_its_worker_was_killed_is_not_charged(live):
    with running(live, "--max-workers", "1"):
        live.wait(live.start_process(steps("steps:nothing")), 20)
        [worker] = live.store.workers(live.store.runners()[0]["id"])
        os.kill(worker["os_pid"], signal.SIGSTOP)
        pid = live.start_process(steps("steps:nothing"))
        eventually(lambda: live.get_process_status(pid) == "running")
        os.kill(worker["os_pid"], signal.SIGKILL)
        assert live.wait(pid, 20).attempt == 1
        died = live.start_process(steps({"call": "os:abort"}))
        with pytest.raises(procman.ProcessFailed):
            live.wait(died, 20)


def test_a_worker_that_was_killed_when_idle_is_given_no_more(live, monkeypatch):
    runner = Runner(live, wait=True, max_workers=1)
    thread = threading.Thread(target=runner.run)
    alive, pids = procman.Tree.alive, []

    def slow(tree):
        if not pids:
            pids.append(live.start_process(steps("steps:nothing")))
            end.append(time.monotonic() + 0.3)
        return time.monotonic() < end[0] or alive(tree)

    end = []
    monkeypatch.setattr(procman.Tree, "alive", slow)
    thread.start()
    try:
        workers = eventually(lambda: runner._pool.workers)
        eventually(lambda: workers[0].ready)
        kill_at_once(workers[0].child.pid)
        eventually(lambda: pids)
        assert live.wait(pids[0], 20).attempt == 1
    finally:
        runner.stop()
        thread.join()


def test_a_runner_killed_at_random_moments_loses_and_repeats_nothing(live, gates):
    import random

    ledger = gates / "ledger"
    process = steps("steps:ledger", "steps:nothing")
    count, kills = (60, 2) if WINDOWS else (250, 5)
    pids = live.start_many([(process, {"ledger": str(ledger)})] * count)
    for _ in range(kills):
        until = len(read_ledger(ledger)) + random.randrange(10, 25)
        with running(live, "--max-workers", "2") as runner:
            eventually(lambda until=until: len(read_ledger(ledger)) >= until)
            runner.kill()
    drain(live)
    infos = live.list_processes(limit=1000)
    assert {info.pid for info in infos} == set(pids)
    assert {info.status for info in infos} == {"finished"}, infos
    runs = read_ledger(ledger)
    for info in infos:
        assert 1 <= runs.count(f"{info.pid}.a.0") <= 1 + info.crashes
        assert (info.attempt, info.output) == (1, {"ledger": str(ledger)})
    assert 0 < sum(info.crashes for info in infos) < count
    assert is_whole(live)


def test_what_becomes_of_a_step_whose_runner_died_is_its_owners_choice(live, gates):
    ledger = gates / "ledger"
    given = {"ledger": str(ledger), "hang": True}
    processes = [
        ManagedProcess({word: "more:hang_if_told"}, on_lost=word)
        for word in ("retry", "ask", "error")
    ]
    retried, asked, failed = live.start_many([(one, given) for one in processes])
    for expected in (3, 4, 5):
        with running(live, "--max-workers", "3") as runner:
            eventually(lambda expected=expected: len(read_ledger(ledger)) == expected)
            runner.kill()
    assert drain(live) == 0
    assert sorted(read_ledger(ledger)) == ["ask", "error", "retry", "retry", "retry"]
    found = live.get_process_info(retried)
    assert (found.status, found.crashes, found.attempt) == ("error", 3, 1)
    assert found.error["type"] == "RunnerDied" and "3 runners" in found.error["message"]
    found = live.get_process_info(failed)
    assert (found.status, found.crashes) == ("error", 1)
    assert found.error["step"] == "error" and "died" in found.error["message"]
    found = live.get_process_info(asked)
    assert (found.status, found.crashes, found.step) == ("interrupted", 1, "ask")
    assert "died" in found.error["message"] and found.output == given
    live.proceed(asked, {"hang": False})
    assert drain(live) == 1
    found = live.wait(asked, 0)
    assert (found.error, found.output) == (None, {**given, "hang": False})
    assert is_whole(live)


@posix
def test_a_suspended_runner_is_alive_and_is_left_alone(live, gates):
    gate = {"gate": str(gates / "open"), "ledger": str(gates / "ledger")}
    pid = live.start_process(steps("more:gate"), gate)
    with running(live) as runner:
        eventually(lambda: read_ledger(gates / "ledger"))
        runner.send_signal(signal.SIGSTOP)
        try:
            other = live.start_process(steps("steps:nothing"))
            assert drain(live) == 1
            assert live.wait(other, 0)
            assert live.get_process_status(pid) == "running"
            (gates / "open").touch()
        finally:
            runner.send_signal(signal.SIGCONT)
        assert live.wait(pid, 20).crashes == 0
    assert read_ledger(gates / "ledger") == ["gate"]


def test_two_runners_at_once_run_each_of_many_processes_once(live, gates):
    process, count = steps("more:own_ledger"), 300 if WINDOWS else 2000
    words = ("--max-workers", "1", "--queue")
    with contextlib.ExitStack() as up:
        one, two = (
            up.enter_context(running(live, *words, queues))
            for queues in ("default", "b,default")
        )
        pids = live.start_many([(process, {"directory": str(gates)})] * count)
        eventually(lambda: live.count(status="open") == 0, 60)
        for runner in (one, two):
            runner.terminate()
        ends = [runner.communicate(timeout=20) for runner in (one, two)]
    assert live.count(status="finished") == count
    written = [path.read_text().split() for path in gates.glob("*.ledger")]
    assert sorted(pid for part in written for pid in part) == sorted(pids)
    assert len(written) >= 2
    assert ends == [(b"", b"")] * 2


# What attacks have found.

EVIL = """
import os, signal, sys, time
from procman import current

def ok(data):
    return {"ok": 1}

def junk(data):
    for fd in range(3, 30):
        try:
            os.write(fd, b"junk\\n")
        except OSError:
            pass

def twins(data):
    os.fork()
    return {"x": "a" * 5_000_000}

def daemon(data):
    if os.fork() == 0:
        sys.exit(0)
    return {"started": True}

def close_reading(data):
    os.close(3)

def clock(data):
    time.perf_counter = lambda: float("nan")

class Lazy:
    def __getattr__(self, name):
        raise ImportError("not here")

def lazy(data):
    sys.modules["lazy_thing"] = Lazy()

def flood(data):
    end = time.monotonic() + 1
    while time.monotonic() < end:
        os.write(1, b"y" * (1 << 20))

def alarm(data):
    signal.alarm(1)

def umask(data):
    os.umask(0o777)

def deaf(data):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def vendored(data):
    from vendor.procman import current
    return {"key": current().key}
"""


@posix
@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("junk", "error"),
        ("twins", "finished"),
        ("daemon", "finished"),
        ("close_reading", "finished"),
        ("clock", "finished"),
        ("lazy", "finished"),
        ("flood", "finished"),
        ("alarm", "finished"),
        ("umask", "finished"),
        ("deaf", "finished"),
    ],
)
def test_a_step_that_tampers_with_its_worker_harms_nobody_else(
    manager, home, name, status
):
    (home / "evil.py").write_text(EVIL)
    pid = manager.start_process(steps(f"evil:{name}", "evil:ok"))
    after = {"shell": "echo > made; test -r made && sleep 0.1"}
    others = manager.start_many([steps("evil:ok"), steps(after), steps("evil:ok")])
    assert drain(manager, max_workers=1) == 4
    assert manager.get_process_info(pid).status == status
    assert {manager.get_process_info(other).status for other in others} == {"finished"}
    assert (home / "made").stat().st_mode & 0o400


@posix
def test_a_child_that_a_step_forks_does_not_speak_for_it(manager, home):
    (home / "forks.py").write_text(
        "import os, time\n"
        "def both(data):\n"
        "    if os.fork() == 0:\n"
        "        return {'who': 'child'}\n"
        "    os.wait()\n"
        "    return {'who': 'parent'}\n"
        "def saw(data):\n"
        "    return {'saw': data}\n"
    )
    pid = manager.start_process(steps("forks:both", "forks:saw"))
    assert drain(manager) == 1
    assert manager.get_process_info(pid).output == {"saw": {"who": "parent"}}


@posix
def test_kill_0_in_a_command_is_the_error_of_its_own_step(manager):
    killer = manager.start_process(steps({"shell": "kill 0; sleep 1"}))
    other = manager.start_process(steps({"shell": "true"}))
    drain(manager, max_workers=1)
    assert manager.get_process_info(killer).error["signal"] == "SIGTERM"
    assert manager.get_process_info(other).status == "finished"


def test_a_worker_imports_nothing_from_the_directory_of_its_runner(manager, home):
    (home / "argparse.py").write_text("open('pwned', 'w'); raise SystemExit")
    (home / "traceback.py").write_text("open('pwned', 'w'); raise SystemExit")
    pid = manager.start_process(steps("steps:fail"))
    drain(manager)
    assert manager.get_process_info(pid).error["type"] == "ValueError"
    assert not (home / "pwned").exists()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE definition SET text = '{'",
        "UPDATE data SET data = '{'",
        "UPDATE data SET data = x'7b7d'",
        "DELETE FROM data",
        "UPDATE process SET step_index = 99",
        "UPDATE process SET attempt = 'abc'",
        "UPDATE process SET claim = 'abc'",
        "UPDATE process SET crashes = 'abc'",
    ],
)
def test_a_row_edited_by_hand_stops_only_its_own_process(manager, sql, capsys):
    bad = manager.start_process(steps({"command": [sys.executable, "-V"]}))
    with contextlib.closing(sqlite3.connect(manager.path)) as db:
        db.execute(sql)
        db.commit()
    good = manager.start_process(steps("steps:nothing", retry=1))
    assert drain(manager) >= 1
    assert manager.get_process_status(good) == "finished"
    assert manager.get_process_status(bad) == "error"
    assert procman.main(["list", "--db", manager.path]) in (0, 5)
    assert capsys.readouterr().err.count("\n") <= 1


def test_rows_that_no_runner_can_take_are_left_and_said(manager):
    for sql in ("due_at = 'soon'", "id = 9223372036854775807"):
        pid = manager.start_process(steps("steps:nothing"))
        with contextlib.closing(sqlite3.connect(manager.path)) as db:
            db.execute(f"UPDATE process SET {sql} WHERE pid = ?", (pid,))
            db.commit()
        assert drain(manager) in (0, 1)
    with pytest.raises(procman.StorageError, match="no room for another id"):
        manager.start_process(steps("steps:nothing"))


def test_a_pid_edited_by_hand_is_no_way_into_a_worker(manager):
    pid = manager.start_process(steps("steps:nothing"))
    with contextlib.closing(sqlite3.connect(manager.path)) as db:
        db.execute("UPDATE process SET pid = 'ab\"c' || substr(pid, 5)")
        db.commit()
    good = manager.start_process(steps("steps:nothing"))
    assert drain(manager) >= 1
    assert manager.get_process_status(good) == "finished"
    rows = manager.store.read("SELECT status FROM process WHERE pid <> ?", (good,))
    assert [row[0] for row in rows] == ["error"] and pid != good


@posix
def test_a_directory_that_is_not_utf8_harms_no_runner(manager, home):
    os.mkdir(b"d\xff")
    os.symlink(b"d\xff", "link")
    pid = manager.start_process(steps({"command": ["no-such"], "cwd": "link"}))
    drain(manager)
    assert manager.get_process_info(pid).error["type"] == "FileNotFoundError"


def test_an_error_shows_no_environment(manager, home):
    (home / "plain.py").write_text("class Plain: pass")
    spec = {"class": "plain:Plain", "env": {"TOKEN": "s3cret"}}
    pid = manager.start_process(steps(spec))
    drain(manager)
    assert "s3cret" not in json.dumps(manager.get_process_info(pid).to_json())


def test_a_late_duplicate_key_is_found_at_once():
    text = "{" + ",".join(f'"{i}":0' for i in range(100_000)) + ',"99999":0}'
    began = time.monotonic()
    with pytest.raises(procman.BadSpec, match="'99999' stands twice"):
        procman.from_json(text)
    assert time.monotonic() - began < 10, "quadratic: minutes"


@posix
def test_two_different_signals_at_once_charge_nothing(manager, home):
    ledger = home / "ledger"
    pid = manager.start_process(steps("steps:hang"), {"ledger": str(ledger)})
    with running(manager) as runner:
        eventually(lambda: read_ledger(ledger))
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            runner.send_signal(number)
        assert runner.wait(20) == 0
    info = manager.get_process_info(pid)
    assert (info.status, info.crashes, info.error) == ("queued", 0, None)


@contextlib.contextmanager
def write_lock(path):
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@posix
def test_a_recovery_that_meets_a_lock_is_done_when_the_lock_is_gone(manager, home):
    ledger = home / "ledger"
    pid = manager.start_process(steps("steps:hang"), {"ledger": str(ledger)})
    with running(manager) as victim:
        eventually(lambda: read_ledger(ledger))
        with running(manager, "--queue", "other"):
            one, other = manager.store.runners()
            eventually(lambda: manager.store.workers(other["id"]))
            life = procman.LockFile(f"{manager.path}.run/{one['token']}.lock")

            def is_tried():
                free = life.acquire()
                life.release()
                return not free and victim.poll() is not None

            with write_lock(manager.path):
                victim.kill()
                eventually(is_tried)
            eventually(lambda: manager.get_process_status(pid) == "queued", 10)


def test_a_checkpoint_that_fails_takes_nothing_back(manager, monkeypatch):
    def full():
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(manager.store, "checkpoint", full)
    pid = manager.start_process(steps("steps:add_one"))
    assert manager.get_process_status(pid) == "queued"
    assert drain(manager) == 1
    assert manager.get_process_status(pid) == "finished"


def test_a_number_of_a_definition_is_never_given_again(manager, clock):
    manager.start_process(steps("steps:add_one"), {"n": 4})
    assert drain(manager) == 1
    clock.advance(10)
    assert manager.prune(0) == 1
    other = manager.start_process(steps("steps:double"), {"n": 4})
    assert drain(manager) == 1
    assert manager.get_process_info(other).output == {"n": 8}


def test_reading_goes_on_beside_a_thread_that_waits_to_write(manager):
    pid = manager.start_process(steps("steps:add_one"))
    writer = threading.Thread(target=manager.cancel, args=(pid,))
    with write_lock(manager.path):
        writer.start()
        began = time.monotonic()
        while time.monotonic() - began < 0.5:
            assert manager.get_process_status(pid) == "queued"
        assert time.monotonic() - began < 3, "it waited for the writer"
    writer.join()
    assert manager.get_process_status(pid) == "cancelled"


def test_errors_survive_pickle(manager):
    import pickle

    pid = manager.start_process(steps("steps:fail"))
    drain(manager)
    with pytest.raises(procman.ProcessFailed) as failed:
        manager.wait(pid)
    with pytest.raises(procman.WrongState) as wrong:
        manager.cancel(pid)
    for error in (
        failed.value,
        wrong.value,
        procman.StepError("Kind", "text", signal=9),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert again.__dict__ == error.__dict__


def test_a_file_edited_while_its_first_step_runs_is_noticed(manager, home):
    code = "import os, time\ndef run(data):\n    {}\n    return {{'version': {}}}\n"
    wait = "while not os.path.exists('go'): time.sleep(0.01)"
    (home / "edited.py").write_text(code.format(wait, 1))
    with running(manager, "--max-workers", "1"):
        first = manager.start_process(steps("edited:run"))
        eventually(lambda: manager.get_process_status(first) == "running")
        eventually(lambda: "edited" in "".join(map(str, home.rglob("*edited*"))))
        (home / "edited.py").write_text(code.format("pass", 22))
        (home / "go").touch()
        assert manager.wait(first, 20).output in ({"version": 1}, {"version": 22})
        second = manager.start_process(steps("edited:run"))
        assert manager.wait(second, 20).output == {"version": 22}


def test_current_works_in_a_copy_that_is_vendored_in_a_package(manager, home):
    import shutil

    (home / "vendor").mkdir()
    (home / "vendor" / "__init__.py").touch()
    shutil.copy(PROCMAN, home / "vendor" / "procman.py")
    (home / "evil.py").write_text(EVIL)
    pid = manager.start_process(steps("evil:vendored"))
    drain(manager)
    assert manager.get_process_info(pid).output == {"key": f"{pid}.a.0"}


@posix
def test_closed_or_full_standard_output_is_no_traceback(live):
    import shlex

    start = [sys.executable, str(PROCMAN), "start", "--db", live.path, "--", "true"]
    closed = "exec >&-; exec " + " ".join(map(shlex.quote, start))
    found = subprocess.run(["sh", "-c", closed], stderr=subprocess.PIPE, check=False)
    assert (found.returncode, found.stderr) == (0, b"")
    assert live.count(status="queued") == 1
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            found = spawn("list", "--db", live.path, stdout=full)
            assert found.communicate()[1].count(b"\n") == 1 and found.returncode == 1


@posix
def test_a_runner_that_ignores_hangups_as_after_nohup_goes_on(manager):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running(manager) as runner:
            runner.send_signal(signal.SIGHUP)
            pid = manager.start_process(steps("steps:add_one"))
            assert manager.wait(pid, 20).output == {"n": 1}
            assert runner.poll() is None
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


# ===========================================================================
# 12. House rules
# ===========================================================================

HOUSE_ARROWS = {  # room: the rooms it may use
    0: "", 1: "", 2: "1", 3: "12", 4: "1", 5: "1234", 6: "124",
    7: "1246", 8: "1235", 9: "12345", 10: "1246789",
}  # fmt: skip
HOUSE_INNOCENT = {(9, "signal_name"), (10, "wal_reset_bug")}  # pure, stateless
HOUSE_SHORT_NAMES = {"db", "fd", "id", "at", "tz", "pm", "_"}
HOUSE_SQL = re.compile(
    r"\b(SELECT .+ FROM|INSERT (OR \w+ )?INTO|UPDATE \w+ SET|DELETE FROM|PRAGMA \w+"
    r"|CREATE (TABLE|INDEX|TRIGGER)|BEGIN IMMEDIATE|COMMIT|ROLLBACK)\b",
    re.DOTALL,
)


class HouseNames(ast.NodeVisitor):
    """The names that code reads from outside its functions, less annotations."""

    def __init__(self, statement):
        self.found, self._bound = [], []
        self.visit(statement)

    def visit_FunctionDef(self, node):
        given = node.args
        for part in (*node.decorator_list, *given.defaults, *given.kw_defaults):
            self.visit(part or ast.Pass())
        parts = [part for statement in node.body for part in ast.walk(statement)]
        self._bound.append(
            {part.arg for part in ast.walk(given) if isinstance(part, ast.arg)}
            | {
                part.id
                for part in parts
                if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load)
            }
        )
        for statement in node.body:
            self.visit(statement)
        self._bound.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node):
        for part in filter(None, (node.target, node.value)):
            self.visit(part)

    def visit_Name(self, node):
        bound = any(node.id in names for names in self._bound)
        if isinstance(node.ctx, ast.Load) and not bound:
            self.found.append((node.id, node.lineno))


@pytest.fixture(scope="module")
def house():
    """[(room, top-level statement)] of procman.py, and {name: room}."""
    text = PROCMAN.read_text(encoding="utf-8")
    banners = [
        (text.count("\n", 0, match.start()) + 1, int(match[1]))
        for match in re.finditer(r"(?m)^# (\d+)\. ", text)
    ]
    assert [room for _, room in banners] == list(range(1, 11))
    found, owners = [], {}
    for statement in ast.parse(text).body:
        room = max((room for at, room in banners if at < statement.lineno), default=0)
        found.append((room, statement))
        inner = ast.walk(statement) if isinstance(statement, ast.If) else [statement]
        for node in inner:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                owners.setdefault(node.name, room)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in getattr(node, "targets", [getattr(node, "target", None)]):
                    if isinstance(target, ast.Name):
                        owners.setdefault(target.id, room)
    return found, owners


def house_functions(house):
    return [
        node
        for _, statement in house[0]
        for node in ast.walk(statement)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def house_texts(room_and_statement):
    """(text, line) of all strings but docstrings."""
    _, statement = room_and_statement
    docs = {
        id(node.value) for node in ast.walk(statement) if isinstance(node, ast.Expr)
    }
    for node in ast.walk(statement):
        found = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
        if isinstance(found, str) and id(node) not in docs:
            yield found, node.lineno


def test_a_room_uses_only_the_rooms_above_that_it_may_use(house):
    found, owners = house
    wrong = []
    for room, statement in found:
        for name, line in HouseNames(statement).found:
            owner = owners.get(name, room)
            allowed = owner in (room, 0) or (room, name) in HOUSE_INNOCENT
            if not allowed and str(owner) not in HOUSE_ARROWS[room]:
                wrong.append(f"line {line}: room {room} uses {name} of room {owner}")
    assert not wrong, "\n".join(wrong)


def test_nothing_points_forward(house):
    lines = {}
    for _, statement in house[0]:
        inner = ast.walk(statement) if isinstance(statement, ast.If) else [statement]
        for node in inner:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.append(node.name)
            for name in names:
                lines.setdefault(name, statement.lineno)
    wrong = [
        f"line {line}: {name} is met at line {lines[name]}"
        for _, statement in house[0]
        for name, line in HouseNames(statement).found
        if lines.get(name, 0) > statement.lineno
    ]
    assert not wrong, "\n".join(wrong)


def test_an_underscored_name_stays_in_its_room(house):
    found, owners = house
    wrong = [
        f"line {line}: room {room} uses {name} of room {owners[name]}"
        for room, statement in found
        for name, line in HouseNames(statement).found
        if re.match("_[^_]", name) and owners.get(name, room) != room
    ]
    assert not wrong, "\n".join(wrong)


def test_only_room_4_asks_for_the_platform_and_only_room_5_speaks_sql(house):
    wrong = []
    for room, statement in house[0]:
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                asked = f"{node.value.id}.{node.attr}"
                if room != 4 and asked in ("os.name", "sys.platform"):
                    wrong.append(f"line {node.lineno}: {asked} in room {room}")
        for text, line in house_texts((room, statement)):
            if room != 5 and HOUSE_SQL.search(text):
                wrong.append(f"line {line}: SQL in room {room}")
    assert not wrong, "\n".join(wrong)


def test_only_the_statement_of_transition_writes_the_status(house):
    writers, wrong = set(), []
    stores = [entry for entry in house[0] if getattr(entry[1], "name", "") == "Store"]
    for function in house_functions([stores]):
        for node in ast.walk(function):
            keys = node.keys if isinstance(node, ast.Dict) else []
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                keys = [node.slice]
            if "status" in [getattr(key, "value", None) for key in keys]:
                writers.add(function.name)
    for entry in house[0]:
        for text, line in house_texts(entry):
            if re.search(r"\bSET\b(?:(?!\bWHERE\b).)*\bstatus\b", text, re.DOTALL):
                wrong.append(f"line {line}: {text.strip()[:60]}")
    assert (writers, wrong) == ({"transition"}, [])


def test_functions_lines_and_names_keep_the_house_limits(house):
    text = PROCMAN.read_text(encoding="utf-8")
    wrong = [
        f"line {number}: {len(line)} characters"
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > 88
    ]
    for function in house_functions(house):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        if length > 45 and function.name != "build_parser":
            wrong.append(f"line {function.lineno}: {function.name} has {length} lines")
    for node in (node for _, statement in house[0] for node in ast.walk(statement)):
        name = getattr(node, "arg", None) or getattr(node, "name", None)
        if isinstance(node, ast.alias):
            name = node.asname
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            name = node.id
        if isinstance(name, str) and len(name) < 3 and name not in HOUSE_SHORT_NAMES:
            wrong.append(f"line {node.lineno}: the name {name!r}")
    assert not wrong, "\n".join(wrong)


def test_status_imports_none_of_the_slow_modules(home):
    with contextlib.closing(ProcessManager(home / "x.db")) as found:
        pid = found.start_process(ManagedProcess({}))
    child = subprocess.run(
        [sys.executable, "-S", "-X", "importtime", str(PROCMAN), "status", pid]
        + ["--db", "x.db"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert json.loads(child.stdout)["pid"] == pid
    lines = child.stderr.decode().splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if "|" in line}
    assert "sqlite3" in modules
    slow = {"asyncio", "logging", "dataclasses", "subprocess", "typing", "traceback"}
    assert modules & slow == set()


def readme_text():
    readme = HERE / "README.md"
    assert readme.exists(), f"there is no {readme}"
    return readme.read_text(encoding="utf-8")


def readme_masked(text):
    """What an example prints, less what differs from run to run."""
    for pattern, word in [
        (r"\b[0-9a-f]{32}\b", "PID"),
        (r"\b\d{14}\b", "TIME"),
        (r"\b\d+(\.\d+)? ?(ms|s|min)\b", "LENGTH"),
    ]:
        text = re.sub(pattern, word, text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@posix
def test_the_examples_of_the_readme_run_and_print_what_it_says(home):
    examples = re.findall(
        r"(?ms)^<!-- run -->\n+```(python|sh)\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?",
        readme_text(),
    )
    assert examples, "README.md has no ```python or ```sh block after <!-- run -->"
    place, programs = home / "example", home / "programs"
    for directory in (place, programs):
        directory.mkdir()
    (place / "procman.py").write_bytes(PROCMAN.read_bytes())
    for name in ("python", "python3"):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        program.chmod(0o755)
    search = f"{programs}{os.pathsep}{os.environ['PATH']}"
    for language, code, expected in examples:
        start = ["sh", "-e", "-c"] if language == "sh" else [sys.executable, "-c"]
        found = subprocess.run(
            [*start, code],
            cwd=place,
            env={**os.environ, "PATH": search},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=False,
        )
        printed = found.stdout.decode()
        assert found.returncode == 0, f"{code}\n{printed}"
        if expected:
            assert readme_masked(printed) == readme_masked(expected), code


def test_the_tables_of_the_readme_name_what_exists_and_every_command():
    commands, top = parser_commands()
    common = {option for action in top._actions for option in action.option_strings}
    named, options, wrong, kind = set(), set(), [], None
    for line in readme_text().splitlines():
        cells = [cell.strip() for cell in line.replace("\\|", " ").split("|")]
        if len(cells) < 3:
            kind = None
        elif kind is None:
            kind = cells[1].lower()
        elif kind == "option" and cells[1].startswith("`"):
            options.add(cells[1].strip("`"))
        elif kind == "command" and cells[1].startswith("`"):
            words = set(re.findall(r"`([\w-]+)", cells[1]))
            wrong += [f"no command {word}" for word in words - set(commands)]
            named |= words
            known = common.union(
                option
                for word in words & set(commands)
                for action in commands[word]._actions
                for option in action.option_strings
            )
            code = " ".join(re.findall("`([^`]*)`", " ".join(cells)))
            found = re.findall(r"(?<![\w-])--?[a-z][a-z-]*", code)
            wrong += [f"{words} has no {word}" for word in found if word not in known]
    assert not wrong, "\n".join(wrong)
    assert named == set(commands)
    assert options == set(procman.OPTIONS)


# ===========================================================================
# 13. Benchmarks: `make bench`
# ===========================================================================
#
# procman and its peers do the same work in one run.  A cell is one bench_* function for
# one system, in a process and a directory of its own; a round is every cell once, in a
# new order.  Ratios are taken within a round, for machines drift.  Equal rules: a start
# returns when it is committed, a result counts when another process can read it, two
# workers.  Asserted is only that the work was done.

BENCH_LONG = bool(os.environ.get("LONG"))
BENCH_WORK = """
def step(data):
    return {**data, "n": data["n"] + 1}

def true(data):
    import subprocess
    child = subprocess.run(["true"], capture_output=True, text=True)
    return {"stdout": child.stdout, "exit_code": child.returncode}

def unique(data):
    import os, procman
    ledger = os.open("ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(ledger, procman.current().pid.encode() + b"\\n")
    os.close(ledger)
"""
BENCH_DATA = {"one": {"n": 0}, "five": {"n": 0, "text": "x" * 1000}, "true": {"n": 0}}

# Each system as the module `peer`, which its workers import or run too.  `put(kind)`
# starts one process: a no-op, five of them in a row, or a command.
BENCH_SYSTEMS = {
    "procman": """
import sys
from procman import ManagedProcess, ProcessManager, __file__ as script, __version__
ABOUT = __version__
SIZE = {"ones": 3000, "thousands": 7, "fives": 600, "trues": 500, "beside": 40_000,
        "samples": 150}
RUNNER = [sys.executable, script, "runner", "--wait", "--max-workers"]
WORKERS = [[*RUNNER, "2", "--db", "procman.db"]]
KINDS = {
    "one": ManagedProcess({"step": "work:step"}),
    "five": ManagedProcess({f"step{number}": "work:step" for number in range(5)}),
    "true": ManagedProcess({"true": {"command": ["true"]}}),
}
manager, started = ProcessManager("procman.db"), 0
def ask(sql): return manager.store.read(sql)[0][0]
def put(kind):
    global started
    started += 1
    return manager.start_process(KINDS[kind], DATA[kind])
def put_many(count):
    global started
    started += count
    return manager.start_many((KINDS["one"], DATA["one"]) for _ in range(count))
def wait(pid): assert manager.wait(pid, 60).status == "finished"
def left():  # both have an index, so that looking costs the runner little
    return sum(manager.count(status=word) for word in ("queued", "running"))
def done(kind): return started - left()
def end(): assert not manager.count(status="error")
""",
    "huey": """
import sys
from huey import SqliteHuey
import work
ABOUT = "2 worker processes"
SIZE = {"ones": 3000, "fives": 200, "trues": 300, "beside": 5000, "samples": 60}
CONSUMER = [sys.executable, "-m", "huey.bin.huey_consumer", "peer.huey", "-n", "-q"]
WORKERS = [[*CONSUMER, "-w", "2", "-k", "process"]]
huey = SqliteHuey("bench", filename="huey.db", timeout=30)
one, true = huey.task()(work.step), huey.task()(work.true)
link = huey.task(name="link")(lambda data: (work.step(data),))
def ask(sql): return huey.storage.sql(sql, results=True)[0][0]
def put(kind):
    if kind != "five":
        return {"one": one, "true": true}[kind](DATA[kind])
    chain = link.s(DATA[kind]).then(link).then(link).then(link).then(one)
    return huey.enqueue(chain)
def wait(result): until(lambda: huey.get(result.id, peek=True), 0.0002)
def done(kind): return huey.storage.result_store_size() // (5 if kind == "five" else 1)
""",
    "litequeue": """
import json, sys, time
from litequeue import LiteQueue
import work
ABOUT = "2 processes that pop, put the result in a second queue, and call done"
SIZE = {"ones": 3000, "thousands": 2}
WORKERS = [[sys.executable, "peer.py"]] * 2
queue, results = [LiteQueue(name, timeout=30) for name in ("queue.db", "results.db")]
def ask(sql): return queue.conn.execute(sql).fetchone()[0]
def put(kind): queue.put(json.dumps(DATA[kind]))
def put_many(count):
    with queue.transaction(mode="IMMEDIATE"):
        for _ in range(count):
            put("one")
def done(kind): return results.conn.execute("SELECT count(*) FROM Queue").fetchone()[0]
def serve():
    while True:
        message = queue.pop()
        if message:
            results.put(json.dumps(work.step(json.loads(message.data))))
            queue.done(message.message_id)
        else:
            time.sleep(0.005)
""",
    "persist-queue": """
import sqlite3, sys, threading, time
from persistqueue import SQLiteAckQueue
from persistqueue.exceptions import Empty
import work
ABOUT = "2 threads (its claims are for one process), results in a second queue, ack"
SIZE = {"ones": 3000}
WORKERS = [[sys.executable, "peer.py"]]
options = {"multithreading": True, "timeout": 30}
queue, results = [SQLiteAckQueue(name, **options) for name in ("queue", "results")]
reader = sqlite3.connect("results/data.db", isolation_level=None)
def ask(sql): return queue._putter.execute(sql).fetchone()[0]
def put(kind): queue.put(DATA[kind])
def done(kind):
    return reader.execute("SELECT count(*) FROM ack_queue_default").fetchone()[0]
def loop():
    while True:
        try:
            message = queue.get(block=False, raw=True)
            results.put(work.step(message["data"]))
            queue.ack(id=message["pqid"])
        except Empty:
            time.sleep(0.005)
def serve():
    for _ in range(2):
        threading.Thread(target=loop).start()
""",
    "DBOS": """
import logging, subprocess, sys, threading
from dbos import DBOS, DBOSClient
import work
ABOUT = "1 process, 2 executor threads, polls each second"
SIZE = {"ones": 600, "fives": 60, "samples": 4}
WORKERS = [[sys.executable, "peer.py"]]
URL = "sqlite:///dbos.db"
logging.disable(logging.WARNING)
if __name__ != "__main__":
    subprocess.run([*WORKERS[0], "makes the schema"], check=True)
    client = DBOSClient(system_database_url=URL)
def ask(sql):
    with client._sys_db.engine.connect() as db:
        return db.exec_driver_sql(sql).fetchone()[0]
def put(kind):
    names = {"workflow_name": kind, "queue_name": "queue", "app_version": "1"}
    return client.enqueue(names, DATA[kind])
def wait(handle): assert handle.get_result(polling_interval_sec=0.001)["n"] == 1
def done(kind):
    return ask("SELECT count(*) FROM workflow_status WHERE status = 'SUCCESS'")
def serve():
    DBOS(config={"name": "bench", "system_database_url": URL, "log_level": "ERROR",
                 "max_executor_threads": 2, "application_version": "1"})
    step = DBOS.step()(work.step)
    @DBOS.workflow(name="five")
    def five(data):
        for _ in range(5):
            data = step(data)
        return data
    DBOS.workflow(name="one")(work.step)
    DBOS.launch()
    DBOS.register_queue("queue")
    threading.Event().wait(0 if sys.argv[1:] else None)
""",
    "loop": """
import contextlib, fcntl, json, os, socket, sqlite3, sys, time
import work
ABOUT = "SQLite by hand: 2 processes, a file lock between them, a datagram as bell"
SIZE = {"ones": 3000, "thousands": 7, "fives": 300, "samples": 150}
GROUP = 1
WORKERS = [[sys.executable, "-S", "peer.py", name] for name in ("bell0", "bell1")]
lock = os.open("lock", os.O_RDWR | os.O_CREAT)
bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
db = sqlite3.connect("loop.db", timeout=30, isolation_level=None)
db.execute("PRAGMA journal_mode = WAL")
db.execute("CREATE TABLE IF NOT EXISTS item"
           " (id INTEGER PRIMARY KEY, steps_left INT, state INT DEFAULT 0, data TEXT)")
db.execute("CREATE INDEX IF NOT EXISTS item_open ON item (id) WHERE state = 0")
def ask(sql): return db.execute(sql).fetchone()[0]
@contextlib.contextmanager
def transaction(durable=True):
    db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    fcntl.flock(lock, fcntl.LOCK_EX)
    db.execute("BEGIN IMMEDIATE")
    yield
    db.execute("COMMIT")
    fcntl.flock(lock, fcntl.LOCK_UN)
def put_many(count, kind="one"):
    row = (5 if kind == "five" else 1, json.dumps(DATA[kind]))
    with transaction():
        sql = "INSERT INTO item (steps_left, data) VALUES (?, ?)"
        db.executemany(sql, [row] * count)
        number = ask("SELECT last_insert_rowid()")
    with contextlib.suppress(OSError):  # not up yet, or has enough to do
        bell.sendto(b"x", socket.MSG_DONTWAIT, f"bell{number % 2}")
    return number
def put(kind): return put_many(1, kind)
def wait(number):
    until(lambda: ask(f"SELECT state FROM item WHERE id = {number}") == 2, 0.0002)
def done(kind): return ask("SELECT count(*) FROM item WHERE state = 2")
def serve():
    bell.bind(sys.argv[1])
    ended = []
    while True:
        with transaction(ended):  # a claim alone need not reach the disk
            sql = "UPDATE item SET steps_left = ?, state = ?, data = ? WHERE id = ?"
            db.executemany(sql, ended)
            sql = "SELECT id, steps_left, data FROM item WHERE state = 0 LIMIT ?"
            taken = db.execute(sql, (GROUP,)).fetchall()
            sql = "UPDATE item SET state = 1 WHERE id = ?"
            db.executemany(sql, [row[:1] for row in taken])
        ended = [(left - 1, 0 if left > 1 else 2,
                  json.dumps(work.step(json.loads(data))), number)
                 for number, left, data in taken]
        ended or bell.recv(1)
""",
    "raw INSERT": """
import sqlite3
ABOUT = "INSERT and COMMIT alone"
SIZE = {"ones": 3000, "thousands": 7}
db = sqlite3.connect("raw.db", isolation_level=None)
db.execute("PRAGMA journal_mode = WAL")
db.execute("PRAGMA synchronous = FULL")
db.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, data TEXT)")
def ask(sql): return db.execute(sql).fetchone()[0]
def put(kind): put_many(1)
def put_many(count):
    db.execute("BEGIN IMMEDIATE")
    db.executemany("INSERT INTO item (data) VALUES (?)", [('{"n": 0}',)] * count)
    db.execute("COMMIT")
""",
    "task-spooler": """
import os, subprocess, sys
TSP = os.environ["TSP"] or sys.exit("there is neither a tsp nor an apt-get to fetch it")
SIZE, WORKERS = {"trues": 500}, []
os.environ.update(TS_SOCKET=os.path.abspath("socket"), TMPDIR=os.getcwd(), TS_SLOTS="2",
                  TS_MAXFINISHED="1000")
def tsp(*words):
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.check_output([TSP, *words], **quiet)
ABOUT = tsp("-V").split(" - ")[0] + "; 2 slots, queue in memory, output in files"
def put(kind): tsp("true")
def done(kind): return tsp("-l").count(" finished ")
def end(): tsp("-K")
""",
    "xargs": """
import os
ABOUT, SIZE = "seq 500 | xargs -P2 -n1 true", {"trues": 500}
def run(count): assert os.system(f"seq {count} | xargs -P2 -n1 true") == 0
""",
    "posix_spawn": """
import os, shutil
ABOUT, SIZE = "and waitpid, a loop in each of 2 processes", {"trues": 500}
def run(count):
    child, true = os.fork(), shutil.which("true")
    for _ in range(count // 2):
        assert os.waitpid(os.posix_spawn(true, ["true"], os.environ), 0)[1] == 0
    assert os.waitpid(child, 0)[1] == 0 if child else os._exit(0)
""",
}
for name, base, change in (
    ("huey, fsync=True", "huey", ("timeout=30", "timeout=30, fsync=True")),
    ("loop of 64", "loop", ("GROUP = 1", 'GROUP = 64; SIZE["thousands"] = 50')),
):
    BENCH_SYSTEMS[name] = BENCH_SYSTEMS[base].replace(*change)


def median(values):
    return sorted(values)[len(values) // 2]


def seconds_of(action, *given):
    began = time.perf_counter()
    action(*given)
    return time.perf_counter() - began


def milliseconds(action, times, pause=lambda: None):
    """The durations of so many calls, sorted."""
    found = []
    for _ in range(times):
        pause()
        found.append(1000 * seconds_of(action))
    return sorted(found)


def until(check, pause=0.01, seconds=1200 if BENCH_LONG else 120):
    """Look every `pause` seconds until `check()` is true; return when that was."""
    deadline = time.perf_counter() + seconds
    while not check():
        assert time.perf_counter() < deadline, f"not within {seconds} s"
        time.sleep(pause)
    return time.perf_counter()


@contextlib.contextmanager
def children(commands):
    """These commands as children, for the time of the block."""
    with open("errors", "ab") as errors:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": errors, "stderr": errors}
        found = [subprocess.Popen(words, **quiet) for words in commands]
        try:
            yield found
        finally:
            for child in found:
                child.terminate()
            for child in found:
                child.wait(30)


def fill(peer, count):
    while count >= 1000 and hasattr(peer, "put_many"):
        peer.put_many(1000)
        count -= 1000
    for _ in range(count):
        peer.put("one")


def drained(peer, total, kind="one"):
    """Seconds until all are done: since the workers' start, since the first result."""
    began, seen = time.perf_counter(), []

    def look():
        seen.append((time.perf_counter(), peer.done(kind)))
        return seen[-1][1] >= total

    with children(peer.WORKERS):
        ended = until(look)
    first, had = next(entry for entry in seen if entry[1] > 0)
    return ended - began, (ended - first) * total / max(total - had, 1)


def bench_throughput(peer):
    """Start one by one and in thousands; then drain all of that."""
    ones, thousands = peer.SIZE["ones"], peer.SIZE.get("thousands", 0)
    total = ones + 1000 * thousands
    took = seconds_of(lambda: [peer.put("one") for _ in range(ones)])
    found = {"start of one, 1/s": ones / took}
    if thousands:
        took = seconds_of(lambda: fill(peer, 1000 * thousands))
        found["start of 1,000 at once, 1/s"] = 1000 * thousands / took
    if hasattr(peer, "WORKERS"):
        since_start, since_first = drained(peer, total)
        found["drain of no-ops, from the workers' start, 1/s"] = total / since_start
        found["drain of no-ops, from the first result, 1/s"] = total / since_first
        assert peer.done("one") == total
    return found


def bench_pipelines(peer):
    total = peer.SIZE["fives"]
    for _ in range(total):
        peer.put("five")
    took, _ = drained(peer, total, "five")
    return {"5 steps, each kept before the next begins, 1/s": total / took}


def bench_beside(peer):
    fill(peer, peer.SIZE["beside"])
    with children(peer.WORKERS):
        until(lambda: peer.done("one"))
        found = milliseconds(lambda: peer.put("one"), 300)
        assert peer.done("one") < peer.SIZE["beside"], "the runner was done too soon"
    return {"start beside a runner at full speed, 99th percentile, ms": found[297]}


def warm(peer):
    for _ in range(3):
        peer.wait(peer.put("one"))


def bench_latency(peer):
    samples, chance = peer.SIZE["samples"], random.Random(1)
    with children(peer.WORKERS):
        warm(peer)
        found = milliseconds(
            lambda: peer.wait(peer.put("one")),
            samples,
            lambda: time.sleep(chance.uniform(0.01, 0.03)),
        )
    return {
        "start to result, idle runner, median, ms": median(found),
        "start to result, 99th percentile, ms": found[int(0.99 * samples)],
    }


def bench_commands(peer):
    total = peer.SIZE["trues"]
    if hasattr(peer, "run"):
        took = seconds_of(lambda: peer.run(total))
    else:
        with children(peer.WORKERS):
            peer.put("true")
            until(lambda: peer.done("true"))
            began = time.perf_counter()
            for _ in range(total):
                peer.put("true")
            took = until(lambda: peer.done("true") > total) - began
    return {"the command `true`, 2 at once, 1/s": total / took}


def bench_idle(peer):
    """What waiting workers cost, with all processes below them."""
    assert Path("/proc/self/smaps_rollup").exists(), "needs /proc as Linux has it"
    with children(peer.WORKERS) as found:
        warm(peer)
        family = [child.pid for child in found]
        for parent in family:
            for path in Path(f"/proc/{parent}/task").glob("*/children"):
                family += map(int, path.read_text().split())

        def used():
            threads = [Path(f"/proc/{pid}/task").glob("*/schedstat") for pid in family]
            texts = [path.read_text() for paths in threads for path in paths]
            return sum(int(text.split()[0]) for text in texts) / 1e9

        time.sleep(1)
        before = used()
        time.sleep(10)
        percent = (used() - before) * 10
        maps = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in family]
    sizes = [int(re.search(r"Pss:\s*(\d+)", text)[1]) for text in maps]
    return {
        "idle runner and workers, % of a core": percent,
        "idle runner and workers, proportional set size, MiB": sum(sizes) / 1024,
    }


# --- what must not depend on size: procman beside itself -------------------


def multiply(path, total):
    """Make `total` of the one process in this database, whatever its state."""
    fresh = {"pid": "lower(hex(randomblob(16)))", "number": "NULL"}
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        db.execute(
            "CREATE TEMP TABLE other AS WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL"
            f" SELECT i + 1 FROM n WHERE i < {total}) SELECT i FROM n"
        )
        for table, key in ("process", "id"), ("data", "process"), ("event", "process"):
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            values = ", ".join({**fresh, key: "i"}.get(name, name) for name in columns)
            db.execute(f"INSERT INTO {table} SELECT {values} FROM {table}, other")
        db.execute("COMMIT")


def claims(kind=None, **options):
    """Claims a second, beside a million of this kind, made once a run."""
    path = Path("..", kind) if kind else Path("empty.db")
    if kind and not path.exists():
        with contextlib.closing(ProcessManager(path)) as manager:
            manager.start_process(steps("work:step", **options), {"n": 0})
            assert kind != "finished" or drain(manager) == 1
        multiply(path, 1_000_000)
    with contextlib.closing(ProcessManager(path)) as manager:
        process, store = steps("work:step"), manager.store
        manager.start_many((process, {"n": 0}) for _ in range(64 * 51))
        number = store.add_runner("none", "none", ["default"], None)

        def claim():  # as a runner does that has nothing to record
            with store.transaction(durable=False) as db:
                assert len(store.claim_due(db, number, demand(64))) == 64

        claim()
        return 64 * 50 / seconds_of(lambda: [claim() for _ in range(50)])


def bench_claims(peer):
    kinds = {"queued": {}, "due later": {"delay": "30d"}, "finished": {}}
    empty = claims()
    return {
        f"claims beside 1,000,000 {kind}, 1/s": {
            "procman": claims(kind, **options),
            "in an empty table": empty,
        }
        for kind, options in kinds.items()
    }


def from_shell(*words):
    """What Python prints for a user, beside a copy of procman.py."""
    clean = {name: os.environ[name] for name in os.environ if name[:6] != "PYTHON"}
    quiet = {"stdin": subprocess.DEVNULL, "env": clean}
    return subprocess.check_output([sys.executable, *words], **quiet).decode().strip()


def bench_shell(peer):
    Path("procman.py").write_bytes(PROCMAN.read_bytes())
    imports = 'python -c "import sqlite3, json, argparse"'
    pid, found = peer.put("one"), {}
    for kind, way in ("", ["procman.py"]), (" with python -m", ["-m", "procman"]):
        looks = [*way, "status", pid], ["-c", "import sqlite3, json, argparse"]

        def pair(way=way):
            given = from_shell(*way, "start", "--step", "step=work:step")
            from_shell(*way, "status", given)

        pair()  # leaves the bytecode, where there is a place for it
        times = [[seconds_of(from_shell, *look) for look in looks] for _ in range(20)]
        mine, bare = [1000 * median(column) for column in zip(*times)]
        found[f"`status` from the shell{kind}, ms"] = {"procman": mine, imports: bare}
        pairs = milliseconds(pair, 200 if BENCH_LONG else 20)
        found[f"`start` and `status` in a loop{kind}, ms"] = sum(pairs) / len(pairs)
    return found


def filled_and_drained(peer, total):
    """Its rate, and in MiB the runner's peak memory and the log that is left."""
    fill(peer, total)
    began = time.perf_counter()
    with children(peer.WORKERS) as [runner]:
        rate = total / (until(lambda: not peer.left()) - began)
        status = Path(f"/proc/{runner.pid}/status").read_text()
        peak = int(re.search(r"VmHWM:\s*(\d+)", status)[1])
        return rate, peak / 1024, os.path.getsize("procman.db-wal") / 2**20


def bench_sizes(peer):
    found, small = {}, filled_and_drained(peer, 1000)
    for total in [100_000] + [1_000_000] * BENCH_LONG:
        large = filled_and_drained(peer, total)
        words = ("rate, 1/s", "peak memory of the runner, MiB", "log left, MiB")
        for what, value, least in zip(words, large, small):
            found[f"drain of {total:,}: {what}"] = {"procman": value, "1,000": least}
    return found


def bench_extremes(peer):
    """An idle runner meets a crowd, a long process and a large one."""
    manager, found = peer.manager, {}
    with children(peer.WORKERS):
        warm(peer)
        moment = time.time() + 2
        crowd = steps("work:step", at=moment)
        manager.start_many((crowd, {"n": 0}) for _ in range(10_000))
        until(lambda: not peer.left())
        found["10,000 due in the same second, s"] = time.time() - moment
        many = ManagedProcess({f"step{number}": "work:step" for number in range(1000)})
        for what, process, data in (
            ("a process of 1,000 steps, s", many, {"n": 0}),
            ("10 MB through a step, s", steps("work:step"), {"n": 0, "x": "x" * 10**7}),
        ):
            began = time.perf_counter()
            manager.wait(manager.start_process(process, data), 60)
            found[what] = time.perf_counter() - began
    assert manager.count(status="finished") == 3 + 10_000 + 2
    return found


def bench_waiters(peer):
    """A drain while 200 threads of another program wait for its last processes."""
    rates = []
    for waiters in 0, 200:
        pids = peer.put_many(10_000)[10_000 - waiters :]
        threads = [threading.Thread(target=peer.wait, args=(pid,)) for pid in pids]
        for thread in threads:
            thread.start()
        began = time.perf_counter()
        with children(peer.WORKERS):
            rates.append(10_000 / (until(lambda: not peer.left()) - began))
            for thread in threads:
                thread.join()
    none, many = rates
    return {"drain beside 200 waiters, 1/s": {"procman": many, "no waiter": none}}


BENCH_STARTER = """
from procman import ManagedProcess, ProcessManager
manager, process = ProcessManager("procman.db"), ManagedProcess({"step": "work:unique"})
for _ in range(200):
    manager.start_process(process)
"""


def bench_crowd(peer):
    """50 programs that start 200 each, and 8 runners, all at once."""
    queues = [["1", "--queue", f"default,more{number}"] for number in range(8)]
    runners = [[*peer.RUNNER, *words, "--db", "procman.db"] for words in queues]
    starters = [[sys.executable, "-c", BENCH_STARTER]] * 50
    began = time.perf_counter()
    with children(runners), children(starters) as programs:
        assert [program.wait(120) for program in programs] == [0] * 50
        took = until(lambda: not peer.left()) - began
    assert peer.manager.count(status="finished") == 10_000
    ran = Path("ledger").read_text().split()
    assert len(ran) == len(set(ran)) == 10_000, "not each of them ran once"
    return {"50 programs start 200 each beside 8 runners, 1/s": 10_000 / took}


# --- one run, one table ----------------------------------------------------

BENCH_PACKAGES = ["huey", "huey, fsync=True", "litequeue", "persist-queue", "DBOS"]
BENCHES = {  # the systems that take part
    bench_throughput: ["procman", *BENCH_PACKAGES, "loop", "loop of 64", "raw INSERT"],
    bench_pipelines: ["procman", "huey", "DBOS", "loop", "loop of 64"],
    bench_beside: ["procman", "huey"],
    bench_latency: ["procman", "huey", "DBOS", "loop"],
    bench_commands: ["procman", "huey", "task-spooler", "xargs", "posix_spawn"],
    bench_idle: ["procman", "huey", "DBOS", "loop"],
    **dict.fromkeys([bench_claims, bench_shell, bench_sizes], ["procman"]),
    **dict.fromkeys([bench_extremes, bench_waiters, bench_crowd], ["procman"]),
}


def bench_cell(function, system):
    """In the process of a cell: measure; print what was found, and of what, as JSON."""
    serving = '\nif __name__ == "__main__":\n    serve()\n'
    Path("peer.py").write_text(BENCH_SYSTEMS[system] + serving)
    Path("work.py").write_text(BENCH_WORK)
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), str(HERE)])
    sys.path.insert(0, os.getcwd())
    peer = importlib.import_module("peer")
    peer.DATA, peer.until = BENCH_DATA, until
    try:
        found, about = globals()[function](peer), peer.ABOUT
    except BaseException:
        for path in Path().glob("errors"):
            print(path.read_text(), file=sys.stderr)
        raise
    finally:
        getattr(peer, "end", lambda: None)()
    if system in BENCH_PACKAGES:
        about = f"{importlib.metadata.version(system.split(',')[0])}; {about}"
    if hasattr(peer, "ask"):
        level = ("OFF", "NORMAL", "FULL", "EXTRA")[peer.ask("PRAGMA synchronous")]
        about += f"; {peer.ask('PRAGMA journal_mode')}, synchronous={level}"
    print(json.dumps([found, about]))


def cell(function, system, shared):
    """Start a cell in a directory of its own."""
    python = os.environ["PEERS"] if system in BENCH_PACKAGES else sys.executable
    return subprocess.Popen(
        [python, __file__, "cell", function.__name__, system],
        cwd=tempfile.mkdtemp(dir=shared),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def result_of(child):
    """What a cell found and of what; nothing, and why, if it failed."""
    try:
        out, err = child.communicate(timeout=1800 if BENCH_LONG else 240)
    except subprocess.TimeoutExpired:
        return {}, "not measured: it took too long"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    if child.returncode == 0:
        return json.loads(out)
    print(err.decode(), file=sys.stderr)
    return {}, "not measured: " + (err.decode().strip() or "?").splitlines()[-1]


def bench_rounds(chosen, rounds, shared):
    """Measure: {(function, system): {round: found}}, and a line about each system."""
    results, about = {}, {}
    for number in range(rounds):
        for function in random.sample(chosen, len(chosen)):
            systems = random.sample(BENCHES[function], len(BENCHES[function]))
            groups = [[system] for system in systems]
            if function is bench_idle:  # ten seconds in which nobody does anything
                groups = [systems]
            for group in groups:
                began = time.perf_counter()
                cells = [cell(function, system, shared) for system in group]
                for system, child in zip(group, cells):
                    found, words = result_of(child)
                    results.setdefault((function, system), {})[number] = found
                    place = system if found else f"{function.__name__[6:]}, {system}"
                    about[place] = words
                print(
                    f"round {number + 1}: {function.__name__[6:]} {', '.join(group)}"
                    f" {time.perf_counter() - began:.1f} s",
                    file=sys.stderr,
                )
    return results, about


def bench_rows(results):
    """{what: {system: {round: value}}} in the order of BENCHES."""
    rows = {}
    for function, systems in BENCHES.items():
        for system in systems:
            for number, found in results.get((function, system), {}).items():
                for what, value in found.items():
                    named = value if isinstance(value, dict) else {system: value}
                    for name, one in named.items():
                        rows.setdefault(what, {}).setdefault(name, {})[number] = one
    return rows


def rounded(values):
    return f"{float(f'{median(values):.3g}'):,.10g}"


def bench_line(what, systems):
    """A line of the table: procman's value, the others', and the ratios."""
    mine, others = systems.pop("procman", {}), []
    for name, values in systems.items():
        both = [number for number in mine if values.get(number)]
        ratios = [mine[number] / values[number] for number in both]
        ratio = f" ({rounded(ratios)})" if ratios else ""
        others.append(f"{name} {rounded(values.values())}{ratio}")
    own = rounded(mine.values()) if mine else ""
    return f"| {what} | {own} | {' · '.join(others)} |"


def bench_main(names):
    """Measure what is named, or everything; print the table and how it was made."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began, rounds = time.time(), int(os.environ.get("ROUNDS") or 3)
    chosen = [one for one in BENCHES if not names or one.__name__[6:] in names]
    with tempfile.TemporaryDirectory("", "bench-", os.environ["CACHE"]) as shared:
        results, about = bench_rounds(chosen, rounds, shared)
    print("| what | procman | beside it (procman's value ÷ its) |\n|---|--:|---|")
    for what, systems in bench_rows(results).items():
        print(bench_line(what, systems))
    print(
        f"\n{time.strftime('%Y-%m-%d')}: medians of {rounds} rounds in"
        f" {(time.time() - began) / 60:.0f} minutes, ratios within a round;"
        f" {os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python"
        f" {platform.python_version()}, SQLite {sqlite3.sqlite_version}. Two workers; a"
        " start returns when it is committed, a result counts when another process can"
        " read it. From the shell: Python of a virtual"
        " environment with pytest alone, beside a fresh copy of procman.py.\n"
    )
    for name in dict.fromkeys([*BENCH_SYSTEMS, *about]):
        if name in about:
            print(f"- {name}: {about[name]}")
    return int(any(name.endswith(", procman") for name in about))


if __name__ == "__main__":
    if sys.argv[1:2] == ["cell"]:
        bench_cell(*sys.argv[2:])
    else:
        sys.exit(bench_main(sys.argv[1:]))
