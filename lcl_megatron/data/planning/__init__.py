"""Which documents, in which row, in which step: pure functions of corpus, configuration and seed."""
