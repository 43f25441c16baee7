"""What a call of `transformers`' generate asks for."""
