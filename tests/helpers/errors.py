"""Checks of error messages."""

import re

import pytest

from common.errors import UserError


def refused(*parts):
    """Expects a UserError of one line that starts with the first part and contains the others."""
    pattern = ".*".join(re.escape(str(part)) for part in parts)
    return pytest.raises(UserError, match=rf"\A{pattern}[^\n]*\Z")
