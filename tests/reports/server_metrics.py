#!/usr/bin/env python3
"""engine_serve --metrics, read as Prometheus does: prometheus_client's parser over HTTP."""
import argparse
import json
import pathlib
import re
import select
import subprocess
import tempfile
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def run(*command, code=0):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert result.returncode == code, f"{command}: exit {result.returncode}\n{result.stderr}"
    return result


class Server:
    def __init__(self, tools, folder, *arguments):
        self.process = subprocess.Popen(
            [str(tools / "engine_serve"), "--model", str(folder / "prepared" / "body"), "--listen",
             "127.0.0.1:0", "--identity", str(folder / "server.key"), "--allow",
             str(folder / "client.key.pub"), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.log = []
        self.url = self.find(self.process.stderr, r"metrics at (http://\S+)")
        self.address = self.find(self.process.stdout, r"listening on ([^,]+),")

    def find(self, stream, pattern):
        for _ in range(100):
            ready, _, _ = select.select([stream], [], [], 20)
            line = stream.readline() if ready else ""
            assert line, f"engine_serve does not say {pattern!r}: {self.log}"
            self.log.append(line)
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(self.log)

    def metrics(self):
        with urllib.request.urlopen(self.url, timeout=20) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain"), answer.headers
            text = answer.read().decode()
        return text, {family.name: family for family in text_string_to_metric_families(text)}

    def stop(self):
        self.process.terminate()
        assert self.process.wait(timeout=30) == 0


def value(families, name):
    # Families have no suffix.
    family = families[re.sub("_(total|count|sum)$", "", name)]
    found = [s.value for s in family.samples if s.name == name]
    assert len(found) == 1, (name, family.samples)
    return found[0]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tools", type=pathlib.Path, required=True)
    parser.add_argument("--bench", type=pathlib.Path, required=True)
    parser.add_argument("--make-tiny-model", type=pathlib.Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        run(args.make_tiny_model, folder / "model")
        run(args.tools / "engine_prep", "--model", folder / "model", "--output", folder / "prepared")
        for name in ("server", "client", "stranger"):
            run(args.tools / "engine_keygen", "--output", folder / f"{name}.key")

        server = Server(args.tools, folder, "--metrics", "127.0.0.1:0", "--max-kv-mib", "1")
        try:
            def generate(key, code):
                return run(args.tools / "engine_run", "-m", folder / "prepared", "--server",
                           server.address, "--server-key", folder / "server.key.pub", "--identity",
                           folder / key, "-p", "hello there", "-n", "5", "--ignore-eos", "--quiet",
                           code=code)
            _, before = server.metrics()
            assert value(before, "infemeral_steps_total") == 0
            assert value(before, "infemeral_connections_total") == 0
            generate("client.key", 0)
            generate("stranger.key", 3)
            text, after = server.metrics()

            for name, family in after.items():
                assert re.fullmatch(r"(infemeral|process)_[a-z_]+|exposer_\w+", name), name
                assert family.documentation, name
                if family.type == "counter":
                    assert all(s.name.endswith("_total") for s in family.samples
                               if not s.name.endswith("_created")), family
            assert value(after, "infemeral_steps_total") == 5
            assert value(after, "infemeral_steps_failed_total") == 0
            assert value(after, "infemeral_connections_total") == 2
            assert value(after, "infemeral_handshakes_total") == 1
            assert value(after, "infemeral_connections_refused_total") == 1
            assert value(after, "infemeral_build_info") == 1
            resident = re.search(r"VmRSS:\s+(\d+)", pathlib.Path(
                f"/proc/{server.process.pid}/status").read_text())[1]
            told = value(after, "process_resident_memory_bytes")
            assert 0.8 < told / (int(resident) * 1024) < 1.25, (told, resident)
            histogram = after["infemeral_step_duration_seconds"]
            assert histogram.type == "histogram"
            buckets = [(float(s.labels["le"]), s.value) for s in histogram.samples
                       if s.name.endswith("_bucket")]
            assert buckets == sorted(buckets) and buckets[-1] == (float("inf"), 5), buckets
            assert [n for _, n in buckets] == sorted(n for _, n in buckets)
            assert value(after, "infemeral_step_duration_seconds_count") == 5
            assert value(after, "infemeral_step_duration_seconds_sum") > 0
            for secret in (folder, (folder / "client.key.pub").read_text().strip(), "127.0.0.1"):
                assert str(secret) not in text, secret

            for path in ("", "/", "/keys"):
                try:
                    urllib.request.urlopen(server.url.removesuffix("/metrics") + path, timeout=20)
                    raise AssertionError(f"{path} is answered")
                except urllib.error.HTTPError as error:
                    assert error.code == 404, (path, error)
            # The body goes on while somebody reads.
            generate("client.key", 0)
            _, last = server.metrics()
            assert value(last, "infemeral_steps_total") == 10

            # engine_bench takes a server that is there; it measures nothing in a sanitizer build.
            report = folder / "report.json"
            measured = subprocess.run(
                [str(args.bench), "-m", str(folder / "prepared"), "--server", server.address,
                 "--server-key", str(folder / "server.key.pub"), "--identity", str(folder / "client.key"),
                 "--runs", "1", "-n", "2", "--prefill-tokens", "8", "--case", "ttft", "--case", "load",
                 "-o", str(report), "--quiet"], capture_output=True, text=True)
            if "build, whose times say nothing" not in measured.stderr:
                assert measured.returncode == 0, measured.stderr
                written = json.loads(report.read_text())
                assert written["options"]["server"] == "remote"
                assert written["runs"][0]["memory"]["body_weights_bytes"] == 0  # not known here
                load = next(case for case in written["cases"] if case["name"] == "load")
                assert "open_body" not in load["phases"]
                assert server.address not in report.read_text()

            serve = (args.tools / "engine_serve", "--model", folder / "prepared" / "body", "--listen",
                     "127.0.0.1:0", "--identity", folder / "server.key", "--allow",
                     folder / "client.key.pub", "--quiet", "--metrics")
            taken = re.search(r"//(.*)/metrics", server.url)[1]
            for address in (taken, "nonsense", "127.0.0.1", ":80", "127.0.0.1:99999", "127.0.0.1:80r",
                            "127.0.0.1:80,127.0.0.1:81", "192.0.2.1:9464"):
                # What another program has, or an interface that is not there yet, may change.
                refused = run(*serve, address, code=3 if address in (taken, "192.0.2.1:9464") else 2)
                assert "metrics" in refused.stderr, refused.stderr
                assert len(refused.stderr.splitlines()) == 1 and refused.stdout == "", refused
        finally:
            server.stop()
    print("all as it should be")


if __name__ == "__main__":
    main()
