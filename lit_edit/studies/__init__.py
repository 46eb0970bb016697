"""Questions of the field, one folder each."""
