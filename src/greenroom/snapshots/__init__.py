"""Snapshot stores: the port and its adapters."""
