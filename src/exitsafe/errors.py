"""Every error that exitsafe raises on purpose. Each message is one line and names the way out.

ExitsafeError             exit status 2 on the command line
├── InputError            a file, sample or setting is wrong
│   └── ExitLayerError    the exit layer does not exist in this encoder
├── ModelError            a model cannot be loaded or is not supported
└── RunError              a run directory cannot be used as asked
"""


class ExitsafeError(Exception):
    """Base of all errors that a user can mend."""


class InputError(ExitsafeError, ValueError):
    """A file, sample or setting is wrong."""


class ExitLayerError(InputError):
    """The exit layer does not exist in this encoder."""


class ModelError(ExitsafeError):
    """A model cannot be loaded or is not supported."""


class RunError(ExitsafeError):
    """A run directory cannot be used as asked."""
