"""The journal: rows that survive the process that logs them."""
