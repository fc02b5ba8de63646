"""A model card is the README.md of an exported folder: what the model is, how good, how to load it.

Hugging Face's Hub shows it, and reads the YAML at its top. It says what the folder, the run and the
data that are here say, and no more: weights of others have no figures.
"""

import json
import re
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scalegpt.checkpoints import manifest
from scalegpt.config.recipe import ModelConfig
from scalegpt.data import tokenizer
from scalegpt.data.token_files import open_dataset, read_meta
from scalegpt.errors import Mistake, counted
from scalegpt.files.folder import expanded, is_url, open_folder
from scalegpt.files.run_folder import FOLDER
from scalegpt.model.flops import parameter_count
from scalegpt.run.curves import LOSSES, REWARDS, UNITS, draw, ledger_of
from scalegpt.run.history import History, Row, read_rows
from scalegpt.run.metrics import of_task
from scalegpt.weights.huggingface import OWN_TYPE
from scalegpt.weights.trained import Trained

CURVES = "curves.png"
# Keys of metrics.jsonl, and what a card calls them.
_TITLES = {
    "val/loss": "validation loss",
    "val/bits_per_byte": "bits per byte",
    "val/accuracy": "accuracy on pairs",
    "val/reward": "reward of held-out prompts",
}
# model_types that llama.cpp converts; it computes as usual whatever config.json says of these keys,
# and knows no tokenizer of bytes or of characters.
_GGUF = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
_GGUF_ONLY = {
    "activation_function": "gelu_new",
    "hidden_act": "silu",
    "n_inner": None,
    "scale_attn_weights": True,
    "sliding_window": None,
}

_CARD = """---
{metadata}---
# {title}

A GPT of {parameters:,} parameters, {origin} scalegpt.

{picture}| | |
|---|---|
{table}

## Use

{use}
## Licence

None is chosen yet. Whoever publishes these weights does, in place of `unknown` in the first lines
of this file; the text they were trained on, and weights they began with, may have a say. scalegpt
itself is under the MIT licence, which does not extend to what it trains.

{upload}## Configuration

```yaml
{config}```
"""
_PICTURE = """![Loss, learning rate, gradient norm, speed and time]({file})

The curves are of the whole run, the figures of these weights; ± is a standard error.

"""
_TEXT = """```python
from transformers import pipeline

write = pipeline("text-generation", model="{name}")
print(write("Once", max_new_tokens={length})[0]["generated_text"])
```

"""
_CHAT = """```python
from transformers import pipeline

answer = pipeline("text-generation", model="{name}")
question = [{{"role": "user", "content": "Who are you?"}}]
print(answer(question, max_new_tokens={length})[0]["generated_text"][-1]["content"])
```

"""
_IDS = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

It came without a tokenizer: only `model` can be loaded, for token ids.

"""
_OURS = """```python
import scalegpt

model = scalegpt.load("{name}")
print(model.{call})
```
"""
_VLLM = """
[vLLM](https://docs.vllm.ai) serves it behind OpenAI's API (the command was not run):

```
vllm serve {name}
```
"""
_LLAMA_CPP = """
[llama.cpp](https://github.com/ggml-org/llama.cpp) makes a GGUF of the folder, where it knows the
tokenizer (the command was not run):

```
{download}python convert_hf_to_gguf.py {folder} --outfile {folder}.gguf
```
"""
_UPLOAD = """## Upload

```
hf auth login
hf upload USER/{name} {folder} --private
```

Afterwards `USER/{name}` is the name to load the model by.

"""


class Figure(NamedTuple):
    """A figure is one result of an evaluation. error: its standard error where the run knows it."""

    dataset: str
    metric: str
    title: str
    value: float
    error: float | None


def write_card(folder: Path, model: Trained, notes: str, repository: str | None = None) -> None:
    """Write the card of a model that is exported into `folder`, and its curves as a picture.

    notes: what else its users must know. repository: of Hugging Face, where the folder is going to
    be. Raises Mistake for metrics that no run writes.
    """
    of_run = open_folder(model.name)
    history = History(
        model.name, model.config, read_rows(of_run), [], manifest.steps(of_run / FOLDER)
    )
    curves = any(len(history.curve(key)[0]) > 2 for key in (*LOSSES, *REWARDS))
    if curves:
        draw([history]).savefig(folder / CURVES, format="png")
    row = {k: v for row in history.rows if row["step"] == model.step for k, v in row.items()}
    names = ", ".join(Path(path).name for path in model.config.data.weights)
    measured = list(figures(names, row))
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    title = Path(model.name).name or folder.name  # of a run named .
    spec, config = model.tokenizer, model.config
    has_text = spec is not None and tokenizer.kind(spec) != "ids"
    table = {
        **_training(model, history, row),
        **{figure.title: _shown(figure) for figure in measured},
        **_best(model, history),
        "model": _architecture(config.model),
        "format": ", ".join(
            [*values.get("architectures", ["scalegpt"]), values.get("dtype", "float32")]
        ),
        "tokenizer": _tokenizer(model),
    }
    kept = config.model_dump() if model.step else {"model": config.model.model_dump()}
    upload = _UPLOAD.format(name=folder.name, folder=shlex.quote(folder.name))
    text = _CARD.format(
        metadata=_yaml(_metadata(title, values["model_type"], has_text, measured)),
        title=title,
        parameters=parameter_count(config.model),
        origin="trained with" if model.step else "converted by",
        picture=_PICTURE.format(file=CURVES) if curves else "",
        table="\n".join(f"| {key} | {value} |" for key, value in table.items() if value),
        use=_use(values, config.model.block_size, spec, has_text, notes, repository or folder.name),
        upload="" if repository else upload,
        config=_yaml(_public(kept)),
    )
    (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")


def figures(data: str, row: Row) -> Iterator[Figure]:
    """Yield the figures in what metrics.jsonl has of a step. data: the names of the data sets."""
    loss, error = row.get("val/loss"), row.get("val/loss_stderr")
    for key, value in row.items():
        task, _, metric = key.rpartition("/")
        if value is None or not (key in _TITLES or of_task(key)):
            continue
        its_error = None
        if error and key in ("val/loss", "val/bits_per_byte"):  # whose ratio is fixed
            its_error = error * value / loss
        title = _TITLES.get(key, f"{task}: {metric}")
        # A loss over pairs of answers is not one of tokens.
        if key == "val/loss" and "val/accuracy" not in row:
            title += ", nats a token"
        yield Figure(data if task == "val" else task, metric, title, value, its_error)


def _public(value: Any, key: str = "") -> Any:
    """Return a part of a configuration with names for absolute paths: where things lie on this
    machine is of no use to readers of a card, and may not be theirs to know."""
    if isinstance(value, dict):
        public: dict[str, Any] = {}
        for name, part in value.items():
            shown = _public(name)
            while shown in public:  # another folder of this name
                shown += "'"
            public[shown] = _public(part, name)
        return public
    path = isinstance(value, str) and key != "sample_prompt" and value.startswith(("/", "~/"))
    return Path(value).name if path else value


def _shown(figure: Figure) -> str:
    error = f" ± {figure.error:.4f}" if figure.error else ""
    return f"{figure.value:.4f}{error}"


def _metadata(
    title: str, model_type: str, has_text: bool, measured: list[Figure]
) -> dict[str, Any]:
    """Return what the Hub reads: how to load the model, and its figures by what they are of."""
    results: dict[str, list[dict[str, Any]]] = {}
    for figure in measured:
        metric = {"type": figure.metric, "name": figure.title, "value": figure.value}
        results.setdefault(figure.dataset, []).append(metric)
    index = [
        {
            "task": {"type": "text-generation", "name": "Text Generation"},
            "dataset": {"type": re.sub(r"[^\w.-]+", "-", dataset), "name": dataset},
            "metrics": metrics,
        }
        for dataset, metrics in results.items()
    ]
    return {
        "library_name": OWN_TYPE if model_type == OWN_TYPE else "transformers",
        **({"pipeline_tag": "text-generation"} if has_text else {}),
        "tags": list(dict.fromkeys([OWN_TYPE, model_type])),
        "license": "unknown",
        **({"model-index": [{"name": title, "results": index}]} if measured else {}),
    }


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _training(model: Trained, history: History, row: Row) -> dict[str, str]:
    """Return what the weights were trained on, for how long and where, as far as it is known."""
    config, step = model.config, model.step
    if not step:
        return {}
    content = history.checkpoints.get(step)
    meta = content["meta"] if isinstance(content, dict) else {}
    fingerprints = meta.get("data", {}).values()
    seconds, time = sum(ledger_of(history).values()), ""
    if seconds:
        scale, unit = next(x for x in UNITS if seconds <= x[0] * 120 or x is UNITS[-1])
        time = f"{seconds / scale:.3g} {unit} for the whole run"
    return {
        "data": "<br>".join(_data(path, fingerprints) for path in config.data.weights if path),
        "began with": _public(config.run.init_from or ""),
        "updates": f"{step:,} of {config.optim.steps:,}",
        "tokens": f"{row['train/tokens']:,}" if "train/tokens" in row else "",
        "time": time,
        "devices": meta.get("devices", ""),
    }


def _data(path: str, fingerprints: Collection[str]) -> str:
    """Return the name of a data set and, where its files are here as the run had them, its size."""
    name, folder = Path(path).name, expanded(path)
    if is_url(path) or not (folder / "meta.json").is_file():
        return name
    try:
        facts = read_meta(folder)[0]["train"]
        if "documents" not in facts or (data := open_dataset(path)).fingerprint not in fingerprints:
            return name
    except Mistake:
        return name
    tokens, documents = counted(facts["tokens"], "token"), counted(facts["documents"], "document")
    return f"{name}: {data.kind}, {tokens} in {documents}"


def _best(model: Trained, history: History) -> dict[str, str]:
    """Return the best value of the run where these are not its best weights."""
    if not model.step or history.best in (None, model.step):
        return {}
    loss = history.checkpoints[history.best]["val_loss"]
    goal = history.config.goal
    value = f"{history.config.as_goal(loss):.4f} at update {history.best:,}"
    return {f"best validation {goal} of the run": value}


def _architecture(model: ModelConfig) -> str:
    shared = f" ({model.n_kv_head} of keys and values)" if model.n_kv_head else ""
    return (
        f"{counted(model.n_layer, 'layer')}, {counted(model.n_head, 'head')}{shared}, "
        f"{model.n_embd} wide, {model.position} positions, context of {model.block_size:,} tokens"
    )


def _tokenizer(model: Trained) -> str:
    if model.tokenizer is None:
        return ""
    codec = model.codec()
    facts = [tokenizer.kind(model.tokenizer), f"vocabulary of {codec.vocab_size:,}"]
    if codec.eot is not None:
        facts.append(f"end of text {codec.eot}")
    return ", ".join([*facts, *(f"{name} {i}" for name, i in codec.marks.items() if name != "bos")])


def _use(
    values: dict[str, Any], context: int, spec: Any, has_text: bool, notes: str, name: str
) -> str:
    """Return how the model is loaded. values: its config.json. name: its folder or repository."""
    length = min(100, context // 2)  # transformers' GPT-2 fails, and says not why, past its context
    call = f'generate("Once", max_new_tokens={length})' if has_text else "logits([5, 17])"
    ours = _OURS.format(name=name, call=call)
    if values["model_type"] == OWN_TYPE:
        return ours
    chat = has_text and tokenizer.is_chat(spec)
    theirs = _CHAT if chat else _TEXT if has_text else _IDS
    text = theirs.format(name=name, length=length) + (f"{notes}\n\n" if notes else "") + ours
    if not has_text:
        return text
    text += _VLLM.format(name=shlex.quote(name))
    usual = all(values.get(key, value) == value for key, value in _GGUF_ONLY.items())
    known = tokenizer.kind(spec.get("base", spec) if chat else spec) not in ("byte", "char")
    if values["model_type"] in _GGUF and usual and known:
        folder = shlex.quote(Path(name).name)
        download = f"hf download {name} --local-dir {folder}\n" if "/" in name else ""
        text += _LLAMA_CPP.format(download=download, folder=folder)
    return text
