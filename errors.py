"""The exceptions of enat. The commands show their message as one line; messages say what was found, what was expected, what to do."""

import errno


def reason(error: OSError) -> str:
    """Why the system refused, in a few words."""
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def first_line(said: Exception | str) -> str:
    """Of what others report; of an exception that says nothing, what it is called."""
    lines = str(said).strip().splitlines() or [type(said).__name__ if isinstance(said, Exception) else ""]
    return lines[0]


class EnatError(Exception):
    """Anything that enat itself reports. `exit_code` is what a command ends with: 1 for work that failed, 2 for input that is wrong."""

    exit_code = 1


class InputError(EnatError, ValueError):
    """An argument is out of its range or unknown."""

    exit_code = 2


class CheckpointError(EnatError):
    """A checkpoint is missing, damaged, unsafe to load, or not of the expected model."""

    exit_code = 2


class EngineError(EnatError):
    """An engine directory is incomplete, altered, of a newer format, or does not hold what was asked of it."""

    exit_code = 2


class BackendError(EnatError):
    """A backend is not installed or cannot run here."""


class ExportError(EnatError):
    """An exported graph does not compute what the model computes, or could not be written."""


class Stopped(EnatError):
    """A callback stopped the run."""
