"""k-NN and linear probe of any encoder, which is never trained, by the classifiers of ``evaluation/probes.py``."""
