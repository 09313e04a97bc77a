"""What comes in and what goes out, per interface: pydantic models in, typed dictionaries out."""
