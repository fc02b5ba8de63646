"""Data sets of many Parquet files on the Hugging Face hub are downloaded file by file."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from scalegpt.data.prepare import Corpus, check_disk, write_dataset
from scalegpt.errors import Mistake
from scalegpt.files import parquet
from scalegpt.files.text_files import absolute, find_files


def local_files(pattern: str, least: int) -> list[Path | str]:
    """Return the Parquet files of a local copy, in order. Raises Mistake for fewer than `least`."""
    files = [path for path in find_files(pattern) if parquet.has_column(path, "text")]
    if len(files) < least:
        raise Mistake(f"--input {pattern}: {len(files)} Parquet files, and {least} are needed")
    return files


def names_and_sizes(repository: str, folder: str) -> dict[str, int]:
    """Return the bytes of each Parquet file in a folder of a data set on the hub, in order."""
    from huggingface_hub import HfApi

    try:
        entries = [*HfApi().list_repo_tree(repository, folder or None, repo_type="dataset")]
    except Exception as error:  # of the network, of the hub, or of a folder that is not there
        raise Mistake(
            f"cannot list {repository}: {error}; with local files: --input FILES"
        ) from error
    sizes = {entry.path: entry.size for entry in entries if entry.path.endswith(".parquet")}
    return dict(sorted(sizes.items()))


def download(repository: str, sizes: dict[str, int], out: Path) -> Iterator[Path]:
    """Say what it takes, and yield each file when it is here; those of an earlier try are kept."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    cache = Path(constants.HF_HUB_CACHE)  # HF_HOME moves it
    cache.mkdir(parents=True, exist_ok=True)
    known = {name: try_to_load_from_cache(repository, name, repo_type="dataset") for name in sizes}
    missing = sum(size for name, size in sizes.items() if not isinstance(known[name], str))
    print(f"{repository}: {len(sizes):,} files, {sum(sizes.values()) / 1e9:,.2f} GB")
    check_disk(cache, missing)
    for name in sizes:
        try:
            yield Path(hf_hub_download(repository, name, repo_type="dataset"))
        except Exception as error:  # of the network, of the hub, or of a full disk
            raise Mistake(
                f"cannot download {name} of {repository}: {error}; start again, and what is here "
                "is kept"
            ) from error


def write(args: Namespace, name: str, build: Callable[[], Corpus]) -> None:
    """Write a published data set by the flags of its recipe, as `write_dataset` does.

    name: what there is on the hub. Raises Mistake for a --files that is not 1 or more, too.
    """
    if args.files is not None and args.files < 1:
        raise Mistake(f"--files={args.files} must be 1 or more")
    source = f"{absolute(args.input) if args.input else name}"
    source += f", files={args.files or 'all'}, {args.tokenizer}"
    write_dataset(args.out, build, source, args.workers, args.force)
