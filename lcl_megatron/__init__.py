"""Pre-training of vision encoders on interleaved image-text data (Latent Compression Learning)."""

import warnings

__version__ = "0.1.0"

# Said by megatron-core 0.16.1 on every import, step or save, on every rank, and nothing that a user could act on: apex
# and TransformerEngine are optional here; torch deprecates names that megatron-core uses; its optimizer reads ``.grad``
# of gradient-buffer views, which is None on purpose.
for _message in (
    r".*Apex (is|are) not installed.*",
    r"Transformer Engine and Apex are not installed.*",
    r"`torch\.distributed\.\w+` is deprecated.*",
    r"full scope is deprecated.*",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor.*",
    r"`load_state_dict` is deprecated and will be removed.*",
):
    warnings.filterwarnings("ignore", message=_message)
