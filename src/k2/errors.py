"""Errors that the command line turns into one clear line."""


class UserError(Exception):
    """Wrong use or bad input: the message says what, where and what is allowed. Exit code 2."""


class StageError(Exception):
    """A stage could not finish although it was asked for correctly. Exit code 1."""
