"""What is said: events, stored documents, transcript rules, limits, errors and ports. No I/O, no clock."""
