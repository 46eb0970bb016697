"""lit-edit."""
