"""Adapters of other libraries, in and out."""
