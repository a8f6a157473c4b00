"""Attention weights of a run as what a caller is told; shared by models that classify and models that write."""
