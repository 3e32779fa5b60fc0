"""Text for the user."""


def printable(text):
    """Text with "?" for line breaks and control characters, which a terminal would execute."""
    return "".join(c if c.isprintable() else "?" for c in text)
