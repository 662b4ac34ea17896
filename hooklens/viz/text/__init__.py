"""Running text as a view."""
