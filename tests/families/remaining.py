"""What is not right yet, by architecture and column, with the reason; and what is not built."""

REMAINING: dict[str, dict[str, str]] = {}
SKIPPED: dict[str, str] = {}
