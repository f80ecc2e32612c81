"""Every error a user may see: a class, a stable code, and its docstring is the message.

The docstring is a format string over the keyword arguments of the constructor, so that what is
wrong, where, and what would be right is written once, beside the code.
"""

from __future__ import annotations


class DlmError(Exception):
    """{message}"""

    code = "DLM-000"
    exit_code = 1
    retryable = False

    def __init__(self, **details: object) -> None:
        self.details = details
        super().__init__(str(self))

    def __str__(self) -> str:
        return " ".join((type(self).__doc__ or "").split()).format(**self.details)

    def __reduce__(self) -> tuple[object, ...]:
        return _told_elsewhere, (type(self), self.details)


def _told_elsewhere(kind: type[DlmError], details: dict[str, object]) -> DlmError:
    """The error of another process."""
    error = kind.__new__(kind)
    DlmError.__init__(error, **details)
    return error


# --- input: exit code 2 -----------------------------------------------------------------------


class InputError(DlmError):
    """{message}"""

    code = "DLM-100"
    exit_code = 2


class InvalidValueError(InputError):
    """{what} {value!r} is not valid: {expected}"""

    code = "DLM-101"


class NotFoundError(InputError):
    """no {noun} {key!r} in the catalogue{hint}"""

    code = "DLM-102"

    def __init__(self, noun: str, key: object, hint: str = "") -> None:
        super().__init__(noun=noun, key=str(key), hint=f"; {hint}" if hint else "")


class AlreadyExistsError(InputError):
    """{noun} {key!r} already exists in the catalogue"""

    code = "DLM-103"


class DigestConflictError(InputError):
    """{uri} is registered with digest {registered} but the payload has {found}; register it as
    a new version (--new-version) or restore the old bytes"""

    code = "DLM-104"


class IllegalTransitionError(InputError):
    """{noun} {key} cannot go from {old} to {new}"""

    code = "DLM-105"


class EmptySelectorError(InputError):
    """an empty selector is refused: {expected}"""

    code = "DLM-106"


class PathMeetingError(InputError):
    """these path rules are refused: on storage {storage} the copies of {uri} at {path!r} and of
    {other_uri} at {other_path!r} would meet; nothing was changed"""

    code = "DLM-107"


class TooLongError(InputError):
    """a name is longer than the catalogue can keep: {message}"""

    code = "DLM-108"


# --- the catalogue and the services: exit code 3 ----------------------------------------------


class CatalogueError(DlmError):
    """the catalogue database refused: {message}"""

    code = "DLM-200"
    exit_code = 3


class CatalogueUnavailableError(CatalogueError):
    """the catalogue database cannot be reached ({reason}); {hint}"""

    code = "DLM-201"
    retryable = True


class SchemaMismatchError(CatalogueError):
    """the catalogue schema is at {found}, this software needs {expected}; {hint}"""

    code = "DLM-202"


class ServiceUnavailableError(DlmError):
    """{service} cannot be used ({reason}); {hint}"""

    code = "DLM-203"
    exit_code = 3
    retryable = True

    def __init__(self, service: str, reason: str, hint: str = "is it running? ('dlm up')") -> None:
        super().__init__(service=service, reason=reason, hint=hint)


class AlreadyRunningError(DlmError):
    """the services of {home} run already (process {pid}, {ui_url}); stop them there first"""

    code = "DLM-204"
    exit_code = 3


class MissingProgramError(DlmError):
    """no {programs} of PostgreSQL {version} or newer found; looked at: {looked}; install
    PostgreSQL's client programs or set DLM_PG_BINDIR to their folder"""

    code = "DLM-205"
    exit_code = 3


class BackupError(DlmError):
    """{what} failed: {reason}; nothing was changed"""

    code = "DLM-206"
    exit_code = 3


class ExportRunningError(DlmError):
    """the description of storage {storage} is being written by somebody else at this moment"""

    code = "DLM-207"
    exit_code = 3
    retryable = True


class ClockSkewError(CatalogueError):
    """this machine's clock is {seconds:.0f} s {way} that of the catalogue's server, at most
    {allowed:.0f} are borne (a quarter of DLM_LEASE_SECONDS); set both by NTP; nothing was done"""

    code = "DLM-208"


class DataRefusedError(CatalogueError):
    """the catalogue database refused what it was given: {message}"""

    code = "DLM-210"


#: what the catalogue refuses of things that are given to it together is one of them: which is not
#: told
OF_DATA = (TooLongError, DataRefusedError)


class LocalFileError(DlmError):
    """{path} cannot be used on this machine ({reason}): look at its folder, rights, free space"""

    code = "DLM-209"
    exit_code = 3


# --- storages: exit code 4 --------------------------------------------------------------------


class StorageError(DlmError):
    """storage {storage}: {message}"""

    code = "DLM-300"
    exit_code = 4


class StorageUnavailableError(StorageError):
    """storage {storage} cannot be reached: {message}"""

    code = "DLM-301"
    retryable = True


class StorageFullError(StorageError):
    """storage {storage} is full: {message}"""

    code = "DLM-302"
    retryable = True


class PayloadNotFoundError(StorageError):
    """storage {storage} has no payload at {path!r}"""

    code = "DLM-303"


class PayloadExistsError(StorageError):
    """storage {storage} already has something at {path!r}; nothing is overwritten"""

    code = "DLM-304"


class PathRefusedError(StorageError):
    """storage {storage} refuses the path {path!r}: {message}"""

    code = "DLM-305"


class AccessDeniedError(StorageError):
    """storage {storage} denies access to {path!r}: {message}"""

    code = "DLM-306"


class NonconformingError(StorageError):
    """storage {storage} does not keep the contract: {message}"""

    code = "DLM-307"


class NotOnlineError(StorageError):
    """storage {storage}: {path!r} has to be staged before it can be read; {message}"""

    code = "DLM-308"
    retryable = True

    def __init__(
        self, storage: str, path: str, message: str, poll_seconds: float | None = None
    ) -> None:
        super().__init__(storage=storage, path=path, message=message)
        #: it was asked for: look again in so many seconds; None: nobody has asked yet
        self.poll_seconds = poll_seconds


class StagingFailedError(StorageError):
    """storage {storage} did not stage {path!r}, which was waited for since {since}: {message};
    'dlm retry' asks again"""

    code = "DLM-309"


class PackingError(StorageError):
    """the bundles of storage {storage} are being made by somebody else at this moment"""

    code = "DLM-310"
    retryable = True


# --- bytes: exit code 5 -----------------------------------------------------------------------


class IntegrityError(DlmError):
    """{where}: digest or size differs, expected {expected}, found {found}"""

    code = "DLM-400"
    exit_code = 5


class SourceDamagedError(IntegrityError):
    """source {where} is damaged: expected {expected}, read {found}; nothing was written"""

    code = "DLM-401"


class DestinationDamagedError(IntegrityError):
    """copy at {where} reads back differently: expected {expected}, found {found}; the copy was
    removed"""

    code = "DLM-402"
    retryable = True


class ChangedWhileReadError(IntegrityError):
    """{where} changed while it was read; it is looked at again later"""

    code = "DLM-403"
    retryable = True

    def __init__(self, where: str) -> None:
        super().__init__(where=where, expected="", found="")


# --- safety: exit code 6 ----------------------------------------------------------------------


class SafetyError(DlmError):
    """{message}"""

    code = "DLM-500"
    exit_code = 6


class DeletionRefusedError(SafetyError):
    """the deletion of {key} is refused: {reason}"""

    code = "DLM-501"


class BlastRadiusError(SafetyError):
    """stopped by {limit}={value}: {found}; nothing of that was trashed, it waits as plan {plan};
    look at it with 'dlm plan show {plan}', go on with 'dlm plan approve {plan}'"""

    code = "DLM-502"


class TooManyErrorsError(SafetyError):
    """stopped by DLM_MAX_DELETE_ERROR_FRACTION={value}: {failed} of {tried} deletions failed, most
    with {cause}; find out why, then go on with 'dlm run expiry --wait', and 'dlm retry' for what is
    FAILED"""

    code = "DLM-506"


class RetentionLockError(SafetyError):
    """hold {hold} is a retention lock until {until}: nobody can shorten it, only lengthen it"""

    code = "DLM-505"


class RestoreRefusedError(SafetyError):
    """bringing the catalogue back into database {database!r} is refused: it {found}; {hint}"""

    code = "DLM-507"


# --- waiting: exit code 1 ----------------------------------------------------------------------


class StillUnderwayError(DlmError):
    """{uri} is not at rest after {seconds:g} s: {underway}; see 'dlm item why {uri}', and whether
    'dlm up' is running"""

    code = "DLM-601"
    retryable = True
