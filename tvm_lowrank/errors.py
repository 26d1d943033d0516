"""The exceptions that a user of the tool is meant to see, one line each, no traceback; and one that none sees."""


class UserError(Exception):
    """Something the user can fix: bad input, a missing file, an unsupported operator.

    The message is one line: what is wrong (naming the thing) and, after a semicolon, the remedy.
    The command line prints it as ``error: …`` and exits with code 2.
    """


class MeasurementError(Exception):
    """A device or a compiler failed at what should have worked; the command line exits with code 1."""


class TimeUp(Exception):
    """The time limit of a search has passed, or would before the next step ends; it delivers what it has."""
