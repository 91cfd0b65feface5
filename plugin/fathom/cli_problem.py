"""The error of a command line that cannot be carried out."""


class ArgumentProblem(ValueError):
    """An argument that cannot be used; exit code 2."""
