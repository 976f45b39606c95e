"""Images on a worker: the port, the content store, registry and layout sources, and the extractor."""
