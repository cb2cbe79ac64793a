"""What Firestore is told at deployment: rules, indexes, exemptions and expiry."""
