"""What goes wrong between this machine and the Hub, in one place."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)

from hf_qie.errors import InputError

LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token with access to it"


@contextmanager
def hub_errors(where: str, *, remedy: str = "check the name, the revision and the connection") -> Iterator[None]:
    """Raise InputError, which begins with `where`, for what the Hub or the way to it answers.

    `where` names the address and the repository, as "model: org/name is not a folder here". `remedy` ends the message,
    unless access is denied.
    """
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{where}; invalid Hub id: {error}") from error
    except LocalEntryNotFoundError as error:
        raise InputError(f"{where}; it is not in the local cache, and the Hub cannot be reached") from error
    except EntryNotFoundError as error:
        raise InputError(f"{where}; the Hub has the repository, but not this file ({error})") from error
    except (HTTPError, ConnectionError, RuntimeError) as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error  # of an upload
        denied = isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403, 404)
        text = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", str(cause))  # addresses of uploads are signed in their query
        raise InputError(f"{where}; the Hub answers: {text}\n{LOGIN if denied else remedy}") from error
