"""What the schemas promise their readers."""
