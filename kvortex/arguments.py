"""Arguments as callers give them: what counts as a whole number, and how messages show a value or a text."""

import operator

SHOWN_CHARACTERS, SHOWN_BITS = 100, 256
LONGEST_MS = 1 << 40


def whole_number(value, name):
    """Return the int that `value` is; raise a TypeError that names it for a float, a text, a bool."""
    if type(value) is int:
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be a whole number, got {shown(value)}")


def require_ms(name, value):
    """Return a time in milliseconds as an int, or refuse it."""
    try:
        number = whole_number(value, name)
    except TypeError:
        number = -1
    if not 0 <= number <= LONGEST_MS:
        raise ValueError(f"{name} must be a whole number of milliseconds from 0 to 2^40, got {shown(value)}")
    return number


def shown(value):
    """A value for a message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > SHOWN_BITS:  # Python refuses to write out more than 4300 digits
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def printable(text):
    """A text in one line that a terminal prints as it is: control characters and what is no Unicode are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
