"""Expectations of errors."""

import re

import pytest

from common.errors import UserError


def refused(*parts):
    """Expects a UserError whose message is one line that contains these parts in this order."""
    pattern = ".*".join(re.escape(str(part)) for part in parts)
    return pytest.raises(UserError, match=rf"\A{pattern}[^\n]*\Z")
