"""Plain llama.cpp, for cpu_system.py: makes a GGUF of the demo model's very weights, and measures.

    llama_cpp_peer.py make-gguf HF_DIR SOURCE_GGUF OUT.gguf
    llama_cpp_peer.py serve MODEL.gguf

`serve` answers one JSON line for each on stdin: {"text", "threads", "tokens", "repack"} -> the
prompt's number of tokens, the milliseconds of the prompt's pass and of every decode pass, and the
greedy tokens. A pass is llama_decode with the logits of the last row; choosing the largest is not
timed. "repack" is llama.cpp's default, weights in the buffers of its kernels for AMX and the like;
without it they go through its other float16 kernels, and which is faster depends on the machine.
"""

import ctypes
import json
import sys
import time
from pathlib import Path


def make_gguf(hf_dir: Path, source: Path, out: Path) -> None:
    """The GGUF that the demo model was made from, with each quantised tensor replaced by the float16
    values of the Hugging Face folder: the same weights for both engines."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    weights = load_file(hf_dir / "model.safetensors")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = field.contents()
        if name == "general.file_type":
            value = int(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_key_value(name, value, kind, sub_type=sub_type)
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        is_vector = value.ndim == 1
        writer.add_tensor(tensor.name, value.astype(np.float32 if is_vector else np.float16))
    # What both read must be the same: compared where GGUF keeps Hugging Face's order of rows.
    for tensor in reader.tensors:
        if tensor.name == "blk.0.ffn_down.weight":
            ours = weights["model.layers.0.mlp.down_proj.weight"]
            theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
            if not np.array_equal(ours, theirs):
                raise SystemExit(f"{hf_dir} was not made from {source}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Peer:
    def __init__(self, model: str, repack: bool) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.log_callback = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log_callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), model_params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 2048, 2048, 512
        self.context = llama_cpp.llama_init_from_model(self.model, params)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        room = (self.api.llama_token * (len(data) + 8))()
        count = self.api.llama_tokenize(self.vocab, data, len(data), room, len(room), False, False)
        return list(room[:count])

    def decode(self, ids: list[int]) -> float:
        tokens = (self.api.llama_token * len(ids))(*ids)
        batch = self.api.llama_batch_get_one(tokens, len(ids))
        begin = time.perf_counter()
        if self.api.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        self.api.llama_get_logits_ith(self.context, -1)  # waits for the result
        return (time.perf_counter() - begin) * 1e3

    def best_token(self) -> int:
        import numpy as np

        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.n_vocab,)).argmax())

    def measure(self, request: dict) -> dict:
        threads = request["threads"]
        self.api.llama_set_n_threads(self.context, threads, threads)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        prompt = self.tokenize(request["text"])
        prompt_ms = self.decode(prompt)
        token, tokens, tokens_ms = self.best_token(), [], []
        for _ in range(request["tokens"]):
            tokens.append(token)
            tokens_ms.append(self.decode([token]))
            token = self.best_token()
        pieces = []
        for token in tokens:
            room = ctypes.create_string_buffer(256)
            size = self.api.llama_token_to_piece(self.vocab, token, room, 256, 0, False)
            pieces.append(room.raw[:size])
        return {"prompt_tokens": len(prompt), "prompt_ms": prompt_ms, "tokens_ms": tokens_ms,
                "text": b"".join(pieces).decode(errors="replace")}


def serve(model: str) -> None:
    peers = {repack: Peer(model, repack) for repack in (True, False)}
    api = peers[True].api
    print(json.dumps({"version": api.__version__,
                      "system": api.llama_print_system_info().decode().strip()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(peers[request["repack"]].measure(request)), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] == "make-gguf":
        make_gguf(*map(Path, sys.argv[2:]))
    elif len(sys.argv) == 3 and sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        raise SystemExit(__doc__)
