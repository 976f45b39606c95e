"""Contract suites: what every adapter of a port does. An adapter's test is its factory."""
