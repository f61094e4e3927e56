"""Assembly of the decoder's input from encoded and filled rows."""
