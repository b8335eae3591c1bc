"""`lit-dpo push`: an exported folder to the Hugging Face hub."""

from __future__ import annotations

import re
import stat
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.text import Text

from lit_dpo.files import read_json
from lit_dpo.plain_text import plain
from lit_dpo.tools import page

_KNOWN = (  # what an export writes; nothing else leaves this machine
    *("README.md", "LICENSE", "config.json", "generation_config.json", "adapter_config.json"),
    *("model*.safetensors", "adapter_model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
)
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def push_folder(
    output_dir: str, repository: str, private: bool = True, dry_run: bool = False, overwrite: bool = False
) -> None:
    """Upload an exported folder to the Hugging Face hub.

    Args:
        output_dir: A folder that `lit-dpo export` wrote. Only files that an export writes are uploaded.
        repository: Where to, as `organization/name`.
        private: Make a new repository private.
        dry_run: Only list what would be uploaded, without any network.
        overwrite: Replace files of a repository that exists already, without asking.

    Raises:
        ValueError: The folder holds no whole model, or the name is none.
        FileExistsError: The repository exists already.
        OSError: The hub cannot be reached, or refuses.
    """
    if not _NAME.fullmatch(repository):
        raise ValueError(f"`repository` must be of the form `organization/name`, got {repository!r}.")
    folder = Path(output_dir)
    names, left_out = _files(folder)
    console = page.terminal()
    kind = "private" if private else "public"
    console.print(Text(f"{'Would upload' if dry_run else 'Uploading'} to {repository} ({kind} if it is new):"))
    for name in names:
        console.print(Text(f"  {name} ({(folder / name).stat().st_size:,} bytes)"))
    if left_out:
        console.print(Text(plain(f"Left out, as no export writes them: {', '.join(left_out)}")))
    if not dry_run:
        console.print(Text(f"Uploaded: {_upload(folder, names, repository, private, overwrite)}"))


def _files(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files to upload, and of what else is in the folder; a folder without a whole model is refused."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder `{folder}`: give one that `lit-dpo export` wrote.")
    names: list[str] = []
    left_out: list[str] = []
    for path in sorted(folder.iterdir()):
        regular = stat.S_ISREG(path.lstat().st_mode)  # no link, which may lead anywhere
        known = regular and any(fnmatch(path.name, pattern) for pattern in _KNOWN)
        (names if known else left_out).append(path.name)
    lacking = _lacking(folder, set(names))
    if lacking:
        raise ValueError(
            f"`{folder}` holds no whole model, it lacks {', '.join(lacking)}: give a folder that "
            "`lit-dpo export` wrote."
        )
    return names, left_out


def _lacking(folder: Path, names: set[str]) -> list[str]:
    """What a folder needs and has not: weights with their configuration, tokenizer, and card."""
    needed = {"README.md", "tokenizer_config.json"}
    if "adapter_config.json" in names:
        needed |= {"adapter_model.safetensors"}
    elif "model.safetensors.index.json" in names:
        shards: Any = read_json(folder / "model.safetensors.index.json").get("weight_map")
        needed |= {"config.json", *(map(str, shards.values()) if isinstance(shards, dict) else ["the list of shards"])}
    else:
        needed |= {"config.json", "model.safetensors"}
    return sorted(needed - names)


def _upload(folder: Path, names: list[str], repository: str, private: bool, overwrite: bool) -> str:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    api = huggingface_hub.HfApi()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        exists = api.repo_exists(repository)
        if exists and not overwrite:
            _ask(repository)
        if not exists:
            api.create_repo(repository, private=private)
        found = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=names, commit_message="Upload a policy of lit_dpo"
        )
    except (FileExistsError, KeyboardInterrupt):
        raise
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise OSError(
            f"The hub does not take `{repository}` ({reason}): log in with `hf auth login`, use a name that you may "
            "write to, and see that the network is there."
        ) from error
    return str(getattr(found, "repo_url", None) or f"https://huggingface.co/{repository}")


def _ask(repository: str) -> None:
    """Have a person allow to replace files; without one that is refused."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        answer = input(f"`{repository}` exists already. Replace its files of the same names? [y/N] ")
        if answer.strip().lower() in ("y", "yes"):
            return
    raise FileExistsError(
        f"The repository `{repository}` exists already and is left as it is: name another, or add `--overwrite` to "
        "replace its files of the same names."
    )
