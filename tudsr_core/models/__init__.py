"""Networks that no installed library has."""
