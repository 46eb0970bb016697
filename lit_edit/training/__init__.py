"""Training of the networks that some editors come with: ``lit-edit fit --config train/NAME``."""
