"""Networks in several processes, against the same network in one."""
