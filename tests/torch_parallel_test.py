#!/usr/bin/env python3
"""tools/serve_torch under torchrun, two ranks on the CPU: a prompt's rows do not depend on its
steps, and where one rank fails in the middle of a step, the others do not wait for it for ever.

The layers are transformers', with random weights. Prints `skipped:` where PyTorch is not installed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "conformance"), str(TESTS.parent / "tools")]
HIDDEN, INTERNAL, EXIT_SERVER = 32, 13, 3
PATIENCE = 100  # s; torchrun kills 30 s after it has asked


def serve():
    """The program on one rank. A first number of 7 in a step is a failure on rank FAIL_RANK; with
    FAIL_IN=wipe it is one when a session ends."""
    from serve_torch.cli import main
    from serve_torch.torch_model import TorchModel
    where, rank = os.environ["FAIL_IN"], os.environ["FAIL_RANK"]
    method = getattr(TorchModel, where)

    def fail(self, given, *more, **named):
        if os.environ["RANK"] == rank and (where == "wipe" or given[0, 0, 0] == 7):
            raise RuntimeError("no such luck")
        return method(self, given, *more, **named)

    setattr(TorchModel, where, fail)
    sys.exit(main())


def rows(n, first=1):
    values = np.random.default_rng(n).standard_normal((n, HIDDEN)).astype(np.float32)
    values[0, 0] = first
    return values


def prepare(folder):
    """The server's arguments, and the client's two keys."""
    import transformers
    from client import new_key
    from serve_torch.identity import SECRET_PREFIX, format_key, format_public_key
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.AutoModel.from_config(transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=4, max_position_embeddings=256,
    )).save_pretrained(folder / "model")
    (server, server_public), (client, client_public) = new_key(), new_key()
    key = folder / "server.key"
    key.touch(0o600)
    key.write_text(format_key(SECRET_PREFIX, server))
    return ["--model", folder / "model", "--listen", "127.0.0.1:0", "--identity", key, "--allow",
            format_public_key(client_public), "--device", "cpu", "--threads", "1"], (client,
                                                                                    server_public)


@contextlib.contextmanager
def group(arguments, log, fail_in, fail_rank):
    from fixture import Server
    os.environ.update(FAIL_IN=fail_in, FAIL_RANK=str(fail_rank))
    # torchrun ends its ranks when it is asked to, not when it is killed.
    server = Server([sys.executable, "-B", "-m", "torch.distributed.run", "--standalone",
                     "--local-addr", "localhost", "--nproc-per-node", "2", __file__, "--serve",
                     *map(str, arguments)], log)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(timeout=PATIENCE)


def check_end(arguments, keys, log):
    from client import Client
    with group(arguments, log, "run", 2) as server:
        client = Client(server.address, *keys, (bytes(32), bytes(32), HIDDEN))
        session, prompt = client.open().session, rows(70)
        whole = client.step(session, 0, prompt)
        again = np.concatenate([client.step(session, i, prompt[i:i + n])
                                for i, n in ((0, 40), (40, 1), (41, 29))])
        assert np.abs(whole - again).max() < 1e-4 * np.abs(whole).max()
        client.close()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=PATIENCE)
    text = log.read_text()
    assert "error:" not in text and text.count("info: shutting down") == 1, text


def check_failure(arguments, keys, log, fail_in, fail_rank):
    from client import Client, Ended, Refused
    with group(arguments, log, fail_in, fail_rank) as server:
        client = Client(server.address, *keys, (bytes(32), bytes(32), HIDDEN))
        session = client.open().session
        client.step(session, 0, rows(3))
        try:
            if fail_in == "run":
                client.step(session, 3, rows(2, first=7))
            else:
                client.send(client.frame(close={"session": session}))
                client.receive()
            raise AssertionError("no failure")
        except Refused as error:
            assert error.code == INTERNAL and "luck" not in error.message, error
        except Ended:
            pass
        server.process.wait(timeout=PATIENCE)
    text = log.read_text()
    ours = [line for line in text.splitlines() if line.startswith("error: ")]
    # The rank that fails says why; one that hears of it by its end says that.
    assert sum("no such luck" in line for line in ours) == 1 and len(ours) <= 2, text
    assert f"exitcode  : {EXIT_SERVER}" in text, text


def main():
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"skipped: {error}")
        return
    with tempfile.TemporaryDirectory(prefix="infemeral-parallel-") as folder:
        arguments, keys = prepare(Path(folder))
        check_end(arguments, keys, Path(folder) / "log")
        print("ok rows and the end", flush=True)
        for fail_in, rank in (("run", 0), ("run", 1), ("wipe", 0), ("wipe", 1)):
            try:
                check_failure(arguments, keys, Path(folder) / "log", fail_in, rank)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{fail_in} on rank {rank}: the group hangs") from None
            print(f"ok a failure in {fail_in} on rank {rank}", flush=True)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        sys.argv.remove("--serve")
        serve()
    main()
