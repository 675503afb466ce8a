"""Errors that users of the library meet, as a tree.

IBPError
├── ModelError (TypeError)        a model that can't be trained by these methods as it is
├── InputError (ValueError)       x, labels, tangents, extra inputs or parameters of a wrong shape, value or device
├── InputTypeError (TypeError)    … of a wrong dtype or type
├── MethodError (ValueError)      a hyper-parameter out of range, a method used where it has no meaning
└── AutocastError (RuntimeError)  a loss or a model under torch.autocast
"""

from __future__ import annotations


class IBPError(Exception):
    """Base of all errors raised by ``ibp_triton`` itself."""


class ModelError(IBPError, TypeError):
    """A model that can't be trained by these methods as it is."""


class InputError(IBPError, ValueError):
    """A tensor of a wrong shape, value or device."""


class InputTypeError(IBPError, TypeError):
    """A tensor of a wrong dtype, or something else in its place."""


class MethodError(IBPError, ValueError):
    """A hyper-parameter out of range, or a method used where it has no meaning."""


class AutocastError(IBPError, RuntimeError):
    """A loss or a model under torch.autocast."""
