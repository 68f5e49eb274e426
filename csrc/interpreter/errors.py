"""What the interpreter raises."""


class PtxError(Exception):
    """A program that the PTX manual does not allow, or an instruction that the interpreter does not know."""
