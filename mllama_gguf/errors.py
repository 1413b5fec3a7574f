"""Every exception that the package raises on purpose. The message is one line, fit to be shown to a user."""

_CONTROL = frozenset((*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029))


class MllamaError(Exception):
    """Base of all errors of this package; catch it to catch them all."""

    def __str__(self) -> str:
        """The message. Control characters, which names of files, variables and keys may have, are escapes:
        they would break the line, or a terminal would obey them."""
        text = super().__str__()
        if text.isprintable():
            return text
        return "".join(ascii(c)[1:-1] if ord(c) in _CONTROL else c for c in text)


class ImageError(MllamaError, ValueError):
    """An image that cannot be used: missing, corrupt, of an unsupported kind, empty or absurdly large."""


class ModelError(MllamaError, ValueError):
    """A model file that cannot be used: not a GGUF, truncated, incomplete, inconsistent or unsupported."""


class DownloadError(MllamaError, RuntimeError):
    """A model that could not be fetched: unknown, gated, out of reach, no room for it, or not what it should
    be."""


class BackendError(MllamaError, RuntimeError):
    """The native library or a device failed: library missing or mismatched, out of memory, device lost."""


class OutOfMemoryError(BackendError):
    """A device, or this machine, has too little memory."""


class ContextFullError(MllamaError, ValueError):
    """The prompt, or the prompt and the reply, need more positions or image slots than the context has."""


class Aborted(MllamaError):
    """The caller stopped the computation (abort callback, Ctrl-C). The object stays usable."""


class TimeLimitError(MllamaError, TimeoutError):
    """A caption took longer than the caller allows."""


class RequestError(MllamaError, ValueError):
    """A request that cannot be carried out as asked: messages, options, a grammar, or images for a text
    model."""


class BusyError(MllamaError, RuntimeError):
    """One conversation used by two threads at the same time, or by one of its own callbacks; open one for
    each thread."""


class CopyError(MllamaError, TypeError):
    """An object that holds memory, threads or devices of its process was to be copied or pickled."""
