"""Exceptions and warnings of the package."""

from __future__ import annotations

__all__ = ["AssumptionWarning", "InputError", "ProcessExited", "SharedInputError", "TokensNotFound", "UnsupportedArchitecture"]


class InputError(ValueError):
    """A model, image, file or option passed to `vit_probe` cannot be used.

    The message says what was wrong, what arrived, and what to do. The command line prints it as one
    sentence and exits with code 2; any other exception is a bug of this package.
    """


class UnsupportedArchitecture(InputError):
    """A checkpoint does not fit our own `VisionTransformer`, or does not describe its model fully.

    The library that wrote the checkpoint may still be able to load it.
    """


class TokensNotFound(InputError):
    """The tokens after each block of a model cannot be read: it has no distinct blocks, or they do not return its tokens.

    The model's attention may still be measurable.
    """


class SharedInputError(InputError):
    """An InputError that is raised in all processes of a run, whichever of them met it, and is reported by the main process."""


class ProcessExited(RuntimeError):
    """Another process of the same run exited before the run was complete."""


class AssumptionWarning(UserWarning):
    """The input leaves open something that the numbers depend on; the message says what was assumed."""
