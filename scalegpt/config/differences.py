"""What may differ between two configurations of one run."""

from scalegpt.config import Config

# Keys of the compared sections that change speed or memory, never the loss curve.
_NEUTRAL = {
    *("model.preset", "model.depth", "model.attention", "model.scan_layers", "model.remat"),
    "model.loss_chunk",
    *("batch.microbatch", "data.path", "data.prepare", "data.prefetch", "data.cache_dir"),
}


def curve_diff(stored: Config, asked: Config) -> list[str]:
    """Keys that would change the loss curve, as `key: stored -> asked`.

    Of the data's path only a mixture's weights are among them: checkpoints carry a fingerprint
    of the files themselves.
    """
    old, new = stored.model_dump(), asked.model_dump()
    lines = [
        f"{section}.{key}: {old[section][key]} -> {value}"
        for section in ("model", "batch", "data", "optim")
        for key, value in new[section].items()
        if f"{section}.{key}" not in _NEUTRAL and old[section][key] != value
    ]
    shares = [list(c.data.weights.values()) for c in (stored, asked)]
    if shares[0] != shares[1]:
        lines.append(f"data.path: {stored.data.path} -> {asked.data.path}")
    if stored.run.seed != asked.run.seed:
        lines.append(f"run.seed: {stored.run.seed} -> {asked.run.seed}")
    return lines


# Keys of a model that may differ where weights are taken over, besides those of its speed.
NOT_SHAPING = {
    *(key.partition(".")[2] for key in _NEUTRAL if key.startswith("model.")),
    *("dtype", "dropout", "init", "block_size", "vocab_multiple"),
}
