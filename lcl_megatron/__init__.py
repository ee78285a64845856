"""Pre-training of vision encoders on interleaved image-text data (Latent Compression Learning)."""

__version__ = "0.1.0"
