"""What an object store's refusals mean, and in how few words they can be said."""

import re

from storage_specs.errors import StoreAccessError, StoreUnsupportedError, TeachOnceError

_STATUS = re.compile(r"status code: (\d{3})")
_XML = re.compile(r"<Message>(.*?)</Message>", re.DOTALL)
_PASSING = (408, 409, 412, 425, 429)  # of the 4xx, those that are no refusal, or not for good
_NO_BUCKET = ("NoSuchBucket", "bucket does not exist", "ContainerNotFound", "container does not exist")
# Where the machine would give credentials to whom it knows; asked only if the environment has none.
_ROLE_ADDRESSES = ("169.254.169.254", "169.254.170.2", "metadata.google.internal", "metadata/identity")


def said(error: BaseException) -> str:
    """An error of obstore in a few words: no debugging output, no address and timing, of an XML body the message."""
    text = str(error).partition("\n\nDebug source")[0]
    status, message = _STATUS.search(text), _XML.search(text)
    if message:
        text = f"{status[1]}: {message[1]}" if status else message[1]
    elif status:
        text = text[status.start(1) :].partition(": <")[0]
    else:
        text = text.rpartition(" - ")[2]
    return " ".join(text.split())[:300].rstrip(":")


def beyond_the_end(error: BaseException) -> bool:
    """Whether a range was asked for that starts behind the object's last byte."""
    return any(words in str(error) for words in ("status code: 416", "Wanted range starting at"))  # S3 and GCS; Azure


def refusal_of(error: BaseException, place: str) -> TeachOnceError | None:
    """Our error for what asking again would not change; None for a missing object and for what may pass."""
    from obstore.exceptions import NotSupportedError, PermissionDeniedError, UnauthenticatedError

    text = str(error)
    status = _STATUS.search(text)
    if isinstance(error, NotSupportedError | NotImplementedError):
        return StoreUnsupportedError(
            f"{place}: the store, as it is configured, cannot create an object only if there is none of that name "
            f"({said(error)}), so two builders could ruin each other's cache; use a store with conditional writes"
        )
    if any(address in text for address in _ROLE_ADDRESSES):
        return StoreAccessError(
            f"{place}: no credentials in the environment, and none from the machine's role ({said(error)}); set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (s3), GOOGLE_SERVICE_ACCOUNT (gs) or "
            "AZURE_STORAGE_ACCOUNT_KEY (az), or for public buckets AWS_SKIP_SIGNATURE=true and the like"
        )
    if any(sign in text for sign in _NO_BUCKET) or (
        status and status[1] == "404" and not isinstance(error, FileNotFoundError)
    ):
        return no_bucket(error, place)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or (status and status[1] in ("401", "403")):
        return StoreAccessError(
            f"{place}: access denied ({said(error)}); check the credentials in the environment, and that they may "
            "list the bucket and read (to build: also write and delete) objects"
        )
    if "redirect without LOCATION" in text or (
        status and 300 <= int(status[1]) < 500 and int(status[1]) not in (404, *_PASSING)
    ):
        return misconfigured(error, place)
    return None


def no_bucket(error: BaseException, place: str) -> StoreAccessError:
    """Our error for a bucket that is not there."""
    return StoreAccessError(f"{place}: there is no such bucket ({said(error)}); create it, or correct the URL")


def misconfigured(error: BaseException, place: str) -> StoreAccessError:
    """Our error for what lies in the settings."""
    return StoreAccessError(
        f"{place}: cannot be asked, or refused ({said(error)}); check the URL and the settings in the environment: the "
        "region (AWS_REGION), the account (AZURE_STORAGE_ACCOUNT_NAME), the endpoint (AWS_ENDPOINT_URL; for http:// "
        "also AWS_ALLOW_HTTP=true)"
    )
