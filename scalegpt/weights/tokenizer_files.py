"""Tokenizers are found by name or folder, and written as transformers loads them."""

import json
import re
from pathlib import Path
from typing import Any

from scalegpt.data import datatrove, tokenizer
from scalegpt.data.token_files import META, read_meta
from scalegpt.data.tokenizer import BYTES, END_OF_TEXT, MARKS, Tokenizer
from scalegpt.errors import Mistake
from scalegpt.files.folder import open_folder
from scalegpt.files.json_files import read_object
from scalegpt.files.run_folder import is_run
from scalegpt.files.text_files import read_text

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def named(name: str) -> Tokenizer:
    """Return the tokenizer that a user has named.

    name: gpt2, byte, the path of a tokenizer.json, or the folder of a run, a data set, a model or
    such a file. Raises Mistake as `tokenizer.load`, and for what cannot be read.
    """
    path = Path(name).expanduser()
    if name in ("gpt2", "byte"):
        return tokenizer.load(name)
    if is_run(name):
        import jax  # which few need here

        from scalegpt.checkpoints.checkpoints import open_checkpoints

        # This needs no accelerator, and a TPU would be taken from whatever trains on it.
        jax.config.update("jax_platforms", "cpu")
        checkpoints = open_checkpoints(name)
        spec = checkpoints.meta(checkpoints.find("best"))["tokenizer"]
        checkpoints.close()
    elif any((path / file).is_file() for file in META) or datatrove.names(open_folder(path)):
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
        spec = with_template(read_file(path), path.parent)
    if spec is None:
        raise Mistake(f"{name} came without a tokenizer; give another to --tokenizer")
    return tokenizer.load(spec)


def read_file(path: Path) -> dict[str, Any]:
    """Return the spec of a tokenizer.json; one that `tokenizer_files` wrote for chats is for chats.

    Raises Mistake as `tokenizer.read_json`.
    """
    spec = tokenizer.read_json(path)
    content, config = spec["json"], path.with_name("tokenizer_config.json")
    added, model = tokenizer.added_tokens(content), content.get("model")
    names = [re.sub(r"<\|(?:chat_)?(\w+)\|>", r"\1", t["content"]) for t in added[-8:]]
    n_marks = next((n for n in (8, 7) if names[-n:] == [*MARKS[-n:]]), 0)
    if not n_marks or not isinstance(model, dict) or not config.is_file():
        return spec
    if isinstance(vocab := model.get("vocab"), dict):
        marks = {token["content"] for token in added[-n_marks:]}
        model = {**model, "vocab": {t: i for t, i in vocab.items() if t not in marks}}
    base = {"kind": "tokenizer.json", "name": path.name}
    base["json"] = {**content, "model": model, "added_tokens": added[:-n_marks]}
    same = known_as(base)
    if same is None and n_marks == 7:  # the eighth is the base's end-of-text mark
        if not isinstance(bos := read_object(config).get("bos_token"), str):
            return spec
        base["eot"] = bos
    return {"kind": "chat", "base": same or base}


def known_as(spec: dict[str, Any]) -> str | None:
    """Return "gpt2" or "byte" where a tokenizer.json gives the ids of that one; else None.

    Another cutter or normalizer gives other ids of the same vocabulary.
    """
    content = spec.get("json") or {}
    cutter = content.get("pre_tokenizer") or {}
    plain = {"type": "ByteLevel", "add_prefix_space": False}.items() <= cutter.items()
    if not plain or content.get("normalizer") or "bos" in spec:
        return None
    names = ("gpt2", "byte") if cutter.get("use_regex", True) else ("byte",)
    return next((name for name in names if tokenizer.same(spec, name)), None)


def of_weights(path: Path) -> dict[str, Any]:
    """Return the spec of the tokenizer.json beside weights of others, as `read_file`, with the
    token that its template puts before each text: they know no text without it."""
    spec, config = read_file(path), path.with_name("tokenizer_config.json")
    if "json" not in spec or config.is_file() and read_object(config).get("add_bos_token") is False:
        return spec
    template = spec["json"].get("post_processor") or {}
    for part in template.get("processors", [template]):
        match part:
            case {"single": [{"SpecialToken": {"id": str(token)}}, {"Sequence": _}]}:
                return {**spec, "bos": token}
    return spec


# Tokens that classes of transformers have where no file names them.
_NAMED_BY_CLASS = {
    "GPT2Tokenizer": {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>"},
}


def with_template(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the spec of the tokenizer in a folder with the chat template that transformers finds
    there, where there is one; the marks of a chat of ours are one already. Raises Mistake."""

    def read(name: str) -> dict[str, Any]:
        return read_object(path) if (path := folder / name).is_file() else {}

    config = read("tokenizer_config.json")
    source = {**config, **read("chat_template.json")}.get("chat_template")
    if isinstance(source, list):  # several, by name
        by_name = {str(x.get("name")): x.get("template") for x in source if isinstance(x, dict)}
        source = by_name.get("default")
    if (path := folder / "chat_template.jinja").is_file():
        source = read_text(path)
    if not isinstance(source, str) or spec["kind"] == "chat":
        return spec
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    kind = "GPT2Tokenizer" if spec["kind"] == "gpt2" else kind
    variables = dict(_NAMED_BY_CLASS.get(kind, {}))
    for key, value in {**read("special_tokens_map.json"), **config}.items():
        value = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, str):
            variables[key] = value
    ends = read("generation_config.json").get("eos_token_id")
    ends = read("config.json").get("eos_token_id") if ends is None else ends
    ends = [i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int]
    return {**spec, "template": {"source": source, "variables": variables, "ends": ends}}


def read_merges(vocab: Path) -> dict[str, Any] | None:
    """Return the spec of a tokenizer of GPT-2's kind in the files of before tokenizer.json, which
    are vocab.json, merges.txt and maybe added_tokens.json. None without merges; raises Mistake."""
    if not (merges := vocab.with_name("merges.txt")).is_file():
        return None
    ids = read_object(vocab)
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f"cannot read {merges}: {error}; download it again") from None
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    more = read_object(path) if (path := vocab.with_name("added_tokens.json")).is_file() else {}
    content = _byte_level(ids, pairs, True)
    content["added_tokens"] = [
        *(_special(ids[mark], mark) for mark in (END_OF_TEXT,) if mark in ids),
        *(_special(id_, token) | {"special": False} for token, id_ in more.items()),
    ]
    return {"kind": "tokenizer.json", "name": vocab.name, "json": content}


def reads_as_qwen2(content: dict[str, Any]) -> bool:
    """Tell whether transformers' Qwen2Tokenizer, which takes the vocabulary, the merges and the
    added tokens of any tokenizer.json and nothing else, gives the ids that this one gives."""
    model, tokens = content["model"], tokenizer.added_tokens(content)
    words = {"type": "Split", "pattern": {"Regex": _QWEN2_PATTERN}, "behavior": "Isolated"}
    match content:
        case {
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {
                "pretokenizers": [
                    {"invert": False, **first},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ]
            },
            "model": {"type": "BPE", "vocab": dict(vocab)},
        } if first == words and not model.get("ignore_merges"):
            # It numbers tokens anew where an id is left out, and adds a mark where there is none.
            added = [token["id"] for token in tokens if token["content"] not in vocab]
            ids = [*sorted(vocab.values()), *added]
            names = {*vocab, *(token["content"] for token in tokens)}
            return ids == [*range(len(ids))] and END_OF_TEXT in names
    return False


def tokenizer_files(spec: Any, block_size: int) -> dict[str, Any]:
    """Return each file's JSON value by its name; {} where there is no tokenizer, or no text.

    The files encode to the same ids, and decode them to the same text; for chats, so does
    transformers' `apply_chat_template`, where no text spells a mark. block_size: transformers warns
    of texts with more tokens. Raises Mistake as `tokenizer.load` does.
    """
    if spec is None or tokenizer.kind(spec) == "ids":
        return {}
    codec = tokenizer.load(spec)
    base = codec.spec().get("base", codec.spec())
    match base:
        case "gpt2" | {"kind": "gpt2"}:
            content, mark = _gpt2(), END_OF_TEXT
        case "byte" | {"kind": "byte"}:
            # No mark: NUL ends a text here, but as a special token transformers would drop it.
            content, mark = _byte_level({c: i for i, c in enumerate(BYTES)}, [], False), None
        case {"kind": "char", "chars": chars}:
            content, mark = _char(chars), None
        case {"json": content}:
            names = {t["id"]: t["content"] for t in content.get("added_tokens", [])}
            mark = names.get(codec.eot)
            content = {**content, "truncation": None, "padding": None}
            if codec.bos is None or codec.marks:
                # A template would put tokens around a text that training has not seen there.
                content["post_processor"] = None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # transformers before 5: "a ." came back as "a."
    }
    if mark:
        config |= {"bos_token": mark, "eos_token": mark}
    if codec.bos is not None:
        config["bos_token"] = base["bos"]
    if codec.template:
        config |= {"chat_template": codec.template["source"], **codec.template["variables"]}
    if codec.marks:
        content, chat = _for_chats(tokenizer.load(codec.spec()["base"]), content, mark)
        config |= chat
    return {"tokenizer.json": content, "tokenizer_config.json": config}


def _gpt2() -> dict[str, Any]:
    return _of_ranks(tokenizer.gpt2_ranks())


# How GPT-4 cuts a text into words, as in the tokenizer.json of Llama 3 and others.
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(ranks: dict[bytes, int]) -> dict[str, Any]:
    """Return the tokenizer.json of BPE over bytes in GPT-4's words, with an end-of-text mark.

    ranks: the tokens with their ids, from 0 on, in the order in which they were learned.
    """
    words = {"type": "Split", "pattern": {"Regex": GPT4_WORDS}, "behavior": "Isolated"}
    content = _of_ranks(ranks)
    cutter = {**content["pre_tokenizer"], "use_regex": False}
    both = {"type": "Sequence", "pretokenizers": [{**words, "invert": False}, cutter]}
    return {**content, "pre_tokenizer": both}


def _of_ranks(ranks: dict[bytes, int]) -> dict[str, Any]:
    vocab = {"".join(BYTES[b] for b in token): rank for token, rank in ranks.items()}
    merges = [_last_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    merges = [["".join(BYTES[b] for b in part) for part in pair] for pair in merges]
    end = len(vocab)
    content = _byte_level({**vocab, END_OF_TEXT: end}, merges, True)
    return {**content, "added_tokens": [_special(end, END_OF_TEXT)]}


def _special(id_: int, content: str) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id_, "content": content, **plain, "special": True}


_TEMPLATE = """{{ BOS }}{% for message in messages %}
{% if message['role'] not in ['system', 'user', 'assistant'] %}
{{ raise_exception('no role ' + message['role'] + ': there are system, user and assistant') }}
{% endif %}
{{ '<|' + message['role'] + '|>' }}
{% if message['content'] is string %}
{{ message['content'] }}
{% else %}
{% for part in message['content'] %}
{% if part is string %}
{{ part }}
{% else %}
{{ '<|call|>' + part['call'] + '<|result|>' + part['result'] + '<|back|>' }}
{% endif %}
{% endfor %}
{% endif %}
{{ '<|end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}""".replace("\n", "")


def _for_chats(base: Tokenizer, content: dict, bos: str | None) -> tuple[dict, dict[str, Any]]:
    """Return a base's tokenizer.json with marks, and more keys for its tokenizer_config.json.

    bos: the base's special token that is <|bos|>, or None where it has none.
    """
    model, added = content["model"], content.get("added_tokens") or []
    known = {*model["vocab"]} if isinstance(model["vocab"], dict) else set()
    known |= {token["content"] for token in added}
    # A tokenizer.json may have tokens of such names, which keep their ids.
    prefix = "<|chat_" if any(f"<|{name}|>" in known for name in MARKS) else "<|"
    marks = base.chat().marks
    ids = {f"{prefix}{n}|>": i for n, i in marks.items() if n != "bos" or base.eot is None}
    if isinstance(model["vocab"], dict):  # else a vocabulary with gaps would number them anew
        model = {**model, "vocab": model["vocab"] | ids}
    # What is put before a text's first word is put there after each mark, too.
    cutter = json.dumps(content.get("pre_tokenizer"))
    cutter = cutter.replace('"prepend_scheme": "first"', '"prepend_scheme": "always"')
    content = {**content, "model": model, "pre_tokenizer": json.loads(cutter)}
    content["added_tokens"] = [*added, *(_special(i, mark) for mark, i in ids.items())]
    if base.eot is None:
        bos = f"{prefix}bos|>"
    template = _TEMPLATE.replace("<|", prefix).replace("BOS", json.dumps(bos or "\0"))
    config = {"chat_template": template, "eos_token": f"{prefix}end|>"}
    return content, config | ({"bos_token": bos} if bos else {})


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
