"""Tokenizers are found by name or folder, and written as transformers loads them."""

from pathlib import Path
from typing import Any

from scalegpt.data import tokenizer
from scalegpt.data.token_files import META, read_meta
from scalegpt.data.tokenizer import BYTES, END_OF_TEXT, Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.run_folder import is_run


def named(name: str) -> Tokenizer:
    """Return the tokenizer that a user has named.

    name: gpt2, byte, the path of a tokenizer.json, or the folder of a run, a data set, a model or
    such a file. Raises Mistake as `tokenizer.load`, and for what cannot be read.
    """
    path = Path(name).expanduser()
    if name in ("gpt2", "byte"):
        return tokenizer.load(name)
    if is_run(name):
        from scalegpt.checkpoints.checkpoints import open_checkpoints  # JAX, which few need here

        checkpoints = open_checkpoints(name)
        spec = checkpoints.meta(checkpoints.find("best"))["tokenizer"]
        checkpoints.close()
    elif any((path / file).is_file() for file in META):
        spec = read_meta(path)[0]["tokenizer"]
    elif (path / "config.json").is_file() and not (path / "tokenizer.json").is_file():
        from scalegpt.weights import huggingface  # JAX, too

        spec = huggingface.describe(path)[1]
    else:
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise Mistake(
                f"no tokenizer {name!r}: say gpt2, byte, a tokenizer.json's path, or the folder of "
                "a run, a data set or a model"
            )
        spec = tokenizer.read_json(path)
    if spec is None:
        raise Mistake(f"{name} came without a tokenizer; give another to --tokenizer")
    return tokenizer.load(spec)


def tokenizer_files(spec: Any, block_size: int) -> dict[str, Any]:
    """Return each file's JSON value by its name; {} where there is no tokenizer, or no text.

    The files encode to the same ids, and decode them to the same text. block_size: transformers
    warns of texts with more tokens. Raises Mistake as `tokenizer.load` does.
    """
    if spec is None or tokenizer.kind(spec) == "ids":
        return {}
    codec = tokenizer.load(spec)
    match codec.spec():
        case {"kind": "gpt2"}:
            content, mark = _gpt2(), END_OF_TEXT
        case {"kind": "byte"}:
            # No mark: NUL ends a text here, but as a special token transformers would drop it.
            content, mark = _byte_level({c: i for i, c in enumerate(BYTES)}, [], False), None
        case {"kind": "char", "chars": chars}:
            content, mark = _char(chars), None
        case {"json": content}:
            names = {t["id"]: t["content"] for t in content.get("added_tokens", [])}
            mark = names.get(codec.eot)
            # A template would put tokens around a text that training has not seen there.
            content = {**content, "post_processor": None, "truncation": None, "padding": None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # transformers before 5: "a ." came back as "a."
    }
    if mark:
        config |= {"bos_token": mark, "eos_token": mark}
    return {"tokenizer.json": content, "tokenizer_config.json": config}


def _gpt2() -> dict[str, Any]:
    import tiktoken

    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    vocab = {"".join(BYTES[b] for b in token): rank for token, rank in ranks.items()}
    merges = [_last_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    merges = [["".join(BYTES[b] for b in part) for part in pair] for pair in merges]
    end = len(vocab)
    content = _byte_level({**vocab, END_OF_TEXT: end}, merges, True)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] = [{"id": end, "content": END_OF_TEXT, **plain, "special": True}]
    return content


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts whose merge makes `token`: those left after all earlier merges."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_level(vocab: dict[str, int], merges: list, words: bool) -> dict[str, Any]:
    """Return BPE over bytes; words: whether texts are first cut into words by GPT-2's pattern."""
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return _file(
        {"type": "BPE", "vocab": vocab, "merges": merges},
        {**bytes_, "use_regex": words},
        {**bytes_, "use_regex": words},
    )


def _char(chars: str) -> dict[str, Any]:
    # The vocabulary lacks the unknown token, so that an unknown character is an error.
    vocab = {c: i for i, c in enumerate(chars)}
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated"}
    return _file(
        {"type": "WordLevel", "vocab": vocab, "unk_token": "unknown character"},
        {**each, "invert": False},
        {"type": "Fuse"},
    )


def _file(model: dict, pre_tokenizer: dict, decoder: dict) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
