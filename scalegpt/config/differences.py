"""Which keys of a run matter: those that a stored run may change, and those that nothing reads."""

from scalegpt.config import Config

# These keys of the compared sections change speed or memory, never the loss curve.
_NEUTRAL = {
    *("model.preset", "model.depth", "model.attention", "model.scan_layers", "model.remat"),
    *("model.loss_chunk", "model.bos", "optim.epochs", "objective.width", "lora.marks"),
    *("batch.microbatch", "data.path", "data.prepare", "data.prefetch", "data.cache_dir"),
    "data.disk_limit",
}


def curve_diff(stored: Config, requested: Config) -> list[str]:
    """Return the changed keys that would change the loss curve, as `key: stored -> requested`.

    The names of data sets are not compared, only the weights of a mixture: checkpoints carry a
    fingerprint of the token files themselves.
    """
    old, new = stored.model_dump(), requested.model_dump()
    neutral = _NEUTRAL | (unread(stored).keys() & unread(requested).keys())
    if not stored.model.isolate and not requested.model.isolate:  # null is false for text
        neutral |= {"model.isolate"}
    optims = stored.optim, requested.optim
    # A run with a constant rate, or with its own end of the decay, has the same curve if longer.
    ends = [None if o.schedule == "constant" else o.decay_steps or o.steps for o in optims]
    if ends[0] == ends[1]:
        neutral |= {"optim.decay_steps"}
    if (ends[0] == ends[1] or all(o.decay_steps for o in optims)) and not any(
        o.average or o.lookahead or o.momentum_slow for o in optims
    ):
        neutral |= {"optim.steps"}
    lines = [
        f"{section}.{key}: {old[section][key]} -> {value}"
        for section in ("model", "batch", "data", "objective", "dpo", "grpo", "lora", "optim")
        for key, value in new[section].items()
        if f"{section}.{key}" not in neutral and old[section][key] != value
    ]
    shares = [list(c.data.weights.values()) for c in (stored, requested)]
    if shares[0] != shares[1]:
        lines.append(f"data.path: {stored.data.path} -> {requested.data.path}")
    if stored.run.seed != requested.run.seed:
        lines.append(f"run.seed: {stored.run.seed} -> {requested.run.seed}")
    return lines


def resolved_as(stored: Config, config: Config) -> Config:
    """Return a run in which what follows from its data is as in the stored one."""
    model, optim = config.model, config.optim
    unknown = [key for key in ("vocab_size", "isolate", "bos") if getattr(model, key) is None]
    model = model.model_copy(update={key: getattr(stored.model, key) for key in unknown})
    if optim.counts_epochs and optim.epochs == stored.optim.epochs:
        optim = optim.model_copy(update={"steps": stored.optim.steps})
    return config.model_copy(update={"model": model, "optim": optim})


def unread(config: Config) -> dict[str, str]:
    """Return the keys that nothing reads with this run's other keys, each with the key to blame."""
    model, optim = config.model, config.optim
    scalars = model.bias, model.qkv_bias, model.residual_scalars, model.value_embeddings
    scalars += model.smear, model.backout, bool(model.ngram_rows)
    rms = model.norm == "rmsnorm"
    no_scalars = rms and not (model.norm_gain or any(scalars))
    no_rms = not rms and not model.qk_norm
    name, named = config.objective.name, config.log.wandb or config.log.trackio
    local = not any("://" in path for path in config.data.weights)
    late = not optim.counts_epochs and min(config.batch.growth, default=0) > optim.steps
    cases = (
        (
            "model.position=learned",
            model.position == "learned",
            "model.rope_base model.rope_scaling",
        ),
        ("model.bias=true", model.bias, "model.qkv_bias"),
        (f"model.norm={model.norm} without qk_norm", no_rms, "model.norm_gain"),
        (f"model.mlp={model.mlp}", model.mlp != "plain", "model.activation"),
        ("model.value_embeddings=false", not model.value_embeddings, "model.value_gates"),
        ("model.ngram_rows=0", not model.ngram_rows, "model.ngram"),
        ("model.logit_softcap=0", not model.logit_softcap, "model.softcap"),
        ("model.tie_word_embeddings=true", model.tie_word_embeddings, "optim.head_lr"),
        ("a model without norms, biases or scalars", no_scalars, "optim.scalar_lr"),
        ("optim.schedule=constant", optim.schedule == "constant", "optim.min_lr optim.decay_steps"),
        (
            f"optim.schedule={optim.schedule}",
            optim.schedule != "wsd",
            "optim.cooldown optim.cooldown_power",
        ),
        ("optim.lookahead=0", not optim.lookahead, "optim.lookahead_decay"),
        (f"optim.steps={optim.steps}", late, "batch.growth"),
        (f"optim.steps={optim.steps}", not optim.counts_epochs, "optim.epochs"),
        ("optim.weight_decay=0", not optim.weight_decay, "optim.decay optim.decay_follows_lr"),
        ("lora.rank=0", not config.lora.rank, "lora.alpha"),
        ("lora.rank", config.lora.rank, "optim.decay"),
        ("no eval.tasks", not config.eval.tasks, "eval.task_examples"),
        (f"objective.name={name}", name not in ("sft", "dpo"), "eval.answers"),
        (f"objective.name={name}", name != "text", "data.shuffle data.shuffle_span data.pack"),
        (f"objective.name={name}", name != "text", "data.document_mask eval.document_mask"),
        ("objective.name=grpo", name == "grpo", "eval.train_windows eval.sample_every"),
        ("objective.name=grpo", name == "grpo", "eval.sample_prompt run.spike"),
        ("grpo.updates=1", config.grpo.updates == 1, "grpo.clip_low grpo.clip_high"),
        ("grpo.kl=0", not config.grpo.kl, "grpo.kl_estimator"),
        ("no run.init_from", not config.run.init_from, "run.init_checkpoint"),
        ("log.wandb=false", not config.log.wandb, "log.wandb_entity log.wandb_tags"),
        ("no log.wandb or log.trackio", not named, "log.wandb_project log.wandb_name"),
        ("data on a local disk", local, "data.cache_dir data.disk_limit"),
    )
    return {key: why for why, applies, keys in cases if applies for key in keys.split()}


# A run that starts from weights has its own of these keys of a model, all others are theirs.
OF_THE_RUN = {
    *(key.partition(".")[2] for key in _NEUTRAL if key.startswith("model.")),
    *("dtype", "dropout", "init", "isolate"),
}
# It may give others of these, to go on with longer texts, as no parameter has a shape by them.
OF_LENGTH = {"block_size", "rope_base", "rope_scaling", "window", "window_pattern"}
