"""The one error that users cause. It stands alone so that a wrong command line is told before torch is loaded."""

from __future__ import annotations


class UserError(ValueError):
    """An error a user can cause and mend. Its message names the file, the value, why it matters and the mend."""


class NoRendezvous(UserError):
    """The processes of a run did not find one another: another start, on other hosts or at another port, may do."""


class Stuck(UserError):
    """A file system does not answer: another start, on other hosts or later, may do."""


class Preempted(Exception):
    """The run was told to stop (a signal), has saved, and goes on when the same command is given again."""


PREEMPTED, HUNG = 85, 86
"""Exit statuses that ask for the same command again: stopped by a signal and saved; stalled (also a file
system that a checkpoint goes to), or processes that did not find one another, told and ended."""
