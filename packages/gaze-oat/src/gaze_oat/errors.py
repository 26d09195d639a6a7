"""The one family of errors that is the user's to mend: data, files or settings that cannot be used."""


class ScanpathProblem(ValueError):
    """Says in one sentence what was given, what is allowed, and what to do."""
