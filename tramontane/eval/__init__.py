"""What models do and where they come from, measured from outside."""
