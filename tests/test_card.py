"""Model cards: the figures are the run's, and Hugging Face's own reader understands them."""

import json

import convert_hf
import jax
import numpy as np
import tiny_run
import yaml
from matplotlib import image

from scalegpt.checkpoints.checkpoints import Checkpoints
from scalegpt.config.command_line import parse
from scalegpt.data.token_files import open_dataset
from scalegpt.run.card import figures
from scalegpt.step import sharding
from scalegpt.step.build import build_for_use
from scalegpt.step.update import State

STEPS = 12


def make_run(folder, **changes):
    """A run of random weights at updates 5 and 12, and its data; its rows are made up."""
    data = tiny_run.write_data(folder / "plays", tiny_run.TEXT)
    meta = json.loads((data / "meta.json").read_text())
    meta["train"] |= {"documents": 1234}
    (data / "meta.json").write_text(json.dumps(meta))
    argv = tiny_run.arguments(data, folder / "run", **changes)
    config = parse(argv, "test", {})[0].with_vocab(meta["vocab_size"])
    steps = build_for_use(config, sharding.make_mesh(config.mesh), 1)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), steps.abstract.params
    )
    meta = {"config": config.model_dump(), "tokenizer": meta["tokenizer"], "best_loss": 1.25}
    meta |= {"data": {"plays": open_dataset(data).fingerprint}, "devices": "4 x TPU v9"}
    checkpoints = Checkpoints(folder / "run")
    for step, loss in ((5, 1.25), (STEPS, 1.5)):
        checkpoints.save(State(np.int32(step), params, {}, {}), step, meta, loss)
        checkpoints.wait()
    checkpoints.close()
    rows = [{"step": 0, "val/loss": 9.0}]
    for step in range(1, STEPS + 1):
        rows.append({"step": step, "train/loss": 5 / step, "train/tokens": 1000 * step})
    best = {"val/loss": 1.25, "val/loss_stderr": 0.05, "val/bits_per_byte": 1.5}
    rows.append({"step": 5, **best, "lambada/acc": 0.75, "val/plays/loss": 1.25})
    rows.append({"step": STEPS, "val/loss": 1.5, "time/step": 400.0, "time/compile": 20.0})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "run" / "metrics.jsonl").write_text(lines + '{"step": 13, "tr')


def rows_of(card):
    lines = [line[2:-2] for line in card.splitlines() if line.startswith("| ") and len(line) > 5]
    return dict(line.split(" | ") for line in lines)


def test_the_card_says_what_the_run_was_and_no_more(tmp_path, capsys):
    from huggingface_hub import ModelCard

    folder = tmp_path
    make_run(folder, model__bias="true", run__init_from="gpt2")
    argv = ["export", "--run", str(folder / "run"), "--out"]
    assert convert_hf.main([*argv, str(folder / "best")]) == 0
    assert f"{folder}/best/README.md" in capsys.readouterr().out
    card = (folder / "best" / "README.md").read_text()
    table = rows_of(card)
    tokens = len(np.fromfile(folder / "plays" / "train.bin", "<u2"))
    assert table.pop("tokenizer").startswith("char, vocabulary of ")
    assert table == {
        "data": f"plays: text, {tokens:,} tokens in 1,234 documents",
        "began with": "gpt2",
        "updates": "5 of 12",
        "tokens": "5,000",
        "time": "7 minutes for the whole run",
        "devices": "4 x TPU v9",
        "validation loss, nats a token": "1.2500 ± 0.0500",
        "bits per byte": "1.5000 ± 0.0600",
        "lambada: acc": "0.7500",
        "model": "2 layers, 2 heads, 32 wide, learned positions, context of 16 tokens",
        "format": "GPT2LMHeadModel, float32",
    }
    for words in (
        'pipeline("text-generation", model="best")\nprint(write("Once", max_new_tokens=8)',
        'scalegpt.load("best")\nprint(model.generate("Once", max_new_tokens=8))',
        "vllm serve best\n",
        "hf upload USER/best best --private\n",
        "activation: gelu",
    ):
        assert words in card, words
    assert str(tmp_path) not in card and "out_dir: run\n" in card, "a card may be published"
    assert "gguf" not in card, "llama.cpp has no tokenizer of characters"

    data = ModelCard(card).data  # raises for what Hugging Face would not understand
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.license == "unknown" and data.tags == ["scalegpt", "gpt2"]
    assert data.model_name == "run"
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results} == {
        ("plays", "loss", 1.25),
        ("plays", "bits_per_byte", 1.5),
        ("lambada", "acc", 0.75),
    }
    assert "&" not in card.split("---")[1], "an alias of YAML, which not all read"
    picture = image.imread(folder / "best" / "curves.png")
    assert "(curves.png)" in card and picture.shape[1] == 1440 and np.ptp(picture) > 0.9

    # The data are others now, and the weights not the best.
    tokens = np.fromfile(folder / "plays" / "train.bin", "<u2")
    tokens[::-1].tofile(folder / "plays" / "train.bin")
    assert convert_hf.main([*argv, str(folder / "last"), "--checkpoint", "latest"]) == 0
    card = (folder / "last" / "README.md").read_text()
    assert "| data | plays |" in card and "| updates | 12 of 12 |" in card
    assert "| best validation loss of the run | 1.2500 at update 5 |" in card


def test_of_weights_of_others_the_card_knows_no_figures(tmp_path):
    folder = tmp_path
    make_run(folder, model__bias="true")
    export = ["export", "--run", str(folder / "run"), "--out", str(folder / "theirs")]
    convert_hf.main(export)
    convert_hf.main(["import", str(folder / "theirs"), "--out", str(folder / "again")])
    for form in ("hf", "scalegpt"):
        out = folder / form
        export = ["export", "--run", str(folder / "again"), "--format", form, "--out", str(out)]
        assert convert_hf.main(export) == 0
        card = (out / "README.md").read_text()
        head = yaml.safe_load(card.split("---")[1])
        assert "model-index" not in head and not (out / "curves.png").exists()
        assert head["library_name"] == ("transformers" if form == "hf" else "scalegpt")
        assert "converted by scalegpt" in card and "curves" not in card
        assert ("vllm" in card) == (form == "hf")
        assert [*rows_of(card)] == ["model", "format", "tokenizer"]
        assert yaml.safe_load(card.split("```yaml")[1].strip("\n`")).keys() == {"model"}


def test_losses_of_pairs_and_rewards_are_not_called_losses_of_tokens():
    row = {"step": 5, "val/loss": 0.5, "val/loss_stderr": 0.1, "val/accuracy": 0.75, "time": 7.0}
    assert [(f.title, f.value, f.error) for f in figures("pairs", row)] == [
        ("validation loss", 0.5, 0.1),
        ("accuracy on pairs", 0.75, None),
    ]
    row = {"val/reward": 0.5, "val/best_reward": 0.75, "val/ended": 1.0, "sort/pass@1": 0.25}
    assert [(f.dataset, f.metric, f.title) for f in figures("sums", row)] == [
        ("sums", "reward", "reward of held-out prompts"),
        ("sort", "pass@1", "sort: pass@1"),
    ]
    assert not [*figures("text", {"val/loss": None, "train/loss": 2.0})], "null: not finite"
