"""The exception whose message is meant for the user, and short messages of other exceptions."""


class UserError(Exception):
    """An error that the user can correct. Its message has one line.

    `command_line.run` prints the message without a traceback and exits with `status`: 2 for a wrong
    command line, 1 for everything else (a damaged file, a loss that is not finite, ...).
    """

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def first_line(error):
    """The first sentence of an exception's message, for a message of one line."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200] or type(error).__name__
