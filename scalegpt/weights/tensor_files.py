"""Named tensors are read from a folder's safetensors files, or from PyTorch's own file by torch."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes  # noqa: F401 - makes bfloat16 a NumPy dtype, which safetensors asks for by name
import numpy as np
import safetensors

from scalegpt.errors import Mistake
from scalegpt.files.json_files import read_object

SAFE, INDEX, TORCH = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
_PREFIX = "transformer."  # GPT2LMHeadModel writes it; the official GPT-2 files lack it
_FLOATS = ("F32", "F16", "BF16", "float32", "float16", "bfloat16")

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], np.ndarray]


def open_tensors(folder: Path) -> tuple[Shapes, Read]:
    """Return the shapes of a folder's tensors, and a function that reads one by its name, once.

    Names are without the prefix `transformer.`. Raises Mistake when there are no weights, a shard
    is missing, a file is damaged, or a tensor holds no floating-point numbers.
    """
    if (folder / SAFE).is_file():
        shapes, read = _safetensors([folder / SAFE])
    elif (folder / INDEX).is_file():
        shapes, read = _safetensors([folder / shard for shard in _shards(folder / INDEX)])
    elif (folder / TORCH).is_file():
        shapes, read = _torch(folder / TORCH)
    else:
        raise Mistake(f"{folder} has no {SAFE}, no {INDEX} and no {TORCH}")
    names = {name.removeprefix(_PREFIX): name for name in shapes}
    if len(names) < len(shapes):
        raise Mistake(f"{folder} has tensors both with and without the prefix {_PREFIX}")
    return {name: shapes[stored] for name, stored in names.items()}, lambda name: read(names[name])


def _shards(index: Path) -> list[str]:
    """Return the names of the index's files. Raises Mistake for a name outside their folder."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise Mistake(f"{index} has no weight_map from tensors to files; download it again")
    for name in names.values():
        if not name.endswith(".safetensors") or set(name) & set("/\\\0"):
            raise Mistake(
                f"{index}: weight_map names {name!r}, which is no .safetensors file beside it; "
                "download it again"
            )
    return sorted(set(names.values()))


def _safetensors(paths: list[Path]) -> tuple[Shapes, Read]:
    shapes, files = {}, {}
    for path in paths:
        try:
            # "pread": pages of a mapped file, once read, would count as this process's memory.
            file = safetensors.safe_open(path, framework="np", backend="pread")
        except (OSError, safetensors.SafetensorError) as error:
            raise Mistake(f"cannot read {path}: {error}") from None
        for name in file.keys():
            part = file.get_slice(name)
            _check_dtype(path, name, part.get_dtype())
            shapes[name], files[name] = tuple(part.get_shape()), file
    return shapes, lambda name: files[name].get_tensor(name)


def _torch(path: Path) -> tuple[Shapes, Read]:
    try:
        import torch
    except ImportError as error:
        raise Mistake(
            f"{path} is PyTorch's own format, which needs a package that is not installed: "
            f"pip install torch, or put {SAFE} beside it"
        ) from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has a dozen exceptions for a file of another format
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Mistake(f"cannot read {path}: {reason}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise Mistake(f"{path} holds no named tensors, as torch.save(model.state_dict()) writes")
    for name, tensor in tensors.items():
        _check_dtype(path, name, str(tensor.dtype).removeprefix("torch."))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # pop, so that the file's copy of the model shrinks in memory as our parameters grow.
    return shapes, lambda name: tensors.pop(name).float().numpy()


def _check_dtype(path: Path, name: str, dtype: str) -> None:
    # GPT-2's masks, attn.bias, are stored as bytes; they are never read.
    if dtype not in _FLOATS and not name.endswith("attn.bias"):
        raise Mistake(f"{path}: {name} is stored as {dtype}; only 16 and 32 bit floats are read")
