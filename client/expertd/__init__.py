"""Client SDK of expertd."""
