"""Name tables between this model and other frameworks' checkpoints."""
