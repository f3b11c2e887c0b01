"""The one exception whose message is written for the person at the keyboard."""


class T3Error(ValueError):
    """Input that cannot be used. The message names the value, the nearest legal one and the way out.

    Command lines print the message alone (no traceback) and exit with status 2.
    """
