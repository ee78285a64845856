"""Image encoders of any library behind one interface: encoded image in, patch features out."""
