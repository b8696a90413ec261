"""What can go wrong with a memory bank, as exceptions a caller can tell apart."""

from __future__ import annotations


class BankError(ValueError):
    """A bank cannot do what was asked: its files, its entries or the request do not allow it."""


class BankCorruptedError(BankError):
    """A file of a saved bank is missing, cut, edited or swapped; the message names it."""


class BankLockedError(BankError):
    """Another process is writing this bank right now; the message names it."""


class StaleBankError(BankError):
    """The bank on disk has moved on since this object was loaded, so that committing would undo somebody's work."""


class FingerprintMismatch(BankError):  # noqa: N818 (the name callers know)
    """Keys, values or queries were made by different things; the message names each field that differs."""


class UnknownIdError(BankError, KeyError):
    """An id that the bank does not hold."""

    def __str__(self) -> str:  # KeyError would quote the sentence
        return str(self.args[0])
