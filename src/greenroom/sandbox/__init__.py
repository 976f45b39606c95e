"""Sandbox backends: the port (`port`), finding them (`registry`) and the ones that come with Greenroom."""
