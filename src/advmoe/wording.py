"""Times and counts as text."""


def duration(seconds: float) -> str:
    """'40 s', '7 min', '3.5 h', '2.1 d'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def number_of(number: int, thing: str) -> str:
    """'1 run', '2 runs'."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
