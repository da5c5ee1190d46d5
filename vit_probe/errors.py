"""The exceptions for what the user can put right, and the one warning for what had to be assumed."""

from __future__ import annotations

__all__ = ["AssumptionWarning", "InputError", "UnsupportedArchitecture"]


class InputError(ValueError):
    """Something given to `vit_probe` cannot be used.

    The message says what was wrong, what arrived, and what to do. The command line prints it as one
    sentence and ends with exit code 2; anything else that is raised is a defect of this package.
    """


class UnsupportedArchitecture(InputError):
    """Our own `VisionTransformer` does not cover a checkpoint's model, or is not told enough; the library that wrote it may."""


class AssumptionWarning(UserWarning):
    """The input leaves something open that the numbers depend on; the message says what was assumed."""
