"""The errors of corpus jobs that are the user's to mend; every other exception is ours and keeps its traceback."""


class CorpusProblem(ValueError):
    """Wrong files or options. The message says what was given, what is allowed, what to do."""
