"""Every error a user can meet, one class per situation.

A message says what is wrong, where, and what to do about it. At the command line each becomes one line and exit
code 2 (`command_line.run`); in Python they are ordinary exceptions below `TeachOnceError`.
"""


class TeachOnceError(Exception):
    """Base of every typed error of this project."""


class ConfigError(TeachOnceError, ValueError):
    """A flag, a config key or an argument that cannot be: unknown, out of range, contradictory."""


class CorpusError(TeachOnceError, ValueError):
    """The corpus is missing, empty, not UTF-8, or lacks the fields of every known document kind."""


class TokenizerError(TeachOnceError, ValueError):
    """A tokenizer that cannot say which bytes its tokens stand for, or whose spans do not fit the text."""


class ChatTemplateError(TeachOnceError, ValueError):
    """A chat document without a chat template, or a template that alters the contents of messages."""


class EngineError(TeachOnceError, RuntimeError):
    """A scoring engine is missing, refused its arguments, or returned rows that cannot be right."""


class DeviceMemoryError(TeachOnceError, MemoryError):
    """A model, or what it was given at a time, needs more memory than its device has; what was finished is kept."""


class DriftError(TeachOnceError, ValueError):
    """An engine's rows differ from an independent forward pass by more than rounding."""


class NotACacheError(TeachOnceError, FileNotFoundError):
    """There is no cache at this place."""


class IncompleteCacheError(TeachOnceError):
    """The folder holds a cache whose build has not finished."""


class OutputFolderError(TeachOnceError, FileExistsError):
    """The output folder holds something else, and nothing in it was touched."""


class CacheInUseError(TeachOnceError):
    """Another process, of this machine or another, is writing the cache."""


class CacheMismatchError(TeachOnceError, ValueError):
    """A cache, plan or checkpoint was made with another teacher, tokenizer, corpus or setting than the config names."""


class InvalidDocumentError(TeachOnceError, ValueError):
    """A document handed to the cache writer breaks the format's rules; nothing of its shard was written."""


class CorruptCacheError(TeachOnceError, ValueError):
    """Stored bytes are not what was written. Base of the four ways in which that happens."""


class MissingObjectError(CorruptCacheError):
    """An object that the manifest names is not there."""


class SizeMismatchError(CorruptCacheError):
    """An object has another size than the manifest says (truncated, or not the same object)."""


class ChecksumMismatchError(CorruptCacheError):
    """An object has the right size and the wrong crc32c (flipped bits, or swapped with another)."""


class MalformedObjectError(CorruptCacheError):
    """An object's bytes verify, but they do not describe a valid cache (bad offsets, unsorted rows, wrong types)."""


class SpecVersionError(TeachOnceError, ValueError):
    """The cache follows a newer (or unknown) version of the specification."""


class StorageFullError(TeachOnceError, OSError):
    """The disk is full; what was complete is kept, and the same command resumes."""


class StoreUnavailableError(TeachOnceError, ConnectionError):
    """An object store did not answer, or kept failing through all retries; nothing half read was returned."""


class StoreAccessError(TeachOnceError, PermissionError):
    """An object store refused: no such bucket, no or wrong credentials, a right that is missing."""


class StoreUnsupportedError(TeachOnceError):
    """A place that cannot do what was asked of it: written to but read only, or without conditional creation."""


class AlignmentError(TeachOnceError, ValueError):
    """Student and cache have nothing in common to compare."""


class CheckpointError(TeachOnceError, ValueError):
    """A training checkpoint that is incomplete, or that belongs to another cache."""


class NonFiniteLossError(TeachOnceError, FloatingPointError):
    """A loss became NaN or infinite, in training or on held-out text."""


class EvaluationError(TeachOnceError, ValueError):
    """A task, prediction or report that cannot be evaluated or compared: malformed, or of something else."""
