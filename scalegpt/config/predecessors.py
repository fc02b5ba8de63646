"""What stands here for the flags and habits of nanoGPT, nanogpt-jax and gpt-jax.

Messages about unknown keys read this table, and configs/README.md shows it.
"""

import difflib
import re

# Cells of a Markdown table: their names, and what to type here. If that begins with a flag, the
# advice is for the commands that have one of its flags, unless it names the command.
ROWS = (
    ("`config/x.py`", "`--config FILE`, a YAML file or the name of one in configs/"),
    ("`out_dir`, `output_dir`", "`--run.out_dir`"),
    (
        "`resume`, `init_from=resume`",
        "the same command again, which continues the run in `--run.out_dir`",
    ),
    (
        "`init_from`",
        "`--run.init_from`, the folder of a run or of Hugging Face's format, or `gpt2-xl` and the "
        "like; of the other commands `--run` and `--hf`",
    ),
    (
        "`ckpt.pt`; a checkpoint of nanogpt-jax or gpt-jax",
        "[`convert_hf.py import`](../tools/README.md#convert_hf) makes a run's folder of it",
    ),
    (
        "a `block_size` below that of the weights",
        "`--model.block_size` below that of `--run.init_from`, or `convert_hf.py import "
        "--block-size`",
    ),
    (
        "`batch_size`, `gradient_accumulation_steps`",
        "`--batch.sequences`, the sequences of a whole update: batch_size x accumulation x "
        "processes; `--batch.microbatch` is what a device computes at a time",
    ),
    ("`block_size`, `n_layer`, `n_head`, `n_embd`, `dropout`, `bias`", "`--model.*`, same names"),
    ("exact GELU; tanh GELU", "`--model.activation=gelu`; `gelu_tanh`"),
    ("learned positions; RoPE", "`--model.position=learned`; `rope`"),
    ("`dataset`, `data_set`, `data_dir`", "`--data.path`, a folder with train.bin or its URL"),
    ("`max_iters`, `train_steps`", "`--optim.steps`, in updates; nanogpt-jax counts microbatches"),
    ("`learning_rate`", "`--optim.lr`"),
    ("`min_lr`, `end_lr`", "`--optim.min_lr`"),
    ("`warmup_iters`, `warmup_steps`", "`--optim.warmup_steps`, in updates"),
    ("`lr_decay_iters`, `decay_steps`", "`--optim.decay_steps`, in updates"),
    ("`decay_lr`", "`--optim.schedule=constant` for false"),
    (
        "`weight_decay`, `beta1`, `beta2`, `grad_clip`",
        "`--optim.*`, same names; `--optim.decay` says what decays",
    ),
    ("`eval_interval`, `eval_every`", "`--eval.every`"),
    ("`eval_iters`, `val_steps`", "`--eval.windows`, which are fixed and not random"),
    (
        "`eval_only`, `config/eval_gpt2.py`",
        "`python -m scalegpt.evaluate`; `--config configs/eval_gpt2.yaml` has nanoGPT's baselines",
    ),
    ("`log_interval`, `log_every`", "`--log.every`"),
    ("`wandb_log`", "`--log.wandb`"),
    ("`wandb_project`, `wandb_entity`", "`--log.*`, same names"),
    ("`wandb_run_name`", "`--log.wandb_name`"),
    (
        "`always_save_checkpoint`, `checkpoint_every`",
        "`--checkpoint.every`; the best is kept besides `--checkpoint.keep`",
    ),
    ("`device`", "`JAX_PLATFORMS=cpu` (`cuda`, `tpu`) before the command; otherwise the fastest"),
    ("`tpu`", "nothing, for a TPU is found by itself; `--data.path=gs://...` reads a bucket"),
    ("`dtype`", "`--model.dtype`"),
    ("`compile`", "nothing, for every update is compiled"),
    ("`backend=nccl`, `torchrun`", "nothing; type the same command on every host"),
    ("`start`", "`--prompt` of `python -m scalegpt.generate`, or `--prompt-file` for `FILE:`"),
    ("`checkpoint_type`", "`--checkpoint`, best or latest, of `python -m scalegpt.generate`"),
    ("`transformer_sizing.ipynb`, `scaling_laws.ipynb`", "`python tools/sizing.py`"),
)


def advice(word: str, known: list[str]) -> str:
    """Return a clause that says what to type instead of `word`, as `max_iters` or `max_iters=5`.

    known: the command's own flags, without dashes. "" for a word that is not in the table, or
    whose advice is for another command and does not say which.
    """
    for there, here in ROWS:
        flags = re.findall(r"--([\w.-]+)", here) if here.startswith("`--") else []
        ours = not flags or any(flag in known for flag in flags) or "`python -m" in here
        if word in there.replace("`", "").split(", ") and ours:
            return f"here that is {here.replace('`', '')}"
    return ""


def nearest(word: str, known: list[str], prefix: str = "") -> str:
    """Return a clause that names the known key that `word`, as `lr` or `lr=1`, stands for, or "".

    It may be a key of another trainer's.
    """
    name, _, value = word.partition("=")
    section, _, key = name.rpartition(".")
    keys = [k.split(".")[-1] for k in known]
    for other in (f"{key}={value}", *([] if key in keys else [key.replace("-", "_")])):
        if found := advice(other, known):
            return found
    # The right key in the wrong section, or without one, is nearer than any mistyped one.
    near = [key] if key in keys else difflib.get_close_matches(key, keys, n=1)
    candidates = [k for k in known if k.split(".")[-1] in near]
    candidates.sort(key=lambda k: not k.startswith(f"{section}."))
    return f"did you mean {prefix}{candidates[0]}?" if candidates else ""
