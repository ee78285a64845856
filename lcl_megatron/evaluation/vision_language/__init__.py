"""A vision encoder, an MLP connector and a causal language model that reads images among its tokens."""
