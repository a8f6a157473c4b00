"""Other people's weights -> the weight file of a bundle, in numpy: reading checkpoints, packing, fetching, binding."""
