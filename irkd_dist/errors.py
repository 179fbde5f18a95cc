"""The one error that is the user's to mend: printed as a single line, exit code 2."""


class UserError(Exception):
    """Something in the input, the configuration or the machine is wrong.

    The message names the value, where it came from and what would be right.
    """
