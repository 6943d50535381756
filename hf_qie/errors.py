"""The error for a mistake of the user."""


class InputError(ValueError):
    """Something the user wrote is wrong: says where, what was found, what was expected and what to do.

    One of a value of a recipe has its address as an argument of its own, before the message.
    """

    def __str__(self) -> str:
        return ": ".join(self.args)
