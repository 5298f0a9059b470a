"""From documents to batches: readers, token shards, the mixture of sources and objectives."""
