"""Model calls on a key-value cache equal calls without one."""
