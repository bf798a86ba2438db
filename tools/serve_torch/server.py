"""gRPC around the connections (net/body_server.h): address, keepalive, health, reflection, end."""

import asyncio
import contextlib

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from .channel import MAX_ENVELOPE_BYTES
from .connection import Connection, ServerState
from .messages import SERVICE

OPTIONS = (
    # A second server on the same port is an error, not a partner.
    ("grpc.so_reuseport", 0),
    # As engine_serve: a client that has vanished is noticed within their sum, and holds its sessions
    # until then.
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients ping every 10 s, also between calls; the default would cut them off as abusive.
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    # Without a stream a connection is nobody's; and nobody gets many for one connection's price.
    ("grpc.max_connection_idle_ms", 30000),
    ("grpc.max_concurrent_streams", 32),
    ("grpc.max_receive_message_length", MAX_ENVELOPE_BYTES),
)

LOOPBACK = ("localhost:", "127.", "[::1]:", "unix:")


class ListenError(Exception):
    """One sentence for the user."""


class BodyServer:
    def __init__(self, state: ServerState):
        self._state = state
        self._server = grpc.aio.server(options=(
            *OPTIONS, ("grpc.server_handshake_timeout_ms", int(1000 * state.handshake_timeout))))
        # Bytes, not messages: what does not parse is the connection's to judge.
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
            SERVICE, {"Session": grpc.stream_stream_rpc_method_handler(self._session)}),))
        self._streams = 0  # whose status is not sent yet
        self._idle = asyncio.Event()
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def _session(self, _, context: grpc.aio.ServicerContext) -> None:
        self._streams += 1
        self._idle.clear()
        context.add_done_callback(self._stream_done)
        await Connection(self._state, context).serve()

    def _stream_done(self, _) -> None:
        self._streams -= 1
        if self._streams == 0:
            self._idle.set()

    async def start(self, listen: str, credentials: grpc.ServerCredentials | None) -> int:
        """The port that it listens on; without credentials it speaks no TLS."""
        port = 0
        try:
            if credentials is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, credentials)
        except (RuntimeError, ValueError):
            pass
        if port == 0:
            raise ListenError(f"cannot listen on {listen}; is the address one of this machine's, "
                              "and the port free and permitted?")
        if credentials is None and not listen.startswith(LOOPBACK):
            self._state.log("info", "the transport has no TLS; the channel inside is encrypted and "
                                    "authenticated by Noise")
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        return port

    async def shutdown(self, grace: float) -> None:
        """Ends idle connections at once, the others when their pending steps are answered or after
        `grace` seconds."""
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        self._state.draining = True
        for connection in list(self._state.open):
            connection.drain()
        # The port stays open meanwhile: a health check is told NOT_SERVING, a new client to go
        # away.
        if self._streams > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace)
        # Those who watch the server's health are owed nothing.
        await self._server.stop(None)
        await asyncio.get_running_loop().run_in_executor(None, self._state.scheduler.close)
