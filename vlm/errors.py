"""The one error that users cause. It stands alone so that a wrong command line is told before torch is loaded."""

from __future__ import annotations


class UserError(ValueError):
    """An error a user can cause and mend. Its message names the file, the value, why it matters and the mend."""
