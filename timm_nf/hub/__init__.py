"""Networks to and from the Hugging Face Hub: nothing is published unread, nothing is loaded unchecked."""

from .client import pull, push
from .errors import HubError
from .folder import Written, write_folder

__all__ = ["HubError", "Written", "pull", "push", "write_folder"]
