"""Errors that users meet, as a tree. The second base is what a plain `except` of Python's own errors catches.

IBPError
├── ModelError (TypeError)        a model that can't be trained by these methods as it is
├── InputError (ValueError)       x, labels, tangents, extra inputs or parameters of a wrong shape, value or device
├── InputTypeError (TypeError)    … of a wrong dtype or type
├── MethodError (ValueError)      a hyper-parameter out of range, a method used where it has no meaning
├── AutocastError (RuntimeError)  a loss or a model under torch.autocast
└── ExperimentError               of `ibp-triton`
    ├── ConfigError (ValueError)      a YAML file, an override or an argument that can't be used
    │   └── YamlError                 … whose text is no YAML of an experiment
    ├── DataError (ValueError)        files of a data set that are missing, damaged or something else
    ├── NetworkError (ValueError)     network.import names no model that can be trained
    ├── DamageError (ValueError)      a stored file of a run that can't be used
    ├── LaunchError (RuntimeError)    runs that can't begin or go on
    ├── PrunedError (RuntimeError)    a trial that its search has stopped half-way
    ├── OvertakenError (RuntimeError) a run in an object store that another process has taken over
    ├── BoardError (RuntimeError)     a board asked for whose package is not installed
    └── BenchError (ValueError)       a benchmark file that can't be compared
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


class ExperimentError(IBPError):
    """Base of what the command ``ibp-triton`` tells without a traceback."""


class ConfigError(ExperimentError, ValueError):
    """A configuration that cannot be used; the message names the file, the key and the cure."""


class YamlError(ConfigError):
    """Text that is no YAML of an experiment; the message names the line and the cure."""


class DataError(ExperimentError, ValueError):
    """Missing, damaged or unfit data; the message names the file, what was expected and what to do."""


class NetworkError(ExperimentError, ValueError):
    """A network that cannot be built; the message names the choice at fault and what would work."""


class DamageError(ExperimentError, ValueError):
    """A stored file that cannot be used; the message names it and the cure."""


class LaunchError(ExperimentError, RuntimeError):
    """Training stopped for all runs: unfit data or model, or workers that died. What is finished is stored."""


class PrunedError(ExperimentError, RuntimeError):
    """A trial that its search has stopped half-way; the search goes on."""


class OvertakenError(ExperimentError, RuntimeError):
    """An object that another process has written since this one saw it: a run in a bucket is in other hands now."""


class BoardError(ExperimentError, RuntimeError):
    """A board was asked for whose package is not installed."""


class BenchError(ExperimentError, ValueError):
    """A benchmark file that cannot be read; the message names the file and the cure."""
