"""The error raised for anything wrong with the user's data."""


class DataError(ValueError):
    """A dataset, annotation file or image cannot be used; the message names it, the reason and the remedy."""
