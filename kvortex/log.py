"""The logger "kvortex": events with a name and fields, for people as text and for collectors as attributes.

The library prints nothing. A record's message ends in ``key=value`` pairs, and the same pairs are attributes of the
record (``record.event``, ``record.device``, ...), which formatters for JSON turn into fields of their own. An attribute
that the application's records have already (its LogRecord factory may set a ``device``) stays the application's; the
message has the pair in any case. Nothing is logged without the GIL, so what a background thread met is told by the next
call that notices.

Logging runs code of the application: factories, filters, handlers. What goes wrong there never ends a call of KVortex;
it is told as logging tells of a broken handler, on stderr unless `logging.raiseExceptions` is False.
"""

import contextlib
import logging

logger = logging.getLogger("kvortex")
_silent = logging.NullHandler()
logger.addHandler(_silent)  # without it, Python prints warnings of applications that set up no logging

_told = set()


def log(level, event, message, **fields):
    """Log one event.

    Parameters
    ----------
    level : int
        As in `logging`.
    event : str
        A name to search and count by; it never changes, unlike the message.
    message : str
        A sentence for people.
    **fields
        Numbers and texts.
    """
    record = None
    try:
        if not logger.isEnabledFor(level):
            return
        pairs = " ".join(f"{key}={value}" for key, value in fields.items())
        path, line, function, _ = logger.findCaller(stacklevel=2)
        made = logger.name, level, path, line, "%s [%s]", (message, pairs), None, function
        try:
            record = logger.makeRecord(*made)
        except Exception:  # the application's factory
            record = logging.LogRecord(*made)
            _tell_broken(record)
        for key, value in {"event": event, **fields}.items():
            if not hasattr(record, key) and key not in ("message", "asctime"):  # which formatters set
                setattr(record, key, value)
        logger.handle(record)
    except Exception:
        _tell_broken(record)


def _tell_broken(record):
    """Tell of the exception that is being handled."""
    with contextlib.suppress(Exception):  # stderr may be broken, too
        _silent.handleError(record)


def warn_once(event, message, **fields):
    """Log a warning, the first time in this process that `event` comes with these fields."""
    occurrence = event, tuple(fields.items())
    if occurrence not in _told:
        _told.add(occurrence)
        log(logging.WARNING, event, message, **fields)


class Guarded(logging.LoggerAdapter):
    """A logger of the application that cannot break a call either, for the integrations."""

    def log(self, level, message, *args, stacklevel=1):
        try:
            self.logger.log(level, message, *args, stacklevel=stacklevel + 1)
        except Exception:
            _tell_broken(None)
