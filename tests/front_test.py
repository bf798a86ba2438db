#!/usr/bin/env python3
"""serve_torch --front: what becomes of the two processes when one of them fails or is told to end,
and of the steps of a body that fails. The protocol behind it is conformance_numpy_front's.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import traceback
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS / "conformance"))
from client import Ended, Refused  # noqa: E402
from fixture import Fixture, soon, temporary_folder  # noqa: E402

INVALID_ARGUMENT, RESOURCE_EXHAUSTED, INTERNAL = 3, 8, 13
HIDDEN = 64  # make_tiny_model's
ALONE = [sys.executable, "-B", str(TESTS / "front_server.py")]  # without --front


def rows(n, first=1):
    values = np.random.default_rng(n).integers(0, 4, (n, HIDDEN)).astype(np.float32)
    values[0, 0] = first
    return values


@contextlib.contextmanager
def held(fixture):
    """Steps that wait for it do not end before the block does."""
    hold = fixture.folder / "hold"
    hold.touch()
    try:
        yield
    finally:
        hold.unlink()


def says(server, text, times=1):
    """In its log, sooner or later."""
    return soon(lambda: server.log.read_text().count(text) >= times)


def child_of(server):
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    assert len(children.split()) == 1, children
    return int(children)


def is_gone(process):
    try:
        os.kill(process, 0)
        return False
    except ProcessLookupError:
        return True


def metric(server, name):
    line = next(line for line in server.log.read_text().splitlines() if "metrics at" in line)
    with urllib.request.urlopen(line.split()[-1], timeout=20) as page:
        values = [line.split()[1] for line in page.read().decode().splitlines()
                  if line.startswith(name + " ")]
    assert len(values) == 1, values
    return float(values[0])


def refused(code, call, *arguments):
    try:
        call(*arguments)
    except Refused as error:
        assert error.code == code, (error.code, error.message)
        return error.message
    raise AssertionError("not refused")


def ends(client):
    try:
        client.receive()
    except Ended as end:
        assert end.code == grpc.StatusCode.UNAVAILABLE, end
        return end
    raise AssertionError("an answer")


def case_rows_of_many_sizes(fixture, server):
    client = fixture.client(server)
    sessions = [client.open().session for _ in range(2)]
    for session in sessions:
        sent = np.zeros((0, HIDDEN), np.float32)
        for n in (1, 3, 512, 1, 40):
            sent = np.concatenate([sent, rows(n)])
            out = client.step(session, len(sent) - n, sent[-n:], 2)
            assert np.array_equal(out, np.cumsum(sent, axis=0)[-n:])
    client.close()


def case_steps_that_wait(fixture, _):
    """More rows than the processes share memory for are run one after another; a prompt in small
    steps is run as one."""
    with fixture.server("--metrics", "127.0.0.1:0") as own:
        client = fixture.client(own)
        first, second, third = (client.open().session for _ in range(3))
        prompt = rows(512)
        with held(fixture):
            client.send(client.step_frame(first, 0, rows(2, first=8), 0))
            assert says(own, "rows [2]")
            client.send(client.step_frame(second, 0, prompt, 2))
            for i in range(0, 512, 64):
                client.send(client.step_frame(third, i, prompt[i:i + 64], 1 if i == 448 else 0))
            assert soon(lambda: metric(own, "infemeral_waiting_steps") == 9)
        answers = [client.receive() for _ in range(10)]
        assert np.array_equal(client.output(answers[1]), np.cumsum(prompt, axis=0))
        assert np.array_equal(client.output(answers[-1]), prompt.sum(axis=0)[None])
        assert says(own, "rows [512]", times=2), own.log.read_text()
        assert metric(own, "infemeral_steps_total") == 10
        client.close()


def case_a_body_that_fails(fixture, server):
    client = fixture.client(server)
    session = client.open().session
    client.step(session, 0, rows(3))
    said = refused(INTERNAL, client.step, session, 3, rows(2, first=7))
    assert "luck" not in said and "luck" in server.log.read_text(), said
    client.step(session, 3, rows(4))  # the session is as it was
    refused(INVALID_ARGUMENT, client.step, session, 9, rows(1))
    client.step(session, 7, rows(1))
    client.close()


def case_sessions_that_the_body_has_no_room_for(fixture, server):
    client = fixture.client(server)
    sessions = [client.open().session for _ in range(4)]

    def fits(session):
        try:
            client.step(session, 0, rows(1))
            return True
        except Refused as error:
            assert error.code == RESOURCE_EXHAUSTED, error
            return False

    # Those of the cases before may be about to end.
    assert all(soon(lambda: fits(session)) for session in sessions[:3])
    assert not fits(sessions[3])
    client.send(client.frame(close={"session": sessions[1]}))
    assert soon(lambda: fits(sessions[3]))
    client.close()


def case_the_body_is_lost(fixture, _):
    """In a run, and when a session is released: all are answered, and the server ends."""
    for program in (None, ALONE):
        for first in (6, 5):
            with fixture.server(program=program) as own:
                client, idle = fixture.client(own), fixture.client(own)
                idle.step(idle.open().session, 0, rows(1))
                session = client.open().session
                client.send(client.step_frame(session, 0, rows(1, first=first)))
                if first == 5:
                    client.receive()
                    client.send(client.frame(close={"session": session}))
                else:
                    with contextlib.suppress(Ended):
                        assert client.receive().error.code == INTERNAL
                ends(client)
                ends(idle)
                assert own.process.wait(timeout=20) == 3
                text = own.log.read_text()
                assert "luck" in text and "Traceback" not in text, text
                assert text.endswith("info: the body is closed\n"), text


def case_an_exception_ends_the_process(fixture, _):
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import front_server\n"
            "async def start(*_): raise RuntimeError('no luck at the start')\n"
            "load = front_server.load\n"
            "def patch(*given):\n"
            "    from serve_torch.server import BodyServer\n"
            "    BodyServer.start = start\n"
            "    return load(*given)\n"
            "sys.exit(front_server.main(load=patch))")
    program = [sys.executable, "-B", "-c", code, TESTS]
    result = subprocess.run(fixture.command(program=program), capture_output=True, text=True,
                            timeout=60)
    assert result.returncode == 1 and "no luck at the start" in result.stderr, result
    assert "the body is closed" in result.stderr, result


def case_the_worker_is_killed(fixture, _):
    with fixture.server() as own, held(fixture):
        child = child_of(own)
        client, idle = fixture.client(own), fixture.client(own)
        idle.step(idle.open().session, 0, rows(1))
        client.send(client.step_frame(client.open().session, 0, rows(2, first=8)))
        assert says(own, "rows [2]")
        own.process.kill()
        ends(client)
        ends(idle)
        assert soon(lambda: is_gone(child))
        assert says(own, "error: the process that runs the layers has ended")


def case_the_server_is_killed(fixture, _):
    with fixture.server() as own:
        client = fixture.client(own)
        client.step(client.open().session, 0, rows(2))
        os.kill(child_of(own), signal.SIGKILL)
        ends(client)
        assert own.process.wait(timeout=20) == 3
        last = own.log.read_text().splitlines()[-2:]
        assert last[0].endswith("was ended by SIGKILL") and last[0].startswith("error: "), last
        assert last[1] == "info: the body is closed", last


def case_the_end(fixture, _):
    """What is pending is answered first; a second signal does not wait for it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        with fixture.server() as own:
            child = child_of(own)
            client = fixture.client(own)
            with held(fixture):
                client.send(client.step_frame(client.open().session, 0, rows(2, first=8)))
                assert says(own, "rows [2]")
                own.process.send_signal(number)
                assert says(own, "shutting down")
                os.kill(child, number)  # as systemd does, to all of a service
            assert np.array_equal(client.output(client.receive()),
                                  np.cumsum(rows(2, first=8), axis=0))
            ends(client)
            assert own.process.wait(timeout=20) == 0
            assert is_gone(child)
            assert own.log.read_text().endswith("shutting down\ninfo: the body is closed\n")
    with fixture.server() as own, held(fixture):
        child = child_of(own)
        client = fixture.client(own)
        client.send(client.step_frame(client.open().session, 0, rows(2, first=8)))
        assert says(own, "rows [2]")
        own.process.terminate()
        assert says(own, "shutting down")
        own.process.terminate()
        assert own.process.wait(timeout=20) == 128 + signal.SIGTERM
        assert soon(lambda: is_gone(child))
        client.close()


def case_mistakes(fixture, _):
    def fails(code, word, front, *flags):
        command = fixture.command(*flags)
        at = command.index("--front")
        command[at:at + 2] = front
        result = fixture.run(*command, check=False)
        assert result.returncode == code, result
        assert word in result.stderr.decode() and b"Traceback" not in result.stderr, result

    fails(2, "no such program", ["--front", "/nowhere/engine_serve"])
    fails(2, "not engine_serve of this release", ["--front", "/bin/true"])
    fails(2, "needs --front", [], "--metrics", "127.0.0.1:0")
    serve = str(fixture.tools / "engine_serve")
    # A key in place of a file is never repeated.
    for text in ((fixture.folder / "client.key").read_text(), "infemeral-public:" + 42 * "A"):
        command = fixture.command("--allow", text, program=ALONE)
        result = fixture.run(*command, check=False)
        assert result.returncode == 2 and b"public" in result.stderr, result
        assert text.split(":")[1].strip().encode() not in result.stderr, result.stderr
    for flags, word in (((), "--model is required"),
                        (("--worker", "0"), "no socket of a worker"),
                        (("--worker", "0", "--model", "x"), "--model")):
        result = fixture.run(serve, *flags, "--identity", fixture.folder / "server.key", "--allow",
                             fixture.folder / "client.key.pub", check=False)
        assert result.returncode == 2 and word in result.stderr.decode(), result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", required=True, help="folder of engine_serve and its kin")
    parser.add_argument("--make-tiny-model", required=True, help="that program")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with it in their name")
    args = parser.parse_args()
    tools = Path(args.tools).resolve()
    failed = count = 0
    with temporary_folder() as folder:
        command = (f"{sys.executable} -B {TESTS / 'front_server.py'} "
                   f"--front {tools / 'engine_serve'}")
        fixture = Fixture(SimpleNamespace(
            tools=tools, make_tiny_model=Path(args.make_tiny_model).resolve(), seed=None,
            server_command=command, replaces_keys=False), folder)
        assert fixture.hidden_size == HIDDEN, fixture.hidden_size
        with fixture.server() as server:
            for name, case in list(globals().items()):
                if not name.startswith("case_") or args.only not in name:
                    continue
                count += 1
                try:
                    case(fixture, server)
                    print(f"ok {name[5:]}", flush=True)
                except Exception:
                    failed += 1
                    traceback.print_exc(file=sys.stdout)
                    print(f"FAILED {name[5:]}", flush=True)
            if failed:
                print(f"the server's log:\n{server.log.read_text()}")
    print(f"{count - failed} of {count} cases passed")
    return 1 if failed or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
