"""The root of every error that a user can cause and mend."""


class JigsawError(Exception):
    """What was wrong, where, and how to mend it.

    Each module derives its own from this and from the builtin that fits (``ValueError``,
    ``OSError``, ``RuntimeError``), so that callers can catch either. Commands show one as a single
    line instead of a traceback.
    """
