"""How a command ends other than well: each is printed as a single line."""

EXIT_USER, EXIT_STOPPED = 2, 75  # 75: EX_TEMPFAIL, try again later


class UserError(Exception):
    """Something in the input, the configuration or the machine is wrong; exit code 2.

    The message names the value, where it came from and what would be right.
    """


class Stopped(Exception):
    """A signal asked the run to stop, and its checkpoint is written; exit code 75. The same command goes on."""
