"""Publishes networks on the Hub and downloads them, with every file read back or checked.

Weights are safetensors, never pickles. timm loads the files by `hf-hub:` and `local-dir:`.

Examples:
    Logged in to the Hub as `user`:

    >>> model = timm.create_model("nfnet_f0", depths=(1,), channels=(16,), group_size=8, num_classes=3)
    >>> written = push(model, "alice/net", card={"license": "apache-2.0"})
    >>> pull("alice/net", sha256=written.sha256).num_classes
    3

    The steps of `push`, for files that were written before:

    >>> from pathlib import Path
    >>> token = require_hub("alice/net2", token=None)
    >>> written = timm_nf.hub.write_folder(model, "net", card={"license": "apache-2.0"})
    >>> upload(Path("net"), written, "alice/net2", token=token).commit is None
    False
"""

# huggingface_hub types only a part of what it exports.
# pyright: reportUnknownVariableType=false

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, constants, get_token, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import nn

from .._labels import own_labels
from .._repository import Repository, repository
from .._temporary import replacing, temporary_folder
from .._text import reason
from ..checkpoint import assign, load_tensors, skeleton
from ..version import __version__
from .card import require_license
from .errors import LOGIN_HINT, HubError, explained
from .folder import (
    CONFIG,
    README,
    WEIGHTS,
    Written,
    first_not_finite,
    git_blob_id,
    sha256_of,
    write_folder,
)

__all__ = ["pull", "push", "require_hub", "upload"]

# Holds the hashes of cached files that no link names, as on systems without symbolic links.
_HASHES = "timm_nf-hashes.json"
_OTHER_CACHE = "give another cache_dir (or set HF_HOME), or local_files_only (HF_HUB_OFFLINE=1) for what it has already"
_PULL_REQUEST = re.compile(r"refs/pr/(\d+)")

_logger = logging.getLogger(__name__)


def push(
    model: nn.Module,
    repo_id: str,
    *,
    card: ModelCardData | Mapping[str, Any] | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite_card: bool = False,
    architecture: str | None = None,
    dry_run: bool = False,
    recipe: Mapping[str, Any] | None = None,
) -> Written:
    """Write a network, read it back, compare it, and publish it on the Hub in one commit.

    The repository does not change before that commit. If somebody else commits in between, this commit is refused.

    Args:
        model: Any model that timm's factory made. It is not changed.
        repo_id: `user/name`, also as `hf-hub:user/name` or as its address. It is made if it is missing.
        card: Fields of the card's metadata. The license is required, so there is no push without a card. The
            repository that `pull` recorded becomes the base model.
        revision: A branch, which is made if it is missing; or `refs/pr/N` for an existing pull request.
        private: Make the repository private. An existing one has to be private already.
        create_pr: Propose the commit as a pull request to the main branch.
        commit_message: The commit's message. By default it says what was done.
        token: The token, by default the login's.
        dtype: Dtype to round floating weights to. By default they stay as they are.
        overwrite_card: Replace an existing README.md.
        architecture: The name in timm's registry under which others load the files. With `dm_nfnet_f0`, stock timm can
            load an NFNet.
        dry_run: Do everything but upload.
        recipe: Settings of the training, for the card.

    Raises:
        ValueError: if the card has no license, before anything is written; if the model cannot be saved, or arguments
            exclude each other.
        HubError: if the Hub, the network or the disk does not allow it. The message says what to do.
    """
    require_license(card)
    repo_id, revision = _named(repo_id, revision)
    if create_pr and revision:
        raise ValueError("a pull request is to the main branch; give create_pr or revision, not both")
    with explained(repo_id, revision, token):
        _require_name(repo_id)
    if not dry_run:
        require_hub(repo_id, token)
    with explained(repo_id, revision, token), temporary_folder() as temporary:
        folder = temporary / "repo"
        written = write_folder(
            model, folder, card=card, dtype=dtype, architecture=architecture, repo_id=repo_id, recipe=recipe
        )
        if dry_run:
            return written
        return upload(
            folder, written, repo_id, revision=revision, private=private, create_pr=create_pr,
            commit_message=commit_message, token=token, overwrite_card=overwrite_card,
        )  # fmt: skip


def upload(
    folder: Path,
    written: Written,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    overwrite_card: bool = False,
) -> Written:
    """Publish in one commit what `write_folder` has written to `folder`. The arguments are those of `push`.

    Raises:
        HubError: if the Hub or the network does not allow it. The message says what to do.
    """
    repo_id, revision = _named(repo_id, revision)
    token = require_hub(repo_id, token)
    pull_request = _PULL_REQUEST.fullmatch(revision or "")
    with explained(repo_id, revision, token):
        api = _api(token)
        if not pull_request:  # a pull request belongs to a repository that exists
            repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        info = api.model_info(repo_id)
        _require_case(repo_id, info.id)
        if private and not info.private:
            raise HubError(f"{repo_id} is there already and public: make it private on the Hub, or push elsewhere")
        if revision:
            if not pull_request:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            info = api.model_info(repo_id, revision=revision)
        names = list(written.files)
        if not overwrite_card and any(file.rfilename == README for file in info.siblings or ()):
            names = [name for name in names if name != README]
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, folder / name) for name in names],
            commit_message=commit_message or "Weights, config and card, read back and compared",
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
    files = {name: written.files[name] for name in names}
    url = commit.pr_url or commit.commit_url
    if pull_request:
        url = f"{constants.ENDPOINT}/{repo_id}/discussions/{pull_request[1]}"
    return replace(written, files=files, url=url, commit=commit.oid)


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """A network from the Hub in evaluation mode, with its files compared with the Hub's hashes.

    `model.pretrained_cfg["hf_hub_id"]` is then `user/name@commit`. The weights keep the dtype of the file. A pull needs
    memory for the file once, and some 50 MB for the client.

    Args:
        repo_id: `user/name` or `user/name@revision`, also with `hf-hub:` before it or as its address.
        revision: A branch, a tag or a commit, by default the main branch.
        sha256: The sha256 that model.safetensors must have, whatever the Hub says.
        token: The token, by default the login's.
        cache_dir: The cache, by default the Hub client's.
        local_files_only: Use only the cache. Its files are compared with the hashes that name them there, or that an
            earlier pull recorded.

    Raises:
        ValueError: if the arguments, the hash, the weights or the labels are not what was expected.
        HubError: if the Hub or the network does not allow it, or a file is damaged. The message says what to do.
    """
    name, revision = _named(repo_id, revision)
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"expected a sha256 of 64 hexadecimal digits, got {sha256!r}")
    token = _clean(token)
    offline = local_files_only or constants.is_offline_mode()
    with explained(name, revision, token, _OTHER_CACHE):
        _require_name(name)
        listing = _Listing(None, {}) if offline else _listing(name, revision, token)
        download = partial(_download, name, hashes=listing.hashes, offline=offline, token=token, cache_dir=cache_dir)
        # The config by branch or tag: this is how the cache learns the commit. The weights by that commit.
        folder = download(CONFIG, revision).parent
        commit = folder.name
        if listing.commit not in (None, commit):
            raise HubError(f"{name} changed from {listing.commit} to {commit} while it was pulled: pull again")
        weights = download(WEIGHTS, commit)
        if sha256 is not None:
            _require_sha256(weights, sha256.lower(), f"{name}@{commit}")
    model: Any = _load(folder, f"{name}@{commit}")
    for key in ("file", "url", "state_dict", "hf_hub_filename"):  # a config may name other sources
        model.pretrained_cfg.pop(key, None)
    model.pretrained_cfg.update(hf_hub_id=f"{name}@{commit}", source="hf-hub")
    return model.eval()


# -- the Hub -----------------------------------------------------------------------------------------------------------


class _Listing(NamedTuple):
    """A repository at a revision: the commit (None offline), and the hash of each file."""

    commit: str | None
    hashes: dict[str, str]


def _listing(repo_id: str, revision: str | None, token: str | None) -> _Listing:
    """Ask the Hub for the commit and the files of a repository."""
    _clean(get_token())  # refuses a bad login before it is sent
    info = _api(token).model_info(repo_id, revision=revision, files_metadata=True)
    _require_case(repo_id, info.id)
    hashes = {file.rfilename: _hash_of(file) for file in info.siblings or ()}
    _refuse_missing(repo_id, hashes)
    return _Listing(info.sha, hashes)


def _hash_of(file: RepoSibling) -> str:
    """The sha256 of a file in LFS or Xet, otherwise the id of its git blob."""
    known = file.lfs.sha256 if file.lfs else file.blob_id
    return known or ""


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="timm_nf", library_version=__version__)


def _require_sha256(file: Path, expected: str, origin: str) -> None:
    got = sha256_of(file)
    if got != expected:
        raise ValueError(f"{origin}: expected {WEIGHTS} with sha256 {expected}, got {got}")


def _clean(token: str | None) -> str | None:
    """A token without white space around it. No header can carry others, and an HTTP library's error would quote it."""
    token = token.strip() if token else None
    if token and not re.fullmatch(r"[!-~]+", token):
        raise ValueError("expected a token of printable characters without spaces; copy it from the Hub again")
    return token


def _require_name(repo_id: str) -> None:
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise HFValidationError("it has no user")


def _named(repo_id: str, revision: str | None) -> Repository:
    """The repository, and the revision that was given in its name or as an argument."""
    name, pinned = repository(repo_id)
    if pinned and revision:
        raise ValueError(f"expected one revision, got {pinned!r} in {repo_id!r} and {revision!r}")
    return Repository(name, pinned or revision)


def _require_case(repo_id: str, found: str | None) -> None:
    """Refuse a name in another case than the Hub's: the cache would hold the repository twice."""
    if found and found != repo_id and found.lower() == repo_id.lower():
        raise HubError(f"the Hub has no {repo_id}, but {found}: write it so")


def require_hub(repo_id: str, token: str | None) -> str | None:
    """Refuse a push that cannot succeed, before anything is written. Return the token without white space.

    Raises:
        HubError: if `repo_id` is no name of a repository, there is no login, or HF_HUB_OFFLINE is set.
    """
    with explained(repo_id, None, token):
        _require_name(repository(repo_id).name)
    if constants.is_offline_mode():
        raise HubError("push needs a network, and HF_HUB_OFFLINE forbids it: unset that")
    token = _clean(token)
    if not (token or _clean(get_token())):
        raise HubError(f"not logged in: {LOGIN_HINT}")
    return token


def _refuse_missing(repo_id: str, files: Mapping[str, str]) -> None:
    for name in (CONFIG, WEIGHTS):
        if name not in files:
            pickles = [f for f in files if f.endswith((".bin", ".pth", ".pt", ".ckpt"))]
            hint = f"; it has {', '.join(pickles)}, but pickles are not read" if pickles and name == WEIGHTS else ""
            raise HubError(f"{repo_id} has no file {name}{hint}: it is no network that timm_nf or timm has saved")


def _download(
    repo_id: str,
    name: str,
    revision: str | None,
    *,
    hashes: Mapping[str, str],
    offline: bool,
    token: str | None,
    cache_dir: str | Path | None,
) -> Path:
    """A file in the cache, compared with the Hub's hash, or offline with the hash that names it in the cache.

    A damaged file is removed, since timm does not look at hashes and would load it. Online it is fetched again once.
    """
    attempts = 1 if offline else 2
    path = Path()
    for attempt in range(attempts):
        path = Path(
            hf_hub_download(
                repo_id, name, revision=revision, force_download=attempt > 0, local_files_only=offline,
                library_name="timm_nf", token=token, cache_dir=cache_dir,
            )
        )  # fmt: skip
        expected = hashes.get(name) or _known_hash(path)
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", expected):
            raise HubError(f"{path} cannot be checked: no hash of it is known here; pull it once with a network")
        found = git_blob_id(path) if len(expected) == 40 else sha256_of(path)
        if found == expected:
            if not offline and not path.is_symlink():
                _record_hash(path, expected)
            return path
        _logger.warning("%s is damaged, its hash is not %s", path, expected)
        _remove(path)
    raise HubError(f"{path} is damaged and was removed, its hash is not what the Hub says: pull again with a network")


def _known_hash(path: Path) -> str:
    """The hash of a file in a snapshot: the name that its link points to, or what an earlier pull recorded, or ''."""
    if path.is_symlink():
        # Only the first link counts: a file from Xet is a link itself, and named by another hash.
        return path.readlink().name
    return _recorded(path).get(_in_snapshot(path), "")


def _in_snapshot(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _recorded(path: Path) -> dict[str, str]:
    """Hashes by `commit/file` that earlier pulls recorded beside the snapshots."""
    try:
        found: object = json.loads((path.parents[2] / _HASHES).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(key): str(value) for key, value in cast(dict[object, object], found).items()}


def _record_hash(path: Path, hash: str) -> None:
    """Record the Hub's hash of a file that no link names, for offline pulls."""
    known = _recorded(path)
    if known.get(_in_snapshot(path)) == hash:
        return
    file = path.parents[2] / _HASHES
    try:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(known | {_in_snapshot(path): hash}), encoding="utf-8")
    except OSError as error:  # the pull has succeeded; only offline pulls need the record
        _logger.warning("%s could not be written (%s): offline pulls will not work", file, reason(error))


def _remove(path: Path) -> None:
    """Remove a file of a snapshot, and the file that it links to if that is in the repository's cache."""
    target, cache = path.resolve(), path.parents[2].resolve()
    path.unlink()  # also a link that points out of the cache, which the client would keep
    if target.is_relative_to(cache):
        target.unlink(missing_ok=True)


def _load(folder: Path, origin: str) -> nn.Module:
    """The network that a folder's config describes, with the folder's weights."""
    try:
        model: Any = skeleton(f"local-dir:{folder}")
        # If `pretrained_cfg` names an architecture too, timm prefers it.
        model.pretrained_cfg["architecture"] = json.loads((folder / CONFIG).read_text("utf-8"))["architecture"]
    except Exception as error:  # a config.json can make timm raise anything
        raise ValueError(
            f"{CONFIG} of {origin} describes no network that timm can build here ({reason(error)})"
        ) from error
    try:
        tensors = load_tensors(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} of {origin} is no safetensors file: {error}") from error
    assign(model, tensors, origin)
    if name := first_not_finite(tensors):
        raise ValueError(f"{name} of {origin} is NaN or infinite: such a network is of no use")
    own_labels(model, f"{CONFIG} of {origin}")
    return model
