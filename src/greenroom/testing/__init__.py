"""Shipped for tests, Greenroom's own and those of out-of-tree adapters: contract suites, sample programs, fakes."""
