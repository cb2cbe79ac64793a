"""What the functions promise their callers."""
