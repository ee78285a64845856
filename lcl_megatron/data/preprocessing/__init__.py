"""Raw shards to a corpus, in many processes."""
