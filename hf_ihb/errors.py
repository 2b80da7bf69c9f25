"""Errors a user can meet, each with the exit code that a script ends with."""


class HfIhbError(Exception):
    """Base of every error that is the user's to mend; printed as one line, without a traceback."""

    exit_code = 1


class RecipeError(HfIhbError):
    """A recipe or a command line that cannot be run as it stands."""

    exit_code = 2


class DataError(HfIhbError):
    """A data set that is missing, empty, or holds a row that cannot be used."""

    exit_code = 3


class ModelLoadError(HfIhbError):
    """A student or teacher that cannot be found, read or trusted."""

    exit_code = 3


class TeacherMismatchError(HfIhbError):
    """A teacher that does not fit the student, the labels or the method."""

    exit_code = 3


class NumericsError(HfIhbError):
    """A loss or a weight that is not a finite number."""

    exit_code = 3


class CheckpointError(HfIhbError):
    """A checkpoint that is missing, incomplete or does not match the model."""

    exit_code = 4


class CacheError(HfIhbError):
    """A cache that cannot be written, or does not hold what it was made of."""

    exit_code = 4


class ProcessLostError(HfIhbError):
    """Another process of a run that ended, and left this one alone; what was saved is kept."""

    exit_code = 4


class HubPushError(HfIhbError):
    """A push to the Hub that failed; what was to be pushed is still where it was."""

    exit_code = 5


class Preempted(HfIhbError):
    """A run that was told to end; it has saved what it goes on from."""

    exit_code = 143
