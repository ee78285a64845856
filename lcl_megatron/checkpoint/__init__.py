"""Native sharded checkpoints, and converters to other formats."""
