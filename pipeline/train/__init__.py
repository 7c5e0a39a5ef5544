"""Cache to student."""
