"""What callers name: heads, tokens, columns, and the cache that belongs to a model."""
