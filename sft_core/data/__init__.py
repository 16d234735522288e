"""Rows, conversations and chat templates, and packing of sequences into micro-batches."""
