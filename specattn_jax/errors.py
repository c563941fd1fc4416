"""The one exception for mistakes that a person can mend."""


class UserError(ValueError):
    """Bad input. The message is one sentence: what was wrong, what was expected, what to do.

    The CLI prints the message alone and exits with status 1; anything else is a bug and keeps its traceback.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device ran out of memory; of a device JAX says so in words alone."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
