"""Encoded images to uint8 pixels, at crops that are hashes of their keys."""
