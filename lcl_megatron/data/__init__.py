"""Raw files to corpus to ``PackedBatch``. Knows ranks as integers; talks to no other rank."""
