"""HTML pages that show a corpus, and the rows of a step."""
