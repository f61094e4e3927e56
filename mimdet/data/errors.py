"""The error raised for anything wrong with the user's data."""


class DataError(ValueError):
    """A dataset, annotation file or image cannot be used; the message says which, why and what to do."""
