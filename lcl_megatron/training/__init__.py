"""Setup, step, loop, optimizer, logging and monitors."""
