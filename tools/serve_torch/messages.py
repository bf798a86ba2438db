"""The protobuf messages of proto/split_inference.proto, made from that file at import."""

import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]
PROTO = "proto/split_inference.proto"
SERVICE = "infemeral.v1.SplitInference"


def _load() -> descriptor_pool.DescriptorPool:
    # The default pool, in which the reflection service looks.
    pool = descriptor_pool.Default()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors"
        if protoc.main(["protoc", f"-I{ROOT}", f"--descriptor_set_out={out}", PROTO]) != 0:
            raise ImportError(f"protoc cannot read {ROOT / PROTO}")
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_pool = _load()


def _message(name: str):
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"infemeral.v1.{name}"))


Envelope = _message("Envelope")
Frame = _message("Frame")
