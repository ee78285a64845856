"""The paper's model, written for one device on megatron-core layers."""
