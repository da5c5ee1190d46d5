"""Checks of the options of measures, by the types that their authors gave them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np

from vit_probe.errors import InputError

__all__ = ["check_options", "checking_options", "keywords_only", "option_types"]

P = ParamSpec("P")
T = TypeVar("T")

_CALLED = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", NoneType: "None"}


def option_types(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of the keyword-only arguments of a function, as far as they can be told.

    Examples:
        >>> def local_mass(dx, dy, *, radius: float = 1.5): ...
        >>> option_types(local_mass)
        {'radius': <class 'float'>}
    """
    hints: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = parameter.annotation
        if isinstance(hint, str):
            try:
                hint = eval(hint, getattr(function, "__globals__", {}))
            except Exception:  # a user's annotation may be a name that only type checkers import, or no expression at all
                continue
        if parameter.kind is parameter.KEYWORD_ONLY and hint is not parameter.empty:
            hints[name] = hint
    return hints


def check_options(types: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise InputError unless each option has its type. A truth value is no number, and whole numbers are numbers.

    Types other than numbers, truth values, strings, None, literals, tuples and unions of these are not checked.

    Examples:
        >>> check_options({"radius": float}, {"radius": "2"})
        Traceback (most recent call last):
        vit_probe.errors.InputError: radius must be a number; got '2'
    """
    for name, value in options.items():
        if name in types and not _fits(value, types[name]):
            raise InputError(f"{name} must be {_words(types[name])}; got {value!r:.80}")


def checking_options(function: Callable[P, T], types: Mapping[str, Any]) -> Callable[P, T]:
    """The function, with its keyword arguments checked before each call."""

    @wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> T:
        check_options(types, options)
        return function(*args, **options)

    return checked


def keywords_only(decorator: Callable[P, T]) -> Callable[P, T]:
    """A decorator with arguments that says so where it is given the function itself."""

    @wraps(decorator)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if args:
            name = decorator.__name__
            required = [
                f"{one.name}=..." for one in inspect.signature(decorator).parameters.values() if one.default is one.empty
            ]
            raise InputError(
                f"{name} takes keywords, not the function itself, got {args[0]!r:.80}; write "
                f"@{name}({', '.join(required)}) above the function"
            )
        return decorator(*args, **kwargs)

    return checked


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return any(isinstance(value, type(one)) and value == one for one in args)
    if origin is tuple and Ellipsis not in args:
        return isinstance(value, tuple | list) and len(value) == len(args) and all(map(_fits, value, args))
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint is str:
        return isinstance(value, str)
    return hint not in (None, NoneType) or value is None


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"({', '.join(map(_words, args))})"
    return _CALLED.get(NoneType if hint is None else hint, str(hint))
