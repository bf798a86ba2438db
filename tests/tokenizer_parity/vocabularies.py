"""Tokenizers in the styles of the model families, trained here on text that every Python has."""

import json
import pydoc_data.topics
import random

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

import strings

GPT4_STYLE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = GPT4_STYLE % r"\p{N}{1,3}"
QWEN2 = GPT4_STYLE % r"\p{N}"


def corpus():
    rng = random.Random(1)
    yield from pydoc_data.topics.topics.values()
    for _ in range(20000):
        yield " ".join(rng.choice(strings.WORDS + strings.EMOJI + strings.DIGITS) for _ in range(8))
    yield from strings.CODE * 50


def added(content, token_id, special=True, **flags):
    return {"id": token_id, "content": content, "special": special,
            **{"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, **flags}}


def document(model, tokens, normalizer, pre_tokenizer, post_processor, decoder):
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens,
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "post_processor": post_processor, "decoder": decoder, "model": model}


def bos_template(token, token_id):
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = single + [{"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair,
            "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}}}


def byte_fallback_model():
    """Llama 2's layout: <unk> <s> </s>, 256 bytes, then merges and characters."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Merges across words, as in Llama 2, would make training slow; within words is enough here.
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    head = ["<unk>", "<s>", "</s>"] + ["<0x%02X>" % b for b in range(256)]
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=6000, limit_alphabet=300, special_tokens=head, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    # Runs of spaces are merged in Llama 2.
    for n in (2, 4, 8):
        model["vocab"]["▁" * n] = len(model["vocab"])
        half = "▁" * (n // 2)
        model["merges"].append([half, half] if isinstance(model["merges"][0], list)
                               else half + " " + half)
    return model


def byte_level_model(pattern):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=6000, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(trained.to_str())["model"]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LLAMA2_DECODER = {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}


def split(pattern):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL]}


def metaspace(scheme, split_words):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split_words}


def build():
    """name -> tokenizer.json as a dict; "byte_fallback" is Llama 2's own arrangement."""
    llama2 = byte_fallback_model()
    llama2_tokens = [added(t, i) for i, t in enumerate(["<unk>", "<s>", "</s>"])]
    prepend = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    bos = bos_template("<s>", 1)
    result = {"byte_fallback": document(llama2, llama2_tokens, prepend, None, bos, LLAMA2_DECODER)}
    # Old files match these in the normalised text.
    normalized_tokens = [dict(t, normalized=True) for t in llama2_tokens]
    result["byte_fallback_normalized"] = document(
        dict(llama2, fuse_unk=False), normalized_tokens, prepend, None, bos, LLAMA2_DECODER)
    metaspace_decoder = {"type": "Sequence", "decoders": [
        {"type": "ByteFallback"}, metaspace("always", True)]}
    for scheme in ("first", "always", "never"):
        for split_words in (False, True):
            result[f"metaspace_{scheme}_{'split' if split_words else 'whole'}"] = document(
                llama2, llama2_tokens, None, metaspace(scheme, split_words), bos,
                LLAMA2_DECODER if split_words else metaspace_decoder)
    # Characters that are neither in the vocabulary nor all bytes of it: unk, fused or not.
    few_bytes = dict(llama2, vocab={t: i for t, i in llama2["vocab"].items()
                                    if not (t.startswith("<0x") and int(t[3:5], 16) > 0xE3)})
    for fuse in (False, True):
        result[f"unk_{'fused' if fuse else 'single'}"] = document(
            dict(few_bytes, fuse_unk=fuse), llama2_tokens, prepend, None, None, None)

    model = byte_level_model(LLAMA3)
    n = len(model["vocab"])
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokens = [added(t, n + i) for i, t in enumerate(names)]
    post = {"type": "Sequence", "processors": [
        dict(BYTE_LEVEL), bos_template("<|begin_of_text|>", n)]}
    result["llama3"] = document(dict(model, ignore_merges=True), tokens, None, split(LLAMA3), post,
                                dict(BYTE_LEVEL))

    model = byte_level_model(QWEN2)
    n = len(model["vocab"])
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [added(t, n + i) for i, t in enumerate(names)]
    tokens.append(added("<tool_call>", n + 3, special=False))
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        result["qwen2" if form == "NFC" else f"qwen2_{form.lower()}"] = document(
            model, tokens, {"type": form}, split(QWEN2), dict(BYTE_LEVEL), dict(BYTE_LEVEL))

    # Every flag of added tokens, found in raw and in normalised text.
    odd = [("<|im_start|>", True, {}), ("<mask>", True, {"lstrip": True}),
           ("<|im_end|>", False, {"rstrip": True}), ("the", False, {"single_word": True}),
           ("<|im", False, {}), ("<s>", True, {"single_word": True, "normalized": True}),
           ("  ", False, {"normalized": True}), ("é", False, {"normalized": True}),
           ("日本", False, {"lstrip": True, "rstrip": True}), ("<|endoftext|>", True, {"normalized": True})]
    gpt2 = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    ids, used = [], n
    for content, special, flags in odd:
        token_id = model["vocab"].get(content)
        if token_id is None:
            token_id, used = used, used + 1
        ids.append(added(content, token_id, special, **flags))
    result["added_tokens"] = document(model, ids, {"type": "NFC"}, gpt2, None, dict(BYTE_LEVEL))

    # Split in its other behaviours.
    for i, behavior in enumerate(["Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"]):
        steps = [{"type": "Split", "pattern": {"Regex": r"\s*\p{P}"} if i % 2 else {"String": " "},
                  "behavior": behavior, "invert": i >= 2},
                 {"type": "Digits", "individual_digits": i % 2 == 0}, BYTE_LEVEL]
        result["split_" + behavior.lower()] = document(
            model, tokens, None, {"type": "Sequence", "pretokenizers": steps}, None, dict(BYTE_LEVEL))
    return result
