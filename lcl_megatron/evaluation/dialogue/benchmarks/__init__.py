"""One module per family of benchmarks: question files, answer files and scores as their authors define them."""
