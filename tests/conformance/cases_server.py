"""The program: tokens through engine_run, limits, health, messages, exit codes and its end."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import grpc
import numpy as np
from client import Ended, Refused, Stream, pb
from fixture import close_to, soon
from grpc_health.v1 import health_pb2, health_pb2_grpc

FLAGS = ("--max-sessions", "3", "--max-sessions-per-client", "2", "--max-context", "200")
CLIENTS = ("client", "other")
EXHAUSTED = 8
SERVICE = "infemeral.v1.SplitInference"


def refused(call, *arguments):
    try:
        call(*arguments)
    except Refused as error:
        assert error.code == EXHAUSTED, (error.code, error.message)
        return
    raise AssertionError("not refused")


def prompt(fixture):
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz .,"))
    return "".join(fixture.random.choice(letters, size=int(fixture.random.integers(1, 120))))


def tokens(fixture, server, text, wire="f32"):
    result = fixture.tool(
        "engine_run", "-m", "prepared", "--backend", "cpu", "--quiet", "--wire", wire, "--server",
        server.address, "--server-key", "server.key.pub", "--identity", "client.key",
        "--temp", "0", "-n", "60", "-p", text)
    return result.stdout


def case_engine_run_gets_the_tokens_of_engine_serve(fixture, server):
    with fixture.reference() as reference:
        for wire in ("f32", "f32", "f16"):
            text = prompt(fixture)
            theirs = tokens(fixture, reference, text, wire)
            assert theirs and tokens(fixture, server, text, wire) == theirs, text


def case_engine_run_says_what_does_not_fit(fixture, server):
    arguments = ["-m", "prepared", "--backend", "cpu", "--quiet", "-p", "x", "--server",
                 server.address]
    for key, identity, code, word in (("client.key.pub", "client.key", 3, "server key"),
                                      ("server.key.pub", "stranger.key", 3, "allow list")):
        result = fixture.tool("engine_run", *arguments, "--server-key", key, "--identity",
                              identity, check=False)
        assert result.returncode == code and word.encode() in result.stderr, result
    fixture.tool("engine_prep", "--quiet", "--model", "model", "--output", "another")
    result = fixture.tool("engine_run", "-m", "another", *arguments[2:], "--server-key",
                          "server.key.pub", "--identity", "client.key", check=False)
    assert result.returncode == 3 and b"cloak" in result.stderr, result


def case_sessions_of_one_client_and_of_all(fixture, server):
    first, second = fixture.client(server), fixture.client(server)
    third = fixture.client(server, "other")
    a, b = first.open(), second.open()
    assert a.max_context == 200
    refused(first.open)
    refused(second.open)
    third.open()
    refused(third.open)
    first.step(a.session, 0, fixture.rows(2))
    # A closed session's place is free again, if only a moment after the answer to its last step.
    first.send(first.frame(close={"session": a.session}))
    assert soon(lambda: opened(first))
    # So are those of a connection that ended.
    second.close()
    assert soon(lambda: opened(third))
    first.close()
    third.close()


def opened(client):
    """A session's number; 0 when there is none left."""
    try:
        return client.open().session
    except Refused:
        return 0


def fits(client, session, rows):
    try:
        client.step(session, 0, rows)
        return True
    except Refused as error:
        assert error.code == EXHAUSTED, error.message
        return False


def case_clients_that_leave_in_the_middle(fixture, server):
    """Their sessions come back, also while steps of theirs wait or run."""
    for _ in range(5):
        client = fixture.client(server)
        sessions = set()
        assert soon(lambda: sessions.add(opened(client)) or len(sessions - {0}) == 2)
        for session in sessions - {0}:
            for _ in range(7):
                client.send(client.step_frame(session, 0, fixture.rows(150)))
        client.receive()  # the first is done, the others wait
        client.close()
    last = fixture.client(server)
    assert soon(lambda: opened(last))
    last.close()


def case_memory_for_the_caches(fixture, server):
    with fixture.server("--max-kv-mib", "1") as small:
        client = fixture.client(small)
        rows, kept, sessions = fixture.rows(fixture.max_context), [], []
        while True:
            sessions.append(client.open().session)
            try:
                kept.append(client.step(sessions[-1], 0, rows))
            except Refused as error:
                assert error.code == EXHAUSTED, error.message
                break
            assert len(sessions) < 64, "64 sessions fit 1 MiB"
        assert len(sessions) > 1
        # Those who are in keep what they have, and go on within it.
        close_to(client.step(sessions[0], 250, rows[250:]), kept[0][250:])
        client.send(client.frame(close={"session": sessions[0]}))
        # A server may answer a step a moment before it lets go of the step's session.
        assert soon(lambda: fits(client, sessions[-1], rows))
        close_to(client.step(sessions[-1], 0, rows), kept[0])
        client.close()


def case_health_and_reflection(fixture, server):
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, answer
        # ServerReflectionRequest.list_services is field 7, a string; the service's name stands
        # in the answer as it is.
        call = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        answer = next(call(iter([b"\x3a\x00"]), timeout=20))
        assert SERVICE.encode() in answer, answer


def case_bytes_that_are_no_message(fixture, server):
    stream = Stream(server.address)
    stream.write(b"\xff\xff\xff\xff")
    stream.ending()  # of whichever status: the server goes on
    client = fixture.client(server)
    client.step(client.open().session, 0, fixture.rows(1))
    client.close()


def case_mistakes_on_the_command_line(fixture, server):
    def fails(word, *command, code=2):
        result = fixture.run(*command, check=False)
        lines = result.stderr.decode().splitlines()
        assert result.returncode == code and len(lines) == 1 and word in lines[0], result
        assert not result.stdout

    good = fixture.command()
    replaced = {flag: good.index(flag) + 1 for flag in ("--model", "--identity", "--allow")}

    def with_value(flag, value):
        command = list(good)
        command[replaced[flag]] = str(value)
        return command

    fails("public key", *with_value("--identity", fixture.folder / "server.key.pub"))
    fails("cannot open", *with_value("--identity", fixture.folder / "missing"))
    fails("secret key", *with_value("--allow", fixture.folder / "client.key"))
    # As a text, it is not taken for a file's name and repeated.
    fails("error: this is a secret key; give the public one",
          *with_value("--allow", (fixture.folder / "client.key").read_text().strip()))
    fails("missing", *with_value("--model", fixture.folder / "missing"))
    fails("positions", *good, "--max-context", "257")
    fails("--max-sessions", *good, "--max-sessions", "0")
    # Time may mend it: another program may end, an interface come up.
    fails("cannot listen", *fixture.command(listen=server.address), code=3)
    open_key = fixture.folder / "open.key"
    open_key.write_text((fixture.folder / "server.key").read_text())
    open_key.chmod(0o644)
    fails("chmod 600", *with_value("--identity", open_key))


def case_standard_output_that_takes_nothing(fixture, server):
    log = fixture.folder / "full.log"
    with open("/dev/full", "wb") as full, open(log, "wb") as errors:
        process = subprocess.Popen(fixture.command(), stdout=full, stderr=errors)
    try:
        assert soon(lambda: "info: serving" in log.read_text(), 60), log.read_text()
        process.terminate()
        assert process.wait(timeout=60) == 0 and "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


def knows(fixture, server, name):
    try:
        client = fixture.client(server, name)
        client.open()
        client.close()
        return True
    except Ended as end:
        assert end.code == grpc.StatusCode.PERMISSION_DENIED, end
        return False


def case_the_allow_list_is_read_again(fixture, server):
    keys = {name: (fixture.folder / f"{name}.key.pub").read_text() for name in CLIENTS}
    listed = fixture.folder / "listed.pub"

    def admit(text, answer):
        before = own.log.read_text().count(answer)
        listed.write_text(text)
        own.process.send_signal(signal.SIGHUP)
        assert soon(lambda: own.log.read_text().count(answer) > before), own.log.read_text()

    listed.write_text(keys["client"])
    with fixture.server("--allow", str(listed), clients=()) as own:
        stays = fixture.client(own)
        session = stays.open().session
        assert not knows(fixture, own, "other")
        admit(keys["other"], "clients: 1")
        assert knows(fixture, own, "other") and not knows(fixture, own, "client")
        stays.step(session, 0, fixture.rows(3))  # who is in goes on
        admit("# nobody", "stays as it was")
        assert knows(fixture, own, "other") and not knows(fixture, own, "client")
        admit("".join(keys.values()), "clients: 2")
        assert knows(fixture, own, "other") and knows(fixture, own, "client")
        stays.close()


class Loading:
    """A server that loads until load_the_rest(): a file of its body is a pipe."""

    def __init__(self, fixture, *flags, clients=CLIENTS):
        body = fixture.folder / "slow_body"
        shutil.rmtree(body, ignore_errors=True)
        shutil.copytree(fixture.folder / "prepared/body", body)
        self._manifest = body / "infemeral.json"
        self._text = self._manifest.read_bytes()
        self._manifest.unlink()
        os.mkfifo(self._manifest)
        command = fixture.command(*flags, clients=clients)
        command[command.index("--model") + 1] = str(body)
        self._pipe = None

        def reads():
            try:
                self._pipe = os.open(self._manifest, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # nobody has it open for reading
                pass
            return self._pipe is not None or self.process.poll() is not None

        environment = {k: v for k, v in os.environ.items() if not k.startswith("INFEMERAL_")}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
            text=True, env=environment)
        assert soon(reads, 120) and self._pipe is not None, self.process.stderr.read()
        # And sleeps in its read: Python looks at a signal between two of its own instructions, and
        # one that came just before the read would be seen only after it.
        assert soon(self._sleeps, 120)

    def _sleeps(self) -> bool:
        def look():
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return fields[0], fields[11:13]  # state, processor time

        first = look()
        time.sleep(0.1)
        return first[0] == "S" and look() == first

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        if self._pipe is not None:
            os.close(self._pipe)

    def load_the_rest(self):
        """Until it serves, at `address`, or has ended."""
        os.write(self._pipe, self._text)
        os.close(self._pipe)
        self._pipe = None
        line = self.process.stdout.readline()
        self.address = line.split()[2].rstrip(",") if line else None


def case_signals_while_the_model_is_loaded(fixture, server):
    for number in (signal.SIGTERM, signal.SIGINT):
        with Loading(fixture) as loading:
            loading.process.send_signal(number)
            # engine_serve looks at a signal when it has loaded.
            early = Path(fixture.server_command[0]).name != "engine_serve"
            if not early:
                loading.load_the_rest()
            out, err = loading.process.communicate(timeout=60)
            assert loading.process.returncode == 0, (loading.process.returncode, err)
            assert err.splitlines()[-1] == "info: shutting down" and "Traceback" not in err, err
            assert not early or not out, out


def case_the_allow_list_changes_while_the_model_is_loaded(fixture, server):
    listed = fixture.folder / "changing.pub"
    listed.write_text((fixture.folder / "client.key.pub").read_text())
    with Loading(fixture, "--allow", str(listed), clients=()) as loading:
        listed.write_text((fixture.folder / "other.key.pub").read_text())
        for _ in range(2):
            loading.process.send_signal(signal.SIGHUP)
        loading.load_the_rest()
        assert loading.address, loading.process.stderr.read()
        # engine_serve may take clients a moment before it reads the list again.
        assert soon(lambda: knows(fixture, loading, "other"))
        assert not knows(fixture, loading, "client")


def case_the_end(fixture, server):
    with fixture.server() as ending:
        client = fixture.client(ending)
        client.step(client.open().session, 0, fixture.rows(1))
        ending.process.terminate()
        start = time.monotonic()
        try:
            client.receive()
            raise AssertionError("an answer that nobody asked for")
        except Ended as end:
            assert end.code == grpc.StatusCode.UNAVAILABLE, end
        # An idle stream ends at once; only pending answers have the 10 seconds.
        assert time.monotonic() - start < 8
        client.close()
        assert ending.process.wait(timeout=60) == 0
        assert ending.process.stdout.read() == ""


def case_health_while_the_server_ends(fixture, server):
    """Answers that are owed hold the end up, those who watch the server's health do not."""
    serving, ends = (health_pb2.HealthCheckResponse.SERVING,
                     health_pb2.HealthCheckResponse.NOT_SERVING)
    asked = health_pb2.HealthCheckRequest()
    with fixture.server() as ending, grpc.insecure_channel(ending.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(asked, timeout=60)
        assert next(watch).status == serving
        # A window that does not grow: it takes one of these answers, the others wait.
        client = fixture.client(ending, options=[("grpc.http2.bdp_probe", 0)])
        session = client.open().session
        steps = [client.step_frame(session, 0, fixture.rows(fixture.max_context))
                 for _ in range(7)]
        # In one envelope: when the first is answered, the server has read them all.
        records = [record for step in steps for record in client.records(step)]
        client.write(pb.Envelope(data=b"".join(records)))
        client.receive()
        ending.process.terminate()
        start = time.monotonic()
        assert next(watch).status == ends
        time.sleep(0.5)
        assert health.Check(asked, timeout=20).status == ends
        answers = 0
        try:
            while True:
                assert client.receive().WhichOneof("kind") == "output"
                answers += 1
        except Ended as end:
            assert end.code == grpc.StatusCode.UNAVAILABLE, end
        assert answers == 6, answers
        client.close()
        assert ending.process.wait(timeout=60) == 0
        assert time.monotonic() - start < 8  # of the 10 seconds that owed answers have
