"""Text for the user."""


def printable(text):
    """Text without line breaks and control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)
