"""Other people's weights into our modules, one file a family; each is strict about missing and unexpected tensors."""
