"""What a pickle could do."""

import os


class Hostile:
    """Unpickling it calls a function; by default it makes a directory."""

    def __init__(self, path, function=os.mkdir, *more):
        self.call = function, (str(path), *more)

    def __reduce__(self):
        return self.call
