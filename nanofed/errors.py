"""Errors that are for people: each says what was wrong, where, and what to do, and knows its exit code."""


class NanofedError(Exception):
    """Something failed that a person can act on; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(NanofedError):
    """A wrong option, key, value or combination of them."""

    exit_code = 2


class DataError(NanofedError):
    """Data, a tokenizer or the network is not available, or a file is damaged."""

    exit_code = 3
