"""What this process is doing, in words: the phase that it reported last."""

_phase = ""


def report(phase: str) -> None:
    """Report that a phase begins, such as ``loading the model``."""
    global _phase
    _phase = phase


def reported() -> str:
    """Return the last phase; empty before the first."""
    return _phase
