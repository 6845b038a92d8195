"""The one exception that means "the user's input is wrong".

Every room raises it for bad files, bad settings and impossible requests. The CLI turns it into one line on stderr and
exit code 2; anything else is a defect of ours and shows its traceback.
"""

__all__ = ["UserError"]


class UserError(Exception):
    """Bad input. The message names the culprit and the remedy, in one line."""
