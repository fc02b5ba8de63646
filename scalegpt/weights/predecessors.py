"""Models that nanoGPT, nanogpt-jax and gpt-jax have trained are read from their own checkpoints.

nanoGPT writes ckpt.pt by torch.save; the other two write a file or a folder by flax.training, in
msgpack or by Orbax. All are read as data, and nothing in them is executed. Their tensors get the
names and shapes of GPT-2's format, whose places `gpt2` knows.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import serialization, traverse_util

from scalegpt.config.recipe import ModelConfig
from scalegpt.data.token_files import read_meta
from scalegpt.errors import Mistake, counted
from scalegpt.model.parameters import parameters
from scalegpt.weights import gpt2, huggingface, tensor_files
from scalegpt.weights.places import Place
from scalegpt.weights.source import Source, open_source

CKPT = "ckpt.pt"
_ORBAX = ("_METADATA", "checkpoint")  # either is in a folder of Orbax; the second in old ones
_GPT2_VOCABULARIES = (50257, 50304)  # nanoGPT pads GPT-2's to a multiple of 64
# Linear layers, which PyTorch stores [out, in].
_LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def find(source: str) -> Path | None:
    """Return the checkpoint that `source` is, or that is in that folder; None if there is none.

    Raises Mistake for a folder of several.
    """
    path = Path(source).expanduser()
    if (path / "config.json").is_file():  # of Hugging Face
        return None
    if path.is_file() and tensor_files.instead(path):
        return None
    if path.is_file() or any((path / name).is_file() for name in _ORBAX):
        return path
    if (path / CKPT).is_file():
        return path / CKPT
    checkpoints = [x for x in sorted(path.glob("checkpoint_*")) if "tmp" not in x.name]
    if len(checkpoints) > 1:
        names = ", ".join(x.name for x in checkpoints)
        raise Mistake(f"{path} has {names}; name one, such as {checkpoints[-1]}")
    return checkpoints[0] if checkpoints else None


def read(path: Path, n_head: int | None, block_size: int | None) -> Source:
    """Open a checkpoint that `find` has found.

    n_head: needed for those by Flax, which do not store it. block_size: of a model with rotary
    positions, which does not store it either; 1024, as there, if None. Raises Mistake for a file
    that is damaged or something else.
    """
    if path.is_file() and zipfile.is_zipfile(path):
        checkpoint = _nanogpt(path)
        if n_head not in (None, checkpoint.model.n_head):
            raise Mistake(
                f"--n-head={n_head}: {path} has {counted(checkpoint.model.n_head, 'head')}"
            )
        return checkpoint
    return _flax(path, n_head, block_size or 1024)


def _nanogpt(path: Path) -> Source:
    match tensor_files.load_torch(path):
        case {"model": state, "model_args": dict(arguments), **more}:
            shapes, read = tensor_files.torch_tensors(path, state)
        case _:
            raise Mistake(f"{path} is not nanoGPT's {CKPT}: it holds no model and model_args")
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    values = {key: arguments.get(key) for key in keys}
    # Before nanoGPT had biases as a choice, its GELU was the approximation.
    values["activation"] = "gelu" if "bias" in arguments else "gelu_tanh"
    model = huggingface.model_of({**values, "bias": arguments.get("bias", True)}, path)
    shapes = {name: x[::-1] if name.endswith(_LINEAR) else x for name, x in shapes.items()}

    def transposed(name: str) -> np.ndarray:
        return read(name).T if name.endswith(_LINEAR) else read(name)

    spec = _gpt2(model)
    config = more.get("config")
    name = config.get("dataset") if isinstance(config, dict) else None
    data = path.absolute().parent.parent / "data" / str(name)
    if (data / "meta.pkl").is_file():
        meta = read_meta(data)[0]
        spec = meta["tokenizer"] if meta["vocab_size"] == model.vocab_size else None
    return open_source(path, model, spec, _places(model), (shapes, transposed))


def _places(model: ModelConfig) -> dict[str, Place]:
    """Return the places of GPT-2's format but for biases and positions that the model has not."""
    leaves = parameters(model)
    return {name: x for name, x in gpt2.places(model).items() if x.leaf in leaves}


def _gpt2(model: ModelConfig) -> dict[str, Any] | None:
    return {"kind": "gpt2"} if model.vocab_size in _GPT2_VOCABULARIES else None


def _flax(path: Path, n_head: int | None, block_size: int) -> Source:
    try:
        tree = _orbax(path) if path.is_dir() else serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # neither format has an exception of its own for other files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Mistake(
            f"cannot read {path} as a checkpoint of nanoGPT, nanogpt-jax or gpt-jax: {reason}"
        ) from None
    match tree:  # nanogpt-jax has the state below "state", gpt-jax the parameters twice below
        case {"state": {"params": params}} | {"params": {"params": params}} | {"params": params}:
            tensors = {_gpt2_name(x): leaf for x, leaf in _flat(params).items()}
        case _:
            tensors = {}
    if not all(isinstance(x, np.ndarray) for x in tensors.values()) or "wte.weight" not in tensors:
        raise Mistake(f"{path} is no checkpoint of nanogpt-jax or gpt-jax: it has no params/wte")
    for name, tensor in tensors.items():
        tensor_files.check_dtype(path, name, str(tensor.dtype))
    shapes = {name: x.shape for name, x in tensors.items()}
    vocab_size, width = (*shapes["wte.weight"], 0, 0)[:2]
    if n_head is None:
        raise Mistake(
            f"{path} does not store the number of heads; say it, as --n-head "
            f"{max(1, width // 64)} for heads of 64 numbers"
        )
    rope = "wpe.weight" not in tensors
    values = {
        "n_layer": sum(name.endswith("ln_1.weight") for name in tensors),
        "n_head": n_head,
        "n_embd": width,
        "block_size": block_size if rope else shapes["wpe.weight"][0],
        "vocab_size": vocab_size,
        "bias": any(name.endswith("bias") for name in tensors),
        "position": "rope" if rope else "learned",
    }
    model = huggingface.model_of(values, path)
    if model.bias and "ln_f.bias" not in tensors:  # gpt-jax's use_bias=False, except in attention
        places = gpt2.places(model)
        zeros = {n: np.zeros(x.shape, "f4") for n, x in places.items() if n.endswith("bias")}
        tensors = zeros | tensors
        shapes = {name: x.shape for name, x in tensors.items()}

    def read(name: str) -> np.ndarray:
        tensor = tensors.pop(name)
        return _halves(tensor, n_head) if rope and ".c_attn." in name else tensor

    return open_source(path, model, _gpt2(model), _places(model), (shapes, read))


def _orbax(path: Path) -> Any:
    """Read the parameters of an Orbax folder, and leave out the optimizer's state."""
    import orbax.checkpoint as ocp  # as in `checkpoints.writing`

    handler, folder = ocp.PyTreeCheckpointHandler(), epath.Path(path.absolute())
    tree = handler.metadata(folder).tree
    state = tree.get("state", tree)
    params = {"params": state["params"]}
    wanted = {"state": params} if "state" in tree else params
    numpy = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    restore = ocp.args.PyTreeRestore(wanted, restore_args=numpy, partial_restore=True)
    return handler.restore(folder, args=restore)


def _flat(params: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep=".") if isinstance(params, dict) else {}


def _gpt2_name(path: str) -> str:
    """Turn 0.attn.c_attn.kernel into h.0.attn.c_attn.weight."""
    return re.sub(r"(kernel|scale|embedding)$", "weight", re.sub(r"^(?=\d)", "h.", path))


def _halves(x: np.ndarray, n_head: int) -> np.ndarray:
    """Reorder queries and keys of c_attn [..., 3 D], whose rotation turns pairs of neighbours.

    Ours turns number i of a head's first half with number i of its second.
    """
    qkv = x.reshape(*x.shape[:-1], 3, -1)
    pairs = qkv[..., :2, :].reshape(*x.shape[:-1], 2, n_head, -1, 2)
    halves = pairs.swapaxes(-1, -2).reshape(qkv[..., :2, :].shape)
    return np.concatenate([halves, qkv[..., 2:, :]], axis=-2).reshape(x.shape)
