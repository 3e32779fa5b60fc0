"""The one exception that is meant for the user."""


class UserError(Exception):
    """Something that the user can put right, said in one line.

    `cli.run` prints the message without a traceback and exits with `status`: 2 where the command line is wrong, 1 for
    everything else (a broken file, a loss that is not finite, …).
    """

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def first_line(error):
    """The first sentence of an exception's message, for a message of one line."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200] or type(error).__name__
