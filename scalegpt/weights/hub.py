"""An exported folder goes to a repository of Hugging Face's Hub that has no files yet."""

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from scalegpt.errors import Mistake, counted
from scalegpt.weights.huggingface import HUB_SECONDS


def check(repository: str) -> None:
    """Raise Mistake unless the user is logged in and the repository is new or empty."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except ValueError:
        valid = False
    if not valid:
        raise Mistake(
            f"--push={repository} is no name of a repository: give OWNER/NAME, where OWNER is you "
            "or an organization, of letters, digits and - _ ."
        )
    if get_token() is None:
        raise Mistake(
            f"--push={repository} needs a login: run `hf auth login`, or set HF_TOKEN to a token "
            "that may write, of https://huggingface.co/settings/tokens"
        )
    hub, files = HfApi(), []
    try:
        token = hub.whoami().get("auth", {}).get("accessToken", {})
        with suppress(RepositoryNotFoundError):
            files = _files(hub.model_info(repository, timeout=HUB_SECONDS))
    except Exception as error:  # of a wrong token or no network, exceptions of several packages
        raise Mistake(
            f"cannot ask Hugging Face for --push={repository}: {_reason(error)}\nif the token "
            "is wrong, `hf auth login` or HF_TOKEN gives another; without --push, the folder's "
            "README.md says how to upload it later"
        ) from None
    if token.get("role") == "read":
        raise Mistake(
            f"--push={repository}: this token may only read; `hf auth login` again, with one that "
            "may write"
        )
    if files:
        raise Mistake(
            f"--push={repository} has {counted(len(files), 'file')} already, as {files[0]}, and "
            "nothing is overwritten: give another name; or export without --push, and upload over "
            f"them with `hf upload {repository} FOLDER`"
        )


def push(folder: Path, repository: str) -> str:
    """Upload every file of a folder, into a private repository if it is new; return what it is.

    Raises Mistake, and then the folder is as it was.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        # Nobody has chosen a licence yet, and what was public cannot be called back.
        url = hub.create_repo(repository, private=True, exist_ok=True)
        info = hub.model_info(repository, timeout=HUB_SECONDS)
        if files := _files(info):
            raise Mistake(f"somebody has put {files[0]} there in the meantime")
        hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload from scalegpt"
        )
    except Exception as error:  # of the network, of the Hub and of hf_xet
        raise Mistake(
            f"cannot upload to {repository}: {_reason(error)}\n{folder} is whole; this uploads "
            f"it later:\n  hf upload {repository} {shlex.quote(str(folder))} --private"
        ) from None
    return f"{url}, {'private: its settings make it public' if info.private else 'public'}"


def _files(info: Any) -> list[str]:
    """Return the names of a repository's files but the one that each begins with."""
    return [x.rfilename for x in info.siblings or [] if x.rfilename != ".gitattributes"]


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "\n  ".join(lines or [type(error).__name__])
