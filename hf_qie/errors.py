"""The errors that speak to the user."""


class InputError(ValueError):
    """Something the user wrote is wrong: says where, what was found, what was expected and what to do."""


class Misfit(Exception):
    """A value that breaks a rule, as (address, message); who read it knows the file, and makes it an InputError."""
