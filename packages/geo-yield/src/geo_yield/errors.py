"""The one family of errors that are the user's to mend; every other exception is ours and keeps its traceback."""


class InputProblem(ValueError):
    """Wrong files or options. The message says what was given, what is allowed, what to do."""
