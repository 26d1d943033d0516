"""The one exception a user of the tool is meant to see."""


class UserError(Exception):
    """Something the user can fix: bad input, a missing file, an unsupported operator.

    The message is one line: what is wrong (naming the thing) and, after a semicolon, the remedy.
    The command line prints it as ``error: …`` and exits with code 2.
    """
