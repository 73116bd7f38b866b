"""Turns errors of the Hub's client into one line that says what to do, without tokens and signed addresses.

Examples:
    >>> try:
    ...     with explained("user/net", revision=None, token=None):
    ...         raise PermissionError(13, "Permission denied", "cache")  # as the Hub's client does
    ... except HubError as error:
    ...     print(error)
    cache cannot be written: name a folder that can be written
"""

# huggingface_hub.errors re-exports HTTPError without saying so.
# pyright: reportPrivateImportUsage=false

import errno
import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import NoReturn

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    BadRequestError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ["LOGIN_HINT", "HubError", "explained"]

LOGIN_HINT = "log in with `hf auth login` or set HF_TOKEN"
"""How to log in, as a part of messages."""


class HubError(RuntimeError):
    """A push or a pull that the Hub, the network or the disk did not allow."""


@contextmanager
def explained(
    repo_id: str, revision: str | None, token: str | None, other_folder: str = "name a folder that can be written"
) -> Generator[None]:
    """Turn errors of the Hub's client into `HubError`. Other errors pass.

    Args:
        repo_id: The repository, as the caller wrote it.
        revision: Its revision, by default the main branch.
        token: The token that the caller gave.
        other_folder: What to do if a folder cannot be written.

    Raises:
        HubError: in place of the client's error, with what to do.
    """
    try:
        yield
    except HubError:
        raise
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise HubError(f"{error.filename or 'a folder'} cannot be written: {other_folder}") from error
        _raise_explained(error, repo_id, revision, token)
    except Exception as error:
        _raise_explained(error, repo_id, revision, token)


def _raise_explained(error: Exception, repo_id: str, revision: str | None, token: str | None) -> NoReturn:
    if message := _explain(error, repo_id, revision or "main", bool(token or get_token())):
        raise HubError(message) from error
    raise error


def _explain(error: BaseException, repo_id: str, revision: str, logged_in: bool) -> str | None:
    """The line for an error or for its cause, None if the error is not the client's."""
    url = f"{constants.ENDPOINT}/{repo_id}"
    match error:
        case LocalTokenNotFoundError():
            return f"not logged in: {LOGIN_HINT}"
        case HFValidationError():
            return f"expected a repository as user/name, got {repo_id!r}"
        case GatedRepoError():
            return f"{repo_id} is gated: ask for access on {url}, and {LOGIN_HINT} as who was granted it"
        case RepositoryNotFoundError():
            hidden = "this login has no access to it" if logged_in else f"it is private: {LOGIN_HINT}"
            return f"there is no repository {repo_id} at {constants.ENDPOINT}, or {hidden}"
        case RevisionNotFoundError():
            return f"{repo_id} has no revision {revision!r}: {url}/tree/main lists branches and tags"
        case RemoteEntryNotFoundError():
            name = str(error.response.url).rpartition("/")[2].partition("?")[0]
            return f"{repo_id} has no file {name} at {revision}: {url}/tree/{revision} lists its files"
        case HfHubHTTPError():
            return _explain_status(error, repo_id, logged_in)
        case FileMetadataError():
            return (
                f"{constants.ENDPOINT} answers without headers that the Hub sends, such as X-Repo-Commit: a proxy or "
                "mirror drops them. Have it pass them on, or set HF_ENDPOINT to one that does"
            )
        case LocalEntryNotFoundError(__cause__=FileMetadataError() | HfHubHTTPError() as cause):
            return _explain(cause, repo_id, revision, logged_in)
        case LocalEntryNotFoundError() | OfflineModeIsEnabled() if constants.is_offline_mode():
            return f"{repo_id} at {revision} is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset that"
        case LocalEntryNotFoundError() if not isinstance(error.__cause__, HTTPError):
            return f"{repo_id} at {revision} is not in the cache: pull it once with a network"
        case HTTPError() | LocalEntryNotFoundError():
            return (
                f"{constants.ENDPOINT} cannot be reached or broke off ({type(error.__cause__ or error).__name__}): try "
                "again; what was pulled before can be had without a network, with HF_HUB_OFFLINE=1"
            )
        case OSError(errno=errno.ENOSPC):
            return f"the disk is full{f' ({error.filename})' if error.filename else ''}: make room and try again"
        case ValueError() if str(error).startswith("Invalid metadata in README.md"):
            return f"the Hub refuses the card: {str(error).partition(chr(10))[2] or 'it gives no reason'}"
        case _:
            pass
    if error.__cause__ is None:
        return None
    return _explain(error.__cause__, repo_id, revision, logged_in)


def _explain_status(error: HfHubHTTPError, repo_id: str, logged_in: bool) -> str:
    status, said = error.response.status_code, _said(error)
    numbered = f"status {status}: {said}" if said else f"status {status}"
    said = said or numbered
    match status:
        case 401 if logged_in:
            return f"the Hub does not accept this login ({said}): {LOGIN_HINT} with a token that is valid"
        case 401:
            return f"not logged in: {LOGIN_HINT}"
        case 403:
            return f"this login may not do that with {repo_id} ({said}): {LOGIN_HINT} as its owner, with write access"
        case 409:
            return f"{repo_id} is taken ({said}): choose another name, or log in as its owner"
        case 412:
            return f"somebody else changed {repo_id} in the meantime; nothing of this push is in it: push again"
        case 429:
            return "the Hub limits how often it is asked, and the limit is reached: wait some minutes, or log in"
        case _ if status >= 500:
            return f"the Hub has a problem of its own (status {status}): try again later"
        case _:
            answer = "does not understand" if isinstance(error, BadRequestError) else "refuses"
            return f"the Hub {answer} what was sent about {repo_id} ({numbered})"


def _said(error: HfHubHTTPError) -> str:
    """The server's reason, in at most one line; '' if it gives none."""
    said = error.response.headers.get("X-Error-Message", "")
    if not said:
        try:
            said = str(error.response.json().get("error", ""))
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, HTTPError, RuntimeError):
            said = ""  # the body is no JSON object, or was never read
    return " ".join(said.split())[:200]
