"""The exceptions that users are meant to see."""


class TersorError(Exception):
    """Something the user can put right: the message names what was found and the way out.

    The command line prints it as one line and exits with status 2.
    """


class OptionError(TersorError, ValueError):
    """An option of a model has a value that no such model can have."""


class FinishedError(TersorError):
    """The very job was finished before: there is nothing to do. The command line says so and exits with status 0."""


class BrokenWeightError(TersorError):
    """A weight of the model holds NaN or Inf: no way around it, whatever else could be done without."""


class NotFiniteError(TersorError):
    """NaN or Inf in a weight or in what a part of the model computes."""
