"""The exceptions for what the user can put right or go on from, and the one warning for what had to be assumed."""

from __future__ import annotations

__all__ = ["AssumptionWarning", "InputError", "ProcessGone", "SharedInputError", "TokensNotSeen", "UnsupportedArchitecture"]


class InputError(ValueError):
    """Something given to `vit_probe` cannot be used.

    The message says what was wrong, what arrived, and what to do. The command line prints it as one
    sentence and ends with exit code 2; anything else that is raised is a defect of this package.
    """


class UnsupportedArchitecture(InputError):
    """Our own `VisionTransformer` does not cover a checkpoint's model, or is not told enough; the library that wrote it may."""


class TokensNotSeen(InputError):
    """The blocks of a model cannot be told apart, or do not pass its tokens on; its attention may be seen all the same."""


class SharedInputError(InputError):
    """An InputError with which all processes of a run end, whichever of them met it; the first says so for all."""


class ProcessGone(RuntimeError):
    """Another process of the same run has ended before its time."""


class AssumptionWarning(UserWarning):
    """The input leaves something open that the numbers depend on; the message says what was assumed."""
