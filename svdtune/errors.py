"""The one base class of the errors a user can cause, so that the command line can print them
without a traceback, and the one class of svdtune's warnings, so that they can be told from those of
the libraries.
"""


class SvdtuneError(ValueError):
    """Something the user gave cannot be used. The message says what was given, what was expected
    and what to do.

    Attributes:
        everywhere: whether every process of a distributed run raises it, so that one of them is
            enough to tell of it.
    """

    everywhere = False


class SvdtuneWarning(UserWarning):
    """Something the user gave can be used, but not as they may think. The message says what to
    do."""
