"""The exceptions a user can meet. Each message says what came, what was expected and what to do."""


class ArmchairError(Exception):
    """Base of every error that armchair raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1


class RequestError(ArmchairError, ValueError):
    """The request was wrong: a bad flag, recipe field, prompt, image or shape. Exit code 2."""

    exit_code = 2


class DataError(RequestError):
    """Captioned images that cannot be read: no such path, an empty folder, too many broken samples."""


class BundleError(RequestError):
    """A bundle that is missing, cut short, altered, of another version or of other shapes."""


class WorkError(ArmchairError, RuntimeError):
    """The request was right and the work failed: a loss that is not finite, collapsed codes, a full disk."""
