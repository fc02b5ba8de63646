"""Eight simulated CPU devices for every test, set before anything asks JAX for a device."""

import gc
import json
import os
import signal
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["WANDB_MODE"] = "offline"
# Tests compile much and run little. The least of LLVM's optimizations saves a third of their time;
# one LLVM module a program, and the older way to write fusions, which XLA has up to jax 0.10, more
# than half of what is left. libtpu aborts on flags that it does not know, as these.
flags = ["--xla_backend_optimization_level=0"]
if find_spec("libtpu") is None:
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
    if version("jax").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
# Beside JAX's threads, torch with more than one spends ten times the CPU time.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from scalegpt.files.cache import cache_folder, kind_of_cpu  # noqa: E402

# Tests compile most of their time, and mostly what another test or an earlier run has compiled:
# this process, subprocesses and the next `pytest` share one cache.
COMPILED = cache_folder("tests", f"jax-{version('jax')}-{kind_of_cpu()}")
COMPILED_GIB = 2
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tiny_run  # noqa: E402

from scalegpt import train  # noqa: E402
from scalegpt.data.tokenizer import Tokenizer, load  # noqa: E402
from scalegpt.step import build as step  # noqa: E402
from scalegpt.step import update  # noqa: E402

# A shell starts what runs in its background deaf to Ctrl-C, and its children are, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SCALEGPT_TEST_DATA", ROOT.parent / "shared" / "data"))
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Delete the oldest compiled programs, also of other versions of JAX, beyond COMPILED_GIB.

    JAX's own limit would have it read the whole folder under a lock for each program it adds.
    """
    if hasattr(session.config, "workerinput"):  # a process of xdist; the one above has done it
        return
    programs = [(f.stat(), f) for f in COMPILED.parent.rglob("*") if f.is_file()]
    excess = sum(stat.st_size for stat, _ in programs) - COMPILED_GIB * 2**30
    for stat, program in sorted(programs, key=lambda entry: entry[0].st_mtime):
        if excess <= 0:
            break
        program.unlink(missing_ok=True)
        excess -= stat.st_size


# Files that take longest: begun last, one of them would keep one process busy while the other has
# nothing to do. Those that mostly wait (peers, tpu, distributed) run beside one that computes.
LONGEST = (
    "train",
    "peers",
    "tpu",
    "distributed",
    "elastic",
    "crash",
    "model",
    "sharding",
    "pmap",
    "hf",
    "decode",
    "attention",
    "health",
    "ablation",
    "parity",
    "muon",
    "ledger",
    "generate",
    "bad_input",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session", autouse=True)
def built_once():
    """Runs of one configuration share their programs: tracing one is most of a tiny run's time."""
    made, build = {}, step.build_steps
    elsewhere = {"data": True, "eval": True, "checkpoint": True, "log": True, "run": {"out_dir"}}

    def remembered(config, mesh, *rest):
        parts = update.apply_gradients, update.accumulate, step.CPU_TOKENS  # which tests replace
        parts = *parts, config.eval.document_mask
        key = config.model_dump_json(exclude=elsewhere), mesh, rest, parts
        if key not in made:
            made[key] = build(config, mesh, *rest)
        return made[key]

    step.build_steps = remembered
    yield made
    step.build_steps = build


@pytest.fixture(scope="module", autouse=True)
def few_programs(built_once):
    """Forget compiled programs in time: each takes some of the 65,530 pieces of memory that Linux
    maps for a process, and XLA ends with a segmentation fault where there are no more."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        built_once.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def without_sample():
    """Runs of tests end without a text, whose programs take longer to compile than to train."""
    with pytest.MonkeyPatch.context() as patch:
        write = train.sample
        patch.setattr(train, "sample", lambda run, params: None)
        yield write


@pytest.fixture
def with_sample(monkeypatch, without_sample):
    """Lets a test have the text at the end of its runs. Its value is `train.sample`."""
    monkeypatch.setattr(train, "sample", without_sample)
    return without_sample


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text for tests; without it the tests that need it are skipped aloud."""
    if not SHARED.is_dir():
        pytest.skip(f"no test data at {SHARED}; point SCALEGPT_TEST_DATA at it")
    return SHARED


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer; without it, in a cache or by the network, the test is skipped aloud."""
    try:
        return load("gpt2")
    except ValueError as error:
        pytest.skip(f"gpt2's files are not here: {error}")


@pytest.fixture(scope="session")
def bottles(tmp_path_factory) -> Path:
    """A data set of 10,000 characters that a tiny model can learn."""
    folder = tmp_path_factory.mktemp("bottles")
    text = "".join(f"{n} green bottles on the wall, then {n * n % 101}.\n" for n in range(300))
    chars = "".join(sorted(set(text)))
    ids = np.array([chars.index(c) for c in text], "<u2")
    meta = {"format": 1, "tokenizer": {"kind": "char", "chars": chars}, "dtype": "uint16"}
    for split, part in (("train", ids[:-1500]), ("val", ids[-1500:])):
        part.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": len(part)}
    (folder / "meta.json").write_text(json.dumps({**meta, "vocab_size": len(chars)}))
    return folder


@pytest.fixture(scope="session")
def plays(tmp_path_factory) -> Path:
    """The data set of tiny_run."""
    return tiny_run.write_data(tmp_path_factory.mktemp("data") / "plays", tiny_run.TEXT)


@pytest.fixture
def signals_as_they_were():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
