"""Every error that tramontane raises on purpose; messages name the thing, the value, the remedy.

TramontaneError
|-- ConfigError        a configuration is unknown, missing, out of range or contradicts itself
|-- CheckpointError    weights or a saved run cannot be read or written as they are
|-- TokenizerError     a tokenizer file is unusable, or text cannot be encoded
|-- DataError          a text source cannot be read (names file and line)
|-- TrainingError      training cannot go on (a loss that is not finite, a locked run folder)
|-- RequestError       a generation request is invalid (a parameter out of range, no prompt)
|   `-- ContextError   prompt and answer do not fit the context length
|-- StorageError       a file or folder cannot be written
|-- CapacityError      memory or disk does not suffice
|   `-- OverloadError  as many requests wait as may; later there will be room
`-- EngineError        a step of the engine failed (a defect of ours, not of the request)
    `-- UnavailableError   the engine has stopped, or takes no more requests
"""


class TramontaneError(Exception):
    """Base of all errors that are the user's to mend; the command line prints no traceback."""


class ConfigError(TramontaneError):
    """A configuration is unknown, missing, out of range or contradicts itself."""


class CheckpointError(TramontaneError):
    """Weights or a saved run cannot be read or written as they are."""


class TokenizerError(TramontaneError):
    """A tokenizer file is unusable, or text cannot be encoded."""


class DataError(TramontaneError):
    """A text source cannot be read; the message names the file and the line."""


class TrainingError(TramontaneError):
    """Training cannot go on: a value is not finite, or the run folder is in use."""


class DivergenceError(TrainingError):
    """A loss or a gradient is not finite; the step was not applied."""


class RequestError(TramontaneError):
    """A generation request is invalid."""


class ContextError(RequestError):
    """Prompt and answer do not fit the context length."""


class StorageError(TramontaneError):
    """A file or folder cannot be written."""


class CapacityError(TramontaneError):
    """Memory or disk does not suffice."""


class OverloadError(CapacityError):
    """As many requests wait as may; the same request may be sent again later."""


class EngineError(TramontaneError):
    """A step of the engine failed; the cause is in the log."""


class UnavailableError(EngineError):
    """The engine has stopped, or takes no more requests."""
