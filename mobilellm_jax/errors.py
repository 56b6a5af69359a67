"""The one exception for mistakes that a user can fix."""


class UserError(ValueError):
    """Bad input from a person: a file, a flag or a config value.

    The message names the file or the key, the value that was found and what to do about it. The
    command line prints it without a traceback and exits with status 2; programmers' mistakes are
    assertions instead.
    """
