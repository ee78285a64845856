"""Image-text retrieval with a fresh text encoder: the task, its score, and the text encoder."""
