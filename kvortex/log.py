"""The logger "kvortex": events with a name and fields, for people as text and for collectors as attributes.

The library prints nothing. A record's message ends in ``key=value`` pairs, and the same pairs are attributes of the
record (``record.event``, ``record.device``, ...), which formatters for JSON turn into fields of their own. Nothing is
logged without the GIL, so what a background thread met is told by the next call that notices.
"""

import logging

logger = logging.getLogger("kvortex")
logger.addHandler(logging.NullHandler())  # without it, Python prints warnings of applications that set up no logging

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
        Numbers and texts; no name that `logging.LogRecord` uses itself.
    """
    if logger.isEnabledFor(level):
        pairs = " ".join(f"{key}={value}" for key, value in fields.items())
        logger.log(level, "%s [%s]", message, pairs, extra={"event": event, **fields}, stacklevel=2)


def warn_once(event, message, **fields):
    """Log a warning, the first time in this process that `event` comes with these fields."""
    occurrence = event, tuple(fields.items())
    if occurrence not in _told:
        _told.add(occurrence)
        log(logging.WARNING, event, message, **fields)
