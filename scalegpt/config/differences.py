"""A stored run may be continued with some keys changed; this file says which."""

from scalegpt.config import Config

# These keys of the compared sections change speed or memory, never the loss curve.
_NEUTRAL = {
    *("model.preset", "model.depth", "model.attention", "model.scan_layers", "model.remat"),
    "model.loss_chunk",
    *("batch.microbatch", "data.path", "data.prepare", "data.prefetch", "data.cache_dir"),
}


def curve_diff(stored: Config, requested: Config) -> list[str]:
    """Return the changed keys that would change the loss curve, as `key: stored -> requested`.

    The names of data sets are not compared, only the weights of a mixture: checkpoints carry a
    fingerprint of the token files themselves.
    """
    old, new = stored.model_dump(), requested.model_dump()
    lines = [
        f"{section}.{key}: {old[section][key]} -> {value}"
        for section in ("model", "batch", "data", "optim")
        for key, value in new[section].items()
        if f"{section}.{key}" not in _NEUTRAL and old[section][key] != value
    ]
    shares = [list(c.data.weights.values()) for c in (stored, requested)]
    if shares[0] != shares[1]:
        lines.append(f"data.path: {stored.data.path} -> {requested.data.path}")
    if stored.run.seed != requested.run.seed:
        lines.append(f"run.seed: {stored.run.seed} -> {requested.run.seed}")
    return lines


# These keys of a model may differ from those of the run whose weights it starts from.
NOT_SHAPING = {
    *(key.partition(".")[2] for key in _NEUTRAL if key.startswith("model.")),
    *("dtype", "dropout", "init", "block_size", "vocab_multiple"),
}
