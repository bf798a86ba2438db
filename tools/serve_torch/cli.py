"""serve_torch: engine_serve's command line, messages and exit codes (tools/engine_serve.cpp)."""

import argparse
import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from . import front
from .body import EXIT_SERVER, Body, BodyLost, LoadError
from .identity import allowed_clients, format_public_key, load_secret_key
from .signals import EarlySignals, write_line

EXIT_OK, EXIT_USAGE = 0, 2
MAX_ROWS_PER_STEP = 512
SHUTDOWN_GRACE_S = 10.0
TRUE, FALSE = ("1", "true", "on", "yes"), ("0", "false", "off", "no")
LEVELS = ("debug", "info", "warning", "error")


class Parser(argparse.ArgumentParser):
    """One line for a mistake, and a default from INFEMERAL_LONG_NAME for every option."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str):
        self.exit(EXIT_USAGE,
                  f"{self.prog}: {message} ({self.prog} --help lists the options)\n")

    def parse_with_environment(self, arguments: list[str]) -> argparse.Namespace:
        lists = {}
        for action in self._actions:
            name = next((o for o in action.option_strings if o.startswith("--")), "")
            variable = "INFEMERAL_" + name[2:].upper().replace("-", "_")
            value = os.environ.get(variable, "")
            if not value or name in ("--help", "--version"):
                continue
            if action.nargs == 0:
                if value.lower() not in TRUE + FALSE:
                    self.error(f"{variable}: '{value}' is neither true nor false")
                action.default = value.lower() in TRUE
            elif isinstance(action, argparse._AppendAction):
                lists[action.dest] = [value]  # the command line replaces it
            else:
                if action.choices is not None and value not in action.choices:
                    self.error(f"{variable}: '{value}' is not one of {', '.join(action.choices)}")
                action.default = value
            action.required = False
        options = self.parse_args(arguments)
        for dest, value in lists.items():
            if getattr(options, dest) is None:
                setattr(options, dest, value)
        return options


def whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {low} to {high}")
        return value
    return parse


def make_parser() -> Parser:
    parser = Parser(prog="serve_torch", description=(
        "Serves a model body with PyTorch to the clients on its list, over an encrypted channel.\n"
        "Every option can also be set by an environment variable: --listen is INFEMERAL_LISTEN."))
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Body folder that engine_prep wrote")
    add("--listen", default="127.0.0.1:50051", metavar="HOST:PORT",
        help="Address to listen on; port 0 takes a free one (default: %(default)s)")
    add("--identity", required=True, metavar="FILE",
        help="This server's secret key file, from engine_keygen")
    add("--allow", required=True, action="append", metavar="KEY",
        help="A client's public key, or a file of them (one a line); may be given several times")
    add("--tls-cert", default="", metavar="FILE",
        help="Speak TLS underneath the encrypted channel, with this certificate chain (PEM)")
    add("--tls-key", default="", metavar="FILE", help="The certificate's private key (PEM)")
    add("--tls-client-ca", default="", metavar="FILE",
        help="Admit only clients with a TLS certificate of these CAs (PEM)")
    add("-t", "--threads", type=whole(0, 1024), default=0, metavar="N",
        help="Threads on the CPU; 0 is PyTorch's own choice")
    add("--max-context", type=whole(0, 2**31), default=0, metavar="N",
        help="Positions a session may hold; 0 is the model's own limit")
    add("--max-sessions", type=whole(1, 100000), default=64, metavar="N",
        help="Sessions at a time (default: %(default)s)")
    add("--max-sessions-per-client", type=whole(0, 100000), default=0, metavar="N",
        help="Of these, for one client; 0 is half of them, or all when only one client is allowed")
    add("--max-kv-mib", type=whole(0, 2**40), default=0, metavar="N",
        help="Memory for the KV caches of all sessions together, in MiB; 0 is what the device has")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto takes a GPU where there is one")
    add("--dtype", choices=("auto", "f32", "f16", "bf16"), default="auto",
        help="Of weights and KV cache; auto is the checkpoint's")
    add("--decode", choices=("auto", "eager", "graph", "compile"), default="auto",
        help="How single rows run: layer by layer, as a CUDA graph, or as a CUDA graph of compiled "
             "layers; the last two have graphs for prompts too; auto is compile on one GPU, graph "
             "on several, eager on a CPU")
    add("--max-batch", type=whole(1, 256), default=8, metavar="N",
        help="Sessions whose single rows run together (default: %(default)s)")
    add("--front", default="", metavar="PROGRAM",
        help="engine_serve of the same release: it speaks with the clients, this process only runs "
             "the layers, and neither gRPC nor cryptography for Python is needed")
    add("--metrics", default="", metavar="HOST:PORT",
        help="With --front: where Prometheus reads counters, as with engine_serve")
    add("--quiet", action="store_true", help="Errors only")
    add("--verbose", action="store_true", help="Connections and sessions too")
    add("--version", action="store_true", help="What runs here")
    return parser


class Console:
    """One line a message on stderr."""

    def __init__(self, quiet: bool, verbose: bool):
        self._level = LEVELS.index("error" if quiet else "debug" if verbose else "info")

    def log(self, level: str, message: str) -> None:
        if LEVELS.index(level) >= self._level:
            # A message may quote what came from outside: it must not move the cursor.
            clean = "".join(" " if c < " " or c == "\x7f" else c for c in message)
            write_line(level, clean)


def print_version() -> None:
    versions = []
    for name in ("torch", "transformers", "grpcio"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    print(f"serve_torch ({', '.join(versions)})")


def load_torch_body(options: argparse.Namespace, console: Console) -> Body | None:
    try:
        from .torch_body import load_body
    except ImportError as error:
        raise LoadError(f"{error}; install tools/serve_torch/requirements.txt") from None
    return load_body(Path(options.model), options, console.log)


async def serve(options: argparse.Namespace, body: Body, secret_key: bytes, allow: list[bytes],
                credentials, console: Console, early: EarlySignals, **state) -> int:
    """`state` goes into ServerState."""
    # gRPC is not needed to compute: perf/serve_torch_bench.py runs without it.
    from .admission import Admission
    from .channel import available_ciphers, public_key_of
    from .connection import ServerState
    from .scheduler import Scheduler
    from .server import BodyServer, ListenError

    info = body.info

    def sessions_per_client(clients: list[bytes]) -> int:
        return options.max_sessions_per_client or (
            options.max_sessions if len(set(clients)) == 1 else max(1, options.max_sessions // 2))

    positions = (options.max_kv_mib << 20) // info.kv_bytes_per_token
    if options.max_kv_mib > 0 and positions == 0:
        raise LoadError(f"max_kv_bytes is {options.max_kv_mib << 20} and one position of the body "
                        f"takes {info.kv_bytes_per_token}; no step would fit")
    # Every connection takes a descriptor, and the usual soft limit is for programs with select().
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # The body's thread and the event loop's take turns: by default one waits 5 ms for the other.
    sys.setswitchinterval(0.0005)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    code = EXIT_OK

    def on_lost() -> None:
        nonlocal code
        code = EXIT_SERVER
        stop.set()

    def on_signal(number: int) -> None:
        if stop.is_set():  # the second one does not wait
            os._exit(128 + number)
        stop.set()

    def read_allow_list() -> None:
        try:
            clients = allowed_clients(options.allow)
        except LoadError as error:
            console.log("error", f"the allow list stays as it was: {error}")
            return
        shared.allow = clients
        shared.admission.max_sessions_per_client = sessions_per_client(clients)
        console.log("info", f"read the allow list again; clients: {len(clients)}")

    # Its thread keeps the process alive: it ends however this does.
    with contextlib.closing(Scheduler(body, loop, console.log, MAX_ROWS_PER_STEP,
                                      on_lost)) as scheduler:
        shared = ServerState(
            body=body, secret_key=secret_key, allow=allow, ciphers=available_ciphers(),
            admission=Admission(options.max_sessions, sessions_per_client(allow),
                                positions if options.max_kv_mib > 0 else None),
            scheduler=scheduler, log=console.log, max_rows=MAX_ROWS_PER_STEP, **state)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, read_allow_list)
        if early.hangup:
            read_allow_list()
        server = BodyServer(shared)
        try:
            port = await server.start(options.listen, credentials)
        except ListenError as error:
            console.log("error", str(error))
            return EXIT_SERVER
        # One line on stdout, so that a script can wait for it and learn the port.
        host = options.listen.rsplit(":", 1)[0]
        key = format_public_key(public_key_of(secret_key))
        write_stdout(f"listening on {host}:{port}, public key {key}\n")
        console.log("info", f"serving {info.description}")
        await stop.wait()
        console.log("info", "shutting down")
        await server.shutdown(SHUTDOWN_GRACE_S)
    return code


def write_stdout(text: str) -> None:
    """As engine_serve, which serves also where nobody takes it. Past Python's buffers, which would
    be written once more at the end."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), text.encode())


def main(arguments: list[str] | None = None,
         load: Callable[[argparse.Namespace, Console], Body | None] = load_torch_body,
         early: EarlySignals | None = None, **state) -> int:
    """`load` returns None on a rank that has followed another one to its end; `state` replaces
    defaults of ServerState, which there is without --front."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--version" in arguments:
        print_version()
        return EXIT_OK
    early = early or EarlySignals()
    # gRPC's own lines on stderr say again, less clearly, what our errors say.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    parser = make_parser()
    options = parser.parse_with_environment(arguments)
    if options.metrics and not options.front:
        parser.error("--metrics needs --front")
    console = Console(options.quiet, options.verbose)
    early.log = console.log
    try:
        # Before the weights: what is missing or wrong is said at once.
        secret_key = load_secret_key(options.identity)
        allow = allowed_clients(options.allow)
        if options.front:
            front.check_program(options.front)
        else:
            try:
                from . import server  # noqa: F401
                from .tls import server_credentials
            except ImportError as error:
                raise LoadError(f"{error}; install tools/serve_torch/requirements.txt, or use "
                                "--front") from None
            credentials = server_credentials(options.tls_cert, options.tls_key,
                                             options.tls_client_ca)
        body = load(options, console)
        if body is None:
            return EXIT_OK
        # What was loaded stays: the collector need not look through it between two steps.
        gc.collect()
        gc.freeze()
        try:
            if options.front:
                return front.serve(options, body, console.log)
            return asyncio.run(serve(options, body, secret_key, allow, credentials, console, early,
                                     **state))
        finally:
            body.close()
    except LoadError as error:
        console.log("error", str(error))
        return EXIT_USAGE
    except BodyLost as error:  # of body.close()
        console.log("error", str(error))
        return EXIT_SERVER
