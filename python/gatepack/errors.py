"""Stage 1, errors: what others raised, for a sentence of ours."""


def first_line(error: Exception) -> str:
    """Its message up to the first line break; the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
