"""Networks to and from the Hugging Face Hub. Every file is read back, and every hash is compared."""

from .client import pull, push
from .errors import HubError
from .folder import Written, write_folder

__all__ = ["HubError", "Written", "pull", "push", "write_folder"]
