"""What the store can fail at: few kinds, each with one answer to the client."""

from __future__ import annotations


class StoreFault(Exception):
    """The root of all that is below."""


class StorageFull(StoreFault):
    """No room on the disk: nothing was written."""


class StorageUnavailable(StoreFault):
    """Locked, read-only or out of reach: nothing was written; later it may go."""


class WrongVersion(StorageUnavailable):
    """A newer gateway has changed the database into what this one does not know."""


class QuotaExceeded(StoreFault):
    """The tenant holds as much as it may."""


class NotThere(StoreFault):
    """There is no such thing, or it is another tenant's: the two cannot be told apart."""


class InUse(StoreFault):
    """A batch that is open needs it."""


class WrongStatus(StoreFault):
    """What was asked for does not go with what has become of the batch."""


class Fenced(StoreFault):
    """Somebody else holds it by now: what was done is not recorded, and is to be dropped."""


class LeaseLost(Fenced):
    """This gateway was silent for too long: others run its rows. Drop them all, join again."""
