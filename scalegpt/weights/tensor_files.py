"""Named tensors are read from a folder's safetensors files, or from PyTorch's own file by torch."""

import re
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - makes bfloat16 a NumPy dtype, which safetensors asks for by name
import numpy as np
import safetensors

from scalegpt.errors import Mistake
from scalegpt.files.formats import stand_in
from scalegpt.files.json_files import read_object

SAFE, INDEX, TORCH = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
# GPT2LMHeadModel writes transformer, which the official GPT-2 files lack; around it torch.compile,
# DistributedDataParallel and Lightning write a name of their own.
_PREFIX = re.compile(r"((_orig_mod|module|model|transformer)\.)*")
_FLOATS = ("F32", "F16", "BF16", "float32", "float16", "bfloat16")

_AGAIN = "; download it again"
# Weights that are not read, by the end of a file's name.
_OTHERS = {
    "adapter_config.json": "of a PEFT adapter, a change of another model; merge it into that by "
    "PEFT's merge_and_unload, and save the result",
    ".gguf": "llama.cpp's; take the model that it was made from, in Hugging Face's form",
    ".onnx": "ONNX, a graph and no weights by name; take the model that it was made from",
    ".h5": f"TensorFlow's, which transformers before 5 loads (from_tf=True) and saves as {SAFE}",
    ".msgpack": f"Flax's, which transformers before 5 loads (from_flax=True) and saves as {SAFE}",
    f"{TORCH}.index.json": f"PyTorch's in parts; transformers loads and saves them as {SAFE}",
    ".safetensors": f"of another name; a model in parts has {INDEX} beside them",
}

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], np.ndarray]


def open_tensors(folder: Path) -> tuple[Shapes, Read]:
    """Return the shapes of a folder's tensors, and a function that reads one by its name, once.

    Names are without the prefixes of what wrapped the model. Raises Mistake when there are no
    weights, a shard is missing, a file is damaged, or a tensor holds no floating-point numbers.
    """
    if (folder / SAFE).is_file():
        shapes, read = _safetensors(folder, {SAFE: None})
    elif (folder / INDEX).is_file():
        shapes, read = _safetensors(folder, _shards(folder / INDEX))
    elif (folder / TORCH).is_file():
        return torch_tensors(folder / TORCH, load_torch(folder / TORCH))
    else:
        raise Mistake(f"{folder} has no {SAFE}, no {INDEX} and no {TORCH}{instead(folder)}")
    return _without_prefixes(folder, shapes, read)


def instead(path: Path) -> str:
    """Return a clause for messages: what to do with the weights of another format that `path` is,
    or is the folder of; "" for others."""
    if path.is_file() and path.name in (SAFE, INDEX, "config.json"):
        return f"; give its folder, {path.parent}"
    names = sorted(x.name for x in path.iterdir()) if path.is_dir() else [path.name]
    for name, (end, advice) in product(names, _OTHERS.items()):
        if name.endswith(end) and name != SAFE:
            return f"; {name} is {advice}"
    return ""


def _without_prefixes(source: Path, shapes: Shapes, read: Read) -> tuple[Shapes, Read]:
    names = {_PREFIX.sub("", name, count=1): name for name in shapes}
    if len(names) < len(shapes):
        twice = next(name for name in shapes if name not in names.values())
        raise Mistake(f"{source} has tensors both with and without the prefix of {twice}")
    return {name: shapes[stored] for name, stored in names.items()}, lambda name: read(names[name])


def _shards(index: Path) -> dict[str, set[str]]:
    """Return the names of the index's files, each with those of its tensors. Raises Mistake for a
    file outside their folder."""
    names = read_object(index, _AGAIN).get("weight_map")
    if not (names and isinstance(names, dict)) or not all(
        isinstance(name, str) for name in names.values()
    ):
        raise Mistake(f"{index} has no weight_map from tensors to files{_AGAIN}")
    for name in names.values():
        if not name.endswith(".safetensors") or set(name) & set("/\\\0"):
            raise Mistake(
                f"{index}: weight_map names {name!r}, which is no .safetensors file beside it"
                f"{_AGAIN}"
            )
    files: dict[str, set[str]] = {}
    for tensor, name in names.items():
        files.setdefault(name, set()).add(tensor)
    return dict(sorted(files.items()))


def _safetensors(folder: Path, names: dict[str, set[str] | None]) -> tuple[Shapes, Read]:
    """names: of the files, each with those of its tensors, or None where no index says them."""
    shapes, files = {}, {}
    for path, tensors in ((folder / name, tensors) for name, tensors in names.items()):
        try:
            # "pread": pages of a mapped file, once read, would count as this process's memory.
            file = safetensors.safe_open(path, framework="np", backend="pread")
        except (OSError, safetensors.SafetensorError) as error:
            what = path.is_file() and stand_in(path)
            reason = f"it is {what}" if what else error
            raise Mistake(f"cannot read {path}: {reason}{_AGAIN}") from None
        if missing := sorted((tensors or set()).difference(file.keys())):
            raise Mistake(f"{path} has no {missing[0]}, which {INDEX} names it for{_AGAIN}")
        if twice := sorted(shapes.keys() & set(file.keys())):
            raise Mistake(f"both {path} and another file beside it have {twice[0]}{_AGAIN}")
        for name in file.keys():
            part = file.get_slice(name)
            check_dtype(path, name, part.get_dtype())
            shapes[name], files[name] = tuple(part.get_shape()), file
    return shapes, lambda name: files[name].get_tensor(name)


def load_torch(path: Path) -> Any:
    """Return what a file of torch.save holds, without running anything of it. Raises Mistake."""
    try:
        import torch
    except ImportError as error:
        raise Mistake(
            f"{path} is PyTorch's own format, which needs a package that is not installed: "
            f"pip install torch (a model of Hugging Face needs it no more with {SAFE} beside it)"
        ) from error
    mapped = zipfile.is_zipfile(path)
    try:  # mapped where the format allows it: of a training checkpoint, 2/3 are never read
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load has a dozen exceptions for a file of another format
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if what := path.is_file() and not mapped and stand_in(path):
            reason = f"it is {what}{_AGAIN}"
        elif reason.startswith("Weights only load failed"):  # and how to execute it all the same
            reason = "it is damaged, or holds more than tensors, which might be code; none is run"
        raise Mistake(f"cannot read {path}: {reason}") from None


def torch_tensors(path: Path, tensors: Any) -> tuple[Shapes, Read]:
    """Return a state_dict of `path` as `open_tensors` returns a folder's."""
    import torch

    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise Mistake(f"{path} holds no named tensors, as torch.save(model.state_dict()) writes")
    for name, tensor in tensors.items():
        check_dtype(path, name, str(tensor.dtype).removeprefix("torch."))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # pop, so that the file's copy of the model shrinks in memory as our parameters grow.
    return _without_prefixes(path, shapes, lambda name: tensors.pop(name).float().numpy())


def check_dtype(path: Path, name: str, dtype: str) -> None:
    """Raise Mistake unless the tensor `name` holds floating-point numbers that are read."""
    # GPT-2's masks, attn.bias, are stored as bytes; they are never read.
    if dtype not in _FLOATS and not name.endswith("attn.bias"):
        raise Mistake(f"{path}: {name} is stored as {dtype}; only 16 and 32 bit floats are read")
