"""Image captioning: test sets, the standard scores, and the task that trains and scores a model."""
