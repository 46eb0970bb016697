"""A testbed for rational belief revision (arXiv 2406.19354): a world, its text, a model of it, and an ideal reader."""
