"""Which teacher to pay for: small students of several teachers, and which of their differences are certain."""
