"""The one exception for what a user can fix: shown as a single line with exit code 2, a traceback only with `--debug`."""


class UserError(ValueError):
    """A wrong input from outside: recipe, command line, data file, checkpoint folder.  The message says what, where, and what was wanted."""
