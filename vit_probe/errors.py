"""The one exception for what the user can put right, and the one warning for what had to be assumed."""

from __future__ import annotations

__all__ = ["AssumptionWarning", "InputError"]


class InputError(ValueError):
    """Something given to `vit_probe` cannot be used.

    The message says what was wrong, what arrived, and what to do. The command line prints it as one
    sentence and ends with exit code 2; anything else that is raised is a defect of this package.
    """


class AssumptionWarning(UserWarning):
    """The input leaves something open that the numbers depend on; the message says what was assumed."""
