"""The one base of all errors that a user can mend."""


class UserError(ValueError):
    """What the user gave cannot be used. The message names the file, the key or the sample, and the mend.

    The command line shows it without a traceback, once.
    """

    on_every_rank: bool = True
    """False for what only one rank of a run can see, so that this rank must say it."""
