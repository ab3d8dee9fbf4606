"""What goes wrong on the command line."""


class CommandError(Exception):
    """One line for the user, and exit status 2."""
