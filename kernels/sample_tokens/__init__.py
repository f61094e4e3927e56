"""Choice of the tokens that the encoder sees."""
