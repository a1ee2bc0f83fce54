"""The bytes of a sample store: shards and index, JPEGs of which a window decodes alone."""
