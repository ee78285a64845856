"""Zero-shot classification: the task, and a training checkpoint as a model of images and texts."""
