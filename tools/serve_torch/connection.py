"""The server's end of one stream (net/connection.h): handshake, sessions, requests and answers.

Everything here runs on the event loop's thread.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import numpy as np

from . import codec, frames
from .admission import Admission
from .body import (FAILED_PRECONDITION, INTERNAL, INVALID_ARGUMENT, NOT_FOUND, WANTED_ALL,
                   WANTED_LAST, WANTED_NONE, Body, BodyStep, StepError)
from .channel import VERSION, ChannelError, Opener, RekeyLimits, Responder, Sealer
from .identity import contains_key, format_public_key
from .messages import Envelope
from .scheduler import Scheduler, ServedSession, StepJob

# What the client has shown so far. The hello may be a recording of another stream's; the first
# record that decrypts proves that the client holds its key.
NOTHING, HELLO, PROVEN = range(3)


@dataclass(eq=False)
class ServerState:
    """What all connections of a server share."""

    body: Body
    secret_key: bytes
    allow: list[bytes]
    ciphers: list[int]
    admission: Admission
    scheduler: Scheduler
    log: Callable[[str, str], None]  # (level, message)
    max_rows: int
    max_pending: int = 16            # requests read but not yet answered
    handshake_timeout: float = 5.0
    first_frame_timeout: float = 60.0
    rekey: RekeyLimits = field(default_factory=RekeyLimits)
    draining: bool = False
    open: set["Connection"] = field(default_factory=set)


def check_fits(message, info) -> None:
    advice = "copy the body folder that belongs to this client folder to the server"
    if message.hidden_size != info.hidden_size:
        raise StepError(FAILED_PRECONDITION,
                        f"the client's model has hidden size {message.hidden_size} and the "
                        f"server's has {info.hidden_size}; prepare both from the same model")
    for ours, theirs, different, what in (
            (info.model_fingerprint, message.model_fingerprint, "from different models",
             "fingerprint"),
            (info.cloak_commitment, message.cloak_commitment, "with different cloaks",
             "commitment")):
        if ours != theirs:
            raise StepError(FAILED_PRECONDITION,
                            f"client and server were prepared {different} ({what} "
                            f"{theirs[:4].hex()} here, {ours[:4].hex()} on the server); {advice}")


class Connection:
    def __init__(self, server: ServerState, context: grpc.aio.ServicerContext):
        self._server = server
        self._context = context
        self._stage = NOTHING
        self._opener: Opener | None = None
        self._sealer: Sealer | None = None
        self._client = b""
        self._sessions: dict[int, ServedSession] = {}
        self._opened_once = False  # a session, which may be closed by now
        self._alarm: asyncio.TimerHandle | None = None
        self._outgoing: deque[bytes] = deque()
        self._writing = False
        self._pad = False          # answers, as the client asked
        self._pending = 0          # requests that have no answer in _outgoing yet
        self._ending: tuple[str, str] | None = None  # a status' name, and a message
        self._gone = False         # no answer can reach the client any more
        self._waiters: list[asyncio.Future] = []

    async def serve(self) -> None:
        """The whole stream; sets its status."""
        self._server.open.add(self)
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            if self._server.draining:
                self._end("UNAVAILABLE", "the server is shutting down", at_once=True)
            else:
                self._limit_stage(NOTHING, self._server.handshake_timeout,
                                  "the handshake did not come in time")
            await self._until(self._finished)
            name, message = self._ending
            if name != "OK":
                self._context.set_code(grpc.StatusCode[name])
                self._context.set_details(message)
        finally:  # also when the client or gRPC cancels the stream
            self._gone = True
            for task in tasks:
                task.cancel()
            if self._alarm is not None:
                self._alarm.cancel()
            for session in self._sessions.values():
                self._close(session)
            self._sessions.clear()
            self._server.open.discard(self)

    def drain(self) -> None:
        """Ends the stream when what is pending has been answered."""
        self._end("UNAVAILABLE", "the server is shutting down", at_once=False)

    # ---- the stream ----

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _wake(self) -> None:
        """After every change of what one of the stream's tasks may wait for."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _may_read(self) -> bool:
        # Not while the client does not take its answers, or asks faster than the body works.
        unanswered = self._pending + len(self._outgoing) + self._writing
        return unanswered < self._server.max_pending

    def _finished(self) -> bool:
        if self._ending is None or self._writing:
            return False
        return self._gone or (self._pending == 0 and not self._outgoing)

    def _end(self, name: str, message: str, at_once: bool) -> None:
        if self._ending is None:
            self._ending = (name, message)
        if at_once:
            self._gone = True
            self._outgoing.clear()
        self._wake()

    async def _read(self) -> None:
        try:
            while True:
                await self._until(self._may_read)
                try:
                    data = await self._context.read()
                except Exception:
                    self._end("UNAVAILABLE", "the client went away", at_once=True)
                    return
                if data is grpc.aio.EOF:
                    # What the client asked for is still answered.
                    self._end("OK", "", at_once=False)
                    return
                if self._ending is not None:
                    return
                self._on_envelope(data)
        except ChannelError as error:
            self._end(error.name, error.message, at_once=True)
        except Exception as error:  # a fault of ours
            self._server.log("error", f"a connection failed: {type(error).__name__}: {error}")
            self._end("INTERNAL", "the server failed", at_once=True)

    async def _write(self) -> None:
        try:
            while True:
                await self._until(lambda: self._outgoing)
                self._writing = True
                data = self._outgoing.popleft()
                await self._context.write(data)
                self._writing = False
                self._wake()
        except Exception:
            self._writing = False
            self._end("UNAVAILABLE", "the client went away", at_once=True)

    def _send(self, envelope) -> None:
        if not self._gone:
            self._outgoing.append(envelope.SerializeToString())
        self._wake()

    # ---- what the client sends ----

    def _on_envelope(self, data: bytes) -> None:
        try:
            envelope = Envelope.FromString(data)
        except Exception:
            # As gRPC's C++ server: bytes that are no message are the end of what the client says.
            self._end("OK", "", at_once=False)
            return
        if self._stage == NOTHING:
            self._on_hello(envelope)
        else:
            self._on_records(envelope)

    def _refuse(self, error: ChannelError) -> ChannelError:
        self._server.log("warning", f"refused {self._context.peer()}: {error.message}")
        return error

    def _on_hello(self, envelope) -> None:
        server = self._server
        if not envelope.HasField("hello"):
            raise self._refuse(ChannelError("INVALID_ARGUMENT", "the first message is no hello"))
        cipher = envelope.hello.cipher
        if envelope.hello.version != VERSION or cipher not in server.ciphers:
            refusal = Envelope()
            refusal.refusal.versions.append(VERSION)
            refusal.refusal.ciphers.extend(server.ciphers)
            self._send(refusal)
            self._end("FAILED_PRECONDITION",
                      "the server does not speak this protocol version or cipher", at_once=False)
            return
        try:
            responder = Responder(cipher, server.secret_key)
            client = responder.read_message(envelope.data)
            if not contains_key(server.allow, client):
                raise ChannelError("PERMISSION_DENIED",
                                   "the client's key is not on this server's list")
            message, self._opener, self._sealer = responder.write_message(server.rekey)
        except ChannelError as error:
            raise self._refuse(error)
        self._client = client
        self._stage = HELLO
        self._limit_stage(HELLO, server.first_frame_timeout,
                          "no frame followed the handshake in time")
        self._send(Envelope(data=message))

    def _limit_stage(self, stage: int, seconds: float, missing: str) -> None:
        """Ends the stream unless it has come beyond `stage` in time."""
        def alarm() -> None:
            if self._stage <= stage and self._ending is None:
                self._end("DEADLINE_EXCEEDED", missing, at_once=True)

        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_later(seconds, alarm)

    def _on_records(self, envelope) -> None:
        if envelope.HasField("hello"):
            raise ChannelError("INVALID_ARGUMENT", "a second hello on one stream")
        server = self._server
        max_frame = (frames.max_frame_bytes(server.max_rows, server.body.info.hidden_size)
                     if self._opened_once else frames.MAX_FRAME_OVERHEAD)
        try:
            whole = self._opener.open(envelope.data, max_frame)
        except ChannelError as error:
            raise self._refuse(error) if self._stage == HELLO else error
        if self._stage == HELLO:
            name = format_public_key(self._client)[:25]
            server.log("debug", f"client {name}... connected from {self._context.peer()}")
            self._stage = PROVEN
        too_many = ChannelError("RESOURCE_EXHAUSTED", "an envelope brings more requests than may "
                                                      "wait for their answers")
        if len(whole) > server.max_pending:
            raise too_many
        for data in whole:
            frame = frames.decode(data)
            kind = frame.WhichOneof("kind")
            if kind == "close":
                session = self._sessions.pop(frame.close.session, None)
                if session is not None:
                    self._close(session)
                continue
            # Only an envelope that holds several frames comes here with as many pending.
            if self._pending >= server.max_pending:
                raise too_many
            self._pending += 1
            padded = frames.MAX_FRAME_OVERHEAD
            try:
                if kind == "open":
                    self._pad = self._pad or frame.open.pad
                    self._answer(self._open_session(frame), padded)
                else:
                    padded = self._padded_bytes(frame.step.tensor.dtype, frame.step.wanted,
                                                frame.step.rows)
                    self._submit_step(frame.request, frame.step)
            except StepError as error:
                self._answer(frames.error_frame(frame.request, error.code, error.message), padded)

    # ---- sessions and steps ----

    def _open_session(self, frame):
        server, info = self._server, self._server.body.info
        check_fits(frame.open, info)
        lease = server.admission.admit(self._client)
        try:
            session = ServedSession(server.body.new_session(), lease)
        except StepError:
            lease.give_back()
            raise
        # Not a counter: a session's number tells nothing about the others.
        number = 0
        while number == 0 or number in self._sessions:
            number = secrets.randbits(64)
        self._sessions[number] = session
        self._opened_once = True
        answer = frames.new_frame(frame.request)
        answer.opened.session = number
        answer.opened.hidden_size = info.hidden_size
        answer.opened.max_context = info.max_context
        answer.opened.max_rows = server.max_rows
        answer.opened.body = frames.clean_text(info.description)
        answer.opened.padded = self._pad
        return answer

    def _close(self, session: ServedSession) -> None:
        session.closed = True
        if session.steps == 0:
            self._server.scheduler.release(session.body)
            session.lease.give_back()

    def _submit_step(self, request: int, message) -> None:
        server, info = self._server, self._server.body.info
        session = self._sessions.get(message.session)
        if session is None:
            raise StepError(NOT_FOUND, "the server does not have this session; open a new one")
        if message.rows > server.max_rows:
            raise StepError(INVALID_ARGUMENT,
                            f"a step of {message.rows} rows; the server takes {server.max_rows}")
        end = message.start_pos + message.rows
        if end > info.max_context:
            raise StepError(INVALID_ARGUMENT,
                            f"positions up to {end} do not fit the context of {info.max_context}; "
                            "shorten the prompt or the answer")
        dtype = message.tensor.dtype
        expected = message.rows * codec.row_bytes(dtype, info.hidden_size)
        try:
            data = codec.unpack(message.tensor.compression == 1, message.tensor.data, expected)
        except codec.TensorError as error:
            raise StepError(INVALID_ARGUMENT, str(error)) from None
        states = codec.decode_rows(dtype, data, message.rows, info.hidden_size)
        finite = np.isfinite(states).all(axis=1)
        if not finite.all():
            raise StepError(INVALID_ARGUMENT, f"row {int(np.argmin(finite))} of the step holds a "
                                              "value that is not finite")
        # Last, so that a step that is refused takes no room.
        session.lease.reserve(end)
        session.steps += 1
        server.scheduler.submit(StepJob(
            session, BodyStep(session.body, message.start_pos, states, message.wanted),
            abandoned=lambda: self._gone,
            done=lambda job: self._on_step_done(request, dtype, job)))

    def _on_step_done(self, request: int, dtype: int, job: StepJob) -> None:
        job.session.steps -= 1
        if job.session.closed:
            self._close(job.session)
        if self._gone:
            return
        step = job.step
        padded = self._padded_bytes(dtype, step.wanted, len(step.states))
        if step.error is not None:
            self._answer(frames.error_frame(request, step.error.code, step.error.message), padded)
        elif step.wanted != WANTED_NONE and not np.isfinite(step.out).all():
            self._answer(frames.error_frame(request, INTERNAL, "the body computed a value that is "
                                            "not finite; is its folder damaged?"), padded)
        else:
            answer = frames.new_frame(request)
            answer.output.kv_len = job.end
            answer.output.compute_ms = job.compute_ms
            answer.output.rows = len(step.out)
            if len(step.out) > 0:
                is_lz4, data = codec.pack(codec.encode_rows(dtype, step.out))
                answer.output.tensor.dtype = dtype
                answer.output.tensor.compression = int(is_lz4)
                answer.output.tensor.data = data
            self._answer(answer, padded)

    def _padded_bytes(self, dtype: int, wanted: int, rows: int) -> int:
        """The size, when it is padded, of the answer to such a step."""
        back = {WANTED_ALL: rows, WANTED_LAST: 1}.get(wanted, 0)
        return frames.padded_frame_bytes(
            back, codec.row_bytes(dtype, self._server.body.info.hidden_size),
            self._server.max_rows)

    def _answer(self, frame, padded_bytes: int) -> None:
        self._pending -= 1
        if self._pad:
            frames.pad(frame, padded_bytes)
        if not self._gone:
            # Encrypted in the order of writing: the nonces follow it.
            for data in self._sealer.seal(frame.SerializeToString()):
                self._send(Envelope(data=data))
        self._wake()
