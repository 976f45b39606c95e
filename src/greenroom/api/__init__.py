"""The public API: gRPC service, server, client.

The wire format is in ``proto/``, the code generated from it in ``_gen/`` (``make proto``).
"""
