"""What changes an update, or a target, on its way to the weights; composes with editors."""
