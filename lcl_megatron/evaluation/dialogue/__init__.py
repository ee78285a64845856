"""Multi-modal dialogue: two-stage tuning in the form of LLaVA-1.5, and benchmarks in their official file formats."""
