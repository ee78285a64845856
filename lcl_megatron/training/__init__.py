"""Setup, step, loop, optimizer, reports."""
